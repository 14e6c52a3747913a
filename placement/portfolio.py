"""Which solvers `auto` runs on a problem, in order; each starts from the best of those before it."""

from __future__ import annotations

from placement.problem import Objective, PlacementProblem, ReplicaSplit, Semantics
from placement.solvers.registry import BASELINES

__all__ = ["QUICK", "num_searches", "portfolio"]

QUICK = frozenset({*BASELINES, "balance", "hierarchy"})
"""Solvers whose placements should not wait for a bound."""

SEARCHES = frozenset({"search", "chain", "split"})
"""Solvers that take as much effort as they are given."""

LIGHT_CLASSES = 5e6
"""Placements of one layer up to which a proof takes seconds."""


def portfolio(problem: PlacementProblem) -> tuple[str, ...]:
    """Return the names of the solvers that `auto` runs: the baselines, then whoever is best at the problem.

    - ``balance`` where loads are averages: it is within a thousandth of even in milliseconds;
    - ``hierarchy`` for step time and traffic over several nodes, as a start;
    - ``exact`` where all placements of a layer can be gone through: after a proof nobody else runs;
    - ``chain`` where stay-put couples the layers, ``search`` elsewhere;
    - ``split`` where the engine splits replicas otherwise than evenly.
    """
    names = list(BASELINES)
    if problem.objective is Objective.BALANCE and problem.profile.num_windows == 1:
        names.append("balance")
    if _hierarchy_helps(problem):
        names.append("hierarchy")
    if _is_light(problem):
        names.append("exact")
    names.append("chain" if problem.layers_are_coupled else "search")
    if problem.replica_split is not ReplicaSplit.EVEN and problem.num_slots > problem.num_experts:
        names.append("split")
    return tuple(names)


def num_searches(names: tuple[str, ...]) -> int:
    """Return among how many solvers an effort is to be shared, at least 1."""
    return max(1, len(SEARCHES.intersection(names)))


def _hierarchy_helps(problem: PlacementProblem) -> bool:
    return (
        problem.topology.num_nodes > 1
        and problem.semantics is Semantics.DISPATCH
        and problem.objective is not Objective.BALANCE
    )


def _is_light(problem: PlacementProblem) -> bool:
    """Whether a proof by enumeration is possible, and takes no longer than a search."""
    from placement.cost import CostModel
    from placement.solvers.exact.layout import make_layout
    from placement.solvers.exact.size import is_enumerable

    if not is_enumerable(problem):
        return False
    return problem.num_slots > problem.num_experts or (
        make_layout(CostModel(problem)).num_classes() <= LIGHT_CLASSES
    )
