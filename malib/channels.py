"""Scores, selection rules and agreement between selections.

The score of a channel for one sample, step, branch and layer is ``|mean over image tokens|`` (MAs-DiT, arXiv 2605.13974);
the variant ``mean over tokens of |.|`` is kept as a second kind. A selection is a rule, resolved when it is applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

AXES = ("sample", "step", "branch", "layer")
KINDS = ("mean", "magnitude")


def score(x: Tensor, kind: str = "mean") -> Tensor:
    """Channel scores of hidden states.

    Args:
        x: (samples, tokens, channels).
        kind: "mean" for |mean over tokens|, "magnitude" for the mean over tokens of |x|.

    Returns:
        (samples, channels), float32.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "mean":
        return x.float().mean(1).abs()
    if kind == "magnitude":
        return x.float().abs().mean(1)
    raise ValueError(f"Score kind '{kind}' is unknown; use one of {', '.join(KINDS)}.")


@dataclass(frozen=True)
class Rule:
    """A selection of channels, resolved per sample at the site where it is applied.

    ``weighs`` says whether it looks at what the edit would change; ``samples`` for how many samples it was made, None where
    that does not matter.
    """

    weighs: ClassVar[bool] = False
    samples: ClassVar[int | None] = None

    def mask(self, x: Tensor, layer: int, change: Tensor | None = None) -> Tensor:
        """Boolean (samples, channels).

        Args:
            x: hidden states (samples, tokens, channels).
            layer: the site's.
            change: what the edit would change in each entry if it were selected, as ``x``; None for ``x`` itself.
        """
        ids = self.ids(x, layer)
        return x.new_zeros(x.shape[0], x.shape[2], dtype=bool).scatter_(1, ids, True)

    def ids(self, x: Tensor, layer: int) -> Tensor:
        """(samples, k) channel ids, in the rule's own order."""
        raise self._varying()

    def at(self, step: int, branch: str, rows: slice) -> Rule:
        """The rule for some samples of a run, at one step and branch: itself, unless it looks something up there."""
        return self

    @property
    def fixed_k(self) -> int:
        """How many channels it selects, at most.

        Raises:
            TypeError: their number varies from sample to sample.
        """
        raise self._varying()

    def _varying(self) -> TypeError:
        return TypeError(f"{type(self).__name__} selects a varying number of channels; use a rule with a fixed k here.")


@dataclass(frozen=True)
class _Ranked(Rule):
    k: int
    kind: str = "mean"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}; a selection needs at least one channel.")
        if self.kind not in KINDS:
            raise ValueError(f"Score kind '{self.kind}' is unknown; use one of {', '.join(KINDS)}.")

    @property
    def fixed_k(self) -> int:
        return self.k


@dataclass(frozen=True)
class TopK(_Ranked):
    """The massive channels: the ``k`` of highest score, for each sample, step, branch and layer its own."""

    def ids(self, x: Tensor, layer: int) -> Tensor:  # noqa: D102
        return score(x, self.kind).topk(_fits(self.k, x), dim=1).indices

    def on(self, scores: xr.DataArray) -> Channels:
        """Fix the choice on a set: the ``k`` highest of ``scores`` averaged over all dimensions but layer and channel."""
        kept = scores.mean([d for d in scores.dims if d not in ("layer", "channel")]).transpose("layer", "channel")
        order = kept.values.argsort(axis=1)[:, ::-1][:, : self.k]
        return Channels({int(layer): tuple(map(int, ids)) for layer, ids in zip(kept.layer.values, order, strict=True)})


@dataclass(frozen=True)
class BottomK(_Ranked):
    """The ``k`` channels of lowest score: the control of the same size."""

    def ids(self, x: Tensor, layer: int) -> Tensor:  # noqa: D102
        return score(x, self.kind).topk(_fits(self.k, x), dim=1, largest=False).indices


@dataclass(frozen=True)
class RandomK(_Ranked):
    """``k`` channels at random, the same for all samples and steps, another draw for each layer and ``seed``.

    ``without_top`` leaves out so many channels of highest score.
    """

    seed: int = 0
    without_top: int = 0

    def ids(self, x: Tensor, layer: int) -> Tensor:  # noqa: D102
        _fits(self.k + self.without_top, x)
        order = _random_order(x, self.seed, layer)
        if self.without_top:
            top = score(x, self.kind).topk(self.without_top, dim=1).indices
            order = order.scatter(1, top, -1.0)
        return order.topk(self.k, dim=1).indices


@dataclass(frozen=True)
class EnergyMatched(_Ranked):
    """Random channels, the top ``k`` excluded, until what changes in them has the energy of what would in the top ``k``.

    Energy is the sum of squares: of the values themselves where they are zeroed, of source less target in a transport. If
    all others together have less than the top ``k``, all of them are selected, and the control is weaker than it should be:
    the edits record the ``amount`` that they changed.
    """

    weighs: ClassVar[bool] = True

    seed: int = 0
    fixed_k = Rule.fixed_k

    def mask(self, x: Tensor, layer: int, change: Tensor | None = None) -> Tensor:  # noqa: D102
        top = score(x, self.kind).topk(_fits(self.k, x), dim=1).indices
        energy, order, shuffled = self._shuffled(x, layer, change, top)
        goal = energy.gather(1, top).sum(1, keepdim=True)
        return _scattered(shuffled.cumsum(1) - shuffled < goal, order, top)

    def _shuffled(self, x: Tensor, layer: int, change: Tensor | None, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Energy of the change in every channel, a random order of the channels, and the energy in that order; 0 in top."""
        energy = (x if change is None else change).float().square().sum(1)
        order = _random_order(x, self.seed, layer).argsort(1, descending=True)
        return energy, order, energy.scatter(1, top, 0.0).gather(1, order)


@dataclass(frozen=True, eq=False)
class AmountMatched(EnergyMatched):
    """Random channels, the top ``k`` excluded, until as much changes in them as another run has changed at the same site.

    ``EnergyMatched`` asks what the top ``k`` would change in its own run. In a transport that overshoots: the massive
    channels of the massive run hold the source's values after the first block and change little later on, those of the
    control's run never do. With the ``amount`` that the massive run has recorded, both change as much at every site, to the
    half of a channel.

    Attributes:
        amounts: what to match, ``records.transport.amount`` or ``records.disrupt.amount`` (sample, step, branch, layer).
    """

    amounts: xr.DataArray | None = None

    __eq__, __hash__ = object.__eq__, object.__hash__  # not the parent's, which know nothing of the amounts

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self.amounts, "dims", None) != AXES:
            raise TypeError(
                f"AmountMatched was given amounts={type(self.amounts).__name__}; give it records.transport.amount or "
                "records.disrupt.amount of the run to match."
            )

    @property
    def samples(self) -> int:  # noqa: D102
        return self.amounts.sizes["sample"]

    def mask(self, x: Tensor, layer: int, change: Tensor | None = None) -> Tensor:  # noqa: D102
        raise TypeError("AmountMatched needs the step and branch, which edits alone know; use EnergyMatched here.")

    def at(self, step: int, branch: str, rows: slice) -> Rule:  # noqa: D102
        try:
            there = self.amounts[rows].sel(step=step, branch=branch)
        except KeyError:
            raise ValueError(
                f"The run to match changed nothing at step {step}, branch {branch}; give this edit the same window."
            ) from None
        values = there.transpose("layer", "sample").values.astype(np.float32)
        return _UpTo(self.k, self.kind, self.seed, dict(zip(there.layer.values.tolist(), values, strict=True)))


@dataclass(frozen=True, eq=False)
class _UpTo(EnergyMatched):
    """``AmountMatched`` at one step and branch: ``amounts`` (samples,) of each layer, means over the tokens."""

    amounts: Mapping[int, np.ndarray] = field(default_factory=dict)

    def mask(self, x: Tensor, layer: int, change: Tensor | None = None) -> Tensor:
        import torch

        if layer not in self.amounts:
            raise ValueError(f"The run to match changed nothing at layer {layer}; give this edit the same window.")
        wanted = torch.from_numpy(self.amounts[layer]).to(x.device, non_blocking=True)
        top = score(x, self.kind).topk(_fits(self.k, x), dim=1).indices
        _, order, shuffled = self._shuffled(x, layer, change, top)
        return _scattered(shuffled.cumsum(1) - shuffled / 2 < wanted[:, None] * x.shape[1], order, top)


def _scattered(chosen: Tensor, order: Tensor, top: Tensor) -> Tensor:
    """What was chosen in an order, as a mask of channels without the top."""
    return chosen.new_zeros(chosen.shape).scatter_(1, order, chosen).scatter_(1, top, False)


@dataclass(frozen=True)
class Channels(Rule):
    """Given channels: one tuple of ids for all layers, or a mapping from layer to its tuple."""

    channels: tuple[int, ...] | Mapping[int, tuple[int, ...]]

    @property
    def fixed_k(self) -> int:  # noqa: D102
        given = self.channels.values() if isinstance(self.channels, Mapping) else [self.channels]
        return max(map(len, given), default=0)

    def ids(self, x: Tensor, layer: int) -> Tensor:  # noqa: D102
        ids = self.channels.get(layer, ()) if isinstance(self.channels, Mapping) else self.channels
        if ids and not 0 <= min(ids) <= max(ids) < x.shape[2]:
            raise ValueError(f"Channels {min(ids)} to {max(ids)} were asked for; layer {layer} has 0 to {x.shape[2] - 1}.")
        return x.new_tensor(ids, dtype=int).expand(x.shape[0], -1)


def controls(k: int, draws: int = 1, amounts: xr.DataArray | None = None) -> dict[str, list[Rule]]:
    """The massive channels and the rules that they must be held against, by name.

    Args:
        k: number of massive channels.
        draws: how many random draws of each control that has some; average over them.
        amounts: what the run with the top ``k`` has changed, which "equal energy" then matches site by site
            (``AmountMatched``); None matches what the top ``k`` would change in the control's own run.

    Returns:
        "top"; "equal energy", so many random channels as change as much; "random" k, without the top k; "bottom" k.
    """
    matched = EnergyMatched if amounts is None else partial(AmountMatched, amounts=amounts)
    return {
        "top": [TopK(k)],
        "equal energy": [matched(k, seed=s) for s in range(draws)],
        "random": [RandomK(k, seed=s, without_top=k) for s in range(draws)],
        "bottom": [BottomK(k)],
    }


def jaccard(a: Tensor, b: Tensor) -> Tensor:
    """Overlap of two selections.

    Args:
        a: (..., k) channel ids, no id twice in a row.
        b: (..., k') channel ids, likewise.

    Returns:
        (...) float: size of the intersection over size of the union, in [0, 1].
    """
    shared = (a.unsqueeze(-1) == b.unsqueeze(-2)).sum((-1, -2)).float()
    return shared / (a.shape[-1] + b.shape[-1] - shared)


def crossed(data: xr.Dataset) -> xr.Dataset:
    """Samples of a full grid of prompts and seeds, (sample) -> (prompt, seed).

    Raises:
        ValueError: some pair of prompt and seed is missing or occurs twice.
    """
    pairs = list(zip(data.prompt.values.tolist(), data.seed.values.tolist(), strict=True))
    prompts, seeds = (list(dict.fromkeys(p[i] for p in pairs)) for i in (0, 1))
    if len(set(pairs)) != len(pairs) or len(pairs) != len(prompts) * len(seeds):
        raise ValueError(f"{len(pairs)} samples are no grid of {len(prompts)} prompts and {len(seeds)} seeds.")
    indexed = data.set_index(sample=("prompt", "seed")).unstack("sample")
    return indexed.sel(prompt=prompts, seed=seeds).transpose("prompt", "seed", ...)


def ratio(scores: xr.DataArray) -> xr.DataArray:
    """Scores over the median score of their site, the measure of massiveness that needs no absolute scale."""
    return scores / scores.median("channel")


def leading(scores: xr.DataArray, ranks: Sequence[int] = (1, 2, 3)) -> xr.DataArray:
    """The scores of given ranks (1 = highest) over the median, with ``rank`` in place of ``channel``."""
    import xarray as xr

    ordered = np.sort(ratio(scores).transpose(..., "channel").values, axis=-1)[..., ::-1]
    dims = [d for d in scores.dims if d != "channel"]
    kept = {n: c for n, c in scores.coords.items() if "channel" not in c.dims}
    picked = ordered[..., [r - 1 for r in ranks]]
    return xr.DataArray(picked, dims=(*dims, "rank"), coords={**kept, "rank": list(ranks)})


def sun_criterion(values: xr.DataArray) -> xr.Dataset:
    """The absolute criterion of Sun et al. (arXiv 2402.17762), for each (..., token, channel) array of hidden states.

    Returns:
        ``maximum`` and ``median`` of |x|, their ``ratio``, and ``massive``: how many entries exceed both 100 and 1,000 times
        the median.
    """
    import xarray as xr

    size = abs(values)
    median, maximum = size.median(("token", "channel")), size.max(("token", "channel"))
    massive = ((size > 100) & (size > 1000 * median)).sum(("token", "channel"))
    return xr.Dataset({"maximum": maximum, "median": median, "ratio": maximum / median, "massive": massive})


def variance_shares(values: xr.DataArray, factors: Sequence[str]) -> xr.DataArray:
    """Shares of the variance due to each factor and each interaction of factors, in a full grid with one value a cell.

    The sum of squares of a set of factors is that of its effect: its cell means less the effects of all its subsets. The
    highest interaction cannot be told from noise. These are shares of the sample's own variance, not variance components:
    with few levels a main effect holds a part of the interactions.

    Args:
        values: array with the factors among its dimensions.
        factors: names of the dimensions that are decomposed; the others stay.

    Returns:
        ``source`` (e.g. "step", "prompt", "prompt x step") by the other dimensions; sums to 1 over ``source``.
    """
    import xarray as xr

    effects: dict[tuple[str, ...], xr.DataArray] = {(): values.mean(factors)}
    sums = {}
    for size in range(1, len(factors) + 1):
        for group in combinations(factors, size):
            effect = values.mean([f for f in factors if f not in group])
            for smaller, known in list(effects.items()):
                if set(smaller) < set(group):
                    effect = effect - known
            effects[group] = effect
            cells = np.prod([values.sizes[f] for f in factors if f not in group])
            sums[" x ".join(group)] = (effect**2).sum(group) * cells
    stacked = xr.concat(list(sums.values()), dim="source", coords="minimal", compat="override").assign_coords(
        source=list(sums)
    )
    return stacked / stacked.sum("source")


def overlap(channels: xr.DataArray, along: str, k: int) -> xr.DataArray:
    """Jaccard overlap of the top ``k`` of all pairs of entries along a dimension.

    Args:
        channels: ids over (..., rank), highest first.
        along: the dimension whose entries are compared pairwise.
        k: how many ranks count.

    Returns:
        (along, other, ...), 1 on the diagonal.

    Raises:
        ValueError: fewer than two entries, or fewer ranks than ``k``.
    """
    import torch
    import xarray as xr

    if channels.sizes["rank"] < k:
        raise ValueError(f"k is {k} but only {channels.sizes['rank']} ranks were recorded; record more with top={k}.")
    ordered = channels.isel(rank=slice(k)).transpose(along, ..., "rank")
    ids = torch.from_numpy(ordered.values.astype(np.int64))
    if len(ids) < 2:
        raise ValueError(f"'{along}' has {len(ids)} entry; an overlap needs at least two.")
    rows = torch.stack([torch.stack([jaccard(a, b) for b in ids]) for a in ids])
    return xr.DataArray(rows.numpy(), dims=(along, "other", *ordered.dims[1:-1]))


def off_diagonal(pairs: xr.DataArray) -> xr.DataArray:
    """Mean over the pairs of different entries of what ``overlap`` gives: (along, other, ...) -> (...)."""
    along, n = pairs.dims[0], pairs.shape[0]
    return (pairs.sum((along, "other")) - n) / (n * (n - 1))


def random_overlap(k: int, channels: int) -> float:
    """Expected Jaccard overlap of two random sets of ``k`` out of ``channels`` (hypergeometric)."""
    from scipy.stats import hypergeom

    shared = np.arange(k + 1)
    return float((hypergeom(channels, k, k).pmf(shared) * shared / (2 * k - shared)).sum())


def random_lead(channels: int) -> float:
    """Expected largest over median among ``channels`` normal values' sizes: the lead that chance gives to a width."""
    from scipy.integrate import quad
    from scipy.stats import halfnorm

    return quad(lambda x: 1 - halfnorm.cdf(x) ** channels, 0, 20, points=[1, 2, 3, 4, 5])[0] / halfnorm.median()


def growth(scores: xr.DataArray, k: int) -> xr.Dataset:
    """The massive channels of one training, over its steps.

    Args:
        scores: (train_step, layer, channel), as of ``train.load_probe`` at one sigma or on average.
        k: how many channels count as the top.

    Returns:
        ``lead`` (train_step): highest score over the median, mean over the blocks; ``kept`` (train_step): Jaccard overlap of
        the top k with those at the end, mean over the blocks; ``top`` (layer, rank): the ids at the end.
    """
    import xarray as xr

    ordered = scores.transpose("train_step", "layer", "channel")
    ids = np.argsort(-ordered.values, axis=-1, kind="stable")[..., :k]
    top = xr.DataArray(
        ids, {n: c for n, c in ordered.coords.items() if "channel" not in c.dims}, (*ordered.dims[:2], "rank")
    )
    kept = overlap(top, "train_step", k).isel(other=-1).mean("layer")
    lead = leading(ordered, (1,)).sel(rank=1, drop=True).mean("layer")
    return xr.Dataset({"lead": lead, "kept": kept, "top": top.isel(train_step=-1, drop=True)})


def pick(values: xr.DataArray, ids: Mapping[int, Sequence[int]]) -> xr.DataArray:
    """For each layer the channels named for it: (..., layer, channel) -> (..., layer, rank)."""
    import xarray as xr

    ordered = values.sel(layer=list(ids)).transpose(..., "layer", "channel")
    places = np.broadcast_to(np.array(list(ids.values())), (*ordered.shape[:-1], len(next(iter(ids.values())))))
    coords = {name: c for name, c in ordered.coords.items() if "channel" not in c.dims}
    return xr.DataArray(np.take_along_axis(ordered.values, places, -1), coords, (*ordered.dims[:-1], "rank"))


def percentile(values: xr.DataArray) -> xr.DataArray:
    """Each channel's rank among all channels of its site, from 0 (lowest) to 1 (highest); ties share their mean rank."""
    from scipy.stats import rankdata

    ordered = values.transpose(..., "channel")
    return ordered.copy(data=(rankdata(ordered.values, axis=-1) - 1) / (ordered.sizes["channel"] - 1))


def energy_curve(energy: xr.DataArray) -> xr.DataArray:
    """Share of the tokens' squared norm held by the 1, 2, ... channels of highest energy: (..., channels)."""
    import xarray as xr

    ordered = np.sort(energy.transpose(..., "channel").values, axis=-1)[..., ::-1].cumsum(-1)
    dims = [d for d in energy.dims if d != "channel"]
    kept = {n: c for n, c in energy.coords.items() if "channel" not in c.dims}
    count = np.arange(1, ordered.shape[-1] + 1)
    return xr.DataArray(ordered / ordered[..., -1:], dims=(*dims, "channels"), coords={**kept, "channels": count})


def _fits(k: int, x: Tensor) -> int:
    if k > x.shape[2]:
        raise ValueError(f"k is {k} but this model has {x.shape[2]} channels; choose a smaller k.")
    return k


def _random_order(x: Tensor, seed: int, layer: int) -> Tensor:
    """Uniform values (samples, channels), equal for all samples; drawn on the CPU so that every device agrees."""
    import torch

    generator = torch.Generator().manual_seed(seed * 10_007 + layer)
    return torch.rand(x.shape[2], generator=generator).to(x.device).expand(x.shape[0], -1)


@cache
def random_frame(width: int, k: int, seed: int, layer: int) -> Tensor:
    """An orthonormal frame (width, k) of a uniformly random subspace; drawn on the CPU so that every device agrees."""
    import torch

    generator = torch.Generator().manual_seed(seed * 10_007 + layer)
    return torch.linalg.qr(torch.randn(width, k, generator=generator, dtype=torch.float64)).Q.float()
