"""The best placement within few moves of a given one.

A move is an expert copy that a device must receive (`placement.plan.diff`): a swap of two experts is two
moves, another expert in an empty slot or in the slot of a spare replica one, a dropped replica none. The
budget holds for all layers together and goes where it buys most.
"""

from __future__ import annotations

from typing import Protocol

from placement.change.coupled import CoupledPaths
from placement.change.curves import LayerCurves, tail_weights
from placement.change.relabel import are_layers_coupled, fewest_moves
from placement.cost import CostModel
from placement.errors import InfeasibleError, InputError
from placement.plan import Placement, diff
from placement.problem import Objective, PlacementProblem
from placement.solvers.search import default_work_s, layer_balance
from placement.stopping import Never, StoppingCriterion

__all__ = ["Ways", "improve_within", "is_allowed", "make_ways"]


LEAST_WORK_S = 5.0

REPLICAS_WORK = 4
"""Times the effort where replicas can be placed: every trial settles tokens anew, so descents are long."""


def default_change_s(problem: PlacementProblem) -> float:
    """Choose the effort by size, in seconds of one thread: a quarter of a solve's."""
    work_s = max(LEAST_WORK_S, default_work_s(problem) / 4)
    replicas = problem.num_slots > problem.num_experts and problem.profile.num_sampled_tokens > 0
    return REPLICAS_WORK * work_s if replicas and problem.objective is not Objective.BALANCE else work_s


class Ways(Protocol):
    """Placements found at all distances from a start."""

    def search(self) -> None:
        """Find them."""

    def deepen(self, budget: int) -> None:
        """Spend what is left of the effort on placements about so many moves away."""

    def within(self, budget: int) -> Placement:
        """Return the best one within a budget, as far as the search can tell."""


def make_ways(
    problem: PlacementProblem,
    start: Placement,
    *,
    most_moves: int,
    seed: int = 0,
    work_s: float | None = None,
    stop: StoppingCriterion | None = None,
    threads: int = 1,
    prefer: Placement | None = None,
) -> Ways:
    """Return the search for placements near a start that suits a problem; nothing is searched yet.

    Parameters
    ----------
    most_moves
        Largest budget that will be asked for.
    prefer
        A placement to steer towards as well, of any distance.
    """
    model = CostModel(problem)
    kind = CoupledPaths if are_layers_coupled(problem) else LayerCurves
    return kind(
        model,
        start,
        most_moves=min(most_moves, problem.num_layers * problem.num_slots),
        seed=seed,
        stop=Never() if stop is None else stop,
        threads=threads,
        work_s=default_change_s(problem) if work_s is None else work_s,
        prefer=prefer,
        weight_W=tail_weights(model, start),
    )


def is_allowed(problem: PlacementProblem, placement: Placement) -> bool:
    """Return whether a placement keeps the load limit of a traffic objective; True for other objectives."""
    if problem.objective is not Objective.TRAFFIC:
        return True
    return bool(layer_balance(problem, placement).max() <= problem.max_imbalance * (1 + 1e-9))


def improve_within(
    problem: PlacementProblem,
    start: Placement,
    *,
    max_moves: int,
    seed: int = 0,
    work_s: float | None = None,
    stop: StoppingCriterion | None = None,
    threads: int = 1,
    prefer: Placement | None = None,
) -> Placement:
    """Return the best placement found within a number of moves of a start; never worse than it.

    Parameters
    ----------
    problem
        What to improve for.
    start
        The placement that is running.
    max_moves
        Expert copies that devices may receive, over all layers, 0 or more.
    seed, stop, threads
        As in a solve: the same seed gives the same placement unless `stop` ends the search.
    work_s
        Effort in seconds of one thread; None for a choice by the problem's size.
    prefer
        A placement to steer towards, such as an unbudgeted solve's; returned itself if it is within the
        budget and nothing better is found.

    Raises
    ------
    InputError
        If a placement does not belong to the problem, or the budget is negative.
    InfeasibleError
        If the start holds more experts on a device than it has slots, or exceeds the load limit of a
        traffic objective and no placement within the budget was found that keeps it.
    """
    if max_moves < 0:
        raise InputError(f"max_moves is {max_moves}; it must be 0 or more")
    problem.check_placement(start)
    problem.check_capacity(start)
    candidates = [start]
    if prefer is not None:
        problem.check_placement(prefer)
        problem.check_capacity(prefer)
        prefer = fewest_moves(problem, start, prefer)
        candidates.append(prefer)
    if max_moves > 0:
        ways = make_ways(
            problem,
            start,
            most_moves=max_moves,
            seed=seed,
            work_s=work_s,
            stop=stop,
            threads=threads,
            prefer=prefer,
        )
        ways.search()
        candidates.append(ways.within(max_moves))
        ways.deepen(max_moves)
        candidates.append(ways.within(max_moves))
    return best_within(CostModel(problem), start, candidates, max_moves)


def best_within(model: CostModel, start: Placement, candidates: list[Placement], max_moves: int) -> Placement:
    """Return the candidate of least objective that is within a budget and keeps the load limit.

    Raises
    ------
    InfeasibleError
        If none does, with the lowest overload.
    """
    problem = model.problem
    near = [candidate for candidate in candidates if len(diff(start, candidate)) <= max_moves]
    allowed = [candidate for candidate in near if is_allowed(problem, candidate)]
    if not allowed:
        least = min(float(layer_balance(problem, candidate).max()) for candidate in near)
        raise InfeasibleError(
            f"the start loads a device with {layer_balance(problem, start).max():.4f} of its layer's mean, "
            f"above --max-imbalance {problem.max_imbalance}, and within {max_moves} moves the best found is "
            f"{least:.4f}; allow more moves or a higher limit"
        )
    return min(allowed, key=model.objective)
