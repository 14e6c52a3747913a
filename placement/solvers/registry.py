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


_SOLVERS: dict[str, Callable[[], Solver]] = {
    "contiguous": _contiguous,
    "greedy": _greedy,
    "eplb": _eplb,
    "search": _search,
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
