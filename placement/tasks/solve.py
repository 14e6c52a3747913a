"""One solve with the options of the command line, and the entries of the placement file that it gives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from placement.bounds import LowerBound
    from placement.cost import CostBreakdown
    from placement.plan import Placement
    from placement.problem import PlacementProblem
    from placement.solution import Incumbent, Solution
    from placement.stopping import StoppingCriterion
    from placement.tasks.problem import ProblemInputs, TraceOrigin

__all__ = [
    "WORK_SHARE",
    "breakdown_entry",
    "note_few_windows",
    "placement_entries",
    "provenance_options",
    "run_solver",
    "work_of_limit",
]

_log = logging.getLogger(__name__)

FEW_WINDOWS = 10

WORK_SHARE = 0.7
"""Share of a time limit that is turned into counted work: the rest is for reading, bounds and evaluation, and
for machines slower than the one the count was set on, so that the limit seldom decides the result."""


def work_of_limit(time_limit: float | None, threads: int) -> float | None:
    """Return the effort that a time limit allows, in seconds of one thread; None without a limit."""
    return None if time_limit is None else WORK_SHARE * time_limit * threads


def run_solver(
    problem: PlacementProblem,
    *,
    solver: str = "auto",
    stop: StoppingCriterion | None = None,
    time_limit: float | None = None,
    threads: int = 1,
    seed: int = 0,
    start: Placement | None = None,
    max_moves: int | None = None,
    on_incumbent: Callable[[Incumbent], None] | None = None,
    on_phase: Callable[[str, LowerBound], None] | None = None,
) -> Solution:
    """Solve a problem with the options of ``solve``.

    Parameters
    ----------
    stop
        When to end early; the caller's clock for `time_limit` is part of it.
    time_limit
        Seconds that the caller allows: how much effort is planned.
    on_incumbent, on_phase
        Told of progress, from the calling thread.

    Raises
    ------
    PlacementError
        As `placement.optimizer.optimize`.
    """
    from placement.optimizer import optimize

    return optimize(
        problem,
        solver=solver,
        stop=stop,
        seed=seed,
        threads=threads,
        work_s=work_of_limit(time_limit, threads),
        start=start,
        max_moves=max_moves,
        on_incumbent=on_incumbent or (lambda _: None),
        on_phase=on_phase or (lambda _, __: None),
    )


def placement_entries(
    problem: PlacementProblem,
    solution: Solution,
    origin: TraceOrigin,
    *,
    seed: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the entries of a placement file that say how good it is and where it comes from."""
    from placement import __version__

    return {
        "objective": solution.objective_dict(str(problem.objective)),
        "metrics": solution.breakdown.metrics.as_dict(),
        "breakdown": breakdown_entry(problem, solution.breakdown, solution.bound),
        "provenance": {
            "solver": solution.solver,
            "seed": seed,
            "trace": origin.digest,
            "version": __version__,
            "termination": str(solution.termination),
            "options": dict(options),
        },
    }


def provenance_options(
    inputs: ProblemInputs, problem: PlacementProblem, *, solver: str, max_moves: int | None
) -> dict[str, Any]:
    """Return the options of a solve that a placement file tells."""
    return {
        "semantics": inputs.semantics,
        "objective": inputs.objective,
        "window": int(problem.profile.window_tokens_W[0]),
        "spare_slots": inputs.spare_slots,
        "risk": inputs.risk,
        "replica_split": inputs.replica_split,
        "topology": problem.topology.name,
        "solver": solver,
        "max_moves": max_moves,
    }


def note_few_windows(problem: PlacementProblem) -> None:
    """Say so where a placement is fitted to little traffic."""
    num_windows = problem.profile.num_windows
    if num_windows < FEW_WINDOWS:
        _log.warning(
            f"only {num_windows} window{'s' * (num_windows > 1)}: what is fitted to so few may not hold on "
            "other traffic; use a longer trace or a smaller --window"
        )


def breakdown_entry(problem: PlacementProblem, breakdown: CostBreakdown, bound: LowerBound) -> dict[str, Any]:
    """Return the parts of the objective, with bound and gap of every layer."""
    from placement.bounds import layer_gaps
    from placement.problem import Objective

    summary = breakdown.summary()
    for row, value in zip(summary["layers"], bound.layer_L.tolist(), strict=True):
        row["lower_bound"] = value
    if problem.objective is not Objective.TRAFFIC:
        gap_L = layer_gaps(problem, breakdown, bound)
        for row, gap in zip(summary["layers"], gap_L.tolist(), strict=True):
            row["gap"] = gap
    return summary
