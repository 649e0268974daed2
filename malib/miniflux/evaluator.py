"""The evaluator: a small network that names the attributes of a scene, segments its subjects and computes features.

``python -m malib.miniflux.train --evaluator`` trains it on renderings only, with noise, blur, empty scenes and mixtures
of two scenes, so that "no subject here" is one of its answers. For mini-flux it has the role that CLIP, Inception and a
segmenter have for large models.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import rendering, scenes
from .scenes import COLOURS, PATTERNS, POSITIONS, SHAPES, SIZES, Scene

HEADS = {
    "shape": (*SHAPES, "none"),
    "colour": tuple(COLOURS),
    "size": SIZES,
    "background": tuple(COLOURS),
    "pattern": PATTERNS,
}
"""The words of each head; shape, colour and size are predicted for each of the three positions."""
SLOT_HEADS = ("shape", "colour", "size")
_TRAINING, _FITTING, _MEASURING = 5_000_000, 2_100_000_000, 2_000_500_000
"""Where the scenes' seeds begin; those of mini-flux begin at 0 and its held-out ones at 2,000,000,000."""


def _block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
        nn.GroupNorm(8, outside),
        nn.SiLU(),
        nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
        nn.GroupNorm(8, outside),
        nn.SiLU(),
    )


class Evaluator(nn.Module):
    """A small U-Net that sees the whole image, and each subject through its own mask.

    ``forward`` takes float (B, 3, 64, 64) in [0, 1] and returns logits by head: (B, 3, words) for shape, colour and
    size, (B, words) for background and pattern; ``segments`` (B, 4, 64, 64) over background, left, center and right; and
    ``features`` (B, 128). The logits are divided by a temperature for each head, fitted after the training.
    """

    def __init__(self, w: int = 24) -> None:
        super().__init__()
        self.down = nn.ModuleList([_block(3, w), _block(w, 2 * w, 2), _block(2 * w, 4 * w, 2), _block(4 * w, 6 * w, 2)])
        self.up = nn.ModuleList([_block(10 * w, 4 * w), _block(6 * w, 2 * w), _block(3 * w, w)])
        self.segment = nn.Conv2d(w, 1 + len(POSITIONS), 1)
        self.squeeze = nn.Sequential(nn.Conv2d(6 * w, 3 * w, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.slot = nn.Sequential(nn.Linear(9 * w + 1, 8 * w), nn.SiLU(), nn.Linear(8 * w, 64), nn.SiLU())
        self.describe = nn.Sequential(nn.Linear(3 * w * 16 + 64 * len(POSITIONS), 128), nn.LayerNorm(128), nn.SiLU())
        self.name = nn.ModuleDict(
            {h: nn.Linear(128, len(words) * (len(POSITIONS) if h in SLOT_HEADS else 1)) for h, words in HEADS.items()}
        )
        self.name_slot = nn.ModuleDict({h: nn.Linear(64, len(HEADS[h])) for h in SLOT_HEADS})
        self.register_buffer("temperature", torch.ones(len(HEADS)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # noqa: D102
        kept, x = [], images * 2 - 1
        for block in self.down:
            x = block(x)
            kept.append(x)
        whole, maps = self.squeeze(x), []
        for block, skip in zip(self.up, kept[-2::-1], strict=True):
            x = block(torch.cat([nn.functional.interpolate(x, scale_factor=2.0), skip], dim=1))
            maps.append(x)
        segments = self.segment(x)
        slots = self.slot(_under_masks(maps[0], maps[-1], segments.float().softmax(1)[:, 1:]))
        features = self.describe(torch.cat([whole, slots.flatten(1)], dim=1))
        named = {h: layer(features) for h, layer in self.name.items()}
        for head in SLOT_HEADS:
            named[head] = named[head].unflatten(1, (len(POSITIONS), -1)) + self.name_slot[head](slots)
        named = {h: logits / self.temperature[i] for i, (h, logits) in enumerate(named.items())}
        return {**named, "segments": segments, "features": features}


def _under_masks(deep: Tensor, fine: Tensor, masks: Tensor) -> Tensor:
    """Return, under each soft mask (B, 3, 64, 64), mean and maximum of deep features, mean of fine ones, and area."""
    small = nn.functional.avg_pool2d(masks, masks.shape[-1] // deep.shape[-1])
    means = [
        torch.einsum("bshw,bchw->bsc", m, x.float()) / (m.sum((2, 3)) + 1)[..., None]
        for m, x in ((small, deep), (masks, fine))
    ]
    highest = (small[:, :, None] * deep[:, None].float()).amax((3, 4))
    return torch.cat([*means, highest, masks.mean((2, 3))[..., None]], dim=2)


@dataclass(frozen=True)
class Prediction:
    """What the evaluator predicts for images.

    Attributes:
        words: for each head an array of words, (B, 3) for shape, colour and size (left, center, right), else (B,).
        confidence: the probabilities of these words, same shapes.
        masks: boolean (B, 64, 64), True where any subject is more probable than the background.
        features: float32 (B, 128).
    """

    words: dict[str, np.ndarray]
    confidence: dict[str, np.ndarray]
    masks: np.ndarray
    features: np.ndarray


@cache
def load_evaluator(path: str | Path | None = None) -> Evaluator:
    """Return the bundled evaluator, or the one in a safetensors file."""
    from ..presets import data_folder

    evaluator = Evaluator()
    evaluator.load_state_dict(
        {k: v.float() for k, v in load_file(path or data_folder() / "evaluator" / "evaluator.safetensors").items()}
    )
    return evaluator.eval().requires_grad_(False)


@torch.no_grad()
def predict(images: np.ndarray, evaluator: Evaluator | None = None, batch_size: int = 64) -> Prediction:
    """Predict the attributes, masks and features of images.

    Args:
        images: uint8 (B, 64, 64, 3).
        evaluator: another evaluator than the bundled one.
        batch_size: images at once.

    Raises:
        ValueError: images of another shape or dtype.
    """
    if images.dtype != np.uint8 or images.shape[1:] != (64, 64, 3):
        raise ValueError(f"Images are {images.dtype} {images.shape}; the evaluator takes uint8 (B, 64, 64, 3).")
    evaluator = evaluator or load_evaluator()
    parts = []
    for start in range(0, len(images), batch_size):
        part = np.ascontiguousarray(images[start : start + batch_size])  # a reversed view has negative strides
        batch = torch.from_numpy(part).permute(0, 3, 1, 2).float() / 255
        parts.append(evaluator(batch))
    found = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    probability = {h: found[h].softmax(-1).max(-1) for h in HEADS}
    return Prediction(
        {h: np.array(words)[probability[h].indices.numpy()] for h, words in HEADS.items()},
        {h: p.values.numpy() for h, p in probability.items()},
        (found["segments"].softmax(1)[:, 0] < 0.5).numpy(),
        found["features"].numpy(),
    )


@torch.no_grad()
def dense_features(images: np.ndarray, evaluator: Evaluator | None = None) -> np.ndarray:
    """Return the evaluator's own map of features, a baseline for correspondence.

    Args:
        images: uint8 (B, 64, 64, 3).
        evaluator: another evaluator than the bundled one.

    Returns:
        float32 (B, 16, 16, 96).
    """
    evaluator, seen = evaluator or load_evaluator(), []
    handle = evaluator.up[0].register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        predict(images, evaluator)
    finally:
        handle.remove()
    return torch.cat(seen).permute(0, 2, 3, 1).numpy()


def prompt_adherence(prediction: Prediction, scenes_: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Return which attributes of each scene the images show.

    Args:
        prediction: for B images.
        scenes_: the B scenes that the images should show.

    Returns:
        Boolean (B,) by attribute: shape, colour and size are right when each subject's position has a subject with that
        attribute; position is right when exactly the scene's positions have subjects; ``all`` when everything is right.
    """
    hits: dict[str, list[bool]] = {a: [] for a in ("shape", "colour", "size", "position", "background", "pattern")}
    for i, scene in enumerate(scenes_):
        slots = {POSITIONS.index(s.position): s for s in scene.subjects}
        present = {p for p in range(len(POSITIONS)) if prediction.words["shape"][i, p] != "none"}
        for head in SLOT_HEADS:
            shown = [p in present and prediction.words[head][i, p] == getattr(s, head) for p, s in slots.items()]
            hits[head].append(all(shown))
        hits["position"].append(present == set(slots))
        hits["background"].append(prediction.words["background"][i] == scene.background)
        hits["pattern"].append(prediction.words["pattern"][i] == scene.pattern)
    result = {a: np.array(v, dtype=bool) for a, v in hits.items()}
    return {**result, "all": np.logical_and.reduce(list(result.values()))}


def train_evaluator(out: Path, seed: int = 0, steps: int = 4000, batch: int = 48, count: int = 24_000) -> dict[str, float]:
    """Train the evaluator on renderings, fit its temperatures, and measure it on unseen renderings.

    Args:
        out: folder for ``evaluator.safetensors`` and its card.
        seed: fixes initialisation, scenes and distortions.
        steps: training steps.
        batch: renderings per step.
        count: number of renderings, of every combination of attributes.

    Returns:
        The result of ``measure_evaluator``.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    images, labels, words = _drawn(seed * 10_000_000 + _TRAINING, count)
    evaluator = Evaluator().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(evaluator.parameters(), lr=2e-3, weight_decay=0.01)
    rng = np.random.default_rng([seed, 17])
    for step in tqdm(range(steps), desc="evaluator", mininterval=10, dynamic_ncols=True):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.from_numpy(rng.integers(count, size=batch))
        loss = _loss(evaluator, *_distorted(images[chosen], labels[chosen], words[chosen], rng))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(evaluator.parameters(), 1.0)
        optimizer.step()
    evaluator.eval()
    _fit_temperatures(evaluator, seed)
    save_file({k: v.half().contiguous() for k, v in evaluator.state_dict().items()}, out / "evaluator.safetensors")
    return measure_evaluator(out, f"seed {seed}, {steps:,} steps of {batch} out of {count:,} renderings")


def measure_evaluator(out: Path, training: str, count: int = 1000) -> dict[str, float]:
    """Measure a stored evaluator on held-out renderings and write its card.

    Args:
        out: folder with ``evaluator.safetensors``, into which the card is written.
        training: description of the training, for the card.
        count: renderings; each once as it is, once distorted as in the training (but never mixed), and once without
            subject.

    Returns:
        Shares right by attribute, ``iou`` of the masks, ``none`` (share of empty scenes and of mixtures in which no
        position has a subject) and ``calibration`` (expected calibration error of the shape, plain and distorted
        renderings together).
    """
    evaluator = load_evaluator(out / "evaluator.safetensors")
    chosen = [scenes.sample_scene(_MEASURING + i, unseen=bool(i % 2)) for i in range(count)]
    renderings = [rendering.render(s) for s in chosen]
    masks, images = np.stack([d.mask for d in renderings]), np.stack([_bytes(d.image) for d in renderings])
    rng = np.random.default_rng(0)
    noisy = _bytes(_noisy(torch.from_numpy(images), rng).permute(0, 2, 3, 1).numpy())
    empty = np.stack([_bytes(rendering.empty(s)) for s in chosen])
    mixture = ((images.astype(np.uint16) + np.roll(images, 1, 0)) // 2).astype(np.uint8)
    tables, calibration = {}, []
    for name, pixels in (("as they are", images), ("distorted", noisy)):
        prediction = predict(pixels, evaluator)
        iou = (prediction.masks & masks).sum((1, 2)) / (prediction.masks | masks).sum((1, 2))
        hits = prompt_adherence(prediction, chosen)
        tables[name] = {k: float(v.mean()) for k, v in hits.items()} | {"iou": float(iou.mean())}
        for i, scene in enumerate(chosen):
            for subject in scene.subjects:
                place = POSITIONS.index(subject.position)
                right = prediction.words["shape"][i, place] == subject.shape
                calibration.append((float(prediction.confidence["shape"][i, place]), float(right)))
    nothing = {n: predict(p, evaluator).words["shape"] == "none" for n, p in (("empty", empty), ("mixture", mixture))}
    bins, error = reliability(*np.array(calibration).T)
    result = {**tables["as they are"], "calibration": error} | {
        f"none, {n}": float(v.all(1).mean()) for n, v in nothing.items()
    }
    (out / "README.md").write_text(_card(training, count, tables, result, bins))
    return result


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> tuple[list[dict[str, float]], float]:
    """Compute the reliability curve and the expected calibration error (Guo et al., arXiv 1706.04599, eq. 3).

    Args:
        confidence: (n,) in [0, 1].
        right: (n,) 0 or 1.
        bins: number of bins of equal width.

    Returns:
        For each bin with entries its ``n``, mean ``confidence`` and share ``right``; and the mean of their absolute
        differences, weighted by n.
    """
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    curve = [
        {"n": int(inside.sum()), "confidence": float(confidence[inside].mean()), "right": float(right[inside].mean())}
        for inside in (place == b for b in range(bins))
        if inside.any()
    ]
    return curve, sum(b["n"] * abs(b["confidence"] - b["right"]) for b in curve) / len(confidence)


def _card(
    training: str, count: int, tables: dict[str, dict[str, float]], result: dict[str, float], bins: list[dict[str, float]]
) -> str:
    rows = "\n".join(f"| {name} | {' | '.join(f'{t[name]:.4f}' for t in tables.values())} |" for name in tables["distorted"])
    curve = "\n".join(f"| {b['n']} | {b['confidence']:.3f} | {b['right']:.3f} |" for b in bins)
    return f"""---
license: mit
---
# The evaluator

A small convolutional network (`malib/miniflux/evaluator.py`) that names the attributes of a scene, segments its subjects
and computes features. `python -m malib.miniflux.train --evaluator` ({training}) trains it on renderings alone; stored in
fp16. No weights come from elsewhere.

On {count} renderings that it has not seen, one or two subjects, half of them of combinations that mini-flux never saw;
"distorted" with the noise, blur and light of its training:

| share right, or mean | {" | ".join(tables)} |
|---|---|---|
{rows}

"all" means every attribute of every subject and of the background. "No subject" is one of its answers: it finds none in
{result["none, empty"]:.1%} of the same backgrounds without subjects, and no clear one in {result["none, mixture"]:.1%} of
the even mixtures of two scenes.

## Calibration

Its confidence in the shape, fitted by one temperature an answer on other renderings. Expected calibration error:
{result["calibration"]:.4f}.

| n | mean confidence | share right |
|---|---|---|
{curve}
"""


def _bytes(image: np.ndarray) -> np.ndarray:
    return (image * 255).round().astype(np.uint8)


def _job(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pixels, label map by position (0 none, 1 left, 2 center, 3 right), and word indices."""
    rng = np.random.default_rng([number, 3])
    scene = scenes.sample_scene(number, unseen=bool(rng.random() < 0.125))
    drawn = rendering.render(scene)
    words = np.full(11, -100, dtype=np.int64)
    words[0:9:3] = len(SHAPES)
    labels = np.zeros((scenes.SIZE, scenes.SIZE), dtype=np.uint8)
    empty = rng.random() < 0.06
    image = rendering.empty(scene) if empty else drawn.image
    for index, subject in enumerate(() if empty else scene.subjects, 1):
        place = POSITIONS.index(subject.position)
        words[3 * place : 3 * place + 3] = (
            SHAPES.index(subject.shape),
            list(COLOURS).index(subject.colour),
            SIZES.index(subject.size),
        )
        labels[drawn.labels == index] = place + 1
    words[9:] = list(COLOURS).index(scene.background), PATTERNS.index(scene.pattern)
    return _bytes(image), labels, words


def _drawn(first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(multiprocessing.cpu_count(), 16)) as pool:
        found = list(pool.imap(_job, range(first, first + count), chunksize=64))
    return tuple(torch.from_numpy(np.stack(part)) for part in zip(*found, strict=True))


def _noisy(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Apply blur, noise and light to uint8 (B, 64, 64, 3): float (B, 3, 64, 64) in [0, 1]."""
    size = len(images)

    def column(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).view(-1, 1, 1, 1)

    x = images.permute(0, 3, 1, 2).float() / 255
    blurred = nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = torch.where(column(rng.random(size) < 0.3), blurred, x)
    strength = column(rng.random(size) ** 2 * 0.12 * (rng.random(size) < 0.6)).float()
    x = x + strength * torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    return (x * column(rng.uniform(0.9, 1.1, size)).float()).clamp(0, 1)


def _distorted(images: Tensor, labels: Tensor, words: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Apply noise, blur and light; a tenth are even mixtures of two scenes, which show no clear subject ("none")."""
    x = _noisy(images, rng)
    mixed = torch.from_numpy(rng.random(len(x)) < 0.1)
    x = torch.where(mixed.view(-1, 1, 1, 1), (x + x.roll(1, 0)) / 2, x)
    words, labels = words.clone(), labels.long()
    words[mixed] = -100
    words[mixed, 0:9:3] = len(SHAPES)
    labels[mixed] = -100
    return x.contiguous(memory_format=torch.channels_last), labels, words


def _loss(evaluator: nn.Module, images: Tensor, labels: Tensor, words: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        output = evaluator(images)
    entropy, segments = nn.functional.cross_entropy, output["segments"].float()
    loss = 4 * entropy(segments, labels, ignore_index=-100) + _outside(segments, labels)
    for number, head in enumerate(SLOT_HEADS):
        loss = loss + entropy(output[head].float().flatten(0, 1), words[:, number:9:3].flatten(), ignore_index=-100)
    for number, head in enumerate(("background", "pattern"), 9):
        loss = loss + 0.5 * entropy(output[head].float(), words[:, number], ignore_index=-100)
    return loss


def _outside(segments: Tensor, labels: Tensor) -> Tensor:
    """Return 1 - soft IoU of the subjects, mean over the images with one, whatever its size."""
    truth = (labels > 0).float()
    found = (1 - segments.softmax(1)[:, 0]) * (labels >= 0)
    both, shown = (found * truth).sum((1, 2)), truth.sum((1, 2))
    return (1 - both / (found.sum((1, 2)) + shown - both).clamp(min=1))[shown > 0].mean()


@torch.no_grad()
def _fit_temperatures(evaluator: Evaluator, seed: int, count: int = 1500) -> None:
    """Fit one temperature per head (Guo et al., arXiv 1706.04599) by a line search, on distorted renderings of their own."""
    images, labels, words = _drawn(_FITTING + seed * count, count)
    x, _, words = _distorted(images, labels, words, np.random.default_rng([seed, 19]))
    parts = [evaluator(part) for part in x.split(64)]
    candidates = torch.logspace(-0.7, 0.7, 57)
    for number, head in enumerate(HEADS):
        logits = torch.cat([p[head] for p in parts]).float().flatten(0, -2)
        truth = (words[:, number:9:3] if head in SLOT_HEADS else words[:, 6 + number]).flatten()
        losses = torch.stack([nn.functional.cross_entropy(logits / t, truth, ignore_index=-100) for t in candidates])
        evaluator.temperature[number] = candidates[losses.argmin()]
