"""Fills slots that a solve left empty: engines have no empty slot.

An even split of an expert's tokens can be worse with one replica more, so that solvers leave slots empty. A
filled slot changes no output, only loads: a solve notes the replicas that do least harm, and exporting uses
them.
Shape letters: W windows, L MoE layers, E experts, D devices, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from placement.plan import EMPTY, Placement

__all__ = ["KEY", "fillers_of", "find_fillers", "full", "with_fillers"]

KEY = "fillers"
"""Entry of a placement file: ``[layer, slot, expert]`` for each empty slot."""

MOST_WINDOWS = 16

Filler = tuple[int, int, int]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def find_fillers(
    placement: Placement, load_WLE: FloatArray, *, start: Placement | None = None
) -> tuple[Filler, ...]:
    """Choose an expert for each empty slot, such that the fullest devices hardly grow.

    Parameters
    ----------
    load_WLE
        Loads that the placement is for, ``[windows, layers, experts]``.
    start
        What runs now: an expert that a device holds already is taken first, since it costs no move.

    Returns
    -------
    fillers
        Layer, slot and expert of each; a device that holds all experts gets none.
    """
    load_WLE = _few_windows(load_WLE)
    found = []
    for layer in np.unique(np.nonzero(placement.physical_to_logical_map_LS == EMPTY)[0]).tolist():
        here_ED = None if start is None else start.count_LED[layer]
        found += [
            (layer, slot, expert)
            for slot, expert in _fill_layer(placement, layer, load_WLE[:, layer], here_ED)
        ]
    return tuple(found)


def _few_windows(load_WLE: FloatArray) -> FloatArray:
    """Sum neighbouring windows of a long trace: a filler need not be chosen by more."""
    if len(load_WLE) <= MOST_WINDOWS:
        return load_WLE
    starts = np.arange(MOST_WINDOWS) * len(load_WLE) // MOST_WINDOWS
    return np.asarray(np.add.reduceat(load_WLE, starts, axis=0), dtype=np.float64)


def _fill_layer(
    placement: Placement, layer: int, load_WE: FloatArray, here_ED: npt.NDArray[np.int8] | None
) -> list[tuple[int, int]]:
    """Fill one layer's slots one by one."""
    held_ED = placement.count_LED[layer].astype(np.float64)
    found = []
    for slot in np.nonzero(placement.physical_to_logical_map_LS[layer] == EMPTY)[0].tolist():
        device = int(placement.device_of_slot_S[slot])
        lacking_E = held_ED[:, device] == 0
        if not lacking_E.any():
            continue
        count_E = held_ED.sum(axis=1)
        load_WD = (load_WE / count_E) @ held_ED
        # The others only lose load, so that the new peak is the old one or this device.
        after_WE = load_WD[:, [device]] + load_WE / (count_E + 1)
        harm_E = np.maximum(after_WE - load_WD.max(axis=1, keepdims=True), 0.0).sum(axis=0)
        moves_E = np.zeros(len(count_E)) if here_ED is None else 1 - np.minimum(here_ED[:, device], 1)
        order_E = np.lexsort((after_WE.sum(axis=0), harm_E, moves_E, ~lacking_E))
        expert = int(order_E[0])
        held_ED[expert, device] = 1
        found.append((slot, expert))
    return found


def with_fillers(placement: Placement, fillers: Sequence[Filler]) -> Placement:
    """Return a placement with its empty slots filled."""
    map_LS = placement.physical_to_logical_map_LS.copy()
    for layer, slot, expert in fillers:
        map_LS[layer, slot] = expert
    return placement.with_layers(map_LS)


def fillers_of(placement: Placement) -> tuple[Filler, ...]:
    """Return the fillers that a placement file notes, none where they do not fit it (any more)."""
    noted = placement.extra.get(KEY, ())
    held: set[tuple[int, int, int]] = set()
    map_LS, device_S = placement.physical_to_logical_map_LS, placement.device_of_slot_S
    for filler in noted if isinstance(noted, (list, tuple)) else ():
        if not isinstance(filler, (list, tuple)) or [type(value) for value in filler] != [int, int, int]:
            return ()
        layer, slot, expert = filler
        sizes = (placement.num_layers, placement.num_slots, placement.num_experts)
        if any(not 0 <= value < size for value, size in zip(filler, sizes, strict=True)):
            return ()
        if map_LS[layer, slot] != EMPTY:
            return ()
        place = (layer, expert, int(device_S[slot]))
        if placement.count_LED[place] or place in held:
            return ()
        held.add(place)
    return tuple((layer, slot, expert) for layer, slot, expert in noted) if held else ()


def full(placement: Placement) -> Placement:
    """Return a placement as an engine can hold it: filled where devices hold different numbers of experts."""
    held_LD = placement.count_LED.sum(axis=1, dtype=np.int64)
    return placement if (held_LD == held_LD[0, 0]).all() else with_fillers(placement, fillers_of(placement))
