"""Solvers by name, imported only when they are asked for."""

from __future__ import annotations

from collections.abc import Callable

from placement._suggest import did_you_mean
from placement.errors import InputError
from placement.solvers.protocol import Solver

__all__ = ["BASELINES", "make_solver", "solver_names"]

BASELINES = ("contiguous", "greedy", "eplb")
"""What users have today; the portfolio never returns worse than any of them."""


def _contiguous() -> Solver:
    from placement.solvers.contiguous import ContiguousSolver

    return ContiguousSolver()


def _greedy() -> Solver:
    from placement.solvers.greedy import GreedySolver

    return GreedySolver()


def _eplb() -> Solver:
    from placement.solvers.eplb import EplbSolver

    return EplbSolver()


def _search() -> Solver:
    from placement.solvers.search import SearchSolver

    return SearchSolver()


def _ilp() -> Solver:
    from placement.solvers.ilp.solver import IlpSolver

    return IlpSolver()


def _lns() -> Solver:
    from placement.solvers.ilp.neighbourhood import LnsSolver

    return LnsSolver()


def _split() -> Solver:
    from placement.solvers.split_refine import SplitRefineSolver

    return SplitRefineSolver()


def _moetuner() -> Solver:
    from placement.solvers.moetuner import MoetunerSolver

    return MoetunerSolver()


def _moetuner_sum() -> Solver:
    from placement.solvers.moetuner import MoetunerSolver
    from placement.solvers.moetuner.devices import Reading

    return MoetunerSolver(reading=Reading.SUM)


def _balance() -> Solver:
    from placement.solvers.balance import BalanceSolver

    return BalanceSolver()


def _hierarchy() -> Solver:
    from placement.solvers.hierarchy import HierarchySolver

    return HierarchySolver()


def _chain() -> Solver:
    from placement.solvers.chain import ChainSolver

    return ChainSolver()


def _exact() -> Solver:
    from placement.solvers.exact.solver import ExactSolver

    return ExactSolver()


_SOLVERS: dict[str, Callable[[], Solver]] = {
    "contiguous": _contiguous,
    "greedy": _greedy,
    "eplb": _eplb,
    "search": _search,
    "exact": _exact,
    "chain": _chain,
    "balance": _balance,
    "hierarchy": _hierarchy,
    "ilp": _ilp,
    "lns": _lns,
    "split": _split,
    "moetuner": _moetuner,
    "moetuner-sum": _moetuner_sum,
}


def solver_names() -> tuple[str, ...]:
    """Return the names of all solvers, without the portfolio ``auto``."""
    return tuple(_SOLVERS)


def make_solver(name: str) -> Solver:
    """Return the solver of a name.

    Raises
    ------
    InputError
        If there is none, with the nearest one.
    """
    if name not in _SOLVERS:
        raise InputError(f"unknown solver {name!r}; {did_you_mean(name, ('auto', *_SOLVERS))}")
    return _SOLVERS[name]()
