"""Figures of notebook 03: token masks from two-means clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from .effects import _COLOURS, _MARKERS
from .style import PALETTE, _band, _blocks, _canvas, _finish

if TYPE_CHECKING:
    import xarray as xr


def mask_layers(data: xr.Dataset) -> Figure:
    """Plot ``mean``, ``low``, ``high`` (sigma, rule, layer): IoU of two-means masks by block, one panel per sigma."""
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
    """Plot ``mean``, ``low``, ``high``, ``right`` (choice, layer): which cluster is the foreground, how often correctly."""
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
    """Plot ``mean``, ``low``, ``high`` (rule, k): IoU against the number of channels, at one block."""
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
    """Plot ``image`` (sample, y, x, rgb), ``truth`` (sample, row, column), ``mask`` and ``heat`` (sample, rule, ...)."""
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
    """Plot ``place`` (projection, rule, token, axis), ``subject`` (token), ``separation`` (rule) and its chance ``base``."""
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
