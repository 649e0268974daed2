"""Guidance away from a degraded model: Detail Guidance (arXiv 2510.11538) and skip-layer guidance.

With the usual scale s of classifier-free guidance and lambda = s - 1, the velocity of a step is ``D(c) + lambda * (D(c)
- D(null)) + w * (D(c) - D_m(c))``, with D_m the model degraded at layer m. The degraded samples are auxiliary samples of
the same batch, so that both read the same latents at every step; calls without guidance omit them. The last term is
added to D(c) before the pipeline combines the branches. A pipeline that rescales after guidance (Qwen-Image) also
rescales this term, so that the formula is then exact up to a factor for each token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .edits import Disrupt, _DisruptListener
from .rules import Rule, TopK
from .window import BaseListener, Run, Window

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

    from .hooks import Event


@dataclass(frozen=True)
class _Guide(Window):
    """Change the velocity of the cond branch; the auxiliary samples are the targets, degraded at one layer."""

    points: ClassVar[tuple[str, ...]] = ("velocity",)
    auxiliary: ClassVar[tuple[str, ...]] = ("degraded",)

    w: float
    layer: int
    branches: tuple[str, ...] = field(default=("cond",), init=False)
    stream: str = field(default="image", init=False)
    point: str = field(default="velocity", init=False)
    layers: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layer, (int, np.integer)):
            raise TypeError(f"layer is {self.layer!r}; give the number of one block, such as 2.")
        object.__setattr__(self, "layer", int(self.layer))


@dataclass(frozen=True)
class DetailGuidance(_Guide):
    """Guide away from the model whose massive channels are disrupted at one layer; ``DiT.generate(..., guide=...)``.

    Recorded are the selection, ``mask`` (sample, step, branch, layer, channel), the ``dose`` in the degraded model, as
    by ``Disrupt``, and the ``push`` (sample, step, branch, layer): the mean square of ``w (D(c) - D_m(c))``. The
    controls are other selection rules and modes.

    Attributes:
        w: weight of the term; 0 is plain generation, bit for bit.
        layer: m, counted over all block stacks; its output is disrupted in all image tokens.
        rule: selection rule of the disrupted channels; the massive ones by default.
        mode: what replaces them, see ``Disrupt``.
        seed: of mode "rotate".
    """

    version: ClassVar[int] = 3

    rule: Rule = field(default_factory=lambda: TopK(8))
    mode: str = "zero"
    seed: int = 0

    @property
    def degradation(self) -> Disrupt:
        """The disruption that turns D into D_m."""
        window = {"layers": self.layer, "steps": self.steps, "branches": self.branches}
        return Disrupt(self.rule, mode=self.mode, seed=self.seed, **window)

    def start(self, run: Run) -> _DetailListener:
        """Return a listener that applies the guidance and records what was disrupted."""
        return _DetailListener(self, run)


@dataclass(frozen=True)
class SkipLayerGuidance(_Guide):
    """Guide away from the model without one block; ``DiT.generate(..., guide=...)``. Recorded is the ``push``.

    Attributes:
        w: weight of the term; 0 is plain generation, bit for bit.
        layer: the block that is skipped, in both streams.
    """

    version: ClassVar[int] = 2

    def start(self, run: Run) -> _SkipListener:
        """Return a listener that applies the guidance."""
        Disrupt(TopK(1), layers=self.layer).check(len(run.blocks), run.steps)
        return _SkipListener(self, run)


class _GuidanceListener(BaseListener):
    """Add w (D(c) - D_m(c)) to the velocity, and keep the degraded samples on the path of their primary samples."""

    writes = True
    record: _Guide

    def __init__(self, record: _Guide, run: Run) -> None:
        super().__init__(record, run)
        self.groups: dict[str, int] = {}

    def wants(self, layer: int, stream: str, point: str) -> bool:
        return point == "velocity"

    def needs(self, step: int, branch: str) -> bool:
        """Return whether a call is guided; elsewhere the degraded model equals the model."""
        return self.record.reaches(step, branch)

    def __call__(self, event: Event, x: Tensor, auxiliary: dict[str, Tensor]) -> None:
        degraded = auxiliary["degraded"]
        if event.point != "velocity":
            self.degrade(event, degraded)
            return
        if self.record.covers(event):
            term = self.record.w * (x.float() - degraded.float())
            self.keep("push", (event.step, event.branch, self.record.layer), term.square().flatten(1).mean(1))
            x.copy_(x.float() + term / max(self.run.cfg, 1.0))  # the pipeline will multiply D(c) by s
        degraded.copy_(x)

    def degrade(self, event: Event, x: Tensor) -> None:
        """Turn D into D_m at an event inside of the transformer."""
        raise NotImplementedError

    def dataset(self) -> xr.Dataset:
        import xarray as xr

        push = self._assemble("push", ())
        return xr.Dataset() if push is None else xr.Dataset({"push": push})


class _DetailListener(_GuidanceListener):
    record: DetailGuidance

    def __init__(self, record: DetailGuidance, run: Run) -> None:
        super().__init__(record, run)
        self._disrupt = _DisruptListener(record.degradation, run)

    def wants(self, layer: int, stream: str, point: str) -> bool:
        return super().wants(layer, stream, point) or self._disrupt.wants(layer, stream, point)

    def degrade(self, event: Event, x: Tensor) -> None:
        self._disrupt(event, x)

    def flush(self) -> None:
        super().flush()
        self._disrupt.flush()

    def discard(self) -> None:
        super().discard()
        self._disrupt.discard()

    def dataset(self) -> xr.Dataset:
        return super().dataset().merge(self._disrupt.dataset())


class _SkipListener(_GuidanceListener):
    record: SkipLayerGuidance

    def __init__(self, record: SkipLayerGuidance, run: Run) -> None:
        super().__init__(record, run)
        self._entering: dict[str, Tensor] = {}

    def wants(self, layer: int, stream: str, point: str) -> bool:
        return super().wants(layer, stream, point) or (layer == self.record.layer and point in ("input", "output"))

    def degrade(self, event: Event, x: Tensor) -> None:
        if not self.record.covers(event):
            return
        if event.point == "input":
            self._entering[event.stream] = x.clone()
        else:
            x.copy_(self._entering.pop(event.stream))
