"""What can be read during a generation. Records are frozen dataclasses; their results are ``xarray.Dataset`` objects.

Everything is reduced on the device, with no copy to the host inside a hook; what is kept leaves the device once a batch.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from .channels import AXES, Rule, TopK
from .families import BRANCHES, STREAMS

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

    from .hooks import Block, Event

log = logging.getLogger("malib")
STATISTICS = ("score", "magnitude", "maximum", "energy")


@dataclass(frozen=True, kw_only=True)
class Window:
    """Where a record or an edit applies: None means all.

    Attributes:
        layers: layer indices, counted over all block stacks.
        steps: denoising steps from 0.
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
                raise ValueError(f"{name} is empty, so nothing would be touched; give at least one, or None for all.")
        if self.stream not in STREAMS:
            raise ValueError(f"Stream '{self.stream}' is unknown; use one of {', '.join(STREAMS)}.")
        if self.point not in self.points:
            raise ValueError(f"Point '{self.point}' is unknown here; use {' or '.join(self.points)}.")
        if self.branches is not None and not set(self.branches) <= set(BRANCHES):
            raise ValueError(f"Branches {self.branches} were given; use {' and/or '.join(BRANCHES)}.")

    def check(self, layers: int, steps: int) -> None:
        """Refuse layers and steps that the run does not have."""
        for name, value, count in (("layers", self.layers, layers), ("steps", self.steps, steps)):
            if value is not None and not all(0 <= v < count for v in value):
                raise ValueError(f"{name} {value} were asked for; this run has {name} 0 to {count - 1}.")

    def entry(self, tokens: int, channels: int) -> int:
        """Bytes that are kept at each entry of the axes; ``tokens`` and ``channels`` are those of the stream."""
        return 0

    def size(self, samples: int, steps: int, branches: int, layers: int, tokens: int, channels: int) -> int:
        """Bytes that the record of a run may take, in memory and in the cache.

        Args:
            samples: prompts times seeds.
            steps: denoising steps of the run.
            branches: 2 with true guidance, 1 without.
            layers: blocks of the model.
            tokens: of the record's stream.
            channels: width of the hidden states.
        """
        entries = self._entries(samples, steps, branches, layers)
        return self.entry(tokens, channels) * math.prod(entries[a] for a in getattr(self, "keep", AXES))

    def _entries(self, samples: int, steps: int, branches: int, layers: int) -> dict[str, int]:
        """How many entries each axis of the record has."""
        return {
            "sample": samples,
            "step": steps if self.steps is None else len(self.steps),
            "branch": branches if self.branches is None else len(self.branches),
            "layer": layers if self.layers is None else len(self.layers),
        }

    def wants_site(self, layer: int, stream: str, point: str) -> bool:
        """Whether any event of this site can matter."""
        return stream == self.stream and point == self.point and (self.layers is None or layer in self.layers)

    def covers(self, event: Event) -> bool:
        """Whether an event of a wanted site lies in the window's steps and branches."""
        return self.reaches(event.step, event.branch)

    def reaches(self, step: int, branch: str) -> bool:
        """Whether a step and branch lie in the window."""
        return (self.steps is None or step in self.steps) and (self.branches is None or branch in self.branches)


@dataclass(frozen=True)
class Run:
    """What a record or an edit needs to know: ``size`` is the pictures' (height, width), ``cfg`` the true guidance scale."""

    samples: int
    steps: int
    blocks: tuple[Block, ...]
    size: tuple[int, int] = (1, 1)
    cfg: float = 1.0


def name_of(record: object) -> str:
    """The attribute under which a record's dataset is found: ``ChannelStats`` -> ``channel_stats``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(record).__name__).lower()


@dataclass(frozen=True, kw_only=True)
class ChannelStats(Window):
    """Statistics of every channel over the tokens.

    Variables of the dataset, each over the kept axes and ``channel``: ``score`` = |mean over tokens|; ``magnitude`` = mean
    of |x|; ``maximum`` of |x|; ``energy`` = mean of x². Also ``top_channel`` and ``top_score`` (sample, step, branch, layer,
    rank): the channels of highest score of each sample.

    An axis that is not in ``keep`` is averaged out while running (the maximum is maximised), and ``score_std`` holds the
    score's standard deviation over it. Without "sample" and with ``top=0``, memory does not grow with the samples.

    Attributes:
        keep: which of sample, step, branch and layer stay axes of the result.
        top: how many highest channels to list for each sample; 0 for none.
        max_bytes: refuse the run if the result would be larger.
    """

    version: ClassVar[int] = 1
    keep: tuple[str, ...] = AXES
    top: int = 32
    max_bytes: int = 2 * 2**30

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep", tuple(self.keep))
        if not set(self.keep) <= set(AXES):
            raise ValueError(f"keep={self.keep} names an unknown axis; use some of {', '.join(AXES)}.")

    def entry(self, tokens: int, channels: int) -> int:  # noqa: D102
        spread = self.keep != AXES  # then the score's standard deviation as well
        return 4 * (len(STATISTICS) + spread) * channels

    def size(self, samples: int, steps: int, branches: int, layers: int, tokens: int, channels: int) -> int:  # noqa: D102
        run = (samples, steps, branches, layers)
        listed = 8 * min(self.top, channels) * math.prod(self._entries(*run).values())
        return super().size(*run, tokens, channels) + listed

    def start(self, run: Run) -> _ChannelStatsListener:
        """A listener that fills the record."""
        return _ChannelStatsListener(self, run)


@dataclass(frozen=True, kw_only=True)
class HiddenStates(Window):
    """Hidden states in full, of chosen tokens and channels: ``value`` (sample, step, branch, layer, token, channel).

    Attributes:
        channels: ids, or a rule with a fixed k (then ``channel`` is a rank and ``channel_id`` holds the ids); None for all.
        tokens: token indices; None for all.
        max_bytes: refuse the run if the result would be larger.
    """

    version: ClassVar[int] = 1
    channels: tuple[int, ...] | Rule | None = None
    tokens: tuple[int, ...] | None = None
    max_bytes: int = 2 * 2**30

    def entry(self, tokens: int, channels: int) -> int:  # noqa: D102
        kept = tokens if self.tokens is None else len(self.tokens)
        if isinstance(self.channels, Rule):
            k = self.channels.fixed_k
            return 4 * k * kept + 4 * k
        return 4 * kept * (channels if self.channels is None else len(self.channels))

    def start(self, run: Run) -> _HiddenStatesListener:
        """A listener that fills the record."""
        return _HiddenStatesListener(self, run)


@dataclass(frozen=True, kw_only=True)
class Gates(Window):
    """The AdaLN gates: ``value`` (sample, step, branch, layer, gate, channel), NaN where a block has no such gate."""

    version: ClassVar[int] = 1
    points: ClassVar[tuple[str, ...]] = ("gate",)
    point: str = field(default="gate", init=False)

    def entry(self, tokens: int, channels: int) -> int:  # noqa: D102
        return 4 * 2 * channels  # attention and MLP

    def start(self, run: Run) -> _GatesListener:
        """A listener that fills the record."""
        return _GatesListener(self, run)


@dataclass(frozen=True, kw_only=True)
class Modulation(Window):
    """Shift and scale of a block's first LayerNorm: ``value`` (sample, step, branch, layer, gate, channel)."""

    version: ClassVar[int] = 1
    points: ClassVar[tuple[str, ...]] = ("modulation",)
    point: str = field(default="modulation", init=False)

    def entry(self, tokens: int, channels: int) -> int:  # noqa: D102
        return 4 * 2 * channels

    def start(self, run: Run) -> _GatesListener:
        """A listener that fills the record."""
        return _GatesListener(self, run)


@dataclass(frozen=True, kw_only=True)
class Clusters(Window):
    """K-means of the image tokens in the subspace of selected channels (MAs-DiT, arXiv 2605.13974, two-means masks).

    Each selected channel is scaled to [0, 1] over the tokens first. Only the result is kept, so thousands of maps are small:
    ``label`` (sample, step, branch, layer, token), int8, and ``heat``, the mean of the scaled channels of each token.

    Attributes:
        channels: a rule; channels that it leaves out do not take part.
        clusters: number of clusters.
        seed: of the starts of k-means.
    """

    version: ClassVar[int] = 2
    channels: Rule = field(default=TopK(12))
    clusters: int = 2
    seed: int = 0

    def entry(self, tokens: int, channels: int) -> int:  # noqa: D102
        return 5 * tokens

    def start(self, run: Run) -> _ClustersListener:
        """A listener that fills the record."""
        return _ClustersListener(self, run)


class _Listener:
    """Collects (samples, ...) tensors by (step, branch, layer); moves them to the host once a batch."""

    writes = False

    def __init__(self, record: Window, run: Run) -> None:
        record.check(len(run.blocks), run.steps)
        self.record, self.run = record, run
        self._batch: dict[str, dict[tuple, Tensor]] = defaultdict(dict)
        self._host: dict[str, dict[tuple, list[Tensor]]] = defaultdict(lambda: defaultdict(list))

    def wants(self, layer: int, stream: str, point: str) -> bool:
        return self.record.wants_site(layer, stream, point)

    def keep(self, name: str, key: tuple, value: Tensor) -> None:
        self._batch[name][key] = value

    def flush(self) -> None:
        """End of a batch: one transfer a variable, unless stacking it would need much memory."""
        import torch

        for name, values in self._batch.items():
            parts = list(values.values())
            small = sum(p.nbytes for p in parts) < 2**26 and len({p.shape for p in parts}) == 1
            moved = torch.stack(parts).cpu() if small else [p.cpu() for p in parts]
            for key, value in zip(values, moved, strict=True):
                self._host[name][key].append(value)
        self._batch.clear()

    def discard(self) -> None:
        """Forget an unfinished batch."""
        self._batch.clear()

    def refuse_larger(self, x: Tensor) -> None:
        """Called at the first event, before anything was kept."""
        r, run = self.record, self.run
        size = r.size(run.samples, run.steps, 2 if run.cfg > 1 else 1, len(run.blocks), x.shape[1], x.shape[2])
        name = type(r).__name__
        if size > r.max_bytes:
            raise ValueError(
                f"{name} would keep up to {size:,} bytes, above max_bytes={r.max_bytes:,}; choose fewer axes, layers, "
                "steps, branches, tokens or channels, or raise max_bytes."
            )
        log.log(logging.WARNING if size > 2**28 else logging.INFO, "%s keeps up to %s bytes.", name, f"{size:,}")

    def _assemble(self, name: str, dims: tuple[str, ...]) -> xr.DataArray | None:
        """Stack what was kept of one variable to (sample, step, branch, layer, *dims)."""
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


class _ChannelStatsListener(_Listener):
    record: ChannelStats

    def __init__(self, record: ChannelStats, run: Run) -> None:
        super().__init__(record, run)
        self._sums: dict[tuple, dict[str, Tensor]] = {}
        self._counts: dict[tuple, int] = defaultdict(int)
        self._pending: list[tuple[tuple, dict[str, Tensor], int]] = []
        self._checked = False

    def __call__(self, event: Event, x: Tensor) -> None:
        if not self.record.covers(event):
            return
        if not self._checked:
            self.refuse_larger(x)
            self._checked = True
        x = x.float()
        size = x.abs()
        stats = {
            "score": x.mean(1).abs(),
            "magnitude": size.mean(1),
            "maximum": size.amax(1),
            "energy": x.square().mean(1),
        }
        site = (event.step, event.branch, event.layer)
        if self.record.top:
            top = stats["score"].topk(min(self.record.top, x.shape[2]), dim=1)
            self.keep("top_score", site, top.values)
            self.keep("top_channel", site, top.indices.int())
        if self.record.keep == AXES:
            for name, value in stats.items():
                self.keep(name, site, value)
        else:
            stats["square"] = stats["score"].square()
            if "sample" not in self.record.keep:
                stats = {n: v.amax(0) if n == "maximum" else _wide(v).sum(0) for n, v in stats.items()}
            self._pending.append((site, stats, len(x)))

    def flush(self) -> None:
        super().flush()
        for site, stats, samples in self._pending:
            self._add(site, stats, samples)
        self._pending.clear()

    def discard(self) -> None:
        super().discard()
        self._pending.clear()

    def _add(self, site: tuple, stats: dict[str, Tensor], samples: int) -> None:
        """Fold one event into the running sums of its kept axes; a kept sample axis keeps one row a sample."""
        named = dict(zip(AXES[1:], site, strict=True))
        by_sample = "sample" in self.record.keep
        offset = self._counts["samples", *site]
        self._counts["samples", *site] += samples
        rows = range(samples) if by_sample else (slice(None),)
        for row in rows:
            named["sample"] = offset + row if by_sample else None
            key = tuple(named[a] for a in self.record.keep)
            part = {n: _wide(v[row]) for n, v in stats.items()} if by_sample else stats
            sums = self._sums.setdefault(key, {})
            for name, value in part.items():
                if name not in sums:
                    sums[name] = value.clone()
                elif name == "maximum":
                    sums[name] = sums[name].maximum(value)
                else:
                    sums[name] += value
            self._counts[key] += 1 if by_sample else samples

    def dataset(self) -> xr.Dataset:
        import xarray as xr

        found = {n: self._assemble(n, ("channel",)) for n in STATISTICS}
        found |= {n: self._assemble(n, ("rank",)) for n in ("top_score", "top_channel")}
        result = xr.Dataset({n: v for n, v in found.items() if v is not None})
        return result.merge(self._reduced()) if self._sums else result

    def _reduced(self) -> xr.Dataset:
        import numpy as np
        import xarray as xr

        keys = list(self._sums)
        labels = {a: sorted({k[i] for k in keys}) for i, a in enumerate(self.record.keep)}
        channels = len(self._sums[keys[0]]["maximum"])
        shape = (*(len(v) for v in labels.values()), channels)
        full = {n: np.full(shape, np.nan, dtype=np.float32) for n in (*STATISTICS, "score_std")}
        for key in keys:
            at = tuple(labels[a].index(v) for a, v in zip(self.record.keep, key, strict=True))
            sums, count = {n: v.cpu().double().numpy() for n, v in self._sums[key].items()}, self._counts[key]
            for name in STATISTICS:
                full[name][at] = sums[name] if name == "maximum" else sums[name] / count
            mean = sums["score"] / count
            full["score_std"][at] = np.sqrt(np.maximum(sums["square"] / count - mean**2, 0))
        coords = {a: v for a, v in labels.items() if a != "sample"}
        dims = (*self.record.keep, "channel")
        return xr.Dataset({n: (dims, v) for n, v in full.items()}, coords=coords).transpose(*dims)


def _wide(x: Tensor) -> Tensor:
    """Sums over many samples need more than fp32, where the device has it."""
    return x if x.device.type == "mps" else x.double()


class _HiddenStatesListener(_Listener):
    record: HiddenStates

    def __init__(self, record: HiddenStates, run: Run) -> None:
        super().__init__(record, run)
        self._checked = False

    def __call__(self, event: Event, x: Tensor) -> None:
        if not self.record.covers(event):
            return
        channels, tokens = self.record.channels, self.record.tokens
        site = (event.step, event.branch, event.layer)
        if not self._checked:
            self.refuse_larger(x)
            self._checked = True
        if tokens is not None:
            if max(tokens) >= x.shape[1]:
                raise ValueError(f"Token {max(tokens)} was asked for; this run has tokens 0 to {x.shape[1] - 1}.")
            chosen = x[:, list(tokens)]
        else:
            chosen = x
        if isinstance(channels, Rule):
            ids = channels.ids(x, event.layer)
            chosen = chosen.gather(2, ids[:, None].expand(-1, chosen.shape[1], -1))
            self.keep("channel_id", site, ids.int())
        elif channels is not None:
            if max(channels) >= x.shape[2]:
                raise ValueError(f"Channel {max(channels)} was asked for; this model has 0 to {x.shape[2] - 1}.")
            chosen = chosen[:, :, list(channels)]
        self.keep("value", site, chosen.float() if chosen is not x else x.float().clone())

    def dataset(self) -> xr.Dataset:
        import xarray as xr

        value = self._assemble("value", ("token", "channel"))
        ids = self._assemble("channel_id", ("channel",))
        if value is None:
            return xr.Dataset()
        coords = {}
        if self.record.tokens is not None:
            coords["token"] = list(self.record.tokens)
        if ids is None and self.record.channels is not None:
            coords["channel"] = list(self.record.channels)
        result = xr.Dataset({"value": value.assign_coords(coords)})
        return result if ids is None else result.assign(channel_id=ids)


class _ClustersListener(_Listener):
    record: Clusters

    def __call__(self, event: Event, x: Tensor) -> None:
        if not self.record.covers(event):
            return
        from .spatial import kmeans, subspace

        site = (event.step, event.branch, event.layer)
        points, heat = subspace(x, self.record.channels, event.layer)
        self.keep("label", site, kmeans(points, self.record.clusters, seed=self.record.seed).char())
        self.keep("heat", site, heat)

    def dataset(self) -> xr.Dataset:
        import xarray as xr

        found = {name: self._assemble(name, ("token",)) for name in ("label", "heat")}
        return xr.Dataset({n: v for n, v in found.items() if v is not None})


class _GatesListener(_Listener):
    record: Gates | Modulation

    def __call__(self, event: Event, x: Tensor) -> None:
        if self.record.covers(event):
            self.keep(event.gate, (event.step, event.branch, event.layer), x.float())

    def dataset(self) -> xr.Dataset:
        import xarray as xr

        found = {gate: self._assemble(gate, ("channel",)) for gate in sorted(self._host)}
        if not found:
            return xr.Dataset()
        stacked = xr.concat(
            list(found.values()), dim="gate", join="outer", coords="minimal", compat="override"
        ).assign_coords(gate=list(found))
        return xr.Dataset({"value": stacked.transpose(*AXES, "gate", "channel")})
