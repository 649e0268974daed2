"""Channel scores over a training: measured at its snapshots, stored in data/probes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from .architecture import load_weights, pack, position_ids, trained_weights
from .data import held_out_batch
from .text import encode_text

if TYPE_CHECKING:
    import xarray as xr
    from diffusers import FluxPipeline


PROBE_SIGMAS = (0.8, 0.5, 0.2)


@torch.no_grad()
def probe(pipeline: FluxPipeline, snapshots: Path, samples: int = 16) -> xr.Dataset:
    """Compute channel scores of a fixed batch at every snapshot of a training: the emergence of massive activations.

    Args:
        pipeline: a pipeline of the snapshots' architecture; its weights are restored afterwards.
        snapshots: folder of ``<step>.safetensors``.
        samples: scenes in the batch, never trained on, the same for every training; cond branch.

    Returns:
        ``score`` (train_step, sigma, layer, channel), averaged over the samples, and ``block`` by layer.
    """
    import xarray as xr

    from ..families import family_of
    from ..hooks import Tap, blocks_of
    from ..records import ChannelStats
    from ..window import Run

    device = str(pipeline.transformer.device)
    clean, captions, _, noise = held_out_batch(pipeline.vae, device, samples)
    text_ids, image_ids = position_ids(device)
    family = family_of(pipeline)
    blocks = tuple(blocks_of(pipeline.transformer, family))
    before, scores = {k: v.clone() for k, v in trained_weights(pipeline).items()}, {}
    for path in sorted(snapshots.glob("*.safetensors")):
        load_weights(pipeline, load_file(path, device=device))
        states, pooled = encode_text(pipeline, captions)
        listener = ChannelStats(keep=("step", "layer"), top=0).start(Run(samples, len(PROBE_SIGMAS), blocks))
        with Tap(pipeline, family, samples, [listener]) as tap:
            for step, sigma in enumerate(PROBE_SIGMAS):
                tap.begin(step)
                pipeline.transformer(
                    hidden_states=pack(torch.lerp(clean, noise, sigma)),
                    encoder_hidden_states=states,
                    pooled_projections=pooled,
                    timestep=torch.full((samples,), sigma, device=device),
                    img_ids=image_ids,
                    txt_ids=text_ids,
                )
        listener.flush()
        scores[int(path.stem)] = listener.dataset().score.rename(step="sigma").assign_coords(sigma=list(PROBE_SIGMAS))
    load_weights(pipeline, before)
    score = xr.concat(list(scores.values()), dim="train_step", coords="minimal", compat="override").assign_coords(
        train_step=list(scores)
    )
    return xr.Dataset({"score": score.assign_coords(block=("layer", [b.name for b in blocks]))})


def join_probes(earlier: xr.Dataset, later: xr.Dataset, total: int) -> xr.Dataset:
    """Join two probes of one training, with the points nearest to ``probe_steps(total)``.

    Args:
        earlier: probe of the first part.
        later: probe of the second part.
        total: number of training steps.
    """
    import xarray as xr

    both = xr.concat([earlier, later], dim="train_step", coords="minimal", compat="override").drop_duplicates("train_step")
    nearest = both.sortby("train_step").sel(train_step=probe_steps(total), method="nearest")
    return nearest.drop_duplicates("train_step")


def save_probe(data: xr.Dataset, path: Path) -> None:
    """Write a probe as one small safetensors file: fp16 scores, the axes as JSON in its header.

    Args:
        data: from ``probe``.
        path: of the file; its folder is created.
    """
    axes = {name: data[name].values.tolist() for name in ("train_step", "sigma", "layer", "block")}
    score = torch.from_numpy(data.score.transpose("train_step", "sigma", "layer", "channel").values).half().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"score": score}, path, metadata={"axes": json.dumps(axes)})


def load_probe(path: str | Path) -> xr.Dataset:
    """Read what ``save_probe`` wrote."""
    import xarray as xr
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        axes, score = json.loads(file.metadata()["axes"]), file.get_tensor("score").float().numpy()
    dims = ("train_step", "sigma", "layer", "channel")
    coords = {d: axes[d] for d in dims[:3]} | {"block": ("layer", axes["block"])}
    return xr.Dataset({"score": (dims, score)}, coords=coords)


def probe_steps(total: int, points: int = 40) -> list[int]:
    """Return about ``points`` steps from 0 to ``total``, dense at the start, where massive activations emerge."""
    return sorted({round(total * (i / (points - 1)) ** 2) for i in range(points)})
