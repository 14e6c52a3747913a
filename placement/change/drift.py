"""How well a running placement still fits: its cost window by window, beside one fitted to each stretch.

Traffic is cut into stretches of consecutive windows. In each stretch a fresh placement is fitted to the even
windows and scored on the odd ones, and another the other way round, so that every window is held out once.
What the running placement costs more than that is the price of staying.

Shape letters: W windows, B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.change.advise import Interval, bootstrap_interval, resample_blocks, window_costs
from placement.errors import InputError
from placement.optimizer import optimize
from placement.plan import Placement
from placement.problem import PlacementProblem
from placement.stopping import StoppingCriterion

__all__ = ["Drift", "Stretch", "drift"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Consecutive windows.

    Parameters
    ----------
    first_window, num_windows
        Which ones.
    excess
        What the running placement costs more than a fresh one there, as a share of its own mean cost.
    """

    first_window: int
    num_windows: int
    excess: Interval


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drift:
    """A running placement beside fresh ones.

    Parameters
    ----------
    running_W, fresh_W
        What each window costs under the running placement, and under one fitted to other windows of its
        stretch, ``[windows]``, in `unit`: what the objective takes the mean of.
    stretches
        In order.
    unit
        Unit of the objective.
    """

    running_W: FloatArray
    fresh_W: FloatArray
    stretches: tuple[Stretch, ...]
    unit: str


def drift(
    problem: PlacementProblem,
    running: Placement,
    *,
    stretch_windows: int | None = None,
    confidence: float = 0.95,
    solver: str = "auto",
    seed: int = 0,
    threads: int = 1,
    work_s: float | None = None,
    stop: StoppingCriterion | None = None,
) -> Drift:
    """Score a running placement on every window, beside fresh ones.

    Parameters
    ----------
    problem
        With the profile of all windows, in the order of time.
    running
        The placement that is running.
    stretch_windows
        Windows of a stretch, 2 or more, the last one may be up to twice as long; by default a sixth of all.
    confidence
        Of the intervals, in (0, 1).
    solver, seed, threads, work_s, stop
        As in `placement.optimize`, for each of two solves in every stretch.

    Raises
    ------
    InputError
        If the placement does not belong to the problem, there are fewer than two windows, or an option is
        out of range.
    InfeasibleError, NoPlacementFoundError
        As `placement.optimize`.
    """
    num_windows = problem.profile.num_windows
    length = max(2, num_windows // 6) if stretch_windows is None else stretch_windows
    if length < 2 or num_windows < 2:
        raise InputError(
            f"stretches of {length} of {num_windows} windows; 2 or more are needed to fit and to score"
        )
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}; it must lie between 0 and 1")
    problem.check_placement(running)
    running_W = window_costs(problem, running).mean(axis=1)
    fresh_W = np.empty(num_windows)
    stretches = []
    for first, last in _stretches(num_windows, length):
        profile = problem.profile.select_windows(range(first, last))
        for fold in (0, 1):
            fit, held = profile.split_fold(fold, folds=2)
            fresh = optimize(
                problem.with_profile(fit),
                solver=solver, seed=seed, threads=threads, work_s=work_s, stop=stop,
            ).placement  # fmt: skip
            fresh_W[first:last][fold::2] = window_costs(problem.with_profile(held), fresh).mean(axis=1)
        excess = _excess(running_W[first:last], fresh_W[first:last], confidence, seed)
        stretches.append(Stretch(first_window=first, num_windows=last - first, excess=excess))
    return Drift(running_W=running_W, fresh_W=fresh_W, stretches=tuple(stretches), unit=problem.unit)


def _stretches(num_windows: int, length: int) -> list[tuple[int, int]]:
    """First window of each stretch and the one after its last; what is left over joins the last one."""
    count = max(1, num_windows // length)
    return [(i * length, (i + 1) * length if i < count - 1 else num_windows) for i in range(count)]


def _excess(running_W: FloatArray, fresh_W: FloatArray, confidence: float, seed: int) -> Interval:
    """Share by which fresh windows are cheaper, with a bootstrap over blocks of windows."""
    num_windows = running_W.size
    picks_BW = resample_blocks(num_windows, seed=seed)
    running_B, fresh_B = running_W[picks_BW].mean(axis=1), fresh_W[picks_BW].mean(axis=1)
    share_B = 1 - np.divide(fresh_B, running_B, out=np.ones_like(fresh_B), where=running_B > 0)
    base = float(running_W.mean())
    value = 1 - float(fresh_W.mean()) / base if base > 0 else 0.0
    return bootstrap_interval(value, share_B, num_windows=num_windows, confidence=confidence)
