"""Figures from datasets: static ones (seaborn) for saving, interactive ones (plotly) for exploring. No model in here.

Each static function takes the dataset with exactly the numbers it draws and returns a matplotlib figure; ``attrs["n"]`` and
``attrs["note"]`` go into the footer.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .metrics import DETAILS

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

PALETTE = sns.color_palette("colorblind")
_MANY = list(zip([*PALETTE, "0.1", "0.6", "tab:olive"], "osD^vP*X<>hdp", strict=True))  # thirteen kinds of mark
_STYLE = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("notebook", font_scale=0.85),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 100,
    "pdf.fonttype": 42,
}


def _canvas(rows: int, columns: int, size: tuple[float, float], **kwargs: Any) -> tuple[Figure, Any]:
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **kwargs)
    plt.close(figure)  # shown by being returned, not twice
    return figure, axes


def _finish(figure: Figure, title: str, data: xr.Dataset) -> Figure:
    title = textwrap.fill(title, int(10 * figure.get_figwidth()))  # about ten letters of this size to an inch
    figure.suptitle(title, fontsize=11.5, fontweight="bold", x=0.01, ha="left")
    words = [f"n = {data.attrs['n']}"] if "n" in data.attrs else []
    figure.supxlabel(
        ", ".join([*words, *filter(None, [data.attrs.get("note")])]), fontsize=8, color="0.35", x=0.01, ha="left"
    )
    return figure


def _blocks(axis: Any, data: xr.Dataset | xr.DataArray, vertical: bool = False) -> None:
    names = [str(b) for b in data.block.values]
    every = max(1, len(names) // 20)
    ticks, labels = range(0, len(names), every), names[::every]
    if vertical:
        axis.set_yticks(ticks, labels)
    else:
        axis.set_xticks(ticks, labels, rotation=35, ha="right")


def _log(axis: Any, *names: str) -> None:
    """Logarithmic axes with plain numbers at 1, 2 and 5."""
    for name in names:
        axis.set(**{f"{name}scale": "log"})
        side = getattr(axis, f"{name}axis")
        side.set_major_locator(LogLocator(10, (1.0,)))
        side.set_minor_locator(LogLocator(10, (2.0, 5.0)))
        side.set_major_formatter("{x:g}")
        low, high = getattr(axis, f"get_{name}lim")()
        side.set_minor_formatter("{x:g}" if high / max(low, 1e-9) < 200 else "")


def _band(axis: Any, data: xr.Dataset, **kwargs: Any) -> None:
    """A line of means over blocks with its 95 % interval."""
    line = axis.plot(range(len(data["mean"])), data["mean"], marker="o", ms=3.5, **kwargs)[0]
    axis.fill_between(range(len(data["mean"])), data.low, data.high, color=line.get_color(), alpha=0.2, lw=0)


def channels(data: xr.Dataset) -> Figure:
    """``ratio`` (layer, channel): score over the median. Left every channel, right the sorted spectrum of each block."""
    figure, (left, right) = _canvas(1, 2, (10.5, 4.0), width_ratios=(1.7, 1))
    values = np.maximum(data.ratio.values, 1e-2)
    picture = left.imshow(values, aspect="auto", interpolation="nearest", cmap="mako", norm=LogNorm(0.1, values.max()))
    figure.colorbar(picture, ax=left, label="score / median score", pad=0.01)
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
    """Largest scores over the median by block, and the absolute criterion of Sun et al. beside them.

    ``mean``, ``low``, ``high`` (kind, rank, layer); ``sun_ratio``, ``sun_maximum``, ``sun_massive`` (dump), where ``dump``
    holds the layers of which the hidden states were kept in full.
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
    """``value`` (step, rank, row, column) of the top channels over the image grid, and ``image`` (y, x, rgb)."""
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
    """``magnitude`` (token, channel) of one sample; ``constancy`` and ``ratio`` (channel): all tokens, or a few?"""
    figure, (left, right) = _canvas(1, 2, (11.0, 4.0), width_ratios=(1.5, 1))
    values = np.maximum(data.magnitude.values, 1e-3)
    picture = left.imshow(values, aspect="auto", cmap="mako", norm=LogNorm(values.max() / 1e3, values.max()))
    figure.colorbar(picture, ax=left, label="|x|", pad=0.01)
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
    """``top`` and ``median`` (step, layer): mean score of the massive channels and of the median one, over the denoising."""
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
    """``share`` (group, source) of the variance of the scores; ``jaccard`` (pair) with ``low`` and ``high``."""
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
    """``gate`` and ``score`` (site, channel): AdaLN gate against channel score at each gate of the model."""
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
    """``share`` (layer, channels): how much of the tokens' squared norm the strongest channels hold."""
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
    """``image`` and ``text`` (layer): largest score over the median; ``jaccard`` (layer) of the two top sets."""
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


def birth(data: xr.Dataset) -> Figure:
    """``lead`` (train_step, layer), and ``ratio`` (train_step, channel) of the channels that lead at the end."""
    figure, (left, right) = _canvas(1, 2, (11.0, 3.9))
    for index, colour in enumerate(sns.color_palette("flare", data.sizes["layer"])):
        label = str(data.block.values[index]) if data.sizes["layer"] <= 12 else None
        left.plot(data.train_step, data["lead"].isel(layer=index), color=colour, marker=".", lw=1.4, label=label)
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
    reached = (data["lead"].max("layer") > 10).values
    when = f"after {int(data.train_step[int(reached.argmax())])} training steps" if reached.any() else "never"
    end, peak = int(data.train_step[-1]), float(data["lead"].isel(train_step=-1).max())
    title = f"The highest score first exceeds 10 x the median {when}; after {end} steps it is {peak:.0f} x"
    return _finish(figure, title, data)


def sizes(data: xr.Dataset) -> Figure:
    """Trainings by width and seed.

    ``lead``, ``kept`` (training, train_step); ``width``, ``chance`` and ``longer`` (training), the last where a training has
    another, longer recipe than the others, which are compared; ``shared`` (pair of seeds).
    """
    figure, (left, middle, right) = _canvas(1, 3, (13.0, 3.9))
    widths = sorted(set(data.width.values.tolist()))
    colours = dict(zip(widths, sns.color_palette("viridis", len(widths) + 1), strict=False))
    runs = {str(name): data.sel(training=name).dropna("train_step", subset=["lead"]) for name in data.training.values}
    common = min(int(run.train_step[-1]) for run in runs.values())
    at = {name: float(run["lead"].sel(train_step=common, method="nearest")) for name, run in runs.items()}
    labels: set[str] = set()
    for name, run in sorted(runs.items(), key=lambda item: int(item[1].width)):
        width = int(run.width)
        label = f"width {width}, longer recipe" if run.longer else f"width {width}"
        line = {"color": colours[width], "marker": ".", "lw": 1.2, "ms": 4, "ls": "--" if run.longer else "-"}
        left.plot(run.train_step, run["lead"], label=None if label in labels else label, **line)
        right.plot(run.train_step, run.kept, **line)
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


_RULES = ("top", "equal energy", "equal norm", "random", "bottom")
_MARKERS = dict(zip(_RULES, "osD^v", strict=True))
_COLOURS = dict(zip(_RULES, (PALETTE[3], PALETTE[0], PALETTE[1], PALETTE[2], "0.5"), strict=True))
_MEASURES = {
    "agreement": "caption's attributes shown",
    "layout": "foreground IoU with undisturbed",
    "high_frequency": "high frequencies, log ratio",
    "edges": "edges, log ratio",
    "texture": "texture, log ratio",
    "distance": "RMS distance to undisturbed",
    "likeness": "likeness to the source",
    "preservation": "preservation of the target",
    "composite": "composite (harmonic mean)",
    "others kept": "other attributes kept",
    "clean": "exactly one subject",
    "PCK@0.1": "PCK@0.1, per image",
    "PCK@0.2": "PCK@0.2, per image",
}


def strength(data: xr.Dataset) -> Figure:
    """``mean``, ``low``, ``high`` (rule, k, measure), ``base`` (measure): what an edit of k channels in all blocks does.

    Another axis than k is named by ``attrs``: ``x``, its ``label``, the value ``at`` which the title speaks, and ``where``.
    """
    x_name, k = data.attrs.get("x", "k"), data.attrs["k"]
    measures = _measures(data, ("agreement", "high_frequency", "distance"))
    figure, axes = _canvas(1, len(measures), (4.1 * len(measures), 3.9), squeeze=False)
    for axis, measure in zip(axes[0], measures, strict=True):
        axis.axhline(float(data.base.sel(measure=measure)), color="0.3", lw=1, ls="--", label="undisturbed")
        if "ceiling" in data:
            label = data.attrs.get("ceiling_label", "the source itself")
            axis.axhline(float(data.ceiling.sel(measure=measure)), color="0.3", lw=1, ls=":", label=label)
        for place, rule in enumerate(data.rule.values):
            part, x = data.sel(rule=rule, measure=measure), data[x_name].values * (1 + 0.035 * (place - 2))
            bars = np.stack([part["mean"] - part.low, part.high - part["mean"]]).clip(0)
            axis.errorbar(x, part["mean"], bars, color=_COLOURS[rule], marker=_MARKERS[rule], ms=5, lw=1.3, label=rule)
        axis.set(xlabel=data.attrs.get("label", "k, channels of each block"), ylabel=_MEASURES[measure])
        axis.set_xscale("log", base=2)
        axis.set_xticks(data[x_name].values, data[x_name].values)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    measure, at = (
        data.attrs.get("told", "high_frequency" if measures[0] == "distance" else measures[0]),
        data.attrs.get("at", k),
    )
    values = data["mean"].sel({x_name: at, "measure": measure})
    told = ", ".join(f"{r} {float(values.sel(rule=r)):.2f}" for r in data.rule.values)
    where = data.attrs.get("where", f"with k = {k} in all blocks")
    return _finish(figure, f"{_MEASURES[measure].capitalize()} {where}: {told}", data)


def _measures(data: xr.Dataset, usual: tuple[str, ...]) -> list[str]:
    """The measures to draw, of those that the data have."""
    return [m for m in data.attrs.get("measures", usual) if m in data.measure]


def sites(data: xr.Dataset) -> Figure:
    """``mean``, ``low``, ``high`` (rule, site, measure): the same disruption at different places.

    Lines across, both optional: ``base`` and ``ceiling`` (measure). ``attrs`` may name them (``base_label``, and so on)
    and the ``title``.
    """
    measures = _measures(data, ("agreement", "layout", "high_frequency", "distance"))
    lines = {
        name: data.attrs.get(f"{name}_label", usual)
        for name, usual in (("base", "undisturbed"), ("ceiling", "the source itself"))
    }
    places, many = np.arange(data.sizes["site"]), data.sizes["site"] > 8
    upright = 0.07 * max(len(str(site)) for site in data.site.values) if many else 0  # inches that their names take
    figure, axes = _canvas(1, len(measures), (3.6 * len(measures), 3.9 + upright), squeeze=False)
    for axis, measure in zip(axes[0], measures, strict=True):
        for name, dash in (("base", "--"), ("ceiling", ":")):
            if name in data:
                axis.axhline(float(data[name].sel(measure=measure)), color="0.3", lw=1, ls=dash, label=lines[name])
        for number, rule in enumerate(data.rule.values):
            part = data.sel(rule=rule, measure=measure)
            bars = np.stack([part["mean"] - part.low, part.high - part["mean"]]).clip(0)
            style = {"color": _COLOURS.get(rule, _MANY[number][0]), "marker": _MARKERS.get(rule, _MANY[number][1])}
            shift = min(0.18, 0.8 / data.sizes["rule"]) * (number - (data.sizes["rule"] - 1) / 2)
            axis.errorbar(places + shift, part["mean"], bars, ls="", ms=5, capsize=2, label=rule, **style)
        axis.set_xticks(places, data.site.values, **({"rotation": 90} if many else {"rotation": 35, "ha": "right"}))
        axis.set(xlabel=data.attrs["axis"], ylabel=_MEASURES[measure])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    measure = "high_frequency" if measures[0] in ("layout", "high_frequency") else measures[0]
    top = data["mean"].isel(rule=0).sel(measure=measure)
    worst, best = (str(data.site.values[int(getattr(top, f)("site"))]) for f in ("argmin", "argmax"))
    who = f"{data.attrs.get('who', 'top')} {data.attrs['k']}"
    title = (
        f"{_MEASURES[measure].capitalize()}, {who}: least with {worst} ({float(top.min()):.2f}), "
        f"most with {best} ({float(top.max()):.2f})"
    )
    return _finish(figure, data.attrs.get("title", title), data)


def losses(data: xr.Dataset) -> Figure:
    """``change`` (condition, measure), mean of disturbed less undisturbed: what exactly is lost."""
    shown = data.change.to_pandas()
    figure, axis = _canvas(1, 1, (1.6 + 0.72 * shown.shape[1], 1.4 + 0.36 * shown.shape[0]))
    sns.heatmap(
        shown, ax=axis, cmap="vlag", center=0, vmin=-1, vmax=1, annot=True, fmt="+.2f", annot_kws={"fontsize": 8},
        cbar_kws={"label": "change to the undisturbed (detail: log of the ratio)"},
    )  # fmt: skip
    axis.set(xlabel="", ylabel="")
    axis.set_xticklabels([str(m).replace("_", " ") for m in shown.columns], rotation=35, ha="right")
    row = data.change.isel(condition=0)
    first = str(data.condition.values[0])
    meaning = [m for m in row.measure.values if m not in ("distance", *DETAILS)]
    lost = min(meaning or list(row.measure.values), key=lambda m: float(row.sel(measure=m)))
    name, size = str(lost).replace("_", " "), float(row.sel(measure=lost))
    title = f"{first[0].upper()}{first[1:]}: the largest loss is in {name} ({size:+.2f})"
    return _finish(figure, title, data)


def pictures(data: xr.Dataset) -> Figure:
    """``image`` (sample, condition, y, x, rgb): samples under each condition; ``row`` (sample) may name the rows."""
    rows, columns = data.sizes["sample"], data.sizes["condition"]
    figure, axes = _canvas(rows, columns, (1.5 * columns, 1.55 * rows + 0.8), squeeze=False)
    for row in range(rows):
        for column in range(columns):
            axis = axes[row, column]
            axis.imshow(data.image.isel(sample=row, condition=column).values.astype(np.uint8), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(textwrap.fill(str(data.condition.values[column]), 16), fontsize=8.5)
            if column == 0 and "row" in data.coords:
                axis.set_ylabel(str(data.row.values[row]), fontsize=8)
    return _finish(
        figure, data.attrs.get("title", f"The same prompts and seeds, {data.attrs['k']} channels a block disturbed"), data
    )


def matches(data: xr.Dataset) -> Figure:
    """``image`` (pair, end, y, x, rgb), ``start`` (pair, point, axis), ``found`` (pair, method, point, axis), ``hit``."""
    rows, methods = data.sizes["pair"], data["method"].values
    figure, axes = _canvas(rows, len(methods), (3.1 * len(methods), 1.6 * rows + 0.8), squeeze=False)
    for row in range(rows):
        image, width = data.image.isel(pair=row).values.astype(np.uint8), data.sizes["x"]
        for axis, method in zip(axes[row], methods, strict=True):
            part = data.isel(pair=row).sel({"method": method})
            axis.imshow(np.concatenate(list(image), axis=1), interpolation="nearest")
            for (x, y), (u, v), hit in zip(part.start.values, part.found.values, part.hit.values, strict=True):
                if np.isfinite(x):
                    colour, style = (PALETTE[9], "-") if hit else (PALETTE[1], ":")
                    axis.plot(
                        [x - 0.5, u + width - 0.5], [y - 0.5, v - 0.5], color=colour, ls=style, lw=1.1, marker="o", ms=2.5
                    )
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(str(method), fontsize=9)
    share = data.hit.where(data.start.isel(axis=0).notnull()).mean(("pair", "point"))
    told = "; ".join(f"{m} {float(share.sel({'method': m})):.0%}" for m in methods)
    return _finish(figure, f"Points found again within 0.1 of the box (solid), others (dotted): {told}", data)


def noise_grid(data: xr.Dataset) -> Figure:
    """``mean`` (rule, site, sigma): a score of features, by the block and the noise level that they are read at."""
    rules, rows = list(data.rule.values), data.sizes["site"]
    size = 1.4 + (1.0 + 0.5 * data.sizes["sigma"]) * len(rules), 1.6 + 0.3 * rows
    figure, axes = _canvas(1, len(rules), size, squeeze=False, sharey=True)
    scale, told = {"vmin": 0, "vmax": float(data["mean"].max())}, []
    for axis, rule in zip(axes[0], rules, strict=True):
        shown = data["mean"].sel(rule=rule).transpose("site", "sigma")
        sns.heatmap(
            shown.to_pandas(), ax=axis, cmap="viridis", annot=True, fmt=".2f", annot_kws={"fontsize": 7}, **scale,
            cbar=rule == rules[-1], cbar_kws={"label": data.attrs["measure"]},
        )  # fmt: skip
        axis.set(title=rule, xlabel="sigma, the noise level", ylabel="")
        at = shown.stack(place=shown.dims).idxmax("place").item()
        told.append(f"{rule} {float(shown.max()):.2f} ({at[0]}, {at[1]:g})")
    return _finish(figure, f"Highest {data.attrs['measure']}, block and sigma: {'; '.join(told)}", data)


def moves(data: xr.Dataset) -> Figure:
    """``share`` (condition, attribute, shown): how often each attribute is the target's, the source's, or neither."""
    conditions, kinds = data.condition.values, ("source", "neither or both", "target")
    figure, axes = _canvas(1, len(conditions), (2.6 * len(conditions) + 1.6, 3.2), squeeze=False, sharey=True)
    for axis, name in zip(axes[0], conditions, strict=True):
        part, left = data.share.sel(condition=name), np.zeros(data.sizes["attribute"])
        for kind, colour in zip(kinds, (PALETTE[3], "0.85", PALETTE[0]), strict=True):
            width = part.sel(shown=kind).values
            axis.barh(range(len(width)), width, left=left, color=colour, label=kind)
            left = left + width
        axis.set_yticks(range(data.sizes["attribute"]), data.attribute.values)
        axis.set(title=str(name), xlim=(0, 1), xlabel=data.attrs.get("axis", "share of pictures"))
    axes[0, 0].invert_yaxis()
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8, title="shown is"
    )
    moved = data.share.isel(condition=0).sel(shown="source")
    told = ", ".join(f"{a} {float(moved.sel(attribute=a)):.0%}" for a in data.attribute.values)
    first = str(conditions[0])
    return _finish(figure, f"{first[0].upper()}{first[1:]}, top {data.attrs['k']}, moved to the source: {told}", data)


def tradeoff(data: xr.Dataset) -> Figure:
    """``mean``, ``low``, ``high`` (method, strength, measure): likeness to the source against preservation of the target."""
    figure, axis = _canvas(1, 1, (7.6, 5.0))
    grid = np.linspace(0.01, 1, 200)
    for level in (0.2, 0.4, 0.6, 0.8):
        other = level * grid / np.maximum(2 * grid - level, 1e-9)
        seen = (2 * grid > level) & (other <= 1.02)
        axis.plot(grid[seen], other[seen], color="0.85", lw=0.8, zorder=0)
        axis.annotate(f"{level:g}", (grid[seen][-1], other[seen][-1]), fontsize=7, color="0.6")
    for number, name in enumerate(data.method.values):
        part = data.sel({"method": name})  # "method" alone would be an argument of sel
        x, y = (part["mean"].sel(measure=m).values for m in ("likeness", "preservation"))
        bars = [
            np.stack([p["mean"] - p.low, p.high - p["mean"]]).clip(0)
            for p in (part.sel(measure=m) for m in ("likeness", "preservation"))
        ]
        colour, marker = _MANY[number]
        axis.errorbar(x, y, bars[1], bars[0], color=colour, lw=0, elinewidth=0.6, alpha=0.5)
        axis.plot(x, y, color=colour, lw=1.2, zorder=2)
        axis.scatter(x, y, s=14 + 46 * data.strength.values, color=colour, marker=marker, label=name, zorder=3)
    axis.set(xlabel=_MEASURES["likeness"], ylabel=_MEASURES["preservation"], xlim=(-0.03, 1.03), ylim=(-0.03, 1.05))
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), title="larger marks: stronger")
    best = data["mean"].sel(measure="composite").max("strength")
    order = best.sortby(best, ascending=False)
    told = ", ".join(f"{m} {float(v):.2f}" for m, v in zip(order.method.values[:3], order.values, strict=False))
    return _finish(figure, f"Best composite, mean of each pair's, at the best strength: {told}", data)


def mask_layers(data: xr.Dataset) -> Figure:
    """``mean``, ``low``, ``high`` (sigma, rule, layer): IoU of two-means masks by block, a panel a sigma."""
    figure, axes = _canvas(1, data.sizes["sigma"], (3.6 * data.sizes["sigma"] + 2.6, 3.8), squeeze=False, sharey=True)
    for axis, level in zip(axes[0], data.sigma.values, strict=True):
        for rule in data.rule.values:
            _band(axis, data.sel(sigma=level, rule=rule), color=_COLOURS.get(rule, PALETTE[4]), label=rule)
        axis.set(title=f"sigma {level:g}", ylim=(0, 1))
        _blocks(axis, data)
    axes[0, 0].set_ylabel(data.attrs.get("axis", "mean IoU, better of the two labels"))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    best = data["mean"].sel(rule="top").max("layer")
    told = ", ".join(f"{float(v):.2f} at sigma {float(s):g}" for s, v in zip(data.sigma, best, strict=True))
    return _finish(figure, f"Top {data.attrs['k']}, best block: IoU {told} with {data.attrs['truth']}", data)


def mask_rules(data: xr.Dataset) -> Figure:
    """``mean``, ``low``, ``high``, ``right`` (choice, layer): which cluster is the foreground, how often rightly."""
    figure, (left, right) = _canvas(1, 2, (9.6, 3.8))
    names = {"best": "better of the two labels", "border": "touches less of the border", "heat": "higher heat (published)"}
    for (choice, label), colour in zip(names.items(), (PALETTE[7], PALETTE[0], PALETTE[3]), strict=True):
        _band(left, data[["mean", "low", "high"]].sel(choice=choice), color=colour, label=label)
        if choice != "best":
            right.plot(range(data.sizes["layer"]), data.right.sel(choice=choice), marker="o", ms=3.5, color=colour)
    left.set(ylabel="mean IoU", ylim=(0, 1))
    right.set(ylabel="share of pictures with the right label", ylim=(0, 1.03))
    right.axhline(0.5, color="0.6", lw=0.8)
    for axis in (left, right):
        _blocks(axis, data)
    left.legend(frameon=False, fontsize=8)
    shares = {c: float(data.right.sel(choice=c).mean()) for c in ("heat", "border")}
    title = (
        f"Mean over the blocks: the published rule picks the right cluster in {shares['heat']:.0%}, "
        f"the border rule in {shares['border']:.0%}"
    )
    return _finish(figure, title, data)


def mask_size(data: xr.Dataset) -> Figure:
    """``mean``, ``low``, ``high`` (rule, k): IoU against the number of channels, at one block."""
    figure, axis = _canvas(1, 1, (5.6, 3.9))
    for rule in data.rule.values:
        part = data.sel(rule=rule)
        line = axis.plot(data.k, part["mean"], marker=_MARKERS.get(rule, "o"), ms=5, color=_COLOURS.get(rule), label=rule)[0]
        axis.fill_between(data.k, part.low, part.high, color=line.get_color(), alpha=0.2, lw=0)
    axis.set(xlabel="k, channels", ylabel="mean IoU, better of the two labels", ylim=(0, 1))
    axis.set_xscale("log", base=2)
    axis.set_xticks(data.k.values, data.k.values)
    axis.legend(frameon=False, fontsize=8)
    top = data["mean"].sel(rule="top")
    best = int(data.k[int(top.argmax("k"))])
    title = f"{data.attrs['block']}: the top channels do best with k = {best} (IoU {float(top.max()):.2f})"
    return _finish(figure, title, data)


def mask_maps(data: xr.Dataset) -> Figure:
    """``image`` (sample, y, x, rgb), ``truth`` (sample, row, column), ``mask`` and ``heat`` (sample, rule, row, column)."""
    rules, rows = [str(r) for r in data.rule.values], data.sizes["sample"]
    figure, axes = _canvas(rows, 2 + 2 * len(rules), (1.35 * (2 + 2 * len(rules)), 1.4 * rows + 0.8), squeeze=False)
    for row in range(rows):
        part = data.isel(sample=row)
        shown = [("image", part.image.values.astype(np.uint8), {}), ("truth", part.truth.values, {"cmap": "gray"})]
        for rule in rules:
            shown.append((f"{rule}: heat", part.heat.sel(rule=rule).values, {"cmap": "mako"}))
            shown.append((f"{rule}: mask", part["mask"].sel(rule=rule).values, {"cmap": "gray"}))
        for axis, (name, values, style) in zip(axes[row], shown, strict=True):
            axis.imshow(values, interpolation="nearest", **style)
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(name, fontsize=8)
    title = f"Two-means masks and heat maps at the output of {data.attrs['block']}, {data.attrs['k']} channels"
    return _finish(figure, title, data)


def embedding(data: xr.Dataset) -> Figure:
    """``place`` (projection, rule, token, axis) and ``subject`` (token), ``separation`` (rule) and ``base``, its chance."""
    methods, rules = data.projection.values, data.rule.values
    figure, axes = _canvas(len(methods), len(rules), (3.6 * len(rules), 3.4 * len(methods)), squeeze=False)
    subject = data.subject.values.astype(bool)
    for row, method in enumerate(methods):
        for column, rule in enumerate(rules):
            x, y = data.place.sel(projection=method, rule=rule).transpose("axis", "token").values
            for chosen, colour, name in ((~subject, "0.6", "background"), (subject, PALETTE[3], "subject")):
                axes[row, column].scatter(x[chosen], y[chosen], s=3, lw=0, color=colour, label=name, alpha=0.6)
            axes[row, column].set(xticks=[], yticks=[], title=f"{method}, {rule} {data.attrs['k']}")
    axes[0, 0].legend(frameon=False, fontsize=8, markerscale=3)
    told = ", ".join(f"{r} {float(data.separation.sel(rule=r)):.2f}" for r in rules)
    title = (
        f"Neighbours of subject tokens that are subject too ({data.attrs['block']}): {told}; of all {float(data.base):.2f}"
    )
    return _finish(figure, title, data)


def verdicts(data: xr.Dataset) -> Figure:
    """``mean`` and ``verdict`` (claim, setting): the number of each claim under each setting, coloured by its verdict."""
    kinds = {"holds": PALETTE[0], "undecided": (0.85, 0.85, 0.85), "does not hold": PALETTE[1]}
    rows, columns = data.sizes["claim"], data.sizes["setting"]
    figure, axis = _canvas(1, 1, (3.2 + 0.85 * columns, 1.9 + 0.42 * rows))
    for (row, column), verdict in np.ndenumerate(data.verdict.values):
        if verdict:
            axis.add_patch(plt.Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, color=kinds[verdict], alpha=0.75, lw=0))
            axis.text(column, row, f"{float(data['mean'][row, column]):+.2f}", ha="center", va="center", fontsize=8)
    axis.set(xlim=(-0.55, columns - 0.45), ylim=(rows - 0.45, -0.55))
    axis.set_xticks(range(columns), data.setting.values, rotation=35, ha="right")
    axis.set_yticks(range(rows), [str(c).replace("_", " ") for c in data.claim.values])
    for name, colour in kinds.items():
        axis.scatter([], [], color=colour, marker="s", s=60, label=name)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    turning = sum(len({v for v in row if v} - {"undecided"}) > 1 for row in data.verdict.values)
    return _finish(figure, f"{turning} of {rows} claims hold in one setting and fail in another", data)


def readings(data: xr.Dataset) -> Figure:
    """``mean``, ``low``, ``high`` (claim, channels), ``limit``, ``rule``, ``setting``, ``apart`` (claim)."""
    rows = data.sizes["claim"]
    figure, axis = _canvas(1, 1, (8.2, 1.6 + 0.55 * rows))
    for number, name in enumerate(data.channels.values):
        part, places = data.sel(channels=name), np.arange(rows) + 0.18 * (2 * number - 1)
        bars = np.stack([part["mean"] - part.low, part.high - part["mean"]]).clip(0)
        colour = (PALETTE[3], PALETTE[0])[number]
        axis.errorbar(part["mean"], places, xerr=bars, ls="", marker="os"[number], ms=5, capsize=2, color=colour, label=name)
    for row, limit in enumerate(data.limit.values):
        axis.plot([limit, limit], [row - 0.4, row + 0.4], color="0.3", ls="--", lw=1, label="rule" if row == 0 else None)
    stars = np.where(data.apart, " *", "")
    names = [f"{str(claim).replace('_', ' ')}{star}" for claim, star in zip(data.claim.values, stars, strict=True)]
    labels = [f"{n}\n({s}; {r})" for n, s, r in zip(names, data.setting.values, data.rule.values, strict=True)]
    axis.set_yticks(range(rows), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="the claim's own number, see the table")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    apart = int(data.apart.sum())
    return _finish(figure, f"In {apart} of {rows} tests (*) the massive channels differ from their control (paired)", data)


def interactive_map(values: xr.DataArray, image: np.ndarray, title: str) -> go.Figure:
    """One channel over the image grid, beside the image; ``values`` (row, column), ``image`` uint8 (height, width, 3)."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, subplot_titles=("image", title), horizontal_spacing=0.06)
    figure.add_trace(go.Image(z=image), 1, 1)
    figure.add_trace(
        go.Heatmap(z=values.values[::-1], colorscale="RdBu_r", zmid=float(np.median(values)), colorbar_len=0.9), 1, 2
    )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.update_yaxes(scaleanchor="x2", col=2)
    return figure.update_layout(height=340, width=720, margin={"l": 10, "r": 10, "t": 40, "b": 10})


def interactive_match(
    source: np.ndarray, target: np.ndarray, similarity: np.ndarray, point: np.ndarray, found: np.ndarray
) -> go.Figure:
    """Source with a point, target with its match, and the similarity (height, width) of every pixel of the target."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(
        1, 3, subplot_titles=("source: click a point", "target: its match", "similarity"), horizontal_spacing=0.03
    )
    for column, image in ((1, source), (2, target)):
        figure.add_trace(go.Image(z=image), 1, column)
    figure.add_trace(go.Heatmap(z=similarity, colorscale="Viridis", colorbar_len=0.9), 1, 3)
    for column, (x, y) in ((1, point), (2, found), (3, found)):
        marker = {"size": 13, "symbol": "cross-thin", "line": {"width": 3, "color": "white"}}
        figure.add_trace(go.Scatter(x=[x - 0.5], y=[y - 0.5], mode="markers", marker=marker, hoverinfo="skip"), 1, column)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.update_yaxes(autorange="reversed", scaleanchor="x3", col=3)
    layout = {"height": 340, "width": 980, "showlegend": False, "margin": {"l": 10, "r": 10, "t": 40, "b": 10}}
    return figure.update_layout(**layout)


def interactive_spectrum(scores: xr.DataArray, k: int, title: str) -> go.Figure:
    """Scores over the median by channel, the top ``k`` marked; ``scores`` (channel)."""
    import plotly.graph_objects as go

    values = (scores / scores.median()).values
    colours = np.where(np.argsort(np.argsort(-values)) < k, "#d55e00", "#8fa3b5")
    figure = go.Figure(go.Bar(x=np.arange(len(values)), y=values, marker_color=colours, marker_line_width=0))
    figure.update_layout(
        title=title,
        xaxis_title="channel",
        yaxis_title="score / median",
        bargap=0,
        height=320,
        width=720,
        margin={"l": 10, "r": 10, "t": 50, "b": 10},
        template="plotly_white",
    )
    return figure


def interactive_clusters(labels: xr.DataArray, heat: xr.DataArray, image: np.ndarray, title: str) -> go.Figure:
    """The image, its clusters and its heat; ``labels`` and ``heat`` (row, column), ``image`` uint8 (height, width, 3)."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 3, subplot_titles=("image", "clusters", "heat"), horizontal_spacing=0.04)
    figure.add_trace(go.Image(z=image), 1, 1)
    figure.add_trace(go.Heatmap(z=labels.values[::-1], colorscale="Viridis", showscale=False), 1, 2)
    figure.add_trace(go.Heatmap(z=heat.values[::-1], colorscale="Magma", colorbar_len=0.9), 1, 3)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    for column in (2, 3):
        figure.update_yaxes(scaleanchor=f"x{column}", col=column)
    return figure.update_layout(title=title, height=330, width=960, margin={"l": 10, "r": 10, "t": 60, "b": 10})
