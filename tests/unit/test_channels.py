from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import xarray as xr

from malib import analysis, rules
from malib.rules import BottomK, Channels, EnergyMatched, RandomK, TopK

from ..closeness import assert_close


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 50, 24) * torch.linspace(0.1, 4, 24) + torch.randn(24)


def test_scores_on_a_case_by_hand() -> None:
    x = torch.tensor([[[1.0, -2.0], [-1.0, -4.0]]])
    assert rules.score(x).tolist() == [[0.0, 3.0]] and rules.score(x, "magnitude").tolist() == [[1.0, 3.0]]


def test_top_and_bottom_equal_sorting(x: torch.Tensor) -> None:
    for kind in rules.KINDS:
        values = rules.score(x, kind)
        for i, row in enumerate(values):
            order = sorted(range(24), key=lambda c: -row[c])
            assert TopK(5, kind).ids(x, 0)[i].tolist() == order[:5]
            assert set(BottomK(5, kind).ids(x, 0)[i].tolist()) == set(order[-5:])


def test_random_is_the_same_for_all_samples_differs_by_seed_and_layer_and_may_avoid_the_top(x: torch.Tensor) -> None:
    ids = RandomK(6, seed=1).ids(x, 2)
    assert (ids == ids[0]).all() and len(set(ids[0].tolist())) == 6
    assert ids.tolist() != RandomK(6, seed=2).ids(x, 2).tolist() != RandomK(6, seed=2).ids(x, 3).tolist()
    top, rest = TopK(8).ids(x, 0), RandomK(16, seed=1, without_top=8).ids(x, 0)
    for a, b in zip(top, rest, strict=True):
        assert not set(a.tolist()) & set(b.tolist())


def test_energy_matched_reaches_the_energy_with_no_channel_to_spare(x: torch.Tensor) -> None:
    mask, energy = EnergyMatched(2, seed=3).mask(x, 0), x.square().sum(1)
    top = TopK(2).ids(x, 0)
    goal = energy.gather(1, top).sum(1)
    removed = (energy * mask).sum(1)
    assert not mask.gather(1, top).any()
    assert (removed >= goal).all()
    order = rules._random_order(x, 3, 0)[0].argsort(descending=True).tolist()
    for i in range(len(x)):
        total, chosen = 0.0, set()
        for c in order:
            if total >= goal[i]:
                break
            if c not in top[i]:
                total, chosen = total + float(energy[i, c]), chosen | {c}
        assert set(mask[i].nonzero().flatten().tolist()) == chosen


def test_a_rule_on_a_set_averages_scores_not_signed_means() -> None:
    """Channel 1 is +5 in one sample and -5 in the other: its score is 5 in both, though its mean is zero."""
    scores = xr.DataArray([[[1.0, 5.0, 2.0]], [[1.0, 5.0, 2.5]]], dims=("sample", "layer", "channel"), coords={"layer": [4]})
    assert TopK(2).on(scores) == Channels({4: (1, 2)})


def test_jaccard_by_hand() -> None:
    assert analysis.jaccard(torch.tensor([1, 2, 3]), torch.tensor([3, 4, 5])).item() == pytest.approx(1 / 5)
    assert analysis.jaccard(torch.tensor([[1, 2], [1, 2]]), torch.tensor([[2, 1], [3, 4]])).tolist() == [1.0, 0.0]


def test_random_overlap_equals_simulation() -> None:
    rng = np.random.default_rng(0)
    draws = [[set(rng.permutation(20)[:5].tolist()) for _ in range(2)] for _ in range(4000)]
    simulated = np.mean([len(a & b) / len(a | b) for a, b in draws])
    assert analysis.random_overlap(5, 20) == pytest.approx(simulated, abs=0.01)


def test_overlap_equals_a_loop_over_pairs() -> None:
    rng = np.random.default_rng(1)
    ids = np.stack([[rng.permutation(12)[:6] for _ in range(2)] for _ in range(4)])
    found = analysis.overlap(xr.DataArray(ids, dims=("prompt", "layer", "rank")), "prompt", 3)
    assert found.dims == ("prompt", "other", "layer")
    for layer in range(2):
        sets = [set(ids[p, layer, :3].tolist()) for p in range(4)]
        for i, j in product(range(4), range(4)):
            assert float(found[i, j, layer]) == pytest.approx(len(sets[i] & sets[j]) / len(sets[i] | sets[j]))
        pairs = [len(a & b) / len(a | b) for i, a in enumerate(sets) for b in sets[:i]]
        assert float(analysis.off_diagonal(found)[layer]) == pytest.approx(np.mean(pairs))
    with pytest.raises(ValueError, match="at least two"):
        analysis.overlap(xr.DataArray(ids[:1], dims=("prompt", "layer", "rank")), "prompt", 3)
    with pytest.raises(ValueError, match="6 recorded ranks"):
        analysis.overlap(xr.DataArray(ids, dims=("prompt", "layer", "rank")), "prompt", 7)


def test_variance_shares_on_known_effects() -> None:
    """y = 3 a + 4 b + 2 ab with orthogonal +-1 effects: variances 9, 16 and 4 of 29."""
    a, b, c = (np.array([-1.0, 1.0]) for _ in range(3))
    y = 3 * a[:, None, None] + 4 * b[None, :, None] + 2 * a[:, None, None] * b[None, :, None] + 0 * c
    shares = analysis.variance_shares(xr.DataArray(y, dims=("a", "b", "c")), ("a", "b", "c"))
    expected = {"a": 9 / 29, "b": 16 / 29, "a x b": 4 / 29}
    for source in shares.source.values:
        assert float(shares.sel(source=source)) == pytest.approx(expected.get(source, 0.0), abs=1e-12)


def test_variance_shares_sum_to_one_on_noise() -> None:
    values = xr.DataArray(np.random.default_rng(2).normal(size=(3, 4, 5, 7)), dims=("a", "b", "c", "channel"))
    shares = analysis.variance_shares(values, ("a", "b", "c"))
    assert shares.sizes == {"source": 7, "channel": 7}
    assert_close(shares.sum("source"), 1)


def test_crossed_puts_every_sample_in_its_cell() -> None:
    pairs = list(product(["b", "a"], [7, 3, 5]))
    data = xr.Dataset(
        {"v": ("sample", np.arange(6.0))},
        coords={"prompt": ("sample", [p for p, _ in pairs]), "seed": ("sample", [s for _, s in pairs])},
    )
    grid = analysis.crossed(data)
    assert [float(grid.v.sel(prompt=p, seed=s)) for p, s in pairs] == list(range(6))
    assert list(grid.prompt.values) == ["b", "a"]
    with pytest.raises(ValueError, match="not a full grid"):
        analysis.crossed(data.isel(sample=slice(5)))


def test_sun_criterion_counts_what_exceeds_both_thresholds() -> None:
    values = np.ones((4, 600))
    values[1, 3], values[2, 5] = -2000, 900
    found = analysis.sun_criterion(xr.DataArray(values, dims=("token", "channel")))
    assert int(found.massive) == 1 and float(found.ratio) == 2000
    assert int(analysis.sun_criterion(xr.DataArray(values * 1e-2, dims=("token", "channel"))).massive) == 0


def test_leading_curve_and_percentile() -> None:
    values = xr.DataArray([[4.0, 1.0, 2.0, 8.0, 2.0]], dims=("layer", "channel"), coords={"layer": [0]})
    assert analysis.top_ratios(values, (1, 2)).values.tolist() == [[4.0, 2.0]]
    assert analysis.energy_curve(values).values.tolist() == [[8 / 17, 12 / 17, 14 / 17, 16 / 17, 1.0]]
    assert analysis.percentile(values).values.tolist() == [[0.75, 0.0, 0.375, 1.0, 0.375]]


def test_pick_takes_each_layers_own_channels() -> None:
    coords = {"layer": [0, 1, 2], "block": ("layer", list("abc"))}
    values = xr.DataArray(np.arange(24.0).reshape(2, 3, 4), dims=("step", "layer", "channel"), coords=coords)
    found = analysis.select_channels(values, {0: (3, 1), 2: (0, 2)})
    assert found.dims == ("step", "layer", "rank") and list(found.block.values) == ["a", "c"]
    assert found.values.tolist() == [[[3, 1], [8, 10]], [[15, 13], [20, 22]]]


@pytest.mark.parametrize("make", [lambda: TopK(0), lambda: TopK(3, "median"), lambda: rules.score(torch.ones(1, 1, 1), "x")])
def test_bad_rules_are_refused(make) -> None:
    with pytest.raises(ValueError, match=r"channel|kind"):
        make()


def test_chance_gives_a_lead_to_width() -> None:
    drawn = np.abs(np.random.default_rng(0).standard_normal((4000, 128)))
    assert analysis.random_ratio(128) == pytest.approx((drawn.max(1).mean() / np.median(drawn)), rel=0.02)
    assert analysis.random_ratio(384) > analysis.random_ratio(128)


def test_growth_follows_the_lead_and_the_ids() -> None:
    """Two channels of twelve swap places: channel 0 leads at the end with ten times the median."""
    scores = np.ones((3, 2, 12))
    scores[0, :, 5], scores[1, :, 5], scores[2, :, 0] = 4.0, 7.0, 10.0
    grown = analysis.emergence(
        xr.DataArray(scores, dims=("train_step", "layer", "channel"), coords={"train_step": [0, 5, 9]}), 1
    )
    assert grown["top_ratio"].values.tolist() == [4.0, 7.0, 10.0]
    assert grown["overlap"].values.tolist() == [0.0, 0.0, 1.0] and grown.top.values.tolist() == [[0], [0]]
