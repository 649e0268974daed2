"""Numbers with intervals, and the verdicts on the claims of ``data/claims.yaml``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

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
    """Mean of independent units and its 95 % percentile interval.

    Args:
        values: (n,) one number an independent unit (a prompt, say), without NaN.
        resamples: number of bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: no values, or NaN among them.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or np.isnan(values).any():
        raise ValueError(f"bootstrap needs a vector of numbers without NaN, not shape {values.shape}.")
    return resample(lambda chosen: values[chosen].mean(), len(values), resamples, seed)


def resample(statistic: Callable[[np.ndarray], float], n: int, resamples: int = 500, seed: int = 0) -> Estimate:
    """Any statistic of ``n`` units with its 95 % percentile interval; ``statistic`` takes the indices of the units drawn."""
    draws = np.random.default_rng(seed).integers(n, size=(resamples, n))
    low, high = np.nanpercentile([statistic(chosen) for chosen in draws], [2.5, 97.5])
    return Estimate(float(statistic(np.arange(n))), float(low), float(high), n)


def pairwise(matrix: np.ndarray, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean over all pairs of units of a symmetric measure, with its 95 % interval from resampling the units.

    Args:
        matrix: (n, n), entry (i, j) the measure of units i and j; the diagonal is not used.
        resamples: number of bootstrap draws; pairs of a unit with itself are left out of each.
        seed: of the draws.
    """

    def mean(chosen: np.ndarray) -> float:
        apart = chosen[:, None] != chosen
        return matrix[np.ix_(chosen, chosen)][apart].mean() if apart.any() else np.nan

    return resample(mean, len(matrix), resamples, seed)


def interval(values: xr.DataArray, over: str = "prompt", resamples: int = 2000, seed: int = 0) -> xr.Dataset:
    """``mean``, ``low`` and ``high`` of a 95 % bootstrap interval over one dimension, for every entry of the others."""
    import xarray as xr

    moved = values.transpose(over, ...)
    n, rest = moved.shape[0], moved.shape[1:]
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples) / n
    means = draws @ moved.values.reshape(n, -1).astype(np.float64)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    mean = moved.mean(over)
    bounds = {name: mean.copy(data=bound.reshape(rest)) for name, bound in (("low", low), ("high", high))}
    return xr.Dataset({"mean": mean, **bounds})


@cache
def claims() -> dict[str, dict[str, Any]]:
    """The claims as written down before the runs."""
    import yaml

    from .dit import data_folder

    return yaml.safe_load((data_folder() / "claims.yaml").read_text())


def rule(claim: str) -> str:
    """A claim's decision rule in words, e.g. "at least 10"."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in claims()[claim]["rule"].items())


def verdict(claim: str, estimate: Estimate) -> str:
    """Apply a claim's decision rule: "holds", "does not hold" or "undecided" (always so below five units).

    Raises:
        KeyError: an unknown claim.
    """
    limits = claims()[claim]["rule"]
    if estimate.n < 5:
        return "undecided"
    if "at_least" in limits:
        above, below = estimate.low > limits["at_least"], estimate.high < limits["at_least"]
    else:
        above, below = estimate.high < limits["at_most"], estimate.low > limits["at_most"]
    return "holds" if above else "does not hold" if below else "undecided"
