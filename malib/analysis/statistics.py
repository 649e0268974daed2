"""Means and other statistics with their 95 % bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval over ``n`` independent units."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}], n = {self.n}"


def bootstrap(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Compute the mean of independent units and its 95 % percentile interval.

    Args:
        values: (n,) one number for each independent unit (such as a prompt), without NaN.
        resamples: number of bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: no values, or NaN among them.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or np.isnan(values).any():
        content = f"shape {values.shape} with {np.isnan(values).sum()} NaN"
        raise ValueError(f"values has {content}; give a non-empty vector of numbers without NaN.")
    return resample(lambda chosen: values[chosen].mean(), len(values), resamples, seed)


def resample(statistic: Callable[[np.ndarray], float], n: int, resamples: int = 500, seed: int = 0) -> Estimate:
    """Compute any statistic of ``n`` units with its 95 % percentile interval.

    Args:
        statistic: function of the indices of the units drawn.
        n: number of units.
        resamples: number of bootstrap draws.
        seed: of the draws.
    """
    draws = np.random.default_rng(seed).integers(n, size=(resamples, n))
    low, high = _exact(np.nanpercentile([statistic(chosen) for chosen in draws], [2.5, 97.5]))
    return Estimate(float(statistic(np.arange(n))), float(low), float(high), n)


def _exact(ends: np.ndarray) -> np.ndarray:
    """Round off the last digits of an interval's ends: an exact 0 must not count as above or below 0."""
    return ends.round(12) + 0.0  # no -0


def pairwise(matrix: np.ndarray, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Compute the mean of a symmetric measure over all pairs of units, with its interval from resampling the units.

    Args:
        matrix: (n, n), entry (i, j) the measure of units i and j; the diagonal is not used.
        resamples: number of bootstrap draws; pairs of a unit with itself are omitted from each.
        seed: of the draws.
    """

    def mean(chosen: np.ndarray) -> float:
        apart = chosen[:, None] != chosen
        return matrix[np.ix_(chosen, chosen)][apart].mean() if apart.any() else np.nan

    return resample(mean, len(matrix), resamples, seed)


def interval(values: xr.DataArray, over: str = "prompt", resamples: int = 2000, seed: int = 0) -> xr.Dataset:
    """Compute ``mean``, ``low`` and ``high`` of a 95 % bootstrap interval for every entry of the other dimensions.

    Args:
        values: array with the dimension ``over``, without NaN.
        over: the dimension of the independent units.
        resamples: number of bootstrap draws.
        seed: of the draws.
    """
    import xarray as xr

    ordered = values.transpose(over, ...)
    n, rest = ordered.shape[0], ordered.shape[1:]
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples) / n
    means = draws @ ordered.values.reshape(n, -1).astype(np.float64)
    low, high = _exact(np.percentile(means, [2.5, 97.5], axis=0))
    mean = ordered.mean(over)
    bounds = {name: mean.copy(data=bound.reshape(rest)) for name, bound in (("low", low), ("high", high))}
    return xr.Dataset({"mean": mean, **bounds})


def grid_intervals(table: Mapping[tuple, xr.DataArray], *names: str) -> xr.Dataset:
    """Combine a full grid of conditions to one dataset of means and 95 % intervals over the samples.

    Args:
        table: (sample, ...) values for every combination of conditions, by a tuple of their labels.
        names: one name for each position of the tuples; they become the first dimensions.

    Raises:
        KeyError: a combination is missing.
    """
    import xarray as xr

    def nested(prefix: tuple) -> xr.DataArray:
        if len(prefix) == len(names):
            return table[prefix]
        labels = list(dict.fromkeys(key[len(prefix)] for key in table))
        parts = [nested((*prefix, label)) for label in labels]
        return xr.concat(parts, names[len(prefix)], coords="minimal").assign_coords({names[len(prefix)]: labels})

    return interval(nested(()), over="sample")
