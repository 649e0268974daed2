"""Semantic correspondence with features of a diffusion transformer (DiTF, arXiv 2505.18584), and its evaluation.

A feature is ``(1 + scale) * LayerNorm(z) + shift``: z the image tokens that enter a block, at one noise level, and scale
and shift the AdaLN modulation of that block's first LayerNorm. The massive channels may be set to zero before the
LayerNorm. Points are x and y in pixels; the centre of the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..cache import describe, key_of
from ..dit import DiT
from ..generation import Renoised
from ..miniflux import rendering, scenes
from ..records import HiddenStates, Modulation
from ..rules import Rule

if TYPE_CHECKING:
    import torch
    import xarray as xr

EPSILON = 1e-6
LARGEST = 2**34
KINDS = ("raw", "norm", "adaln")


@dataclass(frozen=True, eq=False)
class Pair:
    """Two images and points that correspond.

    Attributes:
        source: uint8 (height, width, 3).
        target: uint8 (height, width, 3), perhaps of another size.
        source_points: (n, 2).
        target_points: (n, 2), in the same order.
        box: (height, width) of the target's bounding box, which sets the distance that counts as correct.
        category: what both show.
    """

    source: np.ndarray
    target: np.ndarray
    source_points: np.ndarray
    target_points: np.ndarray
    box: tuple[float, float]
    category: str = ""


def scene_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Return ``count`` pairs of rendered scenes, fixed by ``seed``: one shape, all other attributes different."""
    return [_scene_pair(*couple) for couple in scenes.correspondences(count, seed)]


def _scene_pair(one: scenes.Scene, two: scenes.Scene) -> Pair:
    images = [(rendering.render(s).image * 255).round().astype(np.uint8) for s in (one, two)]
    points = [rendering.key_points(s)[0] for s in (one, two)]
    width, height = np.ptp(points[1], axis=0)
    return Pair(*images, *points, (height, width), one.subjects[0].shape)


def spair(root: str | Path, split: str = "test", category: str | None = None) -> Iterator[Pair]:
    """Iterate over the pairs of SPair-71k, in its folder layout (``PairAnnotation/<split>/*.json``, ``JPEGImages``).

    Args:
        root: the dataset's folder.
        split: "trn", "val" or "test".
        category: for example "cat"; None for all.

    Raises:
        FileNotFoundError: the folder has no annotations of this split and category.
    """
    root = Path(root)
    for path in _annotations(root, split, f"*{category or ''}.json"):
        about = json.loads(path.read_text())
        folder = root / "JPEGImages" / about["category"]
        left, top, right, bottom = about["trg_bndbox"]
        yield Pair(
            _image(folder / about["src_imname"]),
            _image(folder / about["trg_imname"]),
            np.asarray(about["src_kps"], float) + 0.5,
            np.asarray(about["trg_kps"], float) + 0.5,
            (bottom - top, right - left),
            about["category"],
        )


def ap10k(root: str | Path, split: str = "test", category: str | None = None) -> Iterator[Pair]:
    """Iterate over the pairs of AP-10K, in the layout of the correspondence benchmark made from it.

    ``PairAnnotation/<split>/*:<category>.json`` names two files of ``ImageAnnotation``, whose images are in
    ``JPEGImages``. Only points that are visible in both count; pairs without any are omitted.

    Args:
        root: the dataset's folder.
        split: named as its folders, such as "test" or "test_cross_species".
        category: a species; None for all.

    Raises:
        FileNotFoundError: the folder has no annotations of this split and category.
    """
    root = Path(root)
    for path in _annotations(root, split, f"*{':' + category if category else ''}.json"):
        about = json.loads(path.read_text())
        places = [Path(about[f"{end}_json_path"]) for end in ("src", "trg")]
        places = [root / Path(*p.parts[p.parts.index("ImageAnnotation") :]) for p in places]
        ends = [json.loads(p.read_text()) for p in places]
        points = [np.asarray(end["keypoints"], float).reshape(-1, 3) for end in ends]
        seen = (points[0][:, 2] > 0) & (points[1][:, 2] > 0)
        if not seen.any():
            continue
        images = [Path(str(p).replace("ImageAnnotation", "JPEGImages")).with_suffix(".jpg") for p in places]
        yield Pair(
            *(_image(p) for p in images),
            *(p[seen, :2] + 0.5 for p in points),
            (ends[1]["bbox"][3], ends[1]["bbox"][2]),
            path.stem.split(":")[-1],
        )


def _image(path: Path) -> np.ndarray:
    """Return an image as its points were annotated: not rotated, not cropped."""
    from PIL import Image

    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


def _annotations(root: Path, split: str, pattern: str) -> list[Path]:
    paths = sorted((root / "PairAnnotation" / split).glob(pattern))
    if not paths:
        raise FileNotFoundError(
            f"{root} contains no PairAnnotation/{split}/{pattern}; give the unpacked dataset's folder and one of its splits."
        )
    return paths


def resized(images: Sequence[np.ndarray], side: int) -> np.ndarray:
    """Resize images of any sizes to squares, uint8 (n, side, side, 3); relative positions stay the same.

    Args:
        images: uint8 (H, W, 3) each.
        side: in pixels.
    """
    from PIL import Image

    squares = [Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC) for x in images]
    return np.stack([np.asarray(square) for square in squares])


def read(
    dit: DiT,
    images: np.ndarray,
    prompts: str | Sequence[str] = "a picture",
    *,
    layers: int | Sequence[int] | None = None,
    sigma: float = 0.26,
    ensemble: int = 8,
) -> xr.Dataset:
    """Read what features are made of: one forward pass for each noise, averaged over the noises.

    Args:
        dit: a model that images can enter.
        images: uint8 (B, height, width, 3), of one size.
        prompts: descriptions of the images, one for all or one for each.
        layers: blocks, counted over all block stacks; None for all, which takes gigabytes per image for a large model.
        sigma: noise level in (0, 1]; the paper uses 0.26 for FLUX.1.
        ensemble: number of noises; the paper uses 8. Every image has its own, because noise that source and target share
            would reveal the position in the image.

    Returns:
        ``tokens`` (image, layer, token, channel), the image tokens that enter each block; ``shift`` and ``scale``
        (image, layer, channel), the modulation of its first LayerNorm, where it is known; the attribute ``grid``. The
        means are kept in the model's store.

    Raises:
        ValueError: no noise, or no layer.
    """
    if ensemble < 1:
        raise ValueError(f"ensemble={ensemble} has no noise; choose at least 1.")
    texts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
    layers = [layers] if isinstance(layers, int) else range(len(dit.blocks)) if layers is None else layers
    layers = sorted(set(layers))
    if not layers:
        raise ValueError("layers is empty; give at least one, or None for all.")
    call = {"images": images, "prompts": texts, "layers": layers, "sigma": sigma, "ensemble": ensemble}
    call["guidance"] = dit.preset.get("guidance")
    key = key_of({"read": 1, **call, **dit.context})
    rows, columns = dit.grid(images.shape[1:3])
    if dit.store and (stored := dit.store.get(key)):
        return _states(stored[0], layers, (rows, columns))
    reader = copy.copy(dit)
    reader.store = None
    window = {"layers": tuple(layers), "branches": "cond"}
    record = [HiddenStates(point="input", max_bytes=LARGEST, **window), Modulation(**window)]
    one = record[0].size(1, 1, 1, len(dit.blocks), rows * columns, dit.width)
    count, parts = max(1, min(dit.batch_size, 2**30 // one)), []
    for first in range(0, len(images), count):
        part = slice(first, first + count)
        start, total = Renoised(images[part], sigma), None
        for number in range(ensemble):  # summed one by one: the states of all noises at once would fill the memory
            seeds = [ensemble * (first + i) + number for i in range(len(images[part]))]
            run = reader.generate(texts[part], seeds, steps=1, cfg=1.0, start=start, record=record).records
            values = {"tokens": run.hidden_states.value}
            if "value" in run.modulation:
                values |= {name: run.modulation.value.sel(gate=name, drop=True) for name in ("shift", "scale")}
            data = {name: v.isel(step=0, branch=0, drop=True).values for name, v in values.items()}
            total = {name: x + (total[name] if total else 0) for name, x in data.items()}
        parts.append({name: x / ensemble for name, x in total.items()})
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if dit.store:
        dit.store.put(key, arrays, {"model": dit.name, "read": describe(call)})
    return _states(arrays, layers, (rows, columns))


def _states(arrays: dict[str, np.ndarray], layers: list[int], grid: tuple[int, int]) -> xr.Dataset:
    import xarray as xr

    axes = {"tokens": ("image", "layer", "token", "channel")}
    data = {name: (axes.get(name, ("image", "layer", "channel")), values) for name, values in arrays.items()}
    return xr.Dataset(data, coords={"layer": layers}, attrs={"grid": grid})


def features(states: xr.Dataset, layer: int, kind: str = "adaln", discard: Rule | None = None) -> np.ndarray:
    """Return the features of one block.

    Args:
        states: from ``read``.
        layer: the block.
        kind: "raw", the tokens that enter the block; "norm", after a LayerNorm; "adaln", after the block's own AdaLN
            (the paper's feature).
        discard: selection rule of the channels that are set to zero before that, the same in all images (``selected``).

    Returns:
        float32 (image, rows, columns, channels).

    Raises:
        ValueError: an unknown kind, or the block's modulation is not known for this architecture.
    """
    import torch

    if kind not in KINDS:
        raise ValueError(f"Kind '{kind}' is unknown; use {', '.join(KINDS)}.")
    _check_layer(states, layer)
    tokens, *modulation = (
        torch.from_numpy(states[name].sel(layer=layer).values) for name in ("tokens", "shift", "scale") if name in states
    )
    if discard is not None:
        tokens = tokens.masked_fill(torch.from_numpy(selected(states, layer, discard)), 0)
    if kind != "raw":
        tokens = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=EPSILON)
    if kind == "adaln":
        if not modulation or modulation[0].isnan().any():
            raise ValueError(f"The modulation of layer {layer} is not known for this architecture; use 'raw' or 'norm'.")
        shift, scale = (m[:, None] for m in modulation)
        tokens = tokens * (1 + scale) + shift
    return tokens.unflatten(1, tuple(states.attrs["grid"])).numpy()


def selected(states: xr.Dataset, layer: int, rule: Rule) -> np.ndarray:
    """Return the channels that a selection rule selects once for all images, as DiTF's are fixed.

    Scores and energies are means over the images.

    Args:
        states: from ``read``.
        layer: the block.
        rule: selection rule.

    Returns:
        bool (channels,).
    """
    import torch

    _check_layer(states, layer)
    tokens = torch.from_numpy(states.tokens.sel(layer=layer).values)
    upright = tokens * tokens.mean(1, keepdim=True).sign()  # so that the score of all tokens is the mean of the scores
    return rule.mask(upright.flatten(0, 1)[None], layer)[0].numpy()


def _check_layer(states: xr.Dataset, layer: int) -> None:
    if layer not in states.layer:
        raise ValueError(f"Layer {layer} was not read; choose among {', '.join(map(str, states.layer.values))}.")


def pixel_features(images: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return the simplest baseline: the pixels of each patch, minus their mean over the image.

    Args:
        images: uint8 (B, height, width, 3).
        grid: (rows, columns) of patches.

    Returns:
        float32 (B, rows, columns, pixels of a patch * 3).
    """
    count, height, width, _ = images.shape
    patches = images.reshape(count, grid[0], height // grid[0], grid[1], width // grid[1], 3).swapaxes(2, 3)
    values = patches.reshape(count, *grid, -1).astype(np.float32) / 255
    return values - values.mean((1, 2), keepdims=True)


def similarity(
    source: np.ndarray,
    target: np.ndarray,
    points: np.ndarray,
    source_size: tuple[int, int],
    target_size: tuple[int, int],
) -> np.ndarray:
    """Compute the cosine similarity of the source's features at points with the target's at every pixel.

    Both are bilinearly upsampled.

    Args:
        source: (rows, columns, channels).
        target: (rows, columns, channels).
        points: (n, 2) in the source.
        source_size: (height, width) of the source in pixels.
        target_size: (height, width) of the target in pixels.

    Returns:
        float32 (n, height, width).
    """
    import torch

    height, width = target_size
    queries = torch.nn.functional.normalize(_sampled(source, torch.as_tensor(points), source_size), dim=1)
    middles = torch.cartesian_prod(torch.arange(height) + 0.5, torch.arange(width) + 0.5).flip(1)
    similarities = []
    for part in middles.split(16384):  # an image's upsampled features can take gigabytes
        pixels = torch.nn.functional.normalize(_sampled(target, part, target_size), dim=1)
        similarities.append(queries @ pixels.T)
    return torch.cat(similarities, dim=1).unflatten(1, (height, width)).numpy()


def _sampled(values: np.ndarray, points: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return features (rows, columns, channels) at points (n, 2) of an image of that size: (n, channels)."""
    import torch

    height, width = size
    places = 2 * points.float() / torch.tensor([width, height]) - 1
    grid = torch.from_numpy(np.ascontiguousarray(values, np.float32)).permute(2, 0, 1)[None]
    sampled = torch.nn.functional.grid_sample(grid, places[None, None], padding_mode="border", align_corners=False)
    return sampled[0, :, 0].T


def match(
    source: np.ndarray,
    target: np.ndarray,
    points: np.ndarray,
    source_size: tuple[int, int],
    target_size: tuple[int, int],
) -> np.ndarray:
    """Return the target's pixel that is most similar to each point of the source.

    Args:
        source: (rows, columns, channels).
        target: (rows, columns, channels).
        points: (n, 2) in the source.
        source_size: (height, width) of the source in pixels.
        target_size: (height, width) of the target in pixels.

    Returns:
        (n, 2).
    """
    maps = similarity(source, target, points, source_size, target_size)
    rows, columns = np.unravel_index(maps.reshape(len(maps), -1).argmax(1), maps.shape[1:])
    return np.stack([columns, rows], axis=1) + 0.5


def hits(predicted: np.ndarray, truth: np.ndarray, box: tuple[float, float], alpha: float = 0.1) -> np.ndarray:
    """Return which matches are within alpha times the longer side of the target's bounding box.

    Args:
        predicted: (n, 2).
        truth: (n, 2).
        box: (height, width) in pixels.
        alpha: threshold.

    Returns:
        bool (n,).
    """
    return np.linalg.norm(np.asarray(predicted) - truth, axis=1) <= alpha * max(box)


def pck(pairs: Iterable[tuple[Pair, np.ndarray, np.ndarray]], alpha: float | Sequence[float] = 0.1) -> xr.Dataset:
    """Compute the percentage of correct keypoints, by the protocol of SPair-71k.

    Args:
        pairs: pairs, each with the features (rows, columns, channels) of its source and its target; read one by one.
        alpha: one or several thresholds.

    Returns:
        ``hits`` (pair, alpha) and ``points`` (pair), with ``category``: ``hits.sum("pair") / points.sum()`` is the PCK
        per point, ``(hits / points).mean("pair")`` the PCK per image.
    """
    import xarray as xr

    alphas, counts, sizes, categories = np.atleast_1d(alpha), [], [], []
    for pair, one, two in pairs:
        predicted = match(one, two, pair.source_points, pair.source.shape[:2], pair.target.shape[:2])
        counts.append([hits(predicted, pair.target_points, pair.box, a).sum() for a in alphas])
        sizes.append(len(predicted))
        categories.append(pair.category)
    coords = {"alpha": alphas, "category": ("pair", categories)}
    return xr.Dataset({"hits": (("pair", "alpha"), np.array(counts)), "points": ("pair", sizes)}, coords)
