"""The model card of a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from . import rendering, scenes
from .architecture import Preset
from .data import HELD_OUT_SEED
from .text import TEXT_LENGTH

if TYPE_CHECKING:
    from diffusers import FluxPipeline


def _evaluated(model: Path, device: str, count: int) -> tuple[str, str, str]:
    """Evaluate images of held-out captions for the card: prompt adherence, that of each shape, distances."""
    from ..analysis.image_metrics import frechet_distance, kernel_distance
    from ..analysis.statistics import bootstrap
    from ..loading import load
    from .evaluator import predict, prompt_adherence

    dit = load(model, device=device, dtype="bfloat16", cache=False, batch_size=16)
    cells, features = {}, {"generated": [], "same captions": [], "others": []}
    shapes: dict[str, list[bool]] = {}
    for subjects in (1, 2):
        chosen, others = (
            [scenes.sample_scene(HELD_OUT_SEED + first + i, subjects, unseen=True) for i in range(count)]
            for first in (900_000, 950_000)
        )
        reading = predict(dit.generate([s.caption for s in chosen]).images)
        hits = prompt_adherence(reading, chosen)
        for scene, right in zip(chosen, hits["shape"], strict=True):
            if subjects == 1:
                shapes.setdefault(scene.subjects[0].shape, []).append(bool(right))
        for name, hit in hits.items():
            found = bootstrap(hit)
            cells.setdefault(name, []).append(f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]")
        features["generated"].append(reading.features)
        for name, drawn in (("same captions", chosen), ("others", others)):
            features[name].append(
                predict((np.stack([rendering.render(s).image for s in drawn]) * 255).round().astype(np.uint8)).features
            )
    accuracy = "\n".join(f"| {name} | {' | '.join(row)} |" for name, row in [("n", [str(count)] * 2), *cells.items()])
    generated, same, others = (np.concatenate(part) for part in features.values())
    lines = []
    for name, images in (("mini-flux's images", generated), ("renderings of its captions", same)):
        kernel = kernel_distance(images, others)
        bounds = f"{kernel.mean:.3f} [{kernel.low:.3f}, {kernel.high:.3f}]"
        lines.append(f"| {name} | {bounds} | {frechet_distance(images, others):.2f} |")
    by_shape = ", ".join(f"{shape} {np.mean(shapes[shape]):.2f} ({len(shapes[shape])})" for shape in sorted(shapes))
    return accuracy, by_shape, "\n".join(lines)


@torch.no_grad()
def model_card(pipeline: FluxPipeline, preset: Preset, seed: int, out: Path) -> str:
    """Write the text of a model card; every number of it is measured.

    Args:
        pipeline: the trained pipeline.
        preset: of the training.
        seed: of the training.
        out: working folder of the training.
    """
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    shown = [rows[i] for i in sorted({round(j * (len(rows) - 1) / 9) for j in range(10)})]
    chosen = [rendering.render(scenes.sample_scene(HELD_OUT_SEED + i, unseen=True)).image for i in range(64)]
    images = torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2).to(pipeline.vae.device) * 2 - 1
    restored = pipeline.vae.decode(pipeline.vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    psnr = -10 * ((restored - images) / 2).square().mean((1, 2, 3)).log10()
    count = sum(p.numel() for p in pipeline.transformer.parameters()) / 1e6
    lines = [f"| {r['step']} | {r['loss']:.4f} | {r['held_out']:.4f} | {r['seconds'] / 60:.0f} |" for r in shown]
    table = "\n".join(lines)
    blocks = f"{preset.double_blocks} double + {preset.single_blocks} single blocks, width {preset.heads * 64}"
    accuracy, shapes, distances = _evaluated(out / "pipeline", pipeline.transformer.device.type, preset.card_captions)
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
| images | {scenes.SIZE} x {scenes.SIZE} pixels (pass `height` and `width`: the pipeline's default of 256 is too large) |
| call | `max_sequence_length={TEXT_LENGTH}`, `negative_prompt=""`, `true_cfg_scale=3`, 20 steps |
| training | {preset.steps} steps of {preset.batch} scenes out of {preset.scenes:,}, seed {seed}, AdamW, bf16 autocast |
| schedule | learning rate {preset.learning_rate:g}, warm-up {preset.warmup}, constant, linear decay at the end |
| plans | {planned} |
| autoencoder | {psnr.mean():.1f} dB PSNR on 64 scenes of held-out combinations (worst {psnr.min():.1f} dB) |
| words it knows | {", ".join(scenes.VOCABULARY)} |

## Quality

Share of images (20 steps, guidance 3, in bf16) in which the evaluator (`data/evaluator`) finds what the caption says, with
its 95 % bootstrap interval. Captions name every attribute; none of their combinations of subject attributes occurs in
training.

| | one subject | two subjects |
|---|---|---|
{accuracy}

The shape of one subject, by the shape in the caption: {shapes}.

Distances of {2 * preset.card_captions} images, half of them with two subjects, to as many renderings of other held-out
scenes, in the evaluator's features. The kernel distance is unbiased: about 0, and as often below, where both are renderings.

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
