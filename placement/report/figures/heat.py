"""Load maps small enough for a page: some windows as they are, neighbouring devices by their fullest.

Shape letters: W windows, L layers, D devices, R rows, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.report.figures.look import diverging

__all__ = ["MAX_CELLS", "HeatGrid", "load_colours", "quantised", "relative_load"]

FloatArray = npt.NDArray[np.float64]

MAX_CELLS = 210_000
"""Cells of all maps of a page together: a byte each, a third more in base64."""

LEAST_COLUMNS = 16
"""Windows that are shown before neighbouring devices share a row."""

MAX_SIDE = 256
"""Most rows or columns of one map; more are narrower than a pixel."""


def relative_load(load: FloatArray) -> FloatArray:
    """Return loads over the mean of their last axis (devices or experts); 1 where there is no load."""
    mean = load.mean(axis=-1, keepdims=True)
    return np.asarray(np.divide(load, mean, out=np.ones_like(load), where=mean > 0))


def load_colours(*relative: FloatArray, of: str = "z") -> dict[str, Any]:
    """Return the colours of relative loads: white at the mean, blue below, red above, one scale for all maps.

    It ends at the 99.9th percentile, so that one odd window does not wash out all others.

    Parameters
    ----------
    of
        ``z`` for the settings of a heat map, ``c`` for those of a colour axis.
    """
    top = max(1.1, *(float(np.quantile(values, 0.999)) for values in relative))
    bottom = max(0.0, 2.0 - top)
    title = {"text": "load /<br>mean", "side": "top"}
    return {
        f"{of}min": bottom,
        f"{of}max": top,
        "colorscale": diverging((1.0 - bottom) / (top - bottom)),
        "colorbar": {"thickness": 12, "outlinewidth": 0, "title": title, "tickformat": ".2~f", "nticks": 7},
    }


def quantised(values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], float]:
    """Return values (0 or more) as multiples of a step that fit a byte each, and the step, 0.01 at least."""
    top = float(values.max(initial=0.0))
    # Steps that a reader can name: 1, 2, 5, 10, 20, ... per cent.
    steps = (digit * 10.0**power for power in range(-2, 300) for digit in (1, 2, 5))
    step = next(step for step in steps if top / step <= 255)
    return np.round(values / step).astype(np.uint8), step


@dataclass(frozen=True, kw_only=True, eq=False)
class HeatGrid:
    """Which windows and which devices the cells of a map stand for.

    Parameters
    ----------
    windows_C
        Window of each column, ``[columns]``, ascending.
    first_device_R
        First device of each row, ``[rows]``; a row ends where the next begins.
    num_windows, num_devices
        What there is in all.
    """

    windows_C: npt.NDArray[np.int64]
    first_device_R: npt.NDArray[np.int64]
    num_windows: int
    num_devices: int

    @classmethod
    def fit(cls, *, num_windows: int, num_devices: int, num_maps: int) -> HeatGrid:
        """Return the finest grid with which `num_maps` maps stay within `MAX_CELLS`."""
        rows, wanted = min(num_devices, MAX_SIDE), min(num_windows, MAX_SIDE)
        # Every device before every window: a device that is left out is not seen at all.
        while rows > 1 and MAX_CELLS // (rows * num_maps) < min(wanted, LEAST_COLUMNS):
            rows = -(-rows // 2)
        columns = max(1, min(wanted, MAX_CELLS // (rows * num_maps)))
        return cls(
            windows_C=np.unique(np.linspace(0, num_windows - 1, columns).round().astype(np.int64)),
            first_device_R=np.arange(0, num_devices, -(-num_devices // rows), dtype=np.int64),
            num_windows=num_windows,
            num_devices=num_devices,
        )

    @property
    def devices_per_row(self) -> int:
        """Devices that a row stands for; the last row may hold fewer."""
        return (
            int(self.first_device_R[1] - self.first_device_R[0])
            if self.first_device_R.size > 1
            else (self.num_devices)
        )

    @property
    def row_names(self) -> list[str]:
        """Devices of each row, as text."""
        last_R = np.append(self.first_device_R[1:], self.num_devices) - 1
        pairs = zip(self.first_device_R.tolist(), last_R.tolist(), strict=True)
        return [str(first) if first == last else f"{first}\N{EN DASH}{last}" for first, last in pairs]

    @property
    def column_names(self) -> list[str]:
        """Number of each window, as text."""
        return [str(window) for window in self.windows_C.tolist()]

    def map_RC(self, relative_WD: FloatArray) -> npt.NDArray[np.float32]:
        """Return one layer's map, ``[rows, columns]``: in each row the fullest of its devices.

        A mean would hide the very device that the others wait for.
        """
        chosen_CD = relative_WD[self.windows_C]
        return np.maximum.reduceat(chosen_CD, self.first_device_R, axis=1).T.astype(np.float32)

    @property
    def caption(self) -> str:
        """What was left out, in a sentence; empty where every device and window is shown."""
        parts = []
        if self.devices_per_row > 1 and self.num_devices > self.first_device_R.size:
            parts.append(f"each row shows the fullest of {self.devices_per_row} neighbouring devices")
        if self.windows_C.size < self.num_windows:
            parts.append(f"{self.windows_C.size} of {self.num_windows:,} windows are shown, evenly spaced")
        return f"To keep the page small, {' and '.join(parts)}." if parts else ""
