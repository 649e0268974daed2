from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from malib import metrics
from malib.metrics import Estimate


def test_bootstrap_matches_the_normal_interval_and_covers() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(2, 3, size=400)
    found = metrics.bootstrap(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1) and found.high == pytest.approx(
        values.mean() + half, abs=0.1
    )
    hits = sum((e := metrics.bootstrap(rng.normal(0, 1, 30), 500, i)).low < 0 < e.high for i in range(200))
    assert 170 <= hits <= 200


def test_interval_agrees_with_bootstrap_on_every_entry() -> None:
    values = xr.DataArray(np.random.default_rng(1).normal(size=(60, 2, 3)), dims=("prompt", "layer", "rank"))
    found = metrics.interval(values.transpose("layer", "prompt", "rank"))
    one = metrics.bootstrap(values.values[:, 1, 2])
    at = found.isel(layer=1, rank=2)
    assert float(at["mean"]) == pytest.approx(one.mean)
    assert float(at.low) == pytest.approx(one.low, abs=0.03) and float(at.high) == pytest.approx(one.high, abs=0.03)


def test_resample_takes_any_statistic() -> None:
    values = np.arange(50.0)
    found = metrics.resample(lambda chosen: float(np.median(values[chosen])), 50)
    assert found.mean == 24.5 and found.low < 24.5 < found.high and found.n == 50


def test_pairwise_has_the_width_of_a_mean_over_pairs() -> None:
    """J(i, j) = (a_i + a_j) / 2 has the mean of a over pairs, so the interval must be that of the mean of a."""
    a = np.random.default_rng(3).normal(size=80)
    found, plain = metrics.pairwise((a[:, None] + a) / 2), metrics.bootstrap(a)
    assert found.mean == pytest.approx(plain.mean)
    assert found.high - found.low == pytest.approx(plain.high - plain.low, rel=0.1)


@pytest.mark.parametrize("bad", [[], [1.0, np.nan], [[1.0]]])
def test_bootstrap_refuses_what_has_no_mean(bad) -> None:
    with pytest.raises(ValueError, match="vector of numbers"):
        metrics.bootstrap(np.array(bad))


def test_verdicts_need_the_whole_interval() -> None:
    assert metrics.claims()["few_channels"]["rule"] == {"at_least": 10.0}
    assert metrics.verdict("few_channels", Estimate(20, 11, 30, 5)) == "holds"
    assert metrics.verdict("few_channels", Estimate(20, 9, 30, 5)) == "undecided"
    assert metrics.verdict("few_channels", Estimate(5, 4, 9.9, 5)) == "does not hold"
    assert metrics.verdict("few_channels", Estimate(20, 19, 21, 4)) == "undecided"


def test_every_claim_is_complete() -> None:
    for name, claim in metrics.claims().items():
        assert {"notebook", "source", "metric", "branch", "rule", "controls"} <= set(claim), name
        assert set(claim["rule"]) <= {"at_least", "at_most"} and len(claim["rule"]) == 1
