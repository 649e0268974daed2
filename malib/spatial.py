"""Tokens as places in the image: maps, two-means masks (MAs-DiT, arXiv 2605.13974) and how well masks agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

    from .channels import Rule

FOREGROUND = ("heat", "border")


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of the image tokens of a picture of ``height`` x ``width`` pixels.

    Raises:
        ValueError: no such grid has this number of tokens.
    """
    rows = round((tokens * height / width) ** 0.5)
    columns = tokens // max(rows, 1)
    if rows * columns != tokens:
        raise ValueError(f"{tokens} tokens do not fill a grid of the shape {height} x {width}; pass the size of the image.")
    return rows, columns


def on_grid(values: xr.DataArray, height: int, width: int) -> xr.DataArray:
    """``token`` -> (``row``, ``column``), in the order in which diffusers lays the tokens (row by row)."""
    import xarray as xr

    ordered = values.transpose(..., "token")
    grid = token_grid(ordered.sizes["token"], height, width)
    coords = {name: c for name, c in ordered.coords.items() if "token" not in c.dims}
    return xr.DataArray(ordered.values.reshape(*ordered.shape[:-1], *grid), coords, (*ordered.dims[:-1], "row", "column"))


def min_max(x: Tensor) -> Tensor:
    """Each channel scaled to [0, 1] over the tokens; a constant channel becomes 0.

    Args:
        x: (B, tokens, channels).
    """
    x = x.float()
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    span = high - low
    return (x - low) / span.where(span > 0, span.new_ones(()))


def subspace(x: Tensor, rule: Rule, layer: int) -> tuple[Tensor, Tensor]:
    """The tokens in the channels that a rule selects, each scaled to [0, 1] over the tokens.

    Args:
        x: (B, tokens, channels) hidden states.
        rule: which channels, for each sample its own.
        layer: whose states they are.

    Returns:
        Points (B, tokens, k), with all channels (the others being 0) where the rule has no fixed k; and their mean over the
        selected channels, the heat, (B, tokens).
    """
    try:
        ids = rule.ids(x, layer)
    except TypeError:
        mask = rule.mask(x, layer)[:, None]
        points = min_max(x) * mask
        return points, points.sum(2) / mask.sum(2)
    points = min_max(x.gather(2, ids[:, None].expand(-1, x.shape[1], -1)))
    return points, points.mean(2)


def figure_masks(points: Tensor, grid: tuple[int, int]) -> Tensor:
    """Foreground by two-means and the rule "border" of ``foreground``, on the device and without waiting for it.

    Args:
        points: (B, tokens, D), as of ``subspace``.
        grid: (rows, columns) of the tokens.

    Returns:
        Boolean (B, tokens).
    """
    one = kmeans(points, restarts=2, iterations=12).bool()
    framed = one.view(-1, *grid)
    edge = framed[:, 1:-1, [0, -1]].sum((1, 2)) + framed[:, [0, -1]].sum((1, 2))
    total = 2 * (grid[0] + grid[1]) - 4
    return one ^ (edge > total / 2)[:, None]


def kmeans(x: Tensor, clusters: int = 2, restarts: int = 4, iterations: int = 30, seed: int = 0) -> Tensor:
    """K-means on many sets of points at once, all on the device and without waiting for it.

    K-means++ starts; of the restarts the one with the least inertia counts. The labels of a set depend on its points and the
    seed, not on its place among the sets nor on the device that draws.

    Args:
        x: (B, N, D) points.
        clusters: number of clusters, at least 2.
        restarts: starts for each set.
        iterations: Lloyd steps, always all of them: looking whether a set has converged would stop the device.
        seed: of the starts.

    Returns:
        Labels (B, N), long, in [0, clusters).

    Raises:
        ValueError: fewer than two clusters, or more than points.
    """
    import torch

    if not 2 <= clusters <= x.shape[1]:
        raise ValueError(f"clusters is {clusters}; use 2 to {x.shape[1]}, the number of points.")
    sets, points, _ = x.shape
    x = x.float().repeat_interleave(restarts, 0)
    generator, rows = torch.Generator().manual_seed(seed), torch.arange(len(x), device=x.device)
    first = torch.randint(points, (restarts,), generator=generator).to(x.device).repeat(sets)
    draws = torch.rand(clusters - 1, restarts, generator=generator).to(x.device).repeat(1, sets)
    centres = x[rows, first][:, None]
    for draw in draws:
        away = torch.cdist(x, centres).square().amin(2) + 1e-12  # equal points still leave something to draw from
        share = away.cumsum(1)
        chosen = torch.searchsorted(share, (draw * share[:, -1])[:, None]).clamp(max=points - 1)[:, 0]
        centres = torch.cat([centres, x[rows, chosen][:, None]], dim=1)
    for _ in range(iterations):
        near = torch.nn.functional.one_hot(torch.cdist(x, centres).argmin(2), clusters).to(x.dtype)
        count = near.sum(1)[..., None]
        centres = ((near.mT @ x) / count.clamp(min=1)).where(count > 0, centres)
    distance, labels = torch.cdist(x, centres).square().min(2)
    best = distance.sum(1).view(sets, restarts).argmin(1)
    return labels.view(sets, restarts, points)[rows[:sets], best]


def foreground(labels: np.ndarray, heat: np.ndarray, grid: tuple[int, int], rule: str = "border") -> np.ndarray:
    """Which of two clusters is the foreground.

    Args:
        labels: (..., N) of 0 and 1.
        heat: (..., N), the sum of the normalised channels of each token.
        grid: (rows, columns) of the tokens, for rule "border".
        rule: "heat" for the cluster with the higher mean heat, as published; a channel's sign is arbitrary, and with it this
            rule. "border" (ours) for the cluster that fills less of the picture's border.

    Returns:
        Boolean (..., N), True on the foreground.

    Raises:
        ValueError: an unknown rule.
    """
    one = labels.astype(bool)
    if rule == "heat":
        with np.errstate(invalid="ignore"):
            inside = np.where(one, heat, 0).sum(-1) / one.sum(-1)
            outside = np.where(one, 0, heat).sum(-1) / (~one).sum(-1)
        flip = ~(np.nan_to_num(inside, nan=-np.inf) > np.nan_to_num(outside, nan=-np.inf))
    elif rule == "border":
        flip = one[..., _border(grid)].mean(-1) > 0.5
    else:
        raise ValueError(f"Foreground rule '{rule}' is unknown; use one of {', '.join(FOREGROUND)}.")
    return one ^ flip[..., None]


def by_border(labels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Clusters numbered anew by how much of the border they fill, the most first: 0 is the ground, always.

    Args:
        labels: (N,) integers from 0.
        grid: (rows, columns) of the tokens.
    """
    filled = np.bincount(labels[_border(grid)], minlength=labels.max() + 1)
    return np.argsort(np.argsort(-filled, kind="stable"))[labels]


def _border(grid: tuple[int, int]) -> np.ndarray:
    """Boolean (N,): the outermost tokens."""
    edge = np.zeros(grid, dtype=bool)
    edge[[0, -1]] = edge[:, [0, -1]] = True
    return edge.ravel()


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boolean masks (..., N); 1 when both are empty."""
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    union = (a | b).sum(-1)
    return np.where(union > 0, (a & b).sum(-1) / np.maximum(union, 1), 1.0)


def mask_scores(labels: np.ndarray, heat: np.ndarray, truth: np.ndarray, grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """IoU of two-means clusters with a truth, by how the foreground is chosen.

    Args:
        labels: (sample, ..., N) of 0 and 1.
        heat: (sample, ..., N).
        truth: boolean (sample, N).
        grid: (rows, columns) of the tokens.

    Returns:
        (sample, ...) each: "heat" and "border" as in ``foreground``, "best" with the better of the two labels.
    """
    wide = truth.reshape(len(truth), *(1,) * (labels.ndim - 2), -1)
    found = {rule: iou(foreground(labels, heat, grid, rule), wide) for rule in FOREGROUND}
    return found | {"best": np.maximum(iou(labels.astype(bool), wide), iou(~labels.astype(bool), wide))}


def matched_iou(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean IoU of the regions of a truth with the clusters that fit them best, each cluster used once.

    Args:
        labels: (B, N) cluster labels from 0.
        truth: (B, N) region labels, 0 the background, 1 and up the regions that count.

    Returns:
        (B,) mean over the regions, by the assignment that makes it greatest; the background takes part and does not count.

    Raises:
        ValueError: a truth without any region.
    """
    from scipy.optimize import linear_sum_assignment

    found = []
    for clusters, regions in zip(labels, truth, strict=True):
        if not regions.any():
            raise ValueError("A truth without any region has no matched IoU; leave empty masks out.")
        numbers = range(regions.max() + 1)
        table = np.array([[iou(regions == r, clusters == c) for c in range(clusters.max() + 1)] for r in numbers])
        region, cluster = linear_sum_assignment(table, maximize=True)
        total = sum(table[r, c] for r, c in zip(region, cluster, strict=True) if r)
        found.append(total / regions.max())
    return np.array(found)


def to_pixels(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """(..., N) token values as pictures (..., height, width), by the nearest token."""
    rows, columns = token_grid(values.shape[-1], height, width)
    y, x = np.arange(height) * rows // height, np.arange(width) * columns // width
    return values.reshape(*values.shape[:-1], rows, columns)[..., y[:, None], x]


def to_tokens(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(..., H, W) masks or labels as tokens (..., N): the value that fills most of a token's patch.

    Raises:
        ValueError: the picture is no whole number of patches.
    """
    rows, columns = grid
    height, width = mask.shape[-2:]
    if height % rows or width % columns:
        raise ValueError(f"A picture of {height} x {width} is no whole number of patches on a grid of {rows} x {columns}.")
    patches = mask.reshape(*mask.shape[:-2], rows, height // rows, columns, width // columns)
    counts = np.stack([(patches == v).sum((-3, -1)) for v in range(int(mask.max()) + 1)])
    return counts.argmax(0).reshape(*mask.shape[:-2], rows * columns)
