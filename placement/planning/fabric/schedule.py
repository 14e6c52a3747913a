"""Reconfigure or keep: which circuits are up at every all-to-all of a sequence, exactly.

A step of training has four all-to-alls per MoE layer (MixNet, arXiv 2501.03905): dispatch and combine going
forward, both again going back, with the same demand or its transpose. Only the first is a surprise: its
demand is known when the gate has run, so circuits made for it keep everything waiting for the whole delay.
For the others, and for circuits that were made ahead, the switch works while devices compute.

The time of a sequence is the sum of its all-to-alls and of what is not hidden of each change, so the best
sequence of circuits follows by dynamic programming over what is up.

Shape letters: A all-to-alls, K sets of circuits, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.errors import InputError

__all__ = ["Schedule", "best_schedule", "layer_of_step", "schedule_time", "training_exposure"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Schedule:
    """Which circuits are up at each all-to-all.

    Parameters
    ----------
    up_A
        Index of the circuits, ``[all-to-alls]``.
    all_to_all_s, exposed_s
        Seconds of the all-to-alls, and of changes that nothing hides.
    num_changes
        Changes of circuits.
    """

    up_A: IntArray
    all_to_all_s: float
    exposed_s: float
    num_changes: int

    @property
    def time_s(self) -> float:
        """All-to-alls and exposed changes together, seconds."""
        return self.all_to_all_s + self.exposed_s


def layer_of_step(num_layers: int, *, training: bool = True) -> IntArray:
    """Return the layer of each all-to-all of a step: twice each going forward, and twice each going back."""
    forward = np.repeat(np.arange(num_layers), 2)
    return np.concatenate([forward, forward[::-1]]) if training else forward


def training_exposure(
    layer_A: IntArray,
    layer_of_circuits_K: IntArray,
    ahead_K: npt.NDArray[np.bool_],
    *,
    delay_s: float,
    window_s: float,
) -> FloatArray:
    """Return the seconds that a change to each circuits before each all-to-all adds, ``[all-to-alls, K]``.

    Parameters
    ----------
    layer_A
        Layer of each all-to-all, as of `layer_of_step`.
    layer_of_circuits_K
        Layer that the circuits were made for; -1 for none.
    ahead_K
        Whether the circuits are known before the gate of their layer has run.
    delay_s, window_s
        Time to reconfigure, and compute before an all-to-all that hides it.
    """
    exposed_AK = np.full((layer_A.size, ahead_K.size), max(0.0, delay_s - window_s))
    seen: set[int] = set()
    for step, layer in enumerate(layer_A.tolist()):
        if layer not in seen:
            blocks_K = (layer_of_circuits_K == layer) & ~ahead_K
            exposed_AK[step, blocks_K] = delay_s
        # Nobody can know circuits of a layer whose gate has not run yet, unless they were made ahead.
        seen.add(layer)
        unknown_K = ~ahead_K & (layer_of_circuits_K >= 0) & ~np.isin(layer_of_circuits_K, list(seen))
        exposed_AK[step, unknown_K] = np.inf
    return exposed_AK


def schedule_time(up_A: IntArray, time_AK: FloatArray, exposed_AK: FloatArray, *, start: int) -> Schedule:
    """Return a given sequence of circuits with its time.

    Parameters
    ----------
    up_A
        Circuits that are up at each all-to-all, ``[all-to-alls]``.
    time_AK
        Seconds of each all-to-all on each circuits.
    exposed_AK
        Seconds that a change to them before it adds.
    start
        Circuits that are up before the first.
    """
    before_A = np.concatenate([[start], up_A[:-1]])
    steps = np.arange(up_A.size)
    changed_A = up_A != before_A
    return Schedule(
        up_A=up_A,
        all_to_all_s=float(time_AK[steps, up_A].sum()),
        exposed_s=float(exposed_AK[steps, up_A][changed_A].sum()),
        num_changes=int(changed_A.sum()),
    )


def best_schedule(time_AK: FloatArray, exposed_AK: FloatArray, *, start: int) -> Schedule:
    """Return the sequence of circuits of least time; among equals, the one that changes later.

    Raises
    ------
    InputError
        If the matrices differ in shape or hold no all-to-all.
    """
    if time_AK.ndim != 2 or time_AK.shape != exposed_AK.shape or 0 in time_AK.shape:
        raise InputError(f"times have shape {time_AK.shape}, exposed delays {exposed_AK.shape}")
    num_steps, num_circuits = time_AK.shape
    reached_K = np.where(np.arange(num_circuits) == start, 0.0, np.inf)
    came_AK = np.zeros(time_AK.shape, dtype=np.int64)
    for step in range(num_steps):
        cheapest = int(reached_K.argmin())
        changed_K = reached_K[cheapest] + exposed_AK[step]
        keeps_K = reached_K <= changed_K
        came_AK[step] = np.where(keeps_K, np.arange(num_circuits), cheapest)
        reached_K = np.where(keeps_K, reached_K, changed_K) + time_AK[step]
    up_A = np.empty(num_steps, dtype=np.int64)
    up = int(reached_K.argmin())
    for step in range(num_steps - 1, -1, -1):
        up_A[step] = up
        up = int(came_AK[step, up])
    return schedule_time(up_A, time_AK, exposed_AK, start=start)
