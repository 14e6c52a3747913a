"""Load maps small enough for a page."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from placement.report.figures.heat import MAX_CELLS, HeatGrid, relative_load


@given(st.integers(1, 5000), st.integers(1, 2000), st.integers(1, 200))
def test_grid_covers_every_device_within_the_budget(
    num_windows: int, num_devices: int, num_maps: int
) -> None:
    """Rows cover all devices once, columns are real windows, and the maps stay within the budget."""
    grid = HeatGrid.fit(num_windows=num_windows, num_devices=num_devices, num_maps=num_maps)
    rows, columns = grid.first_device_R.size, grid.windows_C.size
    assert rows * columns * num_maps <= max(MAX_CELLS, num_maps)
    assert grid.first_device_R[0] == 0
    assert (np.diff(grid.first_device_R) == grid.devices_per_row).all()
    assert num_devices - grid.first_device_R[-1] <= grid.devices_per_row
    assert (np.diff(grid.windows_C) > 0).all()
    assert grid.windows_C[0] >= 0
    assert grid.windows_C[-1] < num_windows
    assert bool(grid.caption) == (rows < num_devices or columns < num_windows)
    assert len(grid.row_names) == rows


def test_small_maps_are_kept_as_they_are() -> None:
    """Eight devices and ten windows need no reduction."""
    relative_WD = np.random.default_rng(0).uniform(size=(10, 8))
    grid = HeatGrid.fit(num_windows=10, num_devices=8, num_maps=2)
    np.testing.assert_array_equal(grid.map_RC(relative_WD), relative_WD.T.astype(np.float32))
    assert grid.row_names == [str(device) for device in range(8)]


def test_a_row_shows_its_fullest_device() -> None:
    """The hot device of a group is seen, however cool its neighbours are."""
    grid = HeatGrid.fit(num_windows=2, num_devices=600, num_maps=1)
    relative_WD = np.ones((2, 600))
    relative_WD[1, 301] = 9.0
    shown = grid.map_RC(relative_WD)
    assert grid.devices_per_row == 3
    assert shown[100, 1] == 9.0
    assert shown.sum() == 8.0 + shown.size
    assert grid.row_names[100] == "300\u2013302"


def test_relative_load_of_a_silent_window_is_even() -> None:
    """Loads are divided by the mean device; a window without tokens counts as balanced."""
    load_WLD = np.array([[[3.0, 1.0]], [[0.0, 0.0]]])
    np.testing.assert_array_equal(relative_load(load_WLD), [[[1.5, 0.5]], [[1.0, 1.0]]])
