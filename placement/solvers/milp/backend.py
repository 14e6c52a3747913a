"""The seam between a program and the foreign solvers that can solve it.

Shape letters: V variables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from placement.solvers.milp.formulation import FloatArray, MilpProgram
from placement.solvers.milp.result import Limit, MilpStatus

__all__ = ["Backend", "Limits", "Outcome", "Unwatched", "Watcher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a backend may end, and what it may use.

    Parameters
    ----------
    relative_gap, absolute_gap
        The proof may stop within either of them.
    time_limit_s, node_limit
        Where the search ends without a proof; None for nowhere. A backend without nodes counts conflicts.
    threads, seed
        Threads to use, and the seed of everything random.
    """

    relative_gap: float = 1e-4
    absolute_gap: float = 0.0
    time_limit_s: float | None = None
    node_limit: int | None = None
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What a backend says; nothing of it is believed before it has been checked.

    Parameters
    ----------
    status
        How it says that it ended.
    value_V
        Its best point, ``[variables]``.
    bound
        Its bound on the objective.
    limit
        What ended it.
    rows_hold
        False where the backend solved a relaxation, so that the continuous part is to be chosen anew.
    """

    status: MilpStatus
    value_V: FloatArray | None = None
    bound: float = float("-inf")
    limit: Limit = Limit.NONE
    rows_hold: bool = True


class Watcher(Protocol):
    """Whoever wants to know of progress, and may end it."""

    def improved(self, value_V: FloatArray, bound: float) -> None:
        """Take note of a better point and of the bound at that time."""

    def stopped(self) -> bool:
        """Return whether the backend must end now."""


class Unwatched:
    """Nobody looks on."""

    def improved(self, value_V: FloatArray, bound: float) -> None:
        """Take no note."""

    def stopped(self) -> bool:
        """Return False."""
        return False


class Backend(Protocol):
    """Solves a program with a foreign solver."""

    @property
    def name(self) -> str:
        """Name in options and results."""

    def solve(self, program: MilpProgram, limits: Limits, watcher: Watcher) -> Outcome:
        """Solve, telling the watcher of every better point where the solver allows it.

        Raises
        ------
        ImportError
            If the solver is not installed.
        BackendError
            If it fails.
        """
