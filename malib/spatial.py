"""Tokens as places in the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray as xr


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of the image tokens of a picture of ``height`` x ``width`` pixels.

    Raises:
        ValueError: no such grid has this number of tokens.
    """
    rows = round((tokens * height / width) ** 0.5)
    columns = tokens // max(rows, 1)
    if rows * columns != tokens:
        raise ValueError(f"{tokens} tokens do not fill a grid of the shape {height} x {width}; pass the size of the image.")
    return rows, columns


def on_grid(values: xr.DataArray, height: int, width: int) -> xr.DataArray:
    """``token`` -> (``row``, ``column``), in the order in which diffusers lays the tokens (row by row)."""
    import xarray as xr

    ordered = values.transpose(..., "token")
    grid = token_grid(ordered.sizes["token"], height, width)
    coords = {name: c for name, c in ordered.coords.items() if "token" not in c.dims}
    return xr.DataArray(ordered.values.reshape(*ordered.shape[:-1], *grid), coords, (*ordered.dims[:-1], "row", "column"))
