"""One step of one window, device by device: when each is busy, when it waits, and for whom.

The phases of a layer are barriers: none begins before the slowest device has ended the one before it.

Shape letters: L layers, P phases, D devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.cost.model import CostModel
from placement.errors import InputError
from placement.plan import Placement
from placement.problem import PlacementProblem

__all__ = ["PHASES", "Timeline", "timeline", "typical_window"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

PHASES = ("dispatch", "experts", "combine")
"""Phases of a layer, in order."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timeline:
    """Who is busy when in one step.

    Parameters
    ----------
    busy_LPD
        Time that each device is busy in each layer and phase, ``[layers, phases, devices]``, in `unit`.
    window
        Window of the profile.
    unit
        ``s``, or ``cost`` for a linear calibration.
    """

    busy_LPD: FloatArray
    window: int
    unit: str

    @property
    def length_LP(self) -> FloatArray:
        """Length of each phase: the time of its slowest device, ``[layers, phases]``."""
        return np.asarray(self.busy_LPD.max(axis=2))

    @property
    def begin_LP(self) -> FloatArray:
        """Begin of each phase, ``[layers, phases]``."""
        length_LP = self.length_LP
        return np.asarray(np.cumsum(length_LP).reshape(length_LP.shape) - length_LP)

    @property
    def step(self) -> float:
        """Length of the step, as `CostBreakdown.step_W` has it."""
        return float(self.length_LP.sum())

    @property
    def slowest_LP(self) -> IntArray:
        """Device that the others wait for, the lowest number among equals, ``[layers, phases]``."""
        return np.asarray(self.busy_LPD.argmax(axis=2))

    @property
    def idle_LPD(self) -> FloatArray:
        """Time that each device waits at the end of each phase, ``[layers, phases, devices]``."""
        return np.asarray(self.length_LP[:, :, None] - self.busy_LPD)

    @property
    def idle_share(self) -> float:
        """Share of all devices' time that is spent waiting."""
        total = self.step * self.busy_LPD.shape[2]
        return float(self.idle_LPD.sum() / total) if total > 0 else 0.0

    @property
    def waiting_DD(self) -> FloatArray:
        """Time that one device (row) waits for another one (column), ``[devices, devices]``."""
        num_devices = self.busy_LPD.shape[2]
        waiting_DD = np.zeros((num_devices, num_devices))
        np.add.at(waiting_DD.T, self.slowest_LP.ravel(), self.idle_LPD.reshape(-1, num_devices))
        return waiting_DD


def timeline(problem: PlacementProblem, placement: Placement, *, window: int) -> Timeline:
    """Return the timeline of one window's step.

    Raises
    ------
    InputError
        If there is no such window, the placement does not belong to the problem, or what devices exchange is
        not known: of a problem without costs, or a trace of counts where distinct tokens travel.
    """
    if not 0 <= window < problem.profile.num_windows:
        raise InputError(f"window {window} of {problem.profile.num_windows}")
    alone = problem.with_profile(problem.profile.select_windows([window]))
    times = CostModel(alone).device_times(placement)
    busy_LPD = np.stack([time_WLD[0] for time_WLD in times], axis=1)
    if not np.isfinite(busy_LPD).all():
        raise InputError("the trace has expert counts only, which do not tell what devices exchange")
    return Timeline(busy_LPD=busy_LPD, window=window, unit=problem.calibration.unit)


def typical_window(step_W: FloatArray) -> int:
    """Return the window whose step is the median one; the lower of the two in the middle.

    Parameters
    ----------
    step_W
        Step cost of each window, ``[windows]``.
    """
    return int(np.argsort(step_W, kind="stable")[(step_W.size - 1) // 2])
