"""Masks of tokens and pixels: which cluster is the foreground, and how well masks agree."""

from __future__ import annotations

import numpy as np

from ..spatial import token_grid

FOREGROUND = ("heat", "border")


def foreground(labels: np.ndarray, heat: np.ndarray, grid: tuple[int, int], rule: str = "border") -> np.ndarray:
    """Return which of two clusters is the foreground.

    Args:
        labels: (..., N) of 0 and 1.
        heat: (..., N), the sum of each token's normalised channels.
        grid: (rows, columns) of the tokens, for rule "border".
        rule: "heat" for the cluster with the higher mean heat, as published; it depends on the arbitrary signs of the
            channels. "border" (ours) for the cluster that fills less of the image's border.

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
        raise ValueError(f"Foreground rule '{rule}' is unknown; use {' or '.join(FOREGROUND)}.")
    return one ^ flip[..., None]


def relabel_by_border(labels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Renumber clusters by their share of the border, largest first: 0 is always the background.

    Args:
        labels: (N,) integers from 0.
        grid: (rows, columns) of the tokens.
    """
    filled = np.bincount(labels[_border(grid)], minlength=labels.max() + 1)
    return np.argsort(np.argsort(-filled, kind="stable"))[labels]


def _border(grid: tuple[int, int]) -> np.ndarray:
    """Return the outermost tokens as a boolean mask (N,)."""
    edge = np.zeros(grid, dtype=bool)
    edge[[0, -1]] = edge[:, [0, -1]] = True
    return edge.ravel()


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the intersection over union of boolean masks ``a`` and ``b`` (..., N); 1 when both are empty."""
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    union = (a | b).sum(-1)
    return np.where(union > 0, (a & b).sum(-1) / np.maximum(union, 1), 1.0)


def mask_scores(labels: np.ndarray, heat: np.ndarray, truth: np.ndarray, grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the IoU of two-means clusters with a truth, by how the foreground is chosen.

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
    """Return the mean IoU of the regions of a truth with the clusters that fit them best, each cluster used once.

    Args:
        labels: (B, N) cluster labels from 0.
        truth: (B, N) region labels, 0 the background, 1 and up the regions that count.

    Returns:
        (B,) mean over the regions, by the assignment that maximises it; the background takes part and does not count.

    Raises:
        ValueError: a truth without any region.
    """
    from scipy.optimize import linear_sum_assignment

    found = []
    for clusters, regions in zip(labels, truth, strict=True):
        if not regions.any():
            raise ValueError("A truth without any region has no matched IoU; omit empty masks.")
        numbers = range(regions.max() + 1)
        table = np.array([[iou(regions == r, clusters == c) for c in range(clusters.max() + 1)] for r in numbers])
        region, cluster = linear_sum_assignment(table, maximize=True)
        total = sum(table[r, c] for r, c in zip(region, cluster, strict=True) if r)
        found.append(total / regions.max())
    return np.array(found)


def to_pixels(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Upsample token values (..., N) to images (..., height, width) by the nearest token.

    Args:
        values: (..., N).
        height: in pixels.
        width: in pixels.
    """
    rows, columns = token_grid(values.shape[-1], height, width)
    y, x = np.arange(height) * rows // height, np.arange(width) * columns // width
    return values.reshape(*values.shape[:-1], rows, columns)[..., y[:, None], x]


def to_tokens(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Reduce masks or labels (..., H, W) to tokens (..., N): the value that fills most of a token's patch.

    Args:
        mask: (..., H, W), boolean or integers from 0.
        grid: (rows, columns) of the tokens.

    Raises:
        ValueError: the image is not a whole number of patches.
    """
    rows, columns = grid
    height, width = mask.shape[-2:]
    if height % rows or width % columns:
        raise ValueError(
            f"An image of {height} x {width} does not fill a grid of {rows} x {columns} with whole patches; use multiples."
        )
    patches = mask.reshape(*mask.shape[:-2], rows, height // rows, columns, width // columns)
    counts = np.stack([(patches == v).sum((-3, -1)) for v in range(int(mask.max()) + 1)])
    return counts.argmax(0).reshape(*mask.shape[:-2], rows * columns)
