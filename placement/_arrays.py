"""Read-only arrays of one value per device, checked as they are taken in."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.errors import InputError

__all__ = ["FloatArray", "IntArray", "frozen_floats", "frozen_ints"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def frozen_ints(values: npt.ArrayLike, *, name: str) -> IntArray:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise InputError(f"{name} must be a list of integers, one per device")
    frozen = np.array(array, dtype=np.int64)
    frozen.setflags(write=False)
    return frozen


def frozen_floats(values: npt.ArrayLike, *, name: str) -> FloatArray:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iuf":
        raise InputError(f"{name} must be a list of numbers, one per device")
    frozen = np.array(array, dtype=np.float64)
    bad = np.nonzero(~(np.isfinite(frozen) & (frozen > 0)))[0]
    if bad.size:
        raise InputError(f"{name} of device {bad[0]} is {frozen[bad[0]]}; it must be positive and finite")
    frozen.setflags(write=False)
    return frozen
