"""Figures of notebook 01: channel scores, their origin and their emergence during training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import seaborn as sns
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .style import PALETTE, _band, _blocks, _canvas, _finish, _log

if TYPE_CHECKING:
    import xarray as xr


def channels(data: xr.Dataset) -> Figure:
    """Plot ``ratio`` (layer, channel), score over the median: every channel, and the sorted spectrum of each block."""
    figure, (left, right) = _canvas(1, 2, (10.5, 4.0), width_ratios=(1.7, 1))
    values = np.maximum(data.ratio.values, 1e-2)
    heat_map = left.imshow(values, aspect="auto", interpolation="nearest", cmap="mako", norm=LogNorm(0.1, values.max()))
    figure.colorbar(heat_map, ax=left, label="score / median score", pad=0.01)
    left.set(xlabel="channel", ylabel="block")
    _blocks(left, data, vertical=True)
    colours = sns.color_palette("flare", len(values))
    for row, name, colour in zip(values, data.block.values, colours, strict=True):
        right.plot(np.arange(1, len(row) + 1), np.sort(row)[::-1], color=colour, label=str(name), lw=1.4)
    right.set(xlabel="rank of the channel", ylabel="score / median score")
    _log(right, "x", "y")
    right.axhline(1, color="0.6", lw=0.8)
    if len(values) <= 12:
        right.legend(frameon=False, fontsize=7.5)
    lead = int(data.ratio.mean("layer").argmax("channel"))
    wins = int((data.ratio.argmax("channel") == lead).sum())
    many = int((values > values.max() / 10).any(0).sum())
    title = (
        f"Channel {lead} leads in {wins} of {len(values)} blocks; the highest score is {values.max():.0f} x the median, "
        f"and {many} of {values.shape[1]} channels reach a tenth of it"
    )
    return _finish(figure, title, data)


def layers(data: xr.Dataset) -> Figure:
    """Plot the largest scores over the median by block, next to the absolute criterion of Sun et al.

    ``mean``, ``low``, ``high`` (kind, rank, layer); ``sun_ratio``, ``sun_maximum``, ``sun_massive`` (dump), where
    ``dump`` are the layers whose hidden states were kept in full.
    """
    figure, axes = _canvas(1, 3, (12.5, 3.9))
    names = {"score": "|mean over tokens|", "magnitude": "mean over tokens of |x|"}
    ranks = [int(r) for r in data["rank"]]
    for axis, kind in zip(axes, names, strict=False):
        for rank, colour in zip(ranks, sns.color_palette("flare_r", len(ranks)), strict=True):
            _band(axis, data.sel(kind=kind, rank=rank), color=colour, label=f"rank {rank}")
        axis.axhline(1, color="0.6", lw=0.8)
        axis.set(ylabel="score / median score", title=f"score: {names[kind]}")
        _blocks(axis, data)
        axis.legend(frameon=False, fontsize=8)
    axes[1].sharey(axes[0])
    _log(axes[0], "y")
    last, places = axes[2], data["dump"]
    last.plot(places, data.sun_ratio, marker="o", ms=3.5, color=PALETTE[0], label="largest |x| / median |x|")
    last.plot(places, data.sun_maximum, marker="s", ms=3.5, color=PALETTE[2], label="largest |x|")
    last.axhline(1000, color=PALETTE[0], ls="--", lw=1, label="threshold on the ratio: 1,000")
    last.axhline(100, color=PALETTE[2], ls="--", lw=1, label="threshold on |x|: 100")
    last.set(title="Sun et al.: single activations", ylabel="|x|, and its ratio to the median")
    _log(last, "y")
    last.set_xlim(axes[0].get_xlim())
    last.set_ylim(None, max(9000, 3 * float(data.sun_ratio.max())))
    last.legend(frameon=False, fontsize=7.5, ncols=2, loc="upper left")
    _blocks(last, data)
    score = data["mean"].sel(kind="score")
    top, other = float(score.sel(rank=ranks[0]).max()), float(score.sel(rank=ranks[-1]).max())
    met = "meets" if float(data.sun_massive.max()) > 0 else "does not meet"
    title = (
        f"The highest score reaches {top:.0f} x the median, that of rank {ranks[-1]} only {other:.0f} x; "
        f"the model {met} the absolute criterion"
    )
    return _finish(figure, title, data)


def token_maps(data: xr.Dataset) -> Figure:
    """Plot ``value`` (step, rank, row, column) of the top channels over the image grid, and ``image`` (y, x, rgb)."""
    steps, ranks = data.sizes["step"], data.sizes["rank"]
    figure, axes = _canvas(steps, ranks + 1, (1.75 * (ranks + 1), 1.9 * steps + 0.5), squeeze=False)
    for row in range(steps):
        axes[row, 0].axis("off")
        for column in range(ranks):
            axis = axes[row, column + 1]
            values = data.value.isel(step=row, rank=column).values
            span = np.abs(values - np.median(values)).max()
            middle = np.median(values)
            axis.imshow(values, cmap="vlag", vmin=middle - span, vmax=middle + span, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"ch {int(data.channel_id.isel(step=row, rank=column))}: {middle:+.1f} ± {span:.1f}", fontsize=8)
        axes[row, 1].set_ylabel(f"sigma {float(data.sigma[row]):.2f}", fontsize=9)
    axes[0, 0].imshow(data.image.values.astype(np.uint8), interpolation="nearest")
    axes[0, 0].set_title("the image", fontsize=9)
    title = f"What the top channels look like over the image, at the output of {data.attrs['block']}"
    return _finish(figure, title, data)


def tokens(data: xr.Dataset) -> Figure:
    """Plot ``magnitude`` (token, channel) of one sample, and ``constancy`` and ``ratio`` (channel)."""
    figure, (left, right) = _canvas(1, 2, (11.0, 4.0), width_ratios=(1.5, 1))
    values = np.maximum(data.magnitude.values, 1e-3)
    heat_map = left.imshow(values, aspect="auto", cmap="mako", norm=LogNorm(values.max() / 1e3, values.max()))
    figure.colorbar(heat_map, ax=left, label="|x|", pad=0.01)
    left.set(xlabel="channel", ylabel="image token", title=f"one sample, output of {data.attrs['block']}")
    size, top = data.ratio.values, np.argsort(data.ratio.values)[::-1][: data.attrs["k"]]
    right.scatter(size, data.constancy.values, s=9, color="0.6", lw=0, label="channel")
    right.scatter(size[top], data.constancy.values[top], s=22, color=PALETTE[3], lw=0, label=f"top {data.attrs['k']}")
    for place, channel in enumerate(top[:5]):
        right.annotate(
            str(channel),
            (size[channel], data.constancy.values[channel]),
            fontsize=7.5,
            xytext=(3, -10 if place % 2 else 4),
            textcoords="offset points",
        )
    right.set(
        ylim=(0, 1.03),
        xlabel="score / median score",
        ylabel="|mean| / root mean square over tokens",
        title="1 = the same value in every token",
    )
    _log(right, "x")
    right.legend(frameon=False, fontsize=8, loc="lower right")
    share = float(data.share)
    title = f"The leading channel exceeds 10 x its token's median |x| in {share:.0%} of the image tokens"
    return _finish(figure, title, data)


def sigma(data: xr.Dataset) -> Figure:
    """Plot ``top`` and ``median`` (step, layer): mean score of the massive and of the median channel over denoising."""
    figure, axes = _canvas(1, 3, (12.5, 3.8))
    colours = sns.color_palette("flare", data.sizes["layer"])
    panels = (
        (data.top, "score", "massive channels"),
        (data["median"], "score", "median channel"),
        (data.top / data["median"], "ratio", "massive / median"),
    )
    for axis, (values, label, name) in zip(axes, panels, strict=True):
        for index, colour in enumerate(colours):
            axis.plot(data.sigma, values.isel(layer=index), color=colour, lw=1.5, label=str(data.block.values[index]))
        axis.set(xlabel="sigma (1 = noise, 0 = image)", ylabel=label, title=name, ylim=(0, None))
        axis.invert_xaxis()
    if len(colours) <= 12:
        axes[0].legend(frameon=False, fontsize=7.5)
    first, last = data.isel(step=0), data.isel(step=-1)
    change, usual = (float((last[name] / first[name]).mean()) for name in ("top", "median"))
    title = f"From the first step to the last the massive channels change {change:.2f} x, the median channel {usual:.2f} x"
    return _finish(figure, title, data)


def origin(data: xr.Dataset) -> Figure:
    """Plot ``share`` (group, source) of the variance of the scores, and ``jaccard`` (pair) with ``low`` and ``high``."""
    figure, (left, right) = _canvas(1, 2, (11.5, 4.2), width_ratios=(1.25, 1))
    sources = [str(s) for s in data.source.values]
    colours = {s: PALETTE[i % len(PALETTE)] for i, s in enumerate(sources)}
    start = np.zeros(data.sizes["group"])
    for source in sources:
        share = data.share.sel(source=source).values
        left.barh(range(len(start)), share, left=start, color=colours[source], label=source, height=0.62)
        for row, (x, width) in enumerate(zip(start, share, strict=True)):
            if width > 0.05:
                left.text(x + width / 2, row, f"{width:.0%}", ha="center", va="center", fontsize=8, color="white")
        start = start + share
    left.set_yticks(range(data.sizes["group"]), [str(g) for g in data.group.values])
    left.set(xlim=(0, 1), xlabel="share of the variance of the score", title="what sets the magnitude")
    left.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    places = range(data.sizes["pair"])
    error = [data.jaccard - data.low, data.high - data.jaccard]
    right.bar(places, data.jaccard, yerr=np.abs(error), color=PALETTE[0], width=0.62, capsize=3)
    right.axhline(data.attrs["random"], color="0.4", ls="--", lw=1, label="two random sets")
    right.set_xticks(places, [str(p) for p in data.pair.values])
    right.set(
        ylim=(0, 1.02), ylabel=f"Jaccard overlap of the top {data.attrs['k']}", title="who is massive, when only ... differs"
    )
    right.legend(frameon=False, fontsize=8)
    massive = data.share.isel(group=0)
    step = float(massive.sel(source="step"))
    prompt = float(massive.sel(source=[s for s in sources if "prompt" in s and "seed" not in s]).sum())
    title = (
        f"The denoising step explains {step:.0%} of the variance of the massive channels' scores, the prompt {prompt:.0%}"
    )
    return _finish(figure, title, data)


def gates(data: xr.Dataset) -> Figure:
    """Plot ``gate`` against ``score`` (site, channel): AdaLN gate and channel score at each gate of the model."""
    count = data.sizes["site"]
    columns = min(count, 6)
    rows = -(-count // columns)
    figure, axes = _canvas(rows, columns, (2.35 * columns, 2.6 * rows + 0.6), squeeze=False)
    for axis in axes.flat[count:]:
        axis.axis("off")
    for index, axis in zip(range(count), axes.flat, strict=False):
        size, gate = data.score.isel(site=index).values, data.gate.isel(site=index).values
        top = np.argsort(size)[::-1][: data.attrs["k"]]
        axis.scatter(size, gate, s=6, color="0.65", lw=0)
        axis.scatter(size[top], gate[top], s=18, color=PALETTE[3], lw=0)
        _log(axis, "x")
        axis.set_title(f"{data.site.values[index]}\npercentile {float(data.percentile[index]):.0%}", fontsize=8.5)
    for axis in axes[-1]:
        axis.set_xlabel("score of the channel")
    for axis in axes[:, 0]:
        axis.set_ylabel("|AdaLN gate|")
    middle, low = data.attrs["percentile"], data.attrs["bottom"]
    title = (
        f"The top {data.attrs['k']} channels (red) stand at percentile {middle:.0%} of |gate|, the bottom ones at {low:.0%}"
    )
    return _finish(figure, title, data)


def norm_share(data: xr.Dataset) -> Figure:
    """Plot ``share`` (layer, channels): share of the tokens' squared norm in the strongest channels."""
    figure, axis = _canvas(1, 1, (6.2, 4.0))
    for index, colour in enumerate(sns.color_palette("flare", data.sizes["layer"])):
        label = str(data.block.values[index]) if data.sizes["layer"] <= 12 else None
        axis.plot(data.channels, data.share.isel(layer=index), color=colour, lw=1.6, label=label)
    axis.plot(data.channels, data.channels / data.channels.max(), color="0.5", ls="--", lw=1, label="all channels alike")
    axis.set(ylim=(0, 1.02), xlabel="number of channels, strongest first", ylabel="share of the squared norm")
    _log(axis, "x")
    axis.legend(frameon=False, fontsize=8)
    k = data.attrs["k"]
    held = data.share.sel(channels=k)
    low, high, width = float(held.min()), float(held.max()), data.sizes["channels"]
    title = f"{k} of {width} channels hold {low:.0%} to {high:.0%} of a token's squared norm"
    return _finish(figure, title, data)


def streams(data: xr.Dataset) -> Figure:
    """Plot ``image`` and ``text`` (layer), largest score over the median, and ``jaccard`` (layer) of the two top sets."""
    figure, (left, right) = _canvas(1, 2, (9.5, 3.8))
    places = range(data.sizes["layer"])
    for name, colour, marker in (("image", PALETTE[0], "o"), ("text", PALETTE[1], "s")):
        left.plot(places, data[name], color=colour, marker=marker, ms=4, label=f"{name} stream")
    left.set(ylabel="largest score / median", title="how massive")
    _log(left, "y")
    left.legend(frameon=False, fontsize=8)
    right.bar(places, data.jaccard, color=PALETTE[2], width=0.6)
    right.axhline(data.attrs["random"], color="0.4", ls="--", lw=1, label="two random sets")
    right.set(ylim=(0, 1.02), ylabel=f"Jaccard of the two top {data.attrs['k']}", title="the same channels?")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        _blocks(axis, data)
    if bool(data.text.isnull().all()):
        title = "This architecture has no residual text stream"
    else:
        title = (
            f"Image and text stream share {float(data.jaccard.max()):.0%} of their top {data.attrs['k']} channels at most; "
            f"the text stream peaks at {float(data.text.max()):.0f} x its median"
        )
    return _finish(figure, title, data)


def emergence(data: xr.Dataset) -> Figure:
    """Plot ``top_ratio`` (train_step, layer), and ``ratio`` (train_step, channel) of the final top channels."""
    figure, (left, right) = _canvas(1, 2, (11.0, 3.9))
    for index, colour in enumerate(sns.color_palette("flare", data.sizes["layer"])):
        label = str(data.block.values[index]) if data.sizes["layer"] <= 12 else None
        left.plot(data.train_step, data["top_ratio"].isel(layer=index), color=colour, marker=".", lw=1.4, label=label)
    left.set(xlabel="training step", ylabel="largest score / median", title="each block")
    left.legend(frameon=False, fontsize=8)
    for index, channel in enumerate(data.channel.values):
        right.plot(
            data.train_step,
            data.ratio.isel(channel=index),
            marker=".",
            lw=1.4,
            color=PALETTE[index],
            label=f"channel {channel}",
        )
    right.set(xlabel="training step", ylabel="score / median", title="the final leaders")
    right.axhline(1, color="0.6", lw=0.8)
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.set(xscale="symlog", xlim=(0, None))
        axis.xaxis.set_major_formatter("{x:g}")
        _log(axis, "y")
    reached = (data["top_ratio"].max("layer") > 10).values
    when = f"after {int(data.train_step[int(reached.argmax())])} training steps" if reached.any() else "never"
    end, peak = int(data.train_step[-1]), float(data["top_ratio"].isel(train_step=-1).max())
    title = f"The highest score first exceeds 10 x the median {when}; after {end} steps it is {peak:.0f} x"
    return _finish(figure, title, data)


def sizes(data: xr.Dataset) -> Figure:
    """Plot trainings by width and seed.

    ``top_ratio``, ``overlap`` (training, train_step); ``width``, ``chance`` and ``longer`` (training), the last where a
    training has a longer recipe than the others, which are compared; ``shared`` (pair of seeds).
    """
    figure, (left, middle, right) = _canvas(1, 3, (13.0, 3.9))
    widths = sorted(set(data.width.values.tolist()))
    colours = dict(zip(widths, sns.color_palette("viridis", len(widths) + 1), strict=False))
    runs = {str(name): data.sel(training=name).dropna("train_step", subset=["top_ratio"]) for name in data.training.values}
    common = min(int(run.train_step[-1]) for run in runs.values())
    at = {name: float(run["top_ratio"].sel(train_step=common, method="nearest")) for name, run in runs.items()}
    labels: set[str] = set()
    for name, run in sorted(runs.items(), key=lambda item: int(item[1].width)):
        width = int(run.width)
        label = f"width {width}, longer recipe" if run.longer else f"width {width}"
        line = {"color": colours[width], "marker": ".", "lw": 1.2, "ms": 4, "ls": "--" if run.longer else "-"}
        left.plot(run.train_step, run["top_ratio"], label=None if label in labels else label, **line)
        right.plot(run.train_step, run["overlap"], **line)
        middle.scatter(
            width, at[name], facecolor="none" if run.longer else colours[width], edgecolor=colours[width], s=36, zorder=3
        )
        labels.add(label)
    chance = {int(w): float(c) for w, c in zip(data.width.values, data.chance.values, strict=True)}
    middle.plot(widths, [chance[w] for w in widths], color="0.5", ls="--", marker="_", label="normal values of that width")
    middle.set(xlabel="width (channels)", ylabel="largest score / median", title=f"at about step {common}", xticks=widths)
    left.set(xlabel="training step", ylabel="largest score / median, mean of blocks", title="over the training")
    right.set(
        xlabel="training step",
        ylabel=f"Jaccard overlap with the final top {data.attrs['k']}",
        title="which channels they are",
    )
    right.axhline(data.attrs["random"], color="0.5", ls="--", lw=1, label="two random choices")
    if data.sizes.get("pair"):
        right.axhline(float(data.shared.mean()), color=PALETTE[3], lw=1.2, label=f"two seeds of width {widths[0]}")
    for axis in (left, right):
        axis.set(xscale="symlog", xlim=(0, None))
        axis.xaxis.set_major_formatter("{x:g}")
    for axis in (left, middle):
        _log(axis, "y")
    for axis in (left, middle, right):
        axis.legend(frameon=False, fontsize=8)
    alike = {w: [at[n] for n, run in runs.items() if run.width == w and not run.longer] for w in widths}
    means = ", ".join(f"{np.mean(found):.0f} x at width {w}" for w, found in alike.items() if found)
    return _finish(figure, f"After about {common} training steps the highest score is, over the median, {means}", data)
