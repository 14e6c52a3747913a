"""Counting ids at memory speed; compiled on first use."""

from __future__ import annotations

import numba
import numpy as np

from placement.errors import InputError

__all__ = ["count_ids", "count_layers"]


@numba.njit(cache=True)
def _count(ids, count):  # type: ignore[no-untyped-def]
    # Four tables: equal ids in a row would otherwise wait for each other's store.
    part = np.zeros((4, count.shape[0]), np.uint32)
    whole = ids.shape[0] // 4 * 4
    for i in range(0, whole, 4):
        part[0, ids[i]] += 1
        part[1, ids[i + 1]] += 1
        part[2, ids[i + 2]] += 1
        part[3, ids[i + 3]] += 1
    for i in range(whole, ids.shape[0]):
        part[0, ids[i]] += 1
    for e in range(count.shape[0]):
        count[e] = np.int64(part[0, e]) + part[1, e] + part[2, e] + part[3, e]


@numba.njit(cache=True)
def _count_layers(ids, count):  # type: ignore[no-untyped-def]
    for layer in range(ids.shape[0]):
        _count(ids[layer], count[layer])


def count_layers(ids_LTK: np.ndarray, num_experts: int) -> np.ndarray:
    """Count the experts of every layer, ``[layers, experts]``, in one call.

    Raises
    ------
    InputError
        If an id is `num_experts` or more.
    """
    count = np.zeros((len(ids_LTK), 1 << (8 * ids_LTK.dtype.itemsize)), np.int64)
    _count_layers(ids_LTK.reshape(len(ids_LTK), -1), count)
    if count[:, num_experts:].any():
        greatest = int(np.nonzero(count.any(axis=0))[0][-1])
        raise InputError(f"names expert {greatest}, outside 0..{num_experts - 1}")
    return count[:, :num_experts]


def count_ids(ids: np.ndarray, num_bins: int) -> np.ndarray:
    """Count each value of a flat array of fewer than 2**32 unsigned ids; ``[num_bins]``.

    Raises
    ------
    InputError
        If an id is `num_bins` or more.
    """
    # The tables have room for whatever the type can hold: no id can write beside them.
    count = np.zeros(1 << (8 * ids.dtype.itemsize), np.int64)
    _count(ids, count)
    if count[num_bins:].any():
        raise InputError(f"names expert {int(np.nonzero(count)[0][-1])}, outside 0..{num_bins - 1}")
    return count[:num_bins]
