"""Distances between images and between sets of images, and measures of local detail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .statistics import Estimate


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the Frechet distance of two sets of features, taken as normal (Heusel et al., arXiv 1706.08500).

    Biased upward for few samples: compare sets of equal size, and prefer ``kernel_distance`` below thousands.

    Args:
        a: (n, d) features.
        b: (m, d) features.

    Raises:
        ValueError: other shapes, or fewer than two rows.
    """
    a, b = _features(a, b)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.linalg.eigvals(first @ second).real.clip(0)
    gap = np.square(a.mean(0) - b.mean(0)).sum()
    return float(gap + np.trace(first) + np.trace(second) - 2 * np.sqrt(roots).sum())


def kernel_distance(a: np.ndarray, b: np.ndarray, resamples: int = 500, seed: int = 0) -> Estimate:
    """Compute the unbiased squared maximum mean discrepancy with the cubic kernel (KID; arXiv 1801.01401).

    About 0 for two sets of one distribution, and then as often negative as positive.

    Args:
        a: (n, d) features.
        b: (m, d) features.
        resamples: bootstrap draws of both sets; pairs of a sample with itself are omitted from each.
        seed: of the draws.

    Raises:
        ValueError: other shapes, or fewer than two rows.
    """
    a, b = _features(a, b)
    within_a, within_b, between = (np.power(x @ y.T / a.shape[1] + 1, 3) for x, y in ((a, a), (b, b), (a, b)))

    def distance(rows: np.ndarray, columns: np.ndarray) -> float:
        inside = [
            k[np.ix_(chosen, chosen)][chosen[:, None] != chosen].mean()
            for k, chosen in ((within_a, rows), (within_b, columns))
        ]
        return sum(inside) - 2 * between[np.ix_(rows, columns)].mean()

    rng = np.random.default_rng(seed)
    draws = [distance(rng.integers(len(a), size=len(a)), rng.integers(len(b), size=len(b))) for _ in range(resamples)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float(distance(np.arange(len(a)), np.arange(len(b)))), float(low), float(high), min(len(a), len(b)))


def _features(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"Features have shapes {a.shape} and {b.shape}; give (n, d) and (m, d) with n, m >= 2.")
    return a, b


DETAILS = ("edges", "texture", "high_frequency")


def detail(images: np.ndarray) -> dict[str, np.ndarray]:
    """Measure local detail of images, whatever they show (our choice: DG measures detail by preference models).

    Args:
        images: uint8 (B, H, W, 3).

    Returns:
        (B,) each, of the luminance in [0, 1]: ``edges``, the mean length of the gradient (per pixel); ``texture``, the
        mean standard deviation in 5 x 5 windows; ``high_frequency``, the standard deviation of the content above half
        the Nyquist frequency (0.25 cycles per pixel).
    """
    from scipy.ndimage import uniform_filter

    grey = images.astype(np.float64) @ (0.299, 0.587, 0.114) / 255
    down, across = np.gradient(grey, axis=(1, 2))
    window = (0, 5, 5)
    variance = uniform_filter(grey**2, window) - uniform_filter(grey, window) ** 2
    height, width = grey.shape[1:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    power = np.abs(np.fft.fft2(grey)) ** 2 / (height * width) ** 2
    return {
        "edges": np.hypot(down, across).mean((1, 2)),
        "texture": np.sqrt(variance.clip(0)).mean((1, 2)),
        "high_frequency": np.sqrt((power * (frequency > 0.25)).sum((1, 2))),
    }


def image_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the root mean squared difference of images.

    Args:
        a: uint8 (B, H, W, 3).
        b: uint8 (B, H, W, 3).

    Returns:
        (B,), in [0, 1].
    """
    gap = a.astype(np.float64) - b.astype(np.float64)
    return np.sqrt(np.square(gap).mean((1, 2, 3))) / 255


def share_of_path(images: np.ndarray, start: np.ndarray, goal: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Measure how much nearer images are to a goal than their start, by root mean squared distance inside of a region.

    Args:
        images: uint8 (B, H, W, 3); ``start`` and ``goal`` likewise.
        start: where the path begins.
        goal: where it ends.
        region: boolean (B, H, W); where it is empty the whole image counts.

    Returns:
        (B,): 1 at the goal, 0 as far from it as the start, negative farther; 0 where start and goal are equal.
    """
    before = distance_inside(start, goal, region)
    return np.where(before > 0, 1 - distance_inside(images, goal, region) / np.maximum(before, 1e-9), 0.0)


def distance_inside(a: np.ndarray, b: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Compute the root mean squared distance of images inside of a region, in gray levels.

    Args:
        a: uint8 (B, H, W, 3).
        b: uint8 (B, H, W, 3).
        region: boolean (B, H, W); where it is empty the whole image counts.

    Returns:
        (B,), in [0, 255].
    """
    where = np.where(region.any((1, 2))[:, None, None], region, True)[..., None]
    gap = np.square(a.astype(np.float64) - b.astype(np.float64)) * where
    return np.sqrt(gap.sum((1, 2, 3)) / (3 * where.sum((1, 2, 3))))


def harmonic_mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the harmonic mean of two measures ``a`` and ``b``; negative values count as 0."""
    a, b = np.maximum(a, 0), np.maximum(b, 0)
    return np.where(a + b > 0, 2 * a * b / np.maximum(a + b, 1e-9), 0.0)


def torchmetrics_pairs(metric: Any) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return a torchmetrics image metric (LPIPS, SSIM, ...) as a function of two stacks of images, one number per pair.

    Args:
        metric: takes float (1, 3, H, W) pairs in [0, 1]; for LPIPS pass ``normalize=True`` when you create it.
    """

    def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        import torch

        first, second = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 for x in (a, b))
        with torch.no_grad():
            return np.array([float(metric(x[None], y[None])) for x, y in zip(first, second, strict=True)])

    return distance
