"""Moves against objective: what every budget buys, what moving costs, and when it pays back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from placement.change.budget import best_within, make_ways
from placement.cost import CostBreakdown, CostModel
from placement.errors import InfeasibleError, InputError
from placement.moves import MoveSummary, summarise_moves
from placement.optimizer import optimize
from placement.plan import Placement
from placement.problem import PlacementProblem
from placement.profile import RoutingProfile
from placement.solvers.search import default_work_s
from placement.stopping import StoppingCriterion

__all__ = ["Frontier", "FrontierPoint", "frontier"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrontierPoint:
    """One budget of the frontier.

    Parameters
    ----------
    budget
        Moves that were allowed.
    placement
        The best placement found within them.
    moves
        What it takes to get there from the start.
    fitted, held_out
        Its cost on the fitted windows, and on others where there are any.
    saved_per_step
        What a step gets cheaper by against the start, on the held-out windows where there are any, in
        the unit of a step; None where a problem has no costs.
    pay_back_steps
        Steps until the saved time makes up for the transfer: infinite where nothing is saved, None where
        a step is not in seconds or moves have no bytes.
    """

    budget: int
    placement: Placement
    moves: MoveSummary
    fitted: CostBreakdown
    held_out: CostBreakdown | None
    saved_per_step: float | None
    pay_back_steps: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without the placement and the single moves."""
        steps = self.pay_back_steps
        return {
            "budget": self.budget,
            "moves": self.moves.num_moves,
            "moves_by_tier": self.moves.moves_by_tier,
            "bytes": self.moves.total_bytes,
            "transfer_s": self.moves.seconds,
            "fitted": self.fitted.objective,
            "held_out": None if self.held_out is None else self.held_out.objective,
            "saved_per_step": self.saved_per_step,
            "pay_back_steps": steps if steps is not None and np.isfinite(steps) else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frontier:
    """The whole curve of moves against objective.

    Parameters
    ----------
    points
        By ascending budget; the first one is the start, the fitted objective never rises.
    knee
        Index of the point after which moves buy least: farthest below the line from the first point to the
        last one, on the fitted windows.
    unit, step_unit
        Units of the objective and of a step.
    """

    points: tuple[FrontierPoint, ...]
    knee: int
    unit: str
    step_unit: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "unit": self.unit,
            "step_unit": self.step_unit,
            "knee": self.knee,
            "points": [point.to_dict() for point in self.points],
        }


def frontier(
    problem: PlacementProblem,
    start: Placement,
    *,
    budgets: Sequence[int] | None = None,
    points: int = 10,
    held_out: RoutingProfile | None = None,
    solver: str = "auto",
    seed: int = 0,
    threads: int = 1,
    work_s: float | None = None,
    stop: StoppingCriterion | None = None,
) -> Frontier:
    """Find the best placements within many budgets at once.

    One search serves all budgets: every layer's curve is found once, and a knapsack reads any budget off it.

    Parameters
    ----------
    problem
        What to improve for, on the windows to fit.
    start
        The placement that is running.
    budgets
        Moves allowed, over all layers; by default about `points` of them, from 1 to those of the unbudgeted
        solve in geometric steps.
    held_out
        Other windows of the same traffic to score on.
    solver
        Solves without a budget, for the last point.
    seed, threads, stop
        As in a solve.
    work_s
        Effort of the unbudgeted solve, and of the budgeted search, together.

    Raises
    ------
    InputError
        If a placement does not belong to the problem, or a budget is negative.
    InfeasibleError
        If no placement keeps the load limit of a traffic objective.
    NoPlacementFoundError
        If `stop` ended the solve before there was a placement that keeps it.
    """
    if budgets is not None and (len(budgets) == 0 or min(budgets) < 0):
        raise InputError(f"budgets are {list(budgets)}; name at least one, each 0 or more")
    if points < 1:
        raise InputError(f"points is {points}; it must be 1 or more")
    work_s = default_work_s(problem) if work_s is None else work_s
    free = optimize(
        problem, solver=solver, start=start, seed=seed, threads=threads, work_s=work_s / 2, stop=stop
    )
    away = summarise_moves(start, free.placement).num_moves
    chosen = _budgets(away, points) if budgets is None else sorted({int(budget) for budget in budgets})
    ways = make_ways(
        problem,
        start,
        most_moves=max(*chosen, 1),
        seed=seed,
        work_s=work_s / 2,
        stop=stop,
        threads=threads,
        prefer=free.placement,
    )
    ways.search()
    for budget in {max(chosen[len(chosen) // 2], 1), max(*chosen, 1)}:
        ways.deepen(budget)
    candidates = [start, free.placement, *(ways.within(budget) for budget in chosen)]
    return _frontier(problem, start, candidates, chosen, held_out)


def _budgets(away: int, points: int) -> list[int]:
    """Geometric steps from 1 to the moves of the unbudgeted solve."""
    if away == 0:
        return [0]
    return sorted({int(budget) for budget in np.geomspace(1, away, points).round()})


def _frontier(
    problem: PlacementProblem,
    start: Placement,
    candidates: list[Placement],
    budgets: list[int],
    held_out: RoutingProfile | None,
) -> Frontier:
    """Pick the best candidate for every budget and price it."""
    model = CostModel(problem)
    scorer = None if held_out is None else CostModel(problem.with_profile(held_out))
    first = _point(problem, model, scorer, start, start, 0, None)
    points = [first]
    for budget in budgets:
        try:
            best = best_within(model, start, candidates, budget)
        except InfeasibleError:
            continue  # the start exceeds the load limit, and so few moves do not mend that
        if best is start:
            continue
        points.append(_point(problem, model, scorer, start, best, budget, first))
    return Frontier(
        points=tuple(points),
        knee=_knee([p.moves.num_moves for p in points], [p.fitted.objective for p in points]),
        unit=problem.unit,
        step_unit=problem.calibration.unit,
    )


def _point(
    problem: PlacementProblem,
    model: CostModel,
    scorer: CostModel | None,
    start: Placement,
    placement: Placement,
    budget: int,
    first: FrontierPoint | None,
) -> FrontierPoint:
    moves = summarise_moves(start, placement, topology=problem.topology, model=problem.model)
    fitted = model.evaluate(placement)
    held_out = None if scorer is None else scorer.evaluate(placement)
    saved = None
    if model.has_costs:
        now, then = _step(fitted, held_out), 0.0 if first is None else _step(first.fitted, first.held_out)
        saved = 0.0 if first is None else then - now
    return FrontierPoint(
        budget=budget,
        placement=placement,
        moves=moves,
        fitted=fitted,
        held_out=held_out,
        saved_per_step=saved,
        pay_back_steps=_pay_back(moves.seconds, saved, problem.calibration.unit),
    )


def _step(fitted: CostBreakdown, held_out: CostBreakdown | None) -> float:
    return fitted.step if held_out is None else held_out.step


def _pay_back(transfer_s: float | None, saved: float | None, unit: str) -> float | None:
    if transfer_s is None or saved is None or unit != "s":
        return None
    if transfer_s == 0:
        return 0.0
    return transfer_s / saved if saved > 0 else float("inf")


def _knee(moves: list[int], objective: list[float]) -> int:
    """Index of the point farthest below the line from the first point to the last one."""
    x, y = np.array(moves, dtype=np.float64), np.array(objective)
    if x[-1] == x[0] or y[-1] == y[0]:
        return 0
    below = (y[0] - y) / (y[0] - y[-1]) - (x - x[0]) / (x[-1] - x[0])
    return int(below.argmax()) if below.max() > 0 else len(moves) - 1
