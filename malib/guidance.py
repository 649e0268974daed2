"""Guidance away from a degraded model: Detail Guidance (arXiv 2510.11538), and skipping a layer as its neighbour.

With the usual scale s of classifier-free guidance and lambda = s - 1, the velocity of a step is
``D(c) + lambda * (D(c) - D(null)) + w * (D(c) - D_m(c))``, D_m being the model degraded at layer m. The degraded samples
travel in one batch with their originals as companions, so that both read the same latents at every step; calls that are
not guided go without them. The last term is added to D(c) before the pipeline combines the branches. A pipeline that
rescales after guidance (Qwen-Image) rescales this term, too, so that there the formula holds up to a factor for each token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from . import edits
from .channels import Rule, TopK
from .edits import Disrupt, _DisruptListener
from .records import Run, Window, _Listener

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

    from .hooks import Event


@dataclass(frozen=True)
class _Guide(Window):
    """Acts on the velocity of the cond branch; its companions are the targets once more, degraded at one layer."""

    points: ClassVar[tuple[str, ...]] = ("velocity",)
    companions: ClassVar[tuple[str, ...]] = ("degraded",)

    w: float
    layer: int
    branches: tuple[str, ...] = field(default=("cond",), init=False)
    stream: str = field(default="image", init=False)
    point: str = field(default="velocity", init=False)
    layers: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layer, (int, np.integer)):
            raise TypeError(f"layer is {self.layer!r}; give the number of one block.")
        object.__setattr__(self, "layer", int(self.layer))


@dataclass(frozen=True)
class DetailGuidance(_Guide):
    """Guide away from the model whose massive channels are disrupted at one layer; ``DiT.generate(..., guide=...)``.

    Recorded are the selection, ``mask`` (sample, step, branch, layer, channel), the ``amount`` taken from the degraded
    model, as by ``Disrupt``, and the ``push`` (sample, step, branch, layer): the mean square of ``w (D(c) - D_m(c))``. The
    controls are other rules and modes.

    Attributes:
        w: weight of the term; 0 is plain generation, bit for bit.
        layer: m, counted over all block stacks; its output is disrupted in all image tokens.
        rule: which channels; the massive ones by default.
        mode: what becomes of them, see ``Disrupt``.
        seed: of mode "rotate".
    """

    version: ClassVar[int] = 3

    rule: Rule = field(default_factory=lambda: TopK(8))
    mode: str = "zero"
    seed: int = 0

    @property
    def degradation(self) -> Disrupt:
        """The disruption that makes D_m of D."""
        window = {"layers": self.layer, "steps": self.steps, "branches": self.branches}
        return Disrupt(self.rule, mode=self.mode, seed=self.seed, **window)

    def start(self, run: Run) -> _DetailListener:
        """A listener that applies the guidance and records what was disrupted."""
        return _DetailListener(self, run)


@dataclass(frozen=True)
class SkipLayerGuidance(_Guide):
    """Guide away from the model that lacks one block; ``DiT.generate(..., guide=...)``. Recorded is the ``push``.

    Attributes:
        w: weight of the term; 0 is plain generation, bit for bit.
        layer: the block that is skipped, in both streams.
    """

    version: ClassVar[int] = 2

    def start(self, run: Run) -> _SkipListener:
        """A listener that applies the guidance."""
        Disrupt(TopK(1), layers=self.layer).check(len(run.blocks), run.steps)
        return _SkipListener(self, run)


def controls(w: float, layer: int, k: int, draws: int = 1, **window: Any) -> dict[str, list[DetailGuidance]]:
    """Detail Guidance and all that it must be held against, as lists of guides by name.

    Args:
        w: the weight of all of them.
        layer: the layer that is degraded.
        k: number of massive channels.
        draws: how many random draws of each control that has some; average over them.
        window: ``steps``, if not all.

    Returns:
        Those of ``edits.controls``, each as the degradation.
    """
    return {
        name: [DetailGuidance(w, layer, edit.channels, edit.mode, edit.seed, **window) for (edit,) in variants]
        for name, variants in edits.controls(k, draws).items()
    }


class _GuidanceListener(_Listener):
    """Adds w (D(c) - D_m(c)) to the velocity and keeps the degraded companions on their originals' path."""

    writes = True
    record: _Guide

    def __init__(self, record: _Guide, run: Run) -> None:
        super().__init__(record, run)
        self.groups: dict[str, int] = {}

    def wants(self, layer: int, stream: str, point: str) -> bool:
        return point == "velocity"

    def needs(self, step: int, branch: str) -> bool:
        """The degraded model is asked in guided calls alone; elsewhere it would give what the model gives."""
        return self.record.reaches(step, branch)

    def __call__(self, event: Event, x: Tensor, companions: dict[str, Tensor]) -> None:
        degraded = companions["degraded"]
        if event.point != "velocity":
            self.degrade(event, degraded)
            return
        if self.record.covers(event):
            term = self.record.w * (x.float() - degraded.float())
            self.keep("push", (event.step, event.branch, self.record.layer), term.square().flatten(1).mean(1))
            x.copy_(x.float() + term / max(self.run.cfg, 1.0))  # the pipeline will multiply D(c) by s
        degraded.copy_(x)

    def degrade(self, event: Event, x: Tensor) -> None:
        """Make D_m of D at an event inside the transformer."""
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
