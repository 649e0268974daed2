"""Figures of notebooks 02, 04 to 07 and 09: effects of edits and guidance, and verdicts."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from ...analysis.image_metrics import DETAILS
from .style import _MANY, PALETTE, _canvas, _finish

if TYPE_CHECKING:
    import xarray as xr


_RULES = ("top", "equal energy", "equal norm", "random", "bottom")


_MARKERS = dict(zip(_RULES, "osD^v", strict=True))


_COLOURS = dict(zip(_RULES, (PALETTE[3], PALETTE[0], PALETTE[1], PALETTE[2], "0.5"), strict=True))


_MEASURES = {
    "adherence": "caption's attributes shown",
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
    """Plot the effect of an edit of k channels in all blocks.

    ``mean``, ``low``, ``high`` (rule, k, measure), ``base`` (measure). Another axis than k is named by ``attrs``: ``x``,
    its ``label``, the value ``at`` which the title speaks, and ``where``.
    """
    x_name, k = data.attrs.get("x", "k"), data.attrs["k"]
    measures = _measures(data, ("adherence", "high_frequency", "distance"))
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
    """Return the measures to plot, among those that the data have."""
    return [m for m in data.attrs.get("measures", usual) if m in data.measure]


def sites(data: xr.Dataset) -> Figure:
    """Plot the same disruption at different sites: ``mean``, ``low``, ``high`` (rule, site, measure).

    Horizontal lines, both optional: ``base`` and ``ceiling`` (measure). ``attrs`` may name them (``base_label``, and so
    on) and the ``title``.
    """
    measures = _measures(data, ("adherence", "layout", "high_frequency", "distance"))
    lines = {
        name: data.attrs.get(f"{name}_label", usual)
        for name, usual in (("base", "undisturbed"), ("ceiling", "the source itself"))
    }
    places, many = np.arange(data.sizes["site"]), data.sizes["site"] > 8
    upright = 0.07 * max(len(str(site)) for site in data.site.values) if many else 0  # height of their labels in inches
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
    """Plot ``change`` (condition, measure), mean of edited minus unedited: what exactly is lost."""
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


def image_grid(data: xr.Dataset) -> Figure:
    """Plot ``image`` (sample, condition, y, x, rgb): samples under each condition; ``row`` (sample) may name the rows."""
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


def attribute_table(data: xr.Dataset) -> Figure:
    """Plot ``share`` (condition, attribute, shown): how often each attribute is the target's, the source's, or neither."""
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
    """Plot ``mean``, ``low``, ``high`` (method, strength, measure): likeness to the source, preservation of the target."""
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


def verdicts(data: xr.Dataset) -> Figure:
    """Plot ``mean`` and ``verdict`` (claim, setting): the number of each claim, coloured by its verdict."""
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
    """Plot ``mean``, ``low``, ``high`` (claim, channels), with ``limit``, ``rule``, ``setting`` and ``apart`` (claim)."""
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
