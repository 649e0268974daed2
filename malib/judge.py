"""The judge: a small network that names the attributes of a scene, segments its subjects and gives features.

It is trained by ``python -m malib.train --judge`` on renderings alone, with noise, blur, empty scenes and mixtures of two
scenes, so that "no subject here" is one of its answers. For mini-flux it plays the parts that CLIP, Inception and a
background remover play for large models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .scenes import COLOURS, PATTERNS, POSITIONS, SHAPES, SIZES, Scene

HEADS = {
    "shape": (*SHAPES, "none"),
    "colour": tuple(COLOURS),
    "size": SIZES,
    "background": tuple(COLOURS),
    "pattern": PATTERNS,
}
"""The words of each head; shape, colour and size are told for each of the three positions."""
SLOT_HEADS = ("shape", "colour", "size")


def _block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
        nn.GroupNorm(8, outside),
        nn.SiLU(),
        nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
        nn.GroupNorm(8, outside),
        nn.SiLU(),
    )


class Judge(nn.Module):
    """A small U-Net with heads.

    ``forward`` takes float (B, 3, 64, 64) in [0, 1] and returns logits by head: (B, 3, words) for shape, colour and size,
    (B, words) for background and pattern; ``segments`` (B, 4, 64, 64) over background, left, center and right; and
    ``features`` (B, 128).
    """

    def __init__(self, w: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList([_block(3, w), _block(w, 2 * w, 2), _block(2 * w, 4 * w, 2), _block(4 * w, 6 * w, 2)])
        self.up = nn.ModuleList([_block(10 * w, 4 * w), _block(6 * w, 2 * w), _block(3 * w, w)])
        self.segment = nn.Conv2d(w, 1 + len(POSITIONS), 1)
        self.squeeze = nn.Sequential(nn.Conv2d(6 * w, 3 * w, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.describe = nn.Sequential(nn.Linear(3 * w * 16, 128), nn.LayerNorm(128), nn.SiLU())
        self.name = nn.ModuleDict(
            {h: nn.Linear(128, len(words) * (len(POSITIONS) if h in SLOT_HEADS else 1)) for h, words in HEADS.items()}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # noqa: D102
        kept, x = [], images * 2 - 1
        for block in self.down:
            x = block(x)
            kept.append(x)
        features = self.describe(self.squeeze(x))
        for block, skip in zip(self.up, kept[-2::-1], strict=True):
            x = block(torch.cat([nn.functional.interpolate(x, scale_factor=2.0), skip], dim=1))
        named = {h: layer(features) for h, layer in self.name.items()}
        for head in SLOT_HEADS:
            named[head] = named[head].unflatten(1, (len(POSITIONS), -1))
        return {**named, "segments": self.segment(x), "features": features}


@dataclass(frozen=True)
class Reading:
    """What the judge says of images.

    Attributes:
        words: for each head an array of words, (B, 3) for shape, colour and size (left, center, right), else (B,).
        confidence: the probabilities of these words, same shapes.
        masks: boolean (B, 64, 64), True on any subject.
        features: float32 (B, 128).
    """

    words: dict[str, np.ndarray]
    confidence: dict[str, np.ndarray]
    masks: np.ndarray
    features: np.ndarray


@cache
def load_judge(path: str | Path | None = None) -> Judge:
    """The bundled judge, or one from a safetensors file."""
    from safetensors.torch import load_file

    from .dit import data_folder

    judge = Judge()
    judge.load_state_dict(
        {k: v.float() for k, v in load_file(path or data_folder() / "judge" / "judge.safetensors").items()}
    )
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def read(images: np.ndarray, judge: Judge | None = None, batch_size: int = 64) -> Reading:
    """Read images.

    Args:
        images: uint8 (B, 64, 64, 3).
        judge: another judge than the bundled one.
        batch_size: images at once.

    Raises:
        ValueError: images of another shape or dtype.
    """
    if images.dtype != np.uint8 or images.shape[1:] != (64, 64, 3):
        raise ValueError(f"The judge reads uint8 images (B, 64, 64, 3), not {images.dtype} {images.shape}.")
    judge = judge or load_judge()
    parts = []
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(images[start : start + batch_size]).permute(0, 3, 1, 2).float() / 255
        parts.append(judge(batch))
    found = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    probability = {h: found[h].softmax(-1).max(-1) for h in HEADS}
    return Reading(
        {h: np.array(words)[probability[h].indices.numpy()] for h, words in HEADS.items()},
        {h: p.values.numpy() for h, p in probability.items()},
        (found["segments"].argmax(1) > 0).numpy(),
        found["features"].numpy(),
    )


def prompt_accuracy(reading: Reading, scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Which attributes of each scene the images show.

    Returns:
        Boolean (B,) by attribute: shape, colour and size hold when they do for every subject at its position; position holds
        when there are subjects exactly where there should be; ``all`` when everything does.
    """
    found: dict[str, list[bool]] = {a: [] for a in ("shape", "colour", "size", "position", "background", "pattern")}
    for i, scene in enumerate(scenes):
        slots = {POSITIONS.index(s.position): s for s in scene.subjects}
        for head in SLOT_HEADS:
            found[head].append(all(reading.words[head][i, p] == getattr(s, head) for p, s in slots.items()))
        present = {p for p in range(len(POSITIONS)) if reading.words["shape"][i, p] != "none"}
        found["position"].append(present == set(slots))
        found["background"].append(reading.words["background"][i] == scene.background)
        found["pattern"].append(reading.words["pattern"][i] == scene.pattern)
    result = {a: np.array(v, dtype=bool) for a, v in found.items()}
    return {**result, "all": np.logical_and.reduce(list(result.values()))}
