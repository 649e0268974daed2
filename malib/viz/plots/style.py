"""Style, canvas and axes that all figures share."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

if TYPE_CHECKING:
    import xarray as xr


PALETTE = sns.color_palette("colorblind")


_MANY = list(zip([*PALETTE, "0.1", "0.6", "tab:olive"], "osD^vP*X<>hdp", strict=True))  # thirteen markers


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
    plt.close(figure)  # the notebook shows the returned figure once
    return figure, axes


def _finish(figure: Figure, title: str, data: xr.Dataset) -> Figure:
    title = textwrap.fill(title, int(10 * figure.get_figwidth()))  # about ten letters of this size per inch
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
    """Use logarithmic axes with plain numbers at 1, 2 and 5."""
    for name in names:
        axis.set(**{f"{name}scale": "log"})
        side = getattr(axis, f"{name}axis")
        side.set_major_locator(LogLocator(10, (1.0,)))
        side.set_minor_locator(LogLocator(10, (2.0, 5.0)))
        side.set_major_formatter("{x:g}")
        low, high = getattr(axis, f"get_{name}lim")()
        side.set_minor_formatter("{x:g}" if high / max(low, 1e-9) < 200 else "")


def _band(axis: Any, data: xr.Dataset, **kwargs: Any) -> None:
    """Plot a line of means over blocks with its 95 % interval."""
    line = axis.plot(range(len(data["mean"])), data["mean"], marker="o", ms=3.5, **kwargs)[0]
    axis.fill_between(range(len(data["mean"])), data.low, data.high, color=line.get_color(), alpha=0.2, lw=0)
