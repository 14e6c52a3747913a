"""What a calibration file tells of the machine beside experts and exchanges: memory, rows, the host."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from placement.calibration.curve import PiecewiseLinear
from placement.calibration.data_sheet import KERNEL_BANDWIDTH_EFFICIENCY
from placement.devices import DEVICE_KINDS, DeviceKind
from placement.errors import InputError

__all__ = ["ROW_STEPS", "Machine", "kind_of_gpu"]

ROW_STEPS = ("prepare", "unpermute", "expand", "reduce")
"""Handling of rows that may be measured: at the tokens' home, put into sending order and summed when back; at
the experts, put into the experts' order and summed before going back."""

ROWS_SHARE_OF_COPY = 0.9
"""Speed of kernels that move rows by index, as a share of a plain copy's."""

_VARIANTS = frozenset({"pcie", "nvl"})
"""Cards of a known name with another memory than the data sheet of that name has."""

_BY_MEMORY = {("a100", "40gb"): "a100-40", ("v100", "32gb"): "v100-32"}


def kind_of_gpu(name: str) -> DeviceKind | None:
    """Return the device kind that a driver's name of a GPU means; None where that is not known.

    >>> kind_of_gpu("NVIDIA H100 80GB HBM3").name
    'h100'
    """
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    found = [word for word in words if word in DEVICE_KINDS]
    if not found or _VARIANTS & set(words):
        return None
    larger = [kind for (base, size), kind in _BY_MEMORY.items() if base == found[0] and size in words]
    return DEVICE_KINDS[larger[0] if larger else found[0]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Machine:
    """Measured figures of a machine that the objective does not need and a layer's time does.

    Parameters
    ----------
    gpu
        Name of the GPU, as its driver gives it.
    dtype
        Type in which rows and weights were measured.
    copy_bytes_per_s
        Bytes read and written per second by a copy in device memory; None where not measured.
    weights_bytes_per_s
        Fastest reading of experts' weights seen; None where unknown.
    launch_s
        What issuing one operation costs the host; None where not measured.
    counts_exchange_s
        Time in which ranks tell each other how much comes, until the host knows; None where not measured.
    row_steps
        For steps of `ROW_STEPS` and widths of a row, seconds against rows.
    migration_bytes_per_s
        Bytes per second between two GPUs, by tier.
    """

    gpu: str = "unknown GPU"
    dtype: str = "bf16"
    copy_bytes_per_s: float | None = None
    weights_bytes_per_s: float | None = None
    launch_s: float | None = None
    counts_exchange_s: float | None = None
    row_steps: Mapping[str, Mapping[int, PiecewiseLinear]] = field(default_factory=dict)
    migration_bytes_per_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def row_bytes_per_s(self) -> float:
        """Bytes per second, read and written, at which kernels move rows in device memory.

        From the measured copy; else `KERNEL_BANDWIDTH_EFFICIENCY` of the GPU's data sheet, or the fastest
        reading of weights where that is more or the GPU is unknown.

        Raises
        ------
        InputError
            If the file gives nothing to tell it from.
        """
        if self.copy_bytes_per_s is not None:
            return ROWS_SHARE_OF_COPY * self.copy_bytes_per_s
        kind, weights = kind_of_gpu(self.gpu), self.weights_bytes_per_s
        if kind is not None:
            sheet = kind.memory_bandwidth
            return min(max(KERNEL_BANDWIDTH_EFFICIENCY * sheet, weights or 0.0), sheet)
        if weights is None:
            raise InputError(
                f"the memory bandwidth of GPU {self.gpu!r} is not known: give hbm_gb_s, the GB/s of a copy "
                "counting bytes read and written"
            )
        return weights

    def row_step_s(self, step: str, *, rows: float, hidden: int) -> float | None:
        """Return the measured time of a step on so many rows, None where it was not measured.

        Rows of a width that was not measured count as rows of the nearest measured width with as many bytes.
        """
        curves = self.row_steps.get(step)
        if not curves:
            return None
        nearest = min(curves, key=lambda width: (abs(np.log(width / hidden)), width))
        return float(curves[nearest](rows * hidden / nearest))
