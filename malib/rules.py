"""Channel scores and selection rules: which channels an edit or a record uses.

The score of a channel for one sample, step, branch and layer is ``|mean over image tokens|`` (MAs-DiT, arXiv
2605.13974). A selection rule is resolved to channel ids where it is applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor


AXES = ("sample", "step", "branch", "layer")


KINDS = ("mean", "magnitude")


def score(x: Tensor, kind: str = "mean") -> Tensor:
    """Compute channel scores of hidden states (MAs-DiT, arXiv 2605.13974).

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
    raise ValueError(f"Score kind '{kind}' is unknown; use {' or '.join(KINDS)}.")


@dataclass(frozen=True)
class Rule:
    """A selection of channels, resolved per sample at the site where it is applied.

    Attributes:
        uses_change: whether the selection depends on what the edit would change.
        samples: number of samples that the rule was made for; None where it fits any number.
    """

    uses_change: ClassVar[bool] = False
    samples: ClassVar[int | None] = None

    def mask(self, x: Tensor, layer: int, change: Tensor | None = None) -> Tensor:
        """Return the selected channels as a boolean mask (samples, channels).

        Args:
            x: hidden states (samples, tokens, channels).
            layer: of the site.
            change: what the edit would change in each entry if it were selected, shaped as ``x``; None for ``x`` itself.

        Raises:
            ValueError: the rule selects channels that ``x`` does not have.
        """
        ids = self.ids(x, layer)
        return x.new_zeros(x.shape[0], x.shape[2], dtype=bool).scatter_(1, ids, True)

    def ids(self, x: Tensor, layer: int) -> Tensor:
        """Return channel ids (samples, k), in the rule's own order.

        Args:
            x: hidden states (samples, tokens, channels).
            layer: of the site.

        Raises:
            TypeError: the number of selected channels varies from sample to sample.
        """
        raise self._varying()

    def at(self, step: int, branch: str, rows: slice) -> Rule:
        """Return the rule for some samples of a run at one step and branch; the same rule, unless it depends on them.

        Args:
            step: denoising step.
            branch: "cond" or "uncond".
            rows: the samples of the batch among all samples of the call.
        """
        return self

    @property
    def fixed_k(self) -> int:
        """Largest number of channels that the rule selects.

        Raises:
            TypeError: the number varies from sample to sample.
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
            raise ValueError(f"k={self.k} selects no channel; choose k >= 1.")
        if self.kind not in KINDS:
            raise ValueError(f"Score kind '{self.kind}' is unknown; use {' or '.join(KINDS)}.")

    @property
    def fixed_k(self) -> int:
        return self.k


@dataclass(frozen=True)
class TopK(_Ranked):
    """The massive channels: the ``k`` of highest score, chosen for each sample, step, branch and layer."""

    def ids(self, x: Tensor, layer: int) -> Tensor:  # noqa: D102
        return score(x, self.kind).topk(_fits(self.k, x), dim=1).indices

    def on(self, scores: xr.DataArray) -> Channels:
        """Fix the selection on a set: the ``k`` highest of ``scores`` averaged over all dimensions but layer and channel."""
        kept = scores.mean([d for d in scores.dims if d not in ("layer", "channel")]).transpose("layer", "channel")
        order = kept.values.argsort(axis=1)[:, ::-1][:, : self.k]
        return Channels({int(layer): tuple(map(int, ids)) for layer, ids in zip(kept.layer.values, order, strict=True)})


@dataclass(frozen=True)
class BottomK(_Ranked):
    """The ``k`` channels of lowest score: the control of equal number."""

    def ids(self, x: Tensor, layer: int) -> Tensor:  # noqa: D102
        return score(x, self.kind).topk(_fits(self.k, x), dim=1, largest=False).indices


@dataclass(frozen=True)
class RandomK(_Ranked):
    """``k`` random channels, the same for all samples and steps, another draw for each layer and ``seed``.

    ``without_top`` excludes that many channels of highest score.
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
    """Random channels without the top ``k``, added until their change has the energy of the change in the top ``k``.

    Energy is the sum of squares: of the values where they are zeroed, of source minus target in a transport. If all
    other channels together have less energy than the top ``k``, all of them are selected and the control is weaker than
    intended; compare the recorded ``dose``.
    """

    uses_change: ClassVar[bool] = True

    seed: int = 0
    fixed_k = Rule.fixed_k

    def mask(self, x: Tensor, layer: int, change: Tensor | None = None) -> Tensor:  # noqa: D102
        top = score(x, self.kind).topk(_fits(self.k, x), dim=1).indices
        energy, order, shuffled = self._shuffled(x, layer, change, top)
        goal = energy.gather(1, top).sum(1, keepdim=True)
        return _scattered(shuffled.cumsum(1) - shuffled < goal, order, top)

    def _shuffled(self, x: Tensor, layer: int, change: Tensor | None, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the energy of the change by channel, a random order, and the energy in that order, 0 in the top."""
        energy = (x if change is None else change).float().square().sum(1)
        order = _random_order(x, self.seed, layer).argsort(1, descending=True)
        return energy, order, energy.scatter(1, top, 0.0).gather(1, order)


@dataclass(frozen=True, eq=False)
class DoseMatched(EnergyMatched):
    """Random channels without the top ``k``, added until the dose equals that of another run at the same site.

    ``EnergyMatched`` matches what the top ``k`` would change in the control's own run. In a transport that overshoots:
    in the massive run, the massive channels equal the source's after the first block and change little later on; in the
    control's run they never do. With the recorded ``dose`` of the massive run both change as much at every site, up to
    half a channel.

    Attributes:
        doses: the doses to match (sample, step, branch, layer): ``records.transport.dose`` or ``records.disrupt.dose``.
    """

    doses: xr.DataArray | None = None

    __eq__, __hash__ = object.__eq__, object.__hash__  # the parent's ignore the doses

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self.doses, "dims", None) != AXES:
            raise TypeError(
                f"DoseMatched has doses of type {type(self.doses).__name__}; give it records.transport.dose or "
                "records.disrupt.dose of the run to match."
            )

    @property
    def samples(self) -> int:  # noqa: D102
        return self.doses.sizes["sample"]

    def mask(self, x: Tensor, layer: int, change: Tensor | None = None) -> Tensor:  # noqa: D102
        raise TypeError("DoseMatched depends on step and branch, which only edits know; use EnergyMatched here.")

    def at(self, step: int, branch: str, rows: slice) -> Rule:  # noqa: D102
        try:
            there = self.doses[rows].sel(step=step, branch=branch)
        except KeyError:
            raise ValueError(
                f"The run to match changed nothing at step {step}, branch {branch}; give this edit the same window."
            ) from None
        values = there.transpose("layer", "sample").values.astype(np.float32)
        return _UpTo(self.k, self.kind, self.seed, dict(zip(there.layer.values.tolist(), values, strict=True)))


@dataclass(frozen=True, eq=False)
class _UpTo(EnergyMatched):
    """``DoseMatched`` at one step and branch: ``doses`` (samples,) of each layer, means over the tokens."""

    doses: Mapping[int, np.ndarray] = field(default_factory=dict)

    def mask(self, x: Tensor, layer: int, change: Tensor | None = None) -> Tensor:
        import torch

        if layer not in self.doses:
            raise ValueError(f"The run to match changed nothing at layer {layer}; give this edit the same window.")
        doses = torch.from_numpy(self.doses[layer]).to(x.device, non_blocking=True)
        top = score(x, self.kind).topk(_fits(self.k, x), dim=1).indices
        _, order, shuffled = self._shuffled(x, layer, change, top)
        return _scattered(shuffled.cumsum(1) - shuffled / 2 < doses[:, None] * x.shape[1], order, top)


def _scattered(chosen: Tensor, order: Tensor, top: Tensor) -> Tensor:
    """Return a selection in some order as a mask of channels, without the top."""
    return chosen.new_zeros(chosen.shape).scatter_(1, order, chosen).scatter_(1, top, False)


@dataclass(frozen=True)
class Channels(Rule):
    """Given channels: one tuple of ids for all layers, or a mapping from layer to its tuple."""

    channels: tuple[int, ...] | Mapping[int, tuple[int, ...]]

    @property
    def fixed_k(self) -> int:  # noqa: D102
        selections = self.channels.values() if isinstance(self.channels, Mapping) else [self.channels]
        return max(map(len, selections), default=0)

    def ids(self, x: Tensor, layer: int) -> Tensor:  # noqa: D102
        ids = self.channels.get(layer, ()) if isinstance(self.channels, Mapping) else self.channels
        if ids and not 0 <= min(ids) <= max(ids) < x.shape[2]:
            raise ValueError(
                f"Channels {min(ids)} to {max(ids)} exceed the 0 to {x.shape[2] - 1} of layer {layer}; choose less."
            )
        return x.new_tensor(ids, dtype=int).expand(x.shape[0], -1)


def _fits(k: int, x: Tensor) -> int:
    if k > x.shape[2]:
        raise ValueError(f"k={k} exceeds the {x.shape[2]} channels of this model; choose k <= {x.shape[2]}.")
    return k


def _random_order(x: Tensor, seed: int, layer: int) -> Tensor:
    """Return uniform values (samples, channels), equal for all samples; drawn on the CPU so that all devices agree."""
    import torch

    generator = torch.Generator().manual_seed(seed * 10_007 + layer)
    return torch.rand(x.shape[2], generator=generator).to(x.device).expand(x.shape[0], -1)


@cache
def random_frame(width: int, k: int, seed: int, layer: int) -> Tensor:
    """Return an orthonormal frame (``width``, ``k``) of a random subspace, another for each ``seed`` and ``layer``.

    It is drawn on the CPU so that all devices agree.
    """
    import torch

    generator = torch.Generator().manual_seed(seed * 10_007 + layer)
    return torch.linalg.qr(torch.randn(width, k, generator=generator, dtype=torch.float64)).Q.float()
