"""Records: what can be read during a generation. Their results are ``xarray.Dataset`` objects.

Everything is reduced on the device, without a copy to the host inside of a hook, and leaves the device once a batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from .rules import AXES, Rule, TopK
from .window import BaseListener, Run, Window

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

    from .hooks import Event


STATISTICS = ("score", "magnitude", "maximum", "energy")


@dataclass(frozen=True, kw_only=True)
class ChannelStats(Window):
    """Statistics of every channel over the tokens.

    Variables of the dataset, each over the kept axes and ``channel``: ``score`` = |mean over tokens|; ``magnitude`` =
    mean of |x|; ``maximum`` of |x|; ``energy`` = mean of x². Also ``top_channel`` and ``top_score`` (sample, step,
    branch, layer, rank): the channels of highest score of each sample.

    An axis that is not in ``keep`` is averaged out while running (of the maximum, the maximum is taken), and
    ``score_std`` is the standard deviation of the score over it. Without "sample" and with ``top=0``, memory does not
    grow with the samples.

    Attributes:
        keep: which of sample, step, branch and layer remain axes of the result.
        top: number of highest channels to list for each sample; 0 for none.
        max_bytes: largest allowed size of the result; a larger one raises ValueError at the first event.
    """

    version: ClassVar[int] = 1
    keep: tuple[str, ...] = AXES
    top: int = 32
    max_bytes: int = 2 * 2**30

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep", tuple(self.keep))
        if not set(self.keep) <= set(AXES):
            raise ValueError(f"keep={self.keep} contains an unknown axis; use {', '.join(AXES)}.")

    def entry(self, tokens: int, channels: int) -> int:  # noqa: D102
        spread = self.keep != AXES  # then the score's standard deviation as well
        return 4 * (len(STATISTICS) + spread) * channels

    def size(self, samples: int, steps: int, branches: int, layers: int, tokens: int, channels: int) -> int:  # noqa: D102
        run = (samples, steps, branches, layers)
        listed = 8 * min(self.top, channels) * math.prod(self._entries(*run).values())
        return super().size(*run, tokens, channels) + listed

    def start(self, run: Run) -> _ChannelStatsListener:
        """Return a listener that fills the record."""
        return _ChannelStatsListener(self, run)


@dataclass(frozen=True, kw_only=True)
class HiddenStates(Window):
    """Hidden states of selected tokens and channels: ``value`` (sample, step, branch, layer, token, channel).

    Attributes:
        channels: ids, or a selection rule with a fixed k (then ``channel`` is a rank and ``channel_id`` contains the
            ids); None for all.
        tokens: token indices; None for all.
        max_bytes: largest allowed size of the result; a larger one raises ValueError at the first event.
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
        """Return a listener that fills the record."""
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
        """Return a listener that fills the record."""
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
        """Return a listener that fills the record."""
        return _GatesListener(self, run)


@dataclass(frozen=True, kw_only=True)
class Clusters(Window):
    """K-means of the image tokens in selected channels (MAs-DiT, arXiv 2605.13974, two-means masks).

    Each selected channel is scaled to [0, 1] over the tokens first. Recorded are ``label`` (sample, step, branch, layer,
    token), int8, and ``heat``, the mean of each token's scaled channels.

    Attributes:
        channels: selection rule of the channels that take part.
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
        """Return a listener that fills the record."""
        return _ClustersListener(self, run)


class _ChannelStatsListener(BaseListener):
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
        """Add one event to the running sums of its kept axes; a kept sample axis has one row for each sample."""
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

        variables = {n: self._assemble(n, ("channel",)) for n in STATISTICS}
        variables |= {n: self._assemble(n, ("rank",)) for n in ("top_score", "top_channel")}
        result = xr.Dataset({n: v for n, v in variables.items() if v is not None})
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
    """Return ``x`` in float64 where the device has it: sums over many samples need more than float32."""
    return x if x.device.type == "mps" else x.double()


class _HiddenStatesListener(BaseListener):
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
                raise ValueError(
                    f"Token {max(tokens)} exceeds this run, which has tokens 0 to {x.shape[1] - 1}; choose less."
                )
            chosen = x[:, list(tokens)]
        else:
            chosen = x
        if isinstance(channels, Rule):
            ids = channels.ids(x, event.layer)
            chosen = chosen.gather(2, ids[:, None].expand(-1, chosen.shape[1], -1))
            self.keep("channel_id", site, ids.int())
        elif channels is not None:
            if max(channels) >= x.shape[2]:
                raise ValueError(f"Channel {max(channels)} exceeds this model's 0 to {x.shape[2] - 1}; choose less.")
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


class _ClustersListener(BaseListener):
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

        variables = {name: self._assemble(name, ("token",)) for name in ("label", "heat")}
        return xr.Dataset({n: v for n, v in variables.items() if v is not None})


class _GatesListener(BaseListener):
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
