"""Whether to move at all: the gain to expect on traffic not fitted, how sure that is, and when it pays back.

Placements are fitted on every other window and judged on the windows between. The gain's interval comes from
a bootstrap of held-out windows in blocks of consecutive ones, since traffic of one moment resembles that of
the next (Kuensch 1989, moving blocks; Politis and Romano 1992, on a circle so that all windows count alike).

Shape letters: W windows, B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.change.frontier import Frontier, FrontierPoint, frontier
from placement.cost import CostBreakdown, CostModel
from placement.errors import InputError
from placement.plan import Placement
from placement.problem import Objective, PlacementProblem
from placement.stopping import StoppingCriterion

__all__ = [
    "Advice",
    "Interval",
    "advise",
    "bootstrap_interval",
    "frontier_gains",
    "resample_blocks",
    "window_costs",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

FEW_WINDOWS = 10
"""Below so many held-out windows an interval says little."""

RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure and the range that it lies in with some confidence."""

    value: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Advice:
    """Whether a change of placement is worth it.

    Parameters
    ----------
    worth_it
        The verdict.
    reason
        It, and why, in one sentence.
    point
        Recommended point of the frontier, chosen on the fitted windows alone; the start where no other
        placement was better.
    gain
        What the objective gains at that point on the held-out windows, in `unit`.
    relative_gain
        The same as a share of the start's objective.
    frontier
        The whole curve.
    num_fitted_windows, num_held_out_windows
        Windows fitted, and windows judged on.
    warnings
        What to keep in mind.
    """

    worth_it: bool
    reason: str
    point: FrontierPoint
    gain: Interval
    relative_gain: Interval
    frontier: Frontier
    num_fitted_windows: int
    num_held_out_windows: int
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "worth_it": self.worth_it,
            "reason": self.reason,
            "recommended": self.point.to_dict(),
            "gain": _interval_dict(self.gain),
            "relative_gain": _interval_dict(self.relative_gain),
            "fitted_windows": self.num_fitted_windows,
            "held_out_windows": self.num_held_out_windows,
            "warnings": list(self.warnings),
            "frontier": self.frontier.to_dict(),
        }


def _interval_dict(interval: Interval) -> dict[str, float]:
    return {
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "confidence": interval.confidence,
    }


def advise(
    problem: PlacementProblem,
    start: Placement,
    *,
    horizon_steps: float | None = None,
    min_gain: float = 0.01,
    confidence: float = 0.95,
    points: int = 10,
    solver: str = "auto",
    seed: int = 0,
    threads: int = 1,
    work_s: float | None = None,
    stop: StoppingCriterion | None = None,
) -> Advice:
    """Say whether moving away from a placement is worth it, and how far to go.

    Parameters
    ----------
    problem
        With the profile of all windows.
    start
        The placement that is running.
    horizon_steps
        Steps that a new placement is expected to serve: a longer pay-back is not worth it, and the
        recommended point is the one that saves most within them. None for no limit; the frontier's knee is
        recommended then.
    min_gain
        Least gain worth having, as a share of the start's objective.
    confidence
        Of the gain's interval, in (0, 1).
    points, solver, seed, threads, work_s, stop
        As for `placement.change.frontier.frontier`.

    Raises
    ------
    InputError
        If there is only one window, or an option is out of range.
    InfeasibleError, NoPlacementFoundError
        As for `placement.change.frontier.frontier`.
    """
    _check_options(horizon_steps, min_gain, confidence)
    fit, held = problem.profile.split_alternate()
    curve = frontier(
        problem.with_profile(fit),
        start,
        points=points,
        held_out=held,
        solver=solver,
        seed=seed,
        threads=threads,
        work_s=work_s,
        stop=stop,
    )
    point = _recommended(curve, horizon_steps)
    gain, relative = _gain(problem.with_profile(held), start, point.placement, confidence, seed)
    worth_it, reason = _verdict(point, gain, relative, horizon_steps, min_gain, problem)
    return Advice(
        worth_it=worth_it,
        reason=reason,
        point=point,
        gain=gain,
        relative_gain=relative,
        frontier=curve,
        num_fitted_windows=fit.num_windows,
        num_held_out_windows=held.num_windows,
        warnings=_warnings(held.num_windows),
    )


def _check_options(horizon_steps: float | None, min_gain: float, confidence: float) -> None:
    if horizon_steps is not None and not horizon_steps > 0:
        raise InputError(f"horizon_steps is {horizon_steps}; it must be above 0")
    if not 0 <= min_gain < 1:
        raise InputError(f"min_gain is {min_gain}; it must be a share in [0, 1)")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}; it must lie between 0 and 1")


def _warnings(num_held_out: int) -> tuple[str, ...]:
    if num_held_out >= FEW_WINDOWS:
        return ()
    return (
        f"only {num_held_out} held-out windows: the interval is a rough guess; use a longer trace or a "
        "smaller --window",
    )


def _recommended(curve: Frontier, horizon_steps: float | None) -> FrontierPoint:
    """Choose a point on the fitted windows, so that the held-out ones stay a fair judge of it."""
    first = curve.points[0]
    if horizon_steps is None or curve.step_unit != "s" or first.moves.seconds is None:
        return curve.points[curve.knee]

    def net_s(point: FrontierPoint) -> float:
        assert point.moves.seconds is not None
        return horizon_steps * (first.fitted.step - point.fitted.step) - point.moves.seconds

    return max(curve.points, key=net_s)


def _verdict(
    point: FrontierPoint,
    gain: Interval,
    relative: Interval,
    horizon_steps: float | None,
    min_gain: float,
    problem: PlacementProblem,
) -> tuple[bool, str]:
    """Return whether a change is worth it, and a sentence that says why."""
    if point.moves.num_moves == 0 and gain.value <= 0:
        return (
            False,
            "Not worth it: no placement better than the running one was found on the fitted windows.",
        )
    what = f"{point.moves.num_moves} moves{_volume(point)}"
    interval = f"{relative.confidence:.0%} interval {relative.low:.1%} to {relative.high:.1%}"
    share = f"{relative.value:.1%} ({interval})"
    if gain.value <= 0:
        return False, f"Not worth it: {what} gain nothing on held-out windows: {share}."
    if gain.low <= 0:
        return False, f"Not worth it: {what} gain {share} on held-out windows, which may be nothing."
    if relative.value < min_gain:
        return False, f"Not worth it: {what} gain {share} on held-out windows, less than {min_gain:.1%}."
    steps = point.pay_back_steps
    if steps is not None and horizon_steps is not None and steps > horizon_steps:
        return False, (
            f"Not worth it: {what} gain {share}, but pay back after {steps:.0f} steps, later than the "
            f"{horizon_steps:.0f} steps planned."
        )
    pays = "" if steps is None else f", and pay back after {max(1, int(np.ceil(steps)))} steps"
    return True, f"Worth it: {what} lower {problem.objective} by {share} on held-out windows{pays}."


def _volume(point: FrontierPoint) -> str:
    parts = []
    if point.moves.total_bytes is not None:
        parts.append(f"{point.moves.total_bytes / 2**30:.2f} GiB")
    if point.moves.seconds is not None:
        parts.append(f"{point.moves.seconds:.3g} s")
    return f" ({', '.join(parts)})" if parts else ""


def _gain(
    problem: PlacementProblem, start: Placement, placement: Placement, confidence: float, seed: int
) -> tuple[Interval, Interval]:
    """Interval of the objective's gain on a problem's windows, absolute and as a share of the start's."""
    before, after = window_costs(problem, start), window_costs(problem, placement)
    picks_BW = resample_blocks(before.shape[0], seed=seed)
    risk = problem.risk
    base = risk.summarise(before.ravel())
    gain = base - risk.summarise(after.ravel())
    resampled_B = np.array(
        [risk.summarise(before[pick].ravel()) - risk.summarise(after[pick].ravel()) for pick in picks_BW]
    )
    interval = bootstrap_interval(gain, resampled_B, num_windows=before.shape[0], confidence=confidence)
    scale = 1 / base if base > 0 else 0.0
    relative = Interval(
        value=interval.value * scale,
        low=interval.low * scale,
        high=interval.high * scale,
        confidence=confidence,
    )
    return interval, relative


def frontier_gains(
    problem: PlacementProblem, curve: Frontier, *, confidence: float = 0.95, seed: int = 0
) -> tuple[Interval, ...]:
    """Return what every point gains on the held-out windows, as a share of the start's objective.

    Parameters
    ----------
    problem, confidence, seed
        As for `advise`, whose frontier this is: with the profile of all windows.
    curve
        Points fitted on every other window.
    """
    held = problem.with_profile(problem.profile.split_alternate()[1])
    start = curve.points[0].placement
    return tuple(_gain(held, start, point.placement, confidence, seed)[1] for point in curve.points)


def window_costs(problem: PlacementProblem, placement: Placement) -> FloatArray:
    """Return what the objective summarises: step costs, balances of all layers, or traffic.

    The first axis is windows, the second one layers for balance, else a single column.
    """
    if problem.objective is Objective.TRAFFIC:
        windows = range(problem.profile.num_windows)
        parts = [problem.with_profile(problem.profile.select_windows([window])) for window in windows]
        return np.array([[CostModel(part).objective(placement)] for part in parts])
    breakdown: CostBreakdown = CostModel(problem).evaluate(placement)
    if problem.objective is Objective.BALANCE:
        return breakdown.balance_WL
    return breakdown.step_W[:, None]


def block_length(num_windows: int) -> int:
    """Windows of a block: the cube root of their number, the usual rate for a mean."""
    return max(1, round(float(np.cbrt(num_windows))))


def resample_blocks(num_windows: int, *, resamples: int = RESAMPLES, seed: int = 0) -> IntArray:
    """Draw windows in blocks of consecutive ones, on a circle, ``[resamples, windows]``."""
    length = block_length(num_windows)
    rng = np.random.default_rng(seed)
    first = rng.integers(0, num_windows, size=(resamples, -(-num_windows // length)))
    picks = (first[:, :, None] + np.arange(length)) % num_windows
    return np.asarray(picks.reshape(resamples, -1)[:, :num_windows])


def bootstrap_interval(
    value: float, resampled_B: FloatArray, *, num_windows: int, confidence: float
) -> Interval:
    """Return the interval of a figure from its values on resampled windows.

    The quantiles' distance from the resamples' mean, widened because resamples vary less than fresh windows
    would: by 1 / (1 - block / windows) in the variance.
    """
    spare = max(num_windows - block_length(num_windows), 1)
    widen = np.sqrt(num_windows / spare)
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled_B, [tail, 1 - tail]) - resampled_B.mean()
    return Interval(
        value=value, low=value + float(low * widen), high=value + float(high * widen), confidence=confidence
    )
