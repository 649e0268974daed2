from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from malib.spatial import on_grid, token_grid


@pytest.mark.parametrize(("size", "grid"), [((64, 64), (16, 16)), ((32, 128), (8, 32)), ((1024, 768), (64, 48))])
def test_grids_of_square_and_oblong_pictures(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert token_grid(grid[0] * grid[1], *size) == grid


def test_tokens_run_row_by_row() -> None:
    values = xr.DataArray(np.arange(24.0).reshape(2, 12), dims=("channel", "token"))
    assert np.array_equal(on_grid(values, 30, 40).values, np.arange(24.0).reshape(2, 3, 4))


def test_a_number_that_fills_no_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fill"):
        token_grid(17, 64, 64)
