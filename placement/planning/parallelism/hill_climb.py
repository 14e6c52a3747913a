"""Piper's hill climbing: swap experts between the fullest and the emptiest device (arXiv 2605.05049).

Shape letters: L MoE layers, E experts, D devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.errors import InputError

__all__ = ["Swap", "climb", "climb_layer"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """Two experts of a layer that change places."""

    layer: int
    from_fullest: int
    from_emptiest: int


def climb_layer(
    load_E: FloatArray, device_of_expert_E: IntArray, *, num_devices: int, max_swaps: int | None = None
) -> tuple[IntArray, list[tuple[int, int]]]:
    """Improve one layer: up to `max_swaps` times, the swap that most reduces the gap, until none does.

    The gap is the load of the fullest device less that of the emptiest, and a swap exchanges one expert of
    the one for one of the other. Among equal swaps the lowest ids win. Every swap brings the two loads
    closer together, so it ends without a limit too.

    Parameters
    ----------
    load_E
        Load of each expert, ``[experts]``.
    device_of_expert_E
        Device of each expert, ``[experts]``.
    max_swaps
        Piper's T; None for no limit.

    Returns
    -------
    device_of_expert_E, swaps
        The devices afterwards, and the experts swapped: of the fullest and of the emptiest device.

    Raises
    ------
    InputError
        If the limit is negative.
    """
    if max_swaps is not None and max_swaps < 0:
        raise InputError(f"max_swaps is {max_swaps}; it must be 0 or more")
    device_E = np.array(device_of_expert_E, dtype=np.int64)
    swaps: list[tuple[int, int]] = []
    while max_swaps is None or len(swaps) < max_swaps:
        load_D = np.bincount(device_E, weights=load_E, minlength=num_devices)
        fullest, emptiest = int(load_D.argmax()), int(load_D.argmin())
        gap = load_D[fullest] - load_D[emptiest]
        ours, theirs = np.nonzero(device_E == fullest)[0], np.nonzero(device_E == emptiest)[0]
        if ours.size == 0 or theirs.size == 0 or fullest == emptiest:
            break
        gap_after = np.abs(gap - 2.0 * (load_E[ours][:, None] - load_E[theirs][None, :]))
        row, column = np.unravel_index(int(gap_after.argmin()), gap_after.shape)
        # Rounding must not make two swaps undo each other for ever.
        if gap_after[row, column] >= gap * (1.0 - 1e-12):
            break
        first, second = int(ours[row]), int(theirs[column])
        device_E[first], device_E[second] = emptiest, fullest
        swaps.append((first, second))
    return device_E, swaps


def climb(
    load_LE: FloatArray, device_of_expert_LE: IntArray, *, num_devices: int, max_swaps: int | None = None
) -> tuple[IntArray, tuple[Swap, ...]]:
    """Improve every layer by itself; `max_swaps` holds for each.

    Returns
    -------
    device_of_expert_LE, swaps
        The devices afterwards, ``[layers, experts]``, and all swaps in order.
    """
    device_LE = np.array(device_of_expert_LE, dtype=np.int64)
    swaps: list[Swap] = []
    for layer, load_E in enumerate(load_LE):
        device_LE[layer], found = climb_layer(
            load_E, device_LE[layer], num_devices=num_devices, max_swaps=max_swaps
        )
        swaps += [Swap(layer=layer, from_fullest=a, from_emptiest=b) for a, b in found]
    return device_LE, tuple(swaps)
