"""Figures of notebook 08: matched points and their accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from .style import PALETTE, _canvas, _finish

if TYPE_CHECKING:
    import xarray as xr


def matches(data: xr.Dataset) -> Figure:
    """Plot ``image`` (pair, end, y, x, rgb), ``start`` and ``found`` (pair, method, point, axis), and ``hit``."""
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
    """Plot ``mean`` (rule, site, sigma): a score of features by block and noise level."""
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
