"""Where a record or an edit applies, and the base class of the listeners that collect what they see."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .families import BRANCHES, STREAMS
from .rules import AXES

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

    from .hooks import Block, Event


log = logging.getLogger("malib")


@dataclass(frozen=True, kw_only=True)
class Window:
    """Where a record or an edit applies; None means everywhere.

    Attributes:
        layers: layer indices over all block stacks.
        steps: denoising steps, from 0.
        branches: "cond" and/or "uncond".
        stream: "image" or "text".
        point: "output" of a block (what the next one receives) or its "input".
    """

    points: ClassVar[tuple[str, ...]] = ("output", "input")
    layers: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None
    branches: tuple[str, ...] | None = None
    stream: str = "image"
    point: str = "output"

    def __post_init__(self) -> None:
        for name in ("layers", "steps", "branches"):
            value = getattr(self, name)
            if isinstance(value, (int, str)):
                object.__setattr__(self, name, (value,))
            elif value is not None:
                object.__setattr__(self, name, tuple(value))
            if getattr(self, name) == ():
                raise ValueError(f"{name} is empty; give at least one entry, or None for all.")
        if self.stream not in STREAMS:
            raise ValueError(f"Stream '{self.stream}' is unknown; use {', '.join(STREAMS)}.")
        if self.point not in self.points:
            raise ValueError(f"Point '{self.point}' is unknown here; use {' or '.join(self.points)}.")
        if self.branches is not None and not set(self.branches) <= set(BRANCHES):
            raise ValueError(f"Branches {self.branches} are unknown; use {' and/or '.join(BRANCHES)}.")

    def check(self, layers: int, steps: int) -> None:
        """Raise ValueError unless a run with this number of ``layers`` and denoising ``steps`` has those of the window."""
        for name, value, count in (("layers", self.layers, layers), ("steps", self.steps, steps)):
            if value is not None and not all(0 <= v < count for v in value):
                raise ValueError(f"{name} {value} exceed this run, which has {name} 0 to {count - 1}; choose among these.")

    def entry(self, tokens: int, channels: int) -> int:
        """Return the bytes kept at each site, given the numbers of ``tokens`` and ``channels`` of the stream."""
        return 0

    def size(self, samples: int, steps: int, branches: int, layers: int, tokens: int, channels: int) -> int:
        """Return the bytes that the record of a run may take, in memory and in the cache.

        ``samples`` are prompts times seeds, ``branches`` is 2 with true guidance, ``layers`` the blocks of the model;
        ``steps``, ``tokens`` and ``channels`` are numbers, too.
        """
        entries = self._entries(samples, steps, branches, layers)
        return self.entry(tokens, channels) * math.prod(entries[a] for a in getattr(self, "keep", AXES))

    def _entries(self, samples: int, steps: int, branches: int, layers: int) -> dict[str, int]:
        """Return the number of entries of each axis."""
        return {
            "sample": samples,
            "step": steps if self.steps is None else len(self.steps),
            "branch": branches if self.branches is None else len(self.branches),
            "layer": layers if self.layers is None else len(self.layers),
        }

    def wants_site(self, layer: int, stream: str, point: str) -> bool:
        """Return whether events at this ``layer``, ``stream`` and ``point`` can matter."""
        return stream == self.stream and point == self.point and (self.layers is None or layer in self.layers)

    def covers(self, event: Event) -> bool:
        """Return whether an event of a wanted site is inside the window's steps and branches."""
        return self.reaches(event.step, event.branch)

    def reaches(self, step: int, branch: str) -> bool:
        """Return whether a ``step`` and a ``branch`` are inside the window."""
        return (self.steps is None or step in self.steps) and (self.branches is None or branch in self.branches)


@dataclass(frozen=True)
class Run:
    """What a record or an edit knows of a run: ``size`` is (height, width) in pixels, ``cfg`` the true guidance scale."""

    samples: int
    steps: int
    blocks: tuple[Block, ...]
    size: tuple[int, int] = (1, 1)
    cfg: float = 1.0


def name_of(record: object) -> str:
    """Return the attribute under which a record's dataset is found: ``ChannelStats`` -> ``channel_stats``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(record).__name__).lower()


class BaseListener:
    """Collect tensors (samples, ...) by (step, branch, layer), and move them to the host once a batch."""

    writes = False

    def __init__(self, record: Window, run: Run) -> None:
        record.check(len(run.blocks), run.steps)
        self.record, self.run = record, run
        self._batch: dict[str, dict[tuple, Tensor]] = defaultdict(dict)
        self._host: dict[str, dict[tuple, list[Tensor]]] = defaultdict(lambda: defaultdict(list))

    def wants(self, layer: int, stream: str, point: str) -> bool:
        """Return whether the record reads at this ``layer``, ``stream`` and ``point``."""
        return self.record.wants_site(layer, stream, point)

    def keep(self, name: str, key: tuple, value: Tensor) -> None:
        """Keep one variable's tensor of a batch.

        Args:
            name: of the variable.
            key: (step, branch, layer).
            value: (samples, ...); it leaves the device at the end of the batch.
        """
        self._batch[name][key] = value

    def flush(self) -> None:
        """End a batch: one transfer for each variable, unless stacking it would need much memory."""
        import torch

        for name, values in self._batch.items():
            parts = list(values.values())
            small = sum(p.nbytes for p in parts) < 2**26 and len({p.shape for p in parts}) == 1
            moved = torch.stack(parts).cpu() if small else [p.cpu() for p in parts]
            for key, value in zip(values, moved, strict=True):
                self._host[name][key].append(value)
        self._batch.clear()

    def discard(self) -> None:
        """Drop an unfinished batch."""
        self._batch.clear()

    def refuse_larger(self, x: Tensor) -> None:
        """Raise ValueError where the record would exceed its ``max_bytes``; called at the first event, with its ``x``."""
        r, run = self.record, self.run
        size = r.size(run.samples, run.steps, 2 if run.cfg > 1 else 1, len(run.blocks), x.shape[1], x.shape[2])
        name = type(r).__name__
        if size > r.max_bytes:
            raise ValueError(
                f"{name} would keep up to {size:,} bytes and exceed max_bytes={r.max_bytes:,}; choose fewer axes, layers, "
                "steps, branches, tokens or channels, or raise max_bytes."
            )
        log.log(logging.WARNING if size > 2**28 else logging.INFO, "%s keeps up to %s bytes.", name, f"{size:,}")

    def _assemble(self, name: str, dims: tuple[str, ...]) -> xr.DataArray | None:
        """Stack one variable to (sample, step, branch, layer, *dims)."""
        import numpy as np
        import torch
        import xarray as xr

        kept = self._host.get(name)
        if not kept:
            return None
        rows = {key: torch.cat(parts).numpy() for key, parts in kept.items()}
        steps, branches, layers = (sorted({key[i] for key in rows}) for i in range(3))
        first = next(iter(rows.values()))
        empty = {"f": np.nan, "b": False}.get(first.dtype.kind, -1)
        shape = (first.shape[0], len(steps), len(branches), len(layers), *first.shape[1:])
        full = np.full(shape, empty, dtype=first.dtype)
        for (step, branch, layer), row in rows.items():
            full[:, steps.index(step), branches.index(branch), layers.index(layer)] = row
        return xr.DataArray(full, dims=(*AXES, *dims), coords={"step": steps, "branch": branches, "layer": layers})
