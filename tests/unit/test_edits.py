from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from malib import Channels, Disrupt, DoseMatched, EnergyMatched, Images, RandomK, TopK, Transport
from malib.analysis import control_edits
from malib.hooks import Event
from malib.rules import random_frame
from malib.window import Run

from ..closeness import assert_apart, assert_close

AT = Event(0, "cond", 0, "image", "output")


def states(samples: int = 2, tokens: int = 6, channels: int = 10) -> torch.Tensor:
    return torch.randn(samples, tokens, channels, generator=torch.Generator().manual_seed(0))


def changed(x: torch.Tensor, *edits: Disrupt) -> torch.Tensor:
    """The edits in order on a copy, as at the output of one block."""
    x = x.clone()
    for edit in edits:
        edit.start(Run(len(x), 1, (None,)))(AT, x)
    return x


@pytest.mark.parametrize("mode", ["zero", "mean", "scale"])
def test_only_the_named_entries_change_and_exactly_so(mode: str) -> None:
    x, ids, tokens = states(), [1, 7], [0, 2, 5]
    found = changed(x, Disrupt(Channels(tuple(ids)), mode=mode, factor=-0.5, tokens=tuple(tokens)))
    by_hand = x.clone()
    for sample in range(2):
        for channel in ids:
            values = x[sample, tokens, channel]
            new = {"zero": values * 0, "mean": values.mean().expand(3), "scale": values * -0.5}[mode]
            by_hand[sample, tokens, channel] = new
    assert torch.equal(found, by_hand)


def test_mean_keeps_what_all_tokens_share() -> None:
    x = states()
    x[..., 3] = 40.0
    assert torch.equal(changed(x, Disrupt(Channels((3,)), mode="mean")), x)


def test_the_rotated_removal_has_the_norm_of_zeroing_in_every_token() -> None:
    x, rule = states(3, 8, 64), TopK(4)
    gone, turned = x - changed(x, Disrupt(rule)), x - changed(x, Disrupt(rule, mode="rotate", seed=5))
    assert_close(turned.norm(dim=2), gone.norm(dim=2))
    assert torch.linalg.matrix_rank(turned.flatten(0, 1)) == 4
    assert (turned * gone).sum().abs() < 0.5 * gone.square().sum()
    frame = random_frame(64, 4, 5, 0)
    assert_close(turned @ frame @ frame.T, turned)
    assert_apart(turned, x - changed(x, Disrupt(rule, mode="rotate", seed=6)))


def test_edits_compose_in_the_given_order() -> None:
    """The second rule sees what the first has left: zeroing the top 2 twice removes the top 4, as one edit would not."""
    x = states(1)
    twice, once = changed(x, Disrupt(TopK(2)), Disrupt(TopK(2))), changed(x, Disrupt(TopK(2)))
    assert ((twice == 0).all(1).sum(), (once == 0).all(1).sum()) == (4, 2)
    halved_then_zero = changed(x, Disrupt(Channels((1,)), mode="scale", factor=0.5), Disrupt(Channels((1, 2))))
    assert torch.equal(halved_then_zero, changed(x, Disrupt(Channels((1, 2)))))


def test_steps_and_branches_outside_the_window_are_left_alone() -> None:
    x = states()
    edit = Disrupt(TopK(2), steps=(1,), branches=("uncond",))
    listener, before = edit.start(Run(2, 2, (None,))), x.clone()
    for step, branch in ((0, "cond"), (1, "cond"), (0, "uncond")):
        listener(Event(step, branch, 0, "image", "output"), x)
    assert torch.equal(x, before)
    listener(Event(1, "uncond", 0, "image", "output"), x)
    assert (x == 0).any()


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ValueError, match="Mode 'erase'"):
        Disrupt(TopK(2), mode="erase")
    with pytest.raises(ValueError, match="tokens 0 to 5"):
        changed(states(), Disrupt(TopK(2), tokens=(4, 6)))
    with pytest.raises(TypeError, match="fixed k"):
        changed(states(), Disrupt(EnergyMatched(2), mode="rotate"))
    with pytest.raises(TypeError, match="give it a rule"):
        Disrupt(3)
    assert changed(states(), Disrupt(RandomK(3))).eq(0).all(1).sum() == 6


def test_controls_match_the_top_in_number_energy_or_norm() -> None:
    x = states(3, 8, 64)
    x[..., :4] *= 20
    found = {name: x - changed(x, *variants[0]) for name, variants in control_edits(4, draws=2).items()}
    assert list(found) == ["top", "equal energy", "random", "bottom", "equal norm"]
    energy = {name: gone.square().sum((1, 2)) for name, gone in found.items()}
    assert all((found[n] != 0).any(1).sum(1).eq(4).all() for n in ("top", "bottom", "random"))
    assert_close(energy["equal norm"], energy["top"])
    assert (
        energy["equal energy"] < energy["top"]
    ).all()  # sixty ordinary channels hold less than four of twenty times the size
    assert (energy["bottom"] < 0.1 * energy["top"]).all()
    assert [len(v) for v in control_edits(4, draws=2).values()] == [1, 2, 2, 1, 2]
    (first,), (second,) = control_edits(4, draws=2, layers=3)["random"]
    assert first != second and first.layers == second.layers == (3,)


@pytest.mark.parametrize("mode", ["zero", "mean", "scale", "rotate"])
def test_the_amount_is_the_squared_norm_of_the_change_of_a_token(mode: str) -> None:
    x = states()
    listener, after = Disrupt(TopK(3), mode=mode, factor=0.5, tokens=(0, 2)).start(Run(2, 1, (None,))), x.clone()
    listener(AT, after)
    listener.flush()
    dose = listener.dataset().dose
    assert dose.dims == ("sample", "step", "branch", "layer")
    assert_close(dose.values.ravel(), (after - x).square().sum(2).mean(1))
    assert (dose > 0).all()


def test_a_transport_of_equal_energy_changes_as_much_as_the_top_would() -> None:
    """Source and target share their large channels: what changes in them is small, and few others change as much."""
    x = states(2, 6, 40)
    source = states(5, 6, 40)[:2]
    x[..., :3], source[..., :3] = 30 + 0.5 * x[..., :3], 30 + 0.5 * source[..., :3]
    tokens = np.array([1, 1, 0, 0, 1, 0])
    fields = {"source": "a star", "mask": tokens}
    taken, doses = {}, {}
    for name, rule in (("top", TopK(3)), ("energy", EnergyMatched(3))):
        listener = Transport(rule, **fields).start(Run(2, 1, (None,), (2, 3)))
        listener(AT, x.clone(), {"source": source})
        listener.flush()
        taken[name] = listener.dataset().mask.values[:, 0, 0, 0]
        doses[name] = listener.dataset().dose.values.ravel()
    assert not (taken["top"] & taken["energy"]).any() and (taken["energy"].sum(1) < 12).all()
    largest = ((source - x).square()[:, tokens == 1].sum(1) / 6).amax(1).numpy()
    assert (doses["energy"] >= doses["top"]).all() and (doses["energy"] <= doses["top"] + largest).all()


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_matched_transport_changes_at_every_site_what_the_other_run_changed(strength: float) -> None:
    """To the half of a channel, and for each sample its own, in whatever batches they come."""
    x, source, tokens = states(8, 6, 40)[:4], states(8, 6, 40)[4:], np.array([1, 1, 0, 0, 1, 0])
    wanted = xr.DataArray(
        np.linspace(0.5, 4, 8, dtype=np.float32).reshape(4, 1, 1, 2),
        dims=("sample", "step", "branch", "layer"),
        coords={"step": [0], "branch": ["cond"], "layer": [0, 5]},
    )
    edit = Transport(DoseMatched(3, doses=wanted), "a star", mask=tokens, strength=strength)
    listener = edit.start(Run(4, 1, (None,) * 6, (2, 3)))
    for part in (slice(0, 3), slice(3, 4)):
        for layer in (0, 5):
            listener(Event(0, "cond", layer, "image", "output"), x[part].clone(), {"source": source[part]})
        listener.flush()
    found = listener.dataset()
    changed = strength**2 * (source - x).square()[:, tokens == 1].sum(1) / 6
    assert (abs(found.dose - wanted).values.reshape(4, 2) <= changed.amax(1, keepdim=True).numpy() / 2 + 1e-5).all()
    assert not found.mask.values[:, 0, 0].any(1)[np.arange(4)[:, None], TopK(3).ids(source, 0)].any()


def test_a_matched_transport_needs_the_other_runs_amounts_at_its_sites() -> None:
    with pytest.raises(TypeError, match="give it records"):
        DoseMatched(3)
    sites = {"step": [1], "branch": ["cond"], "layer": [0]}
    there = xr.DataArray(np.ones((2, 1, 1, 1)), sites, ("sample", *sites))
    with pytest.raises(ValueError, match="changed nothing at step 0, branch cond"):
        changed(states(), Disrupt(DoseMatched(3, doses=there)))
    with pytest.raises(ValueError, match="changed nothing at layer 0"):
        changed(states(), Disrupt(DoseMatched(3, doses=there.assign_coords(step=[0], layer=[4]))))


def test_a_matched_rule_is_for_the_samples_of_its_run_and_for_edits_alone() -> None:
    sites = {"step": [0], "branch": ["cond"], "layer": [0]}
    one, two, three = (xr.DataArray(np.ones((n, 1, 1, 1)), sites, ("sample", *sites)) for n in (1, 2, 3))
    with pytest.raises(ValueError, match="3 doses were given for 2 prompts"):
        changed(states(), Disrupt(DoseMatched(3, doses=three)))
    assert torch.equal(
        changed(states(), Disrupt(DoseMatched(3, doses=one))), changed(states(), Disrupt(DoseMatched(3, doses=two)))
    )
    with pytest.raises(TypeError, match="use EnergyMatched"):
        DoseMatched(3, doses=two).mask(states(), 0)
    assert DoseMatched(3, doses=two) != DoseMatched(3, doses=two.copy())


def test_what_is_no_source_is_refused() -> None:
    for source in (np.zeros((1, 8, 8, 3), np.uint8), None, 3):
        with pytest.raises(TypeError, match="give a prompt"):
            Transport(TopK(1), source)
    with pytest.raises(TypeError, match="open_image"):
        Images("photo.png")
    with pytest.raises(ValueError, match="steps is empty"):
        Disrupt(TopK(1), steps=())


def moved(x: torch.Tensor, source: torch.Tensor, **fields) -> tuple[torch.Tensor, torch.Tensor]:
    """A transport at the output of one block, and the channels that it took."""
    found = x.clone()
    listener = Transport(source="a star", **fields).start(Run(len(x), 1, (None,), (2, 3)))
    listener(AT, found, {"source": source, "target": x})
    listener.flush()
    return found, torch.from_numpy(listener.dataset().mask.values[:, 0, 0, 0])


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("select_on", ["source", "target", "union"])
def test_transport_is_the_papers_formula(strength: float, select_on: str) -> None:
    x, source = states(), states(3)[1:] * 2 + 1
    p = np.array([[1, 0, 1, 0.5, 0, 0], [0, 0, 0, 1, 0.25, 1]])
    found, taken = moved(x, source, channels=TopK(3), mask=p, select_on=select_on, strength=strength)
    m = torch.zeros(2, 10)
    for sample in range(2):
        for name, states_of in (("source", source), ("target", x)):
            if select_on in (name, "union"):
                m[sample, states_of[sample].mean(0).abs().topk(3).indices] = 1
    weight = strength * torch.from_numpy(p).float()[:, :, None] * m[:, None]
    assert torch.equal(taken, m.bool())
    assert_close(found, x * (1 - weight) + source * weight)
    assert torch.equal(found[weight == 0], x[weight == 0]) and torch.equal(found[weight == 1], source[weight == 1])


def test_transport_finds_the_figure_of_source_or_target() -> None:
    """Two planted figures on a 4 x 4 grid: inside, two channels are large."""
    grids = np.zeros((2, 4, 4), dtype=bool)
    grids[0, 1:3, 1:3] = grids[1, 0:2, 1] = True
    figures = torch.from_numpy(grids.reshape(2, 1, 16))
    base = torch.randn(1, 16, 10, generator=torch.Generator().manual_seed(0)) * 0.1
    lifted = base + 5
    x, source = (torch.where(f[..., None] & (torch.arange(10) < 2), lifted, base) for f in figures)
    for mask, where in (("source", figures[1]), ("target", figures[0]), ("union", figures[0] | figures[1])):
        listener = Transport(Channels((0, 1)), "a star", mask=mask).start(Run(1, 1, (None,), (64, 64)))
        found = x.clone()
        listener(AT, found, {"source": source, "target": x})
        listener.flush()
        assert np.array_equal(listener.dataset().tokens.values[:, 0, 0, 0], where.numpy())
        assert torch.equal(found[where][:, :2], source[where][:, :2]) and torch.equal(found[~where], x[~where])


def test_pictures_and_masks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        Images(np.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="2 images but 3 prompts"):
        Images(np.zeros((2, 8, 8, 3), np.uint8), ("a", "b", "c"))
    with pytest.raises(ValueError, match="Route 'teleport'"):
        Images(np.zeros((2, 8, 8, 3), np.uint8), route="teleport")
    with pytest.raises(ValueError, match="numbers from 0 to 1"):
        Transport(TopK(1), "a", mask=np.full(6, 2.0))
    with pytest.raises(ValueError, match="select_on='mine'"):
        Transport(TopK(1), "a", select_on="mine")
    with pytest.raises(TypeError, match="give it a rule"):
        Transport(3, "a")


def test_the_targets_figure_is_that_of_the_undisturbed_target() -> None:
    """A second block sees a target that holds the source's values already; its own figure must not be lost."""
    grids = np.zeros((2, 6, 6), dtype=bool)
    grids[0, 1:3, 1:3] = grids[1, 3:5, 3:5] = True
    figures = torch.from_numpy(grids.reshape(2, 1, 36))
    base = torch.randn(1, 36, 10, generator=torch.Generator().manual_seed(0)) * 0.1
    x, source = (torch.where(f[..., None] & (torch.arange(10) < 2), base + 5, base) for f in figures)
    edit = Transport(Channels((0, 1)), "a star", mask="union")
    assert edit.auxiliary == ("source", "target") and Transport(TopK(1), "a", mask="source").auxiliary == ("source",)
    assert Transport(TopK(1), "a", select_on="target").auxiliary == ("source", "target")
    listener, batched = edit.start(Run(1, 1, (None,) * 3, (64, 64))), x.clone()
    for layer in range(3):
        listener(Event(0, "cond", layer, "image", "output"), batched, {"source": source, "target": x})
    listener.flush()
    tokens = listener.dataset().tokens.values[0, 0, 0]
    assert (tokens == (figures[0] | figures[1]).numpy()).all()
