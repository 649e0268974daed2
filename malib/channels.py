"""Scores, selection rules and agreement between selections.

The score of a channel for one sample, step, branch and layer is ``|mean over image tokens|`` (MAs-DiT, arXiv 2605.13974);
the variant ``mean over tokens of |.|`` is kept as a second kind. A selection is a rule, resolved when it is applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import xarray as xr

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
    """A selection of channels, resolved per sample at the site where it is applied."""

    def mask(self, x: Tensor, layer: int) -> Tensor:
        """Boolean (samples, channels) for hidden states (samples, tokens, channels)."""
        ids = self.ids(x, layer)
        return torch.zeros(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device).scatter_(1, ids, True)

    def ids(self, x: Tensor, layer: int) -> Tensor:
        """(samples, k) channel ids, in the rule's own order."""
        raise TypeError(f"{type(self).__name__} selects a varying number of channels; use a rule with a fixed k here.")


@dataclass(frozen=True)
class _Ranked(Rule):
    k: int
    kind: str = "mean"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}; a selection needs at least one channel.")
        if self.kind not in KINDS:
            raise ValueError(f"Score kind '{self.kind}' is unknown; use one of {', '.join(KINDS)}.")


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
    """Random channels, the top ``k`` excluded, until their energy (sum of squares) reaches that of the top ``k``.

    If all others together hold less energy than the top ``k``, all of them are selected.
    """

    seed: int = 0

    def mask(self, x: Tensor, layer: int) -> Tensor:  # noqa: D102
        energy = x.float().square().sum(1)
        top = score(x, self.kind).topk(_fits(self.k, x), dim=1).indices
        goal = energy.gather(1, top).sum(1, keepdim=True)
        order = _random_order(x, self.seed, layer).argsort(1, descending=True)
        shuffled = energy.scatter(1, top, 0.0).gather(1, order)
        chosen = shuffled.cumsum(1) - shuffled < goal
        mask = torch.zeros_like(energy, dtype=torch.bool).scatter_(1, order, chosen)
        return mask.scatter_(1, top, False)


@dataclass(frozen=True)
class Channels(Rule):
    """Given channels: one tuple of ids for all layers, or a mapping from layer to its tuple."""

    channels: tuple[int, ...] | Mapping[int, tuple[int, ...]]

    def ids(self, x: Tensor, layer: int) -> Tensor:  # noqa: D102
        ids = self.channels.get(layer, ()) if isinstance(self.channels, Mapping) else self.channels
        if ids and not 0 <= min(ids) <= max(ids) < x.shape[2]:
            raise ValueError(f"Channels {min(ids)} to {max(ids)} were asked for; layer {layer} has 0 to {x.shape[2] - 1}.")
        return torch.tensor(ids, dtype=torch.long, device=x.device).expand(x.shape[0], -1)


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


def _fits(k: int, x: Tensor) -> int:
    if k > x.shape[2]:
        raise ValueError(f"k is {k} but this model has {x.shape[2]} channels; choose a smaller k.")
    return k


def _random_order(x: Tensor, seed: int, layer: int) -> Tensor:
    """Uniform values (samples, channels), equal for all samples; drawn on the CPU so that every device agrees."""
    generator = torch.Generator().manual_seed(seed * 10_007 + layer)
    return torch.rand(x.shape[2], generator=generator).to(x.device).expand(x.shape[0], -1)
