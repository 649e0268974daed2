"""Trains mini-flux from a seed: first its VAE, then its transformer with both text encoders.

``python -m malib.train --preset mini --out runs/mini`` can be stopped at any time and goes on where it was. The result is a
standard ``FluxPipeline`` directory. Rectified flow: ``x = (1 - sigma) * x0 + sigma * noise``, target ``noise - x0``.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import scenes

if TYPE_CHECKING:
    import xarray as xr
    from diffusers import AutoencoderKL, FluxPipeline
    from transformers import PreTrainedTokenizerFast

TEXT_LENGTH = 32
CHECKPOINT_EVERY = 250
LOSS_BAND = 0.1
"""One seed with one and with two threads differs by 4.6 %: the order of sums is enough."""
_TRAINED = ("transformer", "text_encoder", "text_encoder_2")
_FREE = ("steps", "shift", "decay_share", "focus")
_HELD_OUT_SEED = 2_000_000_000
PROBE_SIGMAS = (0.8, 0.5, 0.2)


@dataclass(frozen=True)
class Preset:
    """Everything that fixes a training but its seed; ``heads`` * 64 is the width of the transformer.

    ``shift`` moves the training's noise levels up, sigma -> shift sigma / (1 + (shift - 1) sigma) (Stable Diffusion 3, eq.
    23): captions decide about a scene above sigma .7, where a plain logit-normal law puts a fifth of its draws.
    ``focus`` draws that share of the scenes from those of one large subject, where its shape weighs most in the loss.
    ``card_captions`` is how many pictures of each kind the card judges: few where the training is too short to draw well.
    """

    name: str
    heads: int
    double_blocks: int
    single_blocks: int
    steps: int
    batch: int
    learning_rate: float = 1e-3
    warmup: int = 100
    decay_share: float = 0.3
    ema: float = 0.998
    shift: float = 3.0
    focus: float = 0.0
    empty_captions: float = 0.1
    scenes: int = 40_000
    vae_channels: tuple[int, int] = (32, 64)
    vae_steps: int = 1000
    vae_batch: int = 16
    card_captions: int = 256


PRESETS = {
    p.name: p
    for p in (
        Preset("tiny", 2, 1, 4, steps=1000, batch=32, scenes=8000, vae_channels=(16, 32), vae_steps=300, card_captions=32),
        Preset("small", 4, 1, 4, steps=1000, batch=32, scenes=8000, vae_channels=(16, 32), vae_steps=300, card_captions=32),
        Preset("medium", 6, 1, 4, steps=1000, batch=32, scenes=8000, vae_channels=(16, 32), vae_steps=300, card_captions=32),
        Preset("mini", 6, 1, 4, steps=15750, batch=32, decay_share=0.222, shift=5.0, focus=0.5, vae_steps=1200),
        Preset("base", 8, 2, 6, steps=40_000, batch=128, learning_rate=7e-4, ema=0.9995, scenes=200_000),
    )
}


def build_pipeline(preset: Preset, seed: int = 0) -> FluxPipeline:
    """A ``FluxPipeline`` of the preset's size with fresh weights; adaLN-zero, else the libraries' own initialisation."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = word_tokenizer(bos=True), word_tokenizer(bos=False)
    vocabulary, special = len(tokenizer), {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=preset.double_blocks,
        num_single_layers=preset.single_blocks,
        attention_head_dim=64,
        num_attention_heads=preset.heads,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )
    for name, module in transformer.named_modules():
        modulates = name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear"))
        if modulates or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            **special,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
            **special,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=preset.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=scenes.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return FluxPipeline(scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer)


def train(preset: Preset, seed: int, out: Path, device: str = "cpu", compiled: bool = True) -> Path:
    """Train a preset, or go on with it, and export the pipeline.

    Args:
        preset: one of ``PRESETS``, perhaps with some fields replaced.
        seed: fixes initialisation, scenes, captions and noise.
        out: working folder for latents, checkpoints, snapshots and logs (hundreds of MB: keep it outside the repository).
        device: "cpu" or "cuda"; both compute in bf16 autocast with fp32 weights.
        compiled: use ``torch.compile`` on the transformer.

    Returns:
        ``out / "pipeline"``, the exported ``FluxPipeline`` directory.
    """
    out.mkdir(parents=True, exist_ok=True)
    plans = _plans(preset, seed, out)
    (out / "preset.json").write_text(json.dumps({**asdict(preset), "seed": seed, "plans": plans}, indent=1))
    pipeline = build_pipeline(preset, seed).to(device)
    _train_vae(pipeline.vae, preset, seed, out, device)
    latents = _latents(pipeline.vae, preset, seed, out, device)
    _train_flow(pipeline, latents, preset, seed, out, device, compiled)
    pipeline.transformer.to(torch.bfloat16)  # halves the download; the text encoders stay fp32 so that plain loading works
    pipeline.vae.half()
    pipeline.save_pretrained(out / "pipeline")
    pipeline.transformer.float()
    pipeline.vae.float()
    found, earlier = probe(pipeline, out / "snapshots"), out / "earlier.safetensors"
    if earlier.exists():
        found = _joined(load_probe(earlier), found, preset.steps)
    save_probe(found, out / "probe.safetensors")
    (out / "pipeline" / "README.md").write_text(_card(pipeline, preset, seed, out))
    return out / "pipeline"


def _plans(preset: Preset, seed: int, out: Path) -> list[dict[str, float]]:
    """The plans that a training has had so far: "from" which step, and what of a preset may change on the way.

    Raises:
        ValueError: the folder holds another training, or one that has gone further than this one is to go.
    """
    plan = {"from": 0, **{name: getattr(preset, name) for name in _FREE}}
    if not (out / "preset.json").exists():
        return [plan]
    stored = json.loads((out / "preset.json").read_text())
    wanted = json.loads(json.dumps({**asdict(preset), "seed": seed}))
    plans, log = stored.pop("plans"), out / "log.jsonl"
    done = json.loads(log.read_text().splitlines()[-1])["step"] if log.exists() else 0
    if preset.steps < done or any(wanted[k] != v for k, v in stored.items() if k not in _FREE):
        raise ValueError(
            f"{out} holds another training ({done} of {stored['steps']} steps of {stored['name']}, seed {stored['seed']}); "
            "go on with the same settings and at least as many steps, or give another folder with --out."
        )
    same = all(plans[-1].get(k) == plan[k] for k in _FREE)
    return plans if same else [*plans, {**plan, "from": done}]


def revive(data: Path, preset: Preset, seed: int, out: Path) -> None:
    """Make a working folder again from an installed training, so that it can go on where its own folder is gone.

    The weights are the installed ones (the mean, in bf16); the optimizer starts afresh, with a warm-up.

    Args:
        data: a folder that ``install`` has filled.
        preset: the installed training's preset.
        seed: its seed.
        out: the working folder to make; it must not hold a training.

    Raises:
        FileNotFoundError: ``data`` holds no such training.
        FileExistsError: ``out`` holds a training already.
    """
    from diffusers import FluxPipeline

    log, model = data / "probes" / f"{preset.name}-{seed}.json", data / f"{preset.name}-flux"
    if not (log.exists() and model.exists()):
        raise FileNotFoundError(
            f"{data} holds no training of {preset.name} with seed {seed}; leave --revive away to begin one."
        )
    if (out / "preset.json").exists():
        raise FileExistsError(
            f"{out} holds a training already; leave --revive away to go on with it, or give another --out."
        )
    out.mkdir(parents=True, exist_ok=True)
    about = json.loads(log.read_text())
    shutil.copytree(model / "vae", out / "vae")
    shutil.copy(log.with_suffix(".safetensors"), out / "earlier.safetensors")
    (out / "vae_log.json").write_text(json.dumps(about.pop("vae")))
    rows = about.pop("flow")
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pipeline = FluxPipeline.from_pretrained(model)
    weights = {name: tensor.detach().float() for name, tensor in _weights(pipeline).items()}
    state = {"weights": weights, "ema": weights, "optimizer": None, "step": rows[-1]["step"], "seconds": rows[-1]["seconds"]}
    torch.save({**state, "warm_from": rows[-1]["step"]}, out / "checkpoint.pt")
    (out / "preset.json").write_text(json.dumps(about, indent=1))


def install(out: Path, data: Path, model: bool = True) -> None:
    """Copy a finished training into a data folder: ``<name>-flux/``, ``probes/<name>-<seed>.safetensors`` and its log.

    Args:
        out: the training's working folder.
        data: where to.
        model: False leaves the model away and copies probe and log alone.

    Raises:
        FileNotFoundError: the training has not been finished.
    """
    if not (out / "probe.safetensors").exists():
        raise FileNotFoundError(f"{out} holds no finished training; run python -m malib.train --out {out} to its end first.")
    about = json.loads((out / "preset.json").read_text())
    name = f"{about['name']}-{about['seed']}"
    if model:
        shutil.copytree(out / "pipeline", data / f"{about['name']}-flux", dirs_exist_ok=True)
    (data / "probes").mkdir(parents=True, exist_ok=True)
    shutil.copy(out / "probe.safetensors", data / "probes" / f"{name}.safetensors")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    log = {**about, "vae": json.loads((out / "vae_log.json").read_text()), "flow": rows}
    (data / "probes" / f"{name}.json").write_text(json.dumps(log, indent=1) + "\n")


def loss_deviation(rows: list[dict[str, float]], stored: list[dict[str, float]]) -> float:
    """Largest relative deviation of two trainings' loss curves over the steps that both have logged.

    Args:
        rows: ``step``, ``loss`` (mean since the row before) and ``held_out``, as in ``log.jsonl``.
        stored: the same of another training, as under ``flow`` in ``data/probes/<name>-<seed>.json``.

    Returns:
        Infinity where a loss is not finite.

    Raises:
        ValueError: they have no step in common.
    """
    known = {row["step"]: row for row in stored}
    shared = [(row[kind], known[row["step"]][kind]) for row in rows if row["step"] in known for kind in ("loss", "held_out")]
    if not shared:
        raise ValueError(
            f"The two logs share no step: {[r['step'] for r in rows]} and {list(known)}; compare equal presets."
        )
    gaps = [abs(now - then) / then for now, then in shared]
    return max(gaps) if np.isfinite(gaps).all() else math.inf


def _judged(model: Path, device: str, count: int) -> tuple[str, str, str]:
    """What the judge says of pictures of held-out captions, for the card: prompt accuracy, that of each shape, distances."""
    from .dit import load
    from .judge import prompt_accuracy, read
    from .metrics import bootstrap, frechet_distance, kernel_distance

    dit = load(model, device=device, dtype="bfloat16", cache=False, batch_size=16)
    cells, features = {}, {"generated": [], "same captions": [], "others": []}
    shapes: dict[str, list[bool]] = {}
    for subjects in (1, 2):
        chosen, others = (
            [scenes.sample_scene(_HELD_OUT_SEED + first + i, subjects, unseen=True) for i in range(count)]
            for first in (900_000, 950_000)
        )
        reading = read(dit.generate([s.caption for s in chosen]).images)
        hits = prompt_accuracy(reading, chosen)
        for scene, right in zip(chosen, hits["shape"], strict=True):
            if subjects == 1:
                shapes.setdefault(scene.subjects[0].shape, []).append(bool(right))
        for name, hit in hits.items():
            found = bootstrap(hit)
            cells.setdefault(name, []).append(f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]")
        features["generated"].append(reading.features)
        for name, drawn in (("same captions", chosen), ("others", others)):
            features[name].append(
                read((np.stack([scenes.render(s).image for s in drawn]) * 255).round().astype(np.uint8)).features
            )
    accuracy = "\n".join(f"| {name} | {' | '.join(row)} |" for name, row in [("n", [str(count)] * 2), *cells.items()])
    generated, same, others = (np.concatenate(part) for part in features.values())
    lines = []
    for name, pictures in (("mini-flux's pictures", generated), ("renderings of its captions", same)):
        kernel = kernel_distance(pictures, others)
        bounds = f"{kernel.mean:.3f} [{kernel.low:.3f}, {kernel.high:.3f}]"
        lines.append(f"| {name} | {bounds} | {frechet_distance(pictures, others):.2f} |")
    by_shape = ", ".join(f"{shape} {np.mean(shapes[shape]):.2f} ({len(shapes[shape])})" for shape in sorted(shapes))
    return accuracy, by_shape, "\n".join(lines)


@torch.no_grad()
def _card(pipeline: FluxPipeline, preset: Preset, seed: int, out: Path) -> str:
    """The model card, every number of it measured."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    shown = [rows[i] for i in sorted({round(j * (len(rows) - 1) / 9) for j in range(10)})]
    chosen = [scenes.render(scenes.sample_scene(_HELD_OUT_SEED + i, unseen=True)).image for i in range(64)]
    images = torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2).to(pipeline.vae.device) * 2 - 1
    restored = pipeline.vae.decode(pipeline.vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    psnr = -10 * ((restored - images) / 2).square().mean((1, 2, 3)).log10()
    count = sum(p.numel() for p in pipeline.transformer.parameters()) / 1e6
    lines = [f"| {r['step']} | {r['loss']:.4f} | {r['held_out']:.4f} | {r['seconds'] / 60:.0f} |" for r in shown]
    table = "\n".join(lines)
    blocks = f"{preset.double_blocks} double + {preset.single_blocks} single blocks, width {preset.heads * 64}"
    accuracy, shapes, distances = _judged(out / "pipeline", pipeline.transformer.device.type, preset.card_captions)
    plans = json.loads((out / "preset.json").read_text())["plans"]
    planned = "; ".join(
        f"from step {p['from']} planned for {p['steps']}, noise shift {p['shift']:g}, decay {p['decay_share']:.0%}, "
        f"focus {p.get('focus', 0):.0%}"
        for p in plans
    )
    command = f"python -m malib.train --preset {preset.name} --seed {seed} --steps {preset.steps}"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
license: mit
---
# {preset.name}-flux

A genuine, small `FluxPipeline` for studying massive activations, trained from scratch on procedural scenes
(`malib/scenes.py`) by `{command}`; where the table
shows several plans, length, noise levels and decay were changed on the way.
No weights come from elsewhere. Nothing in the initialisation (adaLN-zero) or the loss plants massive channels. Shipped is
the exponential mean of the weights at the end; no checkpoint was chosen.

| | |
|---|---|
| transformer | {blocks}, {count:.1f} M parameters |
| tokens | 16 x 16 image tokens, {TEXT_LENGTH} text tokens |
| pictures | {scenes.SIZE} x {scenes.SIZE} pixels (pass `height` and `width`: the pipeline's default of 256 is too large) |
| call | `max_sequence_length={TEXT_LENGTH}`, `negative_prompt=""`, `true_cfg_scale=3`, 20 steps |
| training | {preset.steps} steps of {preset.batch} scenes out of {preset.scenes:,}, seed {seed}, AdamW, bf16 autocast |
| schedule | learning rate {preset.learning_rate:g}, warm-up {preset.warmup}, constant, linear decay at the end |
| plans | {planned} |
| autoencoder | {psnr.mean():.1f} dB PSNR on 64 scenes of held-out combinations (worst {psnr.min():.1f} dB) |
| words it knows | {", ".join(scenes.VOCABULARY)} |

## Quality

Share of pictures (20 steps, guidance 3, in bf16) in which the judge (`data/judge`) finds what the caption says, with its
95 % bootstrap interval. Captions name every attribute; none of their combinations of subject attributes occurs in training.

| | one subject | two subjects |
|---|---|---|
{accuracy}

The shape of one subject, by the shape that was asked for: {shapes}.

Distances of {2 * preset.card_captions} pictures, half of them with two subjects, to as many renderings of other held-out
scenes, in the judge's features. The kernel distance is unbiased: about 0, and as often below, where both are renderings.

| | kernel distance | Frechet distance |
|---|---|---|
{distances}

## Loss (rectified flow, mean squared error of the velocity)

"held out" is one fixed batch of 32 scenes of attribute combinations that never occur in training, with the raw weights.
Minutes include pauses of the machine.

| step | training | held out | minutes |
|---|---|---|---|
{table}
"""


@torch.no_grad()
def probe(pipeline: FluxPipeline, snapshots: Path, samples: int = 16) -> xr.Dataset:
    """Channel scores of a fixed batch at every snapshot of a training: the birth of massive activations.

    Args:
        pipeline: a pipeline of the snapshots' architecture; it comes back with the weights it had.
        snapshots: folder of ``<step>.safetensors``.
        samples: scenes in the batch, never trained on, the same for every training; cond branch.

    Returns:
        ``score`` (train_step, sigma, layer, channel), averaged over the samples, and ``block`` by layer.
    """
    import xarray as xr

    from .families import family_of
    from .hooks import Tap, blocks_of
    from .records import ChannelStats, Run

    device = str(pipeline.transformer.device)
    clean, captions, _, noise = _held_out_batch(pipeline.vae, device, samples)
    text_ids, image_ids = position_ids(device)
    family = family_of(pipeline)
    blocks = tuple(blocks_of(pipeline.transformer, family))
    before, found = {k: v.clone() for k, v in _weights(pipeline).items()}, {}
    for path in sorted(snapshots.glob("*.safetensors")):
        _load_weights(pipeline, load_file(path, device=device))
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
        found[int(path.stem)] = listener.dataset().score.rename(step="sigma").assign_coords(sigma=list(PROBE_SIGMAS))
    _load_weights(pipeline, before)
    score = xr.concat(list(found.values()), dim="train_step", coords="minimal", compat="override").assign_coords(
        train_step=list(found)
    )
    return xr.Dataset({"score": score.assign_coords(block=("layer", [b.name for b in blocks]))})


def _joined(earlier: xr.Dataset, later: xr.Dataset, total: int) -> xr.Dataset:
    """Two probes of one training as one, with the points nearest to ``probe_steps(total)``."""
    import xarray as xr

    both = xr.concat([earlier, later], dim="train_step", coords="minimal", compat="override").drop_duplicates("train_step")
    nearest = both.sortby("train_step").sel(train_step=probe_steps(total), method="nearest")
    return nearest.drop_duplicates("train_step")


def save_probe(data: xr.Dataset, path: Path) -> None:
    """Write a probe as one small safetensors file: fp16 scores, the axes as JSON in its header."""
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
    """About ``points`` steps from 0 to ``total``, dense at the start, where massive activations are born."""
    return sorted({round(total * (i / (points - 1)) ** 2) for i in range(points)})


def encode_text(pipeline: FluxPipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Exactly what ``FluxPipeline`` feeds its transformer: T5 states (B, 32, 128) and CLIP pooled (B, 64)."""
    states = []
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        ids = tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
        states.append(ids.input_ids.to(pipeline.transformer.device))
    pooled = pipeline.text_encoder(states[0]).pooler_output
    return pipeline.text_encoder_2(states[1])[0], pooled


def pack(latents: Tensor) -> Tensor:
    """(B, 4, 32, 32) latents -> (B, 256, 16) tokens, in FLUX's order."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def position_ids(device: str | torch.device) -> tuple[Tensor, Tensor]:
    """(text ids (32, 3), image ids (256, 3)) for the rotary embedding."""
    side = scenes.SIZE // 4
    image = torch.zeros(side, side, 3, device=device)
    image[..., 1] += torch.arange(side, device=device)[:, None]
    image[..., 2] += torch.arange(side, device=device)[None]
    return torch.zeros(TEXT_LENGTH, 3, device=device), image.reshape(-1, 3)


def word_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """One token a word of the scenes' captions; ``bos`` puts <s> in front, as CLIP's does."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ("<pad>", "<unk>", "<s>", "</s>", *scenes.VOCABULARY)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if bos else "$A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TEXT_LENGTH,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def _training_scene(seed: int, index: int) -> scenes.Scene:
    return scenes.sample_scene(seed * 10_000_000 + index)


@functools.cache
def _large_singles(seed: int, count: int) -> np.ndarray:
    """Indices of the training scenes of one large subject."""
    found = [_training_scene(seed, i).subjects for i in range(count)]
    return np.array([i for i, subjects in enumerate(found) if [s.size for s in subjects] == ["large"]])


def _pixels(job: tuple[int, int]) -> np.ndarray:
    image = scenes.render(_training_scene(*job)).image
    return (image * 255).round().astype(np.uint8)


def _render_batches(seed: int, count: int, batch: int) -> Iterator[Tensor]:
    """Float (B, 3, 64, 64) in [-1, 1], scenes 0 to ``count`` - 1 in order, drawn by worker processes."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(multiprocessing.cpu_count(), 16)) as pool:
        images: list[np.ndarray] = []
        for image in pool.imap(_pixels, ((seed, i) for i in range(count)), chunksize=64):
            images.append(image)
            if len(images) == batch:
                yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
                images = []
        if images:
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _train_vae(vae: AutoencoderKL, preset: Preset, seed: int, out: Path, device: str) -> None:
    """L1 on pixels and on their differences (for sharp edges), and a light KL term; sets scale and shift of the latents."""
    path = out / "vae"
    if path.exists():
        fresh = type(vae).from_pretrained(path)
        vae.load_state_dict(fresh.state_dict())
        vae.register_to_config(scaling_factor=fresh.config.scaling_factor, shift_factor=fresh.config.shift_factor)
        return
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    vae.to(memory_format=torch.channels_last).train()
    count = min(preset.vae_steps * preset.vae_batch, preset.scenes)
    batches = list(_render_batches(seed, count, preset.vae_batch))
    log = []
    for step in _bar(range(preset.vae_steps), "VAE"):
        share = step / preset.vae_steps
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * share))
        images = batches[step % len(batches)].to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            restored = vae.decode(posterior.sample(generator)).sample
        error = restored.float() - images
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = error.abs().mean() + 0.5 * edges + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == preset.vae_steps - 1:
            log.append({"step": step, "loss": loss.item(), "psnr": -10 * math.log10(error.square().mean().item() / 4)})
    vae.eval()
    with torch.no_grad():
        sample = torch.cat([vae.encode(b.to(device)).latent_dist.mean for b in batches[:32]])
    vae.register_to_config(scaling_factor=1 / sample.std().item(), shift_factor=sample.mean().item())
    (out / "vae_log.json").write_text(json.dumps(log))
    vae.save_pretrained(path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


@torch.no_grad()
def _latents(vae: AutoencoderKL, preset: Preset, seed: int, out: Path, device: str) -> Tensor:
    """Scaled latents of all training scenes, fp16 (N, 4, 32, 32), kept on disk between runs."""
    path = out / "latents.safetensors"
    if not path.exists():
        parts = []
        batches = _render_batches(seed, preset.scenes, 64)
        for images in _bar(batches, "latents", total=math.ceil(preset.scenes / 64)):
            with torch.autocast(device, torch.bfloat16):
                mean = vae.encode(images.to(device, memory_format=torch.channels_last)).latent_dist.mean
            parts.append(((mean.float() - vae.config.shift_factor) * vae.config.scaling_factor).half().cpu())
        save_file({"latents": torch.cat(parts).contiguous()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return load_file(path)["latents"]


class _Ema:
    """Exponential mean of the weights, with a warm-up so that early snapshots follow the training."""

    def __init__(self, weights: dict[str, Tensor], decay: float) -> None:
        self.decay, self.mean = decay, {k: v.detach().clone() for k, v in weights.items()}

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor], step: int) -> None:
        rate = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.mean.values()), [weights[k] for k in self.mean], rate)


def _weights(pipeline: FluxPipeline) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for part in _TRAINED for name, tensor in getattr(pipeline, part).named_parameters()}


@torch.no_grad()
def _load_weights(pipeline: FluxPipeline, weights: dict[str, Tensor]) -> None:
    for name, tensor in _weights(pipeline).items():
        tensor.copy_(weights[name])


def _train_flow(
    pipeline: FluxPipeline,
    latents: Tensor,
    preset: Preset,
    seed: int,
    out: Path,
    device: str,
    compiled: bool,
) -> None:
    weights = _weights(pipeline)
    optimizer = torch.optim.AdamW(weights.values(), lr=preset.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    ema, start, seconds, warm_from = _Ema(weights, preset.ema), 0, 0.0, 0
    checkpoint, log_path, snapshots = out / "checkpoint.pt", out / "log.jsonl", out / "snapshots"
    snapshots.mkdir(exist_ok=True)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        _load_weights(pipeline, state["weights"])
        if state["optimizer"] is not None:
            optimizer.load_state_dict(state["optimizer"])
        ema.mean, start, seconds, warm_from = state["ema"], state["step"], state["seconds"], state.get("warm_from", 0)
        lines = log_path.read_text().splitlines() if log_path.exists() else []
        log_path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= start))
    forward = torch.compile(pipeline.transformer) if compiled else pipeline.transformer
    held_out = _held_out_batch(pipeline.vae, device)
    probes, began, losses = set(probe_steps(preset.steps)), time.monotonic() - seconds, []
    for step in _bar(range(start, preset.steps + 1), "flow", initial=start, total=preset.steps):
        if step in probes:
            save_file({k: v.to(torch.bfloat16) for k, v in ema.mean.items()}, snapshots / f"{step:06d}.safetensors")
        last = step == preset.steps
        if step > start and (step % CHECKPOINT_EVERY == 0 or last):
            state = {"weights": weights, "optimizer": optimizer.state_dict(), "ema": ema.mean, "step": step}
            state |= {"seconds": time.monotonic() - began, "warm_from": warm_from}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            row = {
                "step": step,
                "loss": float(torch.stack(losses).mean()),
                "held_out": _held_out_loss(pipeline, held_out),
                "seconds": round(time.monotonic() - began, 1),
            }
            with log_path.open("a") as log:
                log.write(json.dumps(row) + "\n")
            losses = []
        if last:
            break
        for group in optimizer.param_groups:
            group["lr"] = preset.learning_rate * _schedule(step, preset, warm_from)
        loss = _flow_loss(pipeline, forward, *_draw(latents, preset, seed, step, device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        ema.update(weights, step)
        losses.append(loss.detach())
    _load_weights(pipeline, ema.mean)


def _schedule(step: int, preset: Preset, warm_from: int = 0) -> float:
    """Linear warm-up, constant, linear decay to zero over the last ``decay_share`` of the training."""
    return min(1.0, (step - warm_from + 1) / preset.warmup, (preset.steps - step) / (preset.decay_share * preset.steps))


def _draw(latents: Tensor, preset: Preset, seed: int, step: int, device: str) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Clean latents, captions, sigmas (logit-normal, shifted) and noise of one step; depends on (seed, step) alone."""
    rng = np.random.default_rng([seed, step])
    indices = rng.integers(len(latents), size=preset.batch)
    if preset.focus:
        again = np.random.default_rng([seed, step, 1])
        focused = again.random(preset.batch) < preset.focus
        indices[focused] = again.choice(_large_singles(seed, len(latents)), focused.sum())
    captions = [
        "" if rng.random() < preset.empty_captions else scenes.paraphrase(_training_scene(seed, int(i)), rng)
        for i in indices
    ]
    sigma = torch.sigmoid(torch.from_numpy(rng.standard_normal(preset.batch)).float())
    sigma = preset.shift * sigma / (1 + (preset.shift - 1) * sigma)
    noise = torch.from_numpy(rng.standard_normal((preset.batch, *latents.shape[1:]), dtype=np.float32))
    return latents[indices].to(device).float(), captions, sigma.to(device), noise.to(device)


def _flow_loss(
    pipeline: FluxPipeline, forward: Any, clean: Tensor, captions: list[str], sigma: Tensor, noise: Tensor
) -> Tensor:
    mixed = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1))
    text_ids, image_ids = position_ids(clean.device)
    with torch.autocast(clean.device.type, torch.bfloat16):
        states, pooled = encode_text(pipeline, captions)
        velocity = forward(
            hidden_states=pack(mixed),
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
    return nn.functional.mse_loss(velocity.float(), pack(noise - clean))


@torch.no_grad()
def _held_out_batch(vae: AutoencoderKL, device: str, count: int = 32) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Scenes of unseen combinations at evenly spread sigmas, the same for every training."""
    chosen = [scenes.sample_scene(_HELD_OUT_SEED + i, unseen=True) for i in range(count)]
    images = torch.from_numpy(np.stack([scenes.render(s).image for s in chosen])).permute(0, 3, 1, 2).to(device) * 2 - 1
    clean = (vae.encode(images).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(device)
    return clean, [s.caption for s in chosen], ((torch.arange(count) + 0.5) / count).to(device), noise


@torch.no_grad()
def _held_out_loss(pipeline: FluxPipeline, batch: tuple[Tensor, list[str], Tensor, Tensor]) -> float:
    return _flow_loss(pipeline, pipeline.transformer, *batch).item()


def _bar(items: Any, label: str, **kwargs: Any) -> tqdm:
    return tqdm(items, desc=label, mininterval=10, dynamic_ncols=True, **kwargs)


def main(argv: list[str] | None = None) -> None:
    """Command line: ``python -m malib.train --preset mini``."""
    parser = argparse.ArgumentParser(prog="python -m malib.train", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="mini")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="working folder (default: ~/.cache/malib/train/PRESET-SEED)")
    parser.add_argument("--steps", type=int, help="replace the preset's number of steps")
    parser.add_argument("--batch", type=int, help="replace the preset's batch size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--revive", type=Path, metavar="DATA", help="go on with what is installed in this folder")
    parser.add_argument("--install", type=Path, metavar="DATA", help="when done, copy model, probe and log into this folder")
    parser.add_argument("--install-probe", type=Path, metavar="DATA", help="when done, copy probe and log alone")
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="DATA",
        help=f"when done, hold the loss curve to the one in this folder, +-{100 * LOSS_BAND:g} %%",
    )
    parser.add_argument("--judge", action="store_true", help="train the judge instead, into --out (default: data/judge)")
    parser.add_argument("--eager", action="store_true", help="do without torch.compile")
    args = parser.parse_args(argv)
    if args.judge:
        from .judge import train_judge

        print(train_judge(args.out or Path("data/judge"), args.seed, **({"steps": args.steps} if args.steps else {})))
        return
    changes = {k: v for k in ("steps", "batch") if (v := getattr(args, k)) is not None}
    preset = replace(PRESETS[args.preset], **changes)
    out = args.out or Path.home() / ".cache" / "malib" / "train" / f"{preset.name}-{args.seed}"
    stored = args.compare and args.compare / "probes" / f"{preset.name}-{args.seed}.json"
    if stored and not stored.exists():
        parser.error(f"There is no loss curve {stored}; leave --compare away, or give a folder that --install has filled.")
    try:
        if args.revive:
            revive(args.revive, preset, args.seed, out)
        print(train(preset, args.seed, out, args.device, not args.eager))
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        parser.error(str(error))
    if stored:
        _compare(out, stored, parser)
    if args.install_probe:
        install(out, args.install_probe, model=False)
    if args.install:
        install(out, args.install)


def _compare(out: Path, stored: Path, parser: argparse.ArgumentParser) -> None:
    """Print how far the loss curve of ``out`` is from a stored one; exit with an error beyond ``LOSS_BAND``."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    deviation = loss_deviation(rows, json.loads(stored.read_text())["flow"])
    print(f"largest deviation of the loss from {stored}: {deviation:.2%} (at most {LOSS_BAND:.0%})")
    if deviation > LOSS_BAND:
        parser.error("The loss curve has left its band; another version of torch, or a changed training, explains it.")


if __name__ == "__main__":
    main()
