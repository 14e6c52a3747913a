"""`solve_milp`: scale a program, have a backend solve it, and believe nothing that cannot be checked.

Shape letters: V variables.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from placement.errors import BackendError, InputError
from placement.solvers.milp.backend import Limits, Outcome
from placement.solvers.milp.backends import BACKENDS, make_backend
from placement.solvers.milp.checking import fixed_integers, rounded, worst_violation
from placement.solvers.milp.formulation import FloatArray, MilpProgram
from placement.solvers.milp.process import solve_in_child
from placement.solvers.milp.result import Limit, MilpResult, MilpStatus
from placement.solvers.milp.scaling import Scaling, make_scaling
from placement.stopping import Never, StoppingCriterion

__all__ = ["DEFAULT_MEMORY_BYTES", "solve_milp"]

DEFAULT_MEMORY_BYTES = 8 * 2**30

BOUND_SLACK = 1e-6
"""Relative step back from a bound: solvers prune with tolerances of 1e-7 to 1e-6."""


def solve_milp(
    program: MilpProgram,
    *,
    backend: str = "highs",
    time_limit_s: float | None = None,
    node_limit: int | None = None,
    relative_gap: float = 1e-4,
    absolute_gap: float = 0.0,
    threads: int = 1,
    seed: int = 0,
    stop: StoppingCriterion | None = None,
    in_process: bool = False,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> MilpResult:
    """Minimise a program.

    The result depends on the machine only where `limit` is ``time`` or ``stop``.

    Parameters
    ----------
    program
        What to minimise.
    backend
        One of `BACKENDS`.
    time_limit_s, node_limit
        Where to end without a proof; None for nowhere.
    relative_gap, absolute_gap
        The proof may end within either; the second in units of the objective.
    threads, seed
        Threads for the backend, and the seed of everything random in it.
    stop
        Polled every few hundredths of a second; the backend is killed and its best point returned, or the
        program's start where that is feasible and nothing better was told of.
    in_process
        Run the backend in this process: no start-up (0.3 s) for small programs, but a crash is ours as
        well, memory is not capped, and `stop` is asked only where the backend calls back.
    memory_bytes
        Address space of the child process.

    Raises
    ------
    InputError
        If the backend is unknown or a limit is out of range.
    BackendError
        If the backend is missing, crashes, runs out of memory, or its answer does not hold.
    """
    if backend not in BACKENDS:
        make_backend(backend)
    limits = Limits(
        relative_gap=relative_gap,
        absolute_gap=absolute_gap,
        time_limit_s=time_limit_s,
        node_limit=node_limit,
        threads=threads,
        seed=seed,
    )
    _check_limits(limits, memory_bytes)
    run = _Run(
        program=program,
        backend=backend,
        limits=limits,
        stop=Never() if stop is None else stop,
        memory_bytes=None if in_process else memory_bytes,
    )
    return run.result()


def _check_limits(limits: Limits, memory_bytes: int) -> None:
    if not (limits.relative_gap >= 0 and limits.absolute_gap >= 0):
        raise InputError(f"gaps are {limits.relative_gap} and {limits.absolute_gap}; they must be 0 or more")
    for name, value in (
        ("time_limit_s", limits.time_limit_s),
        ("node_limit", limits.node_limit),
        ("threads", limits.threads),
        ("memory_bytes", memory_bytes),
    ):
        if value is not None and not value > 0:
            raise InputError(f"{name} is {value}; it must be above 0")


@dataclass(slots=True, kw_only=True, eq=False)
class _Run:
    """One solve; also the watcher of its backend."""

    program: MilpProgram
    backend: str
    limits: Limits
    stop: StoppingCriterion
    memory_bytes: int | None
    scaling: Scaling = field(init=False)

    def __post_init__(self) -> None:
        self.scaling = make_scaling(self.program)

    def improved(self, value_V: FloatArray, bound: float) -> None:
        """Take no note: the last point told is in the outcome."""

    def stopped(self) -> bool:
        """Ask the caller."""
        return self.stop()

    def result(self) -> MilpResult:
        """Solve and check."""
        if self.stop():
            return self._at_start(float("-inf"), Limit.STOP)
        if self.program.num_variables == 0:
            return self._without_variables()
        scaled = self.scaling.apply(self.program)
        outcome = self._outcome(scaled)
        if outcome.status in (MilpStatus.INFEASIBLE, MilpStatus.UNBOUNDED):
            return self._impossible(scaled, outcome.status)
        bound = self._true_bound(outcome.bound)
        if outcome.value_V is None:
            return self._at_start(bound, outcome.limit)
        value_V = outcome.value_V * self.scaling.column_V
        return self._checked(value_V, bound, outcome.limit, rows_hold=outcome.rows_hold)

    def _at_start(self, bound: float, limit: Limit) -> MilpResult:
        """Fall back on the program's start, if that is feasible, where no better point was told of."""
        start_V = self.program.start_V
        if start_V is not None:
            start_V = rounded(self.program, start_V)
            if worst_violation(self.program, start_V, self.scaling.column_V)[0] <= 1:
                return self._checked(start_V, bound, limit)
        return self._without_point(MilpStatus.STOPPED, bound=bound, limit=limit)

    def _without_variables(self) -> MilpResult:
        """Judge a program of constants, which several solvers refuse."""
        point_V = np.empty(0)
        if worst_violation(self.program, point_V, point_V)[0] > 1:
            return self._without_point(MilpStatus.INFEASIBLE, bound=float("inf"))
        return self._checked(point_V, self.program.offset, Limit.NONE)

    def _outcome(self, scaled: MilpProgram) -> Outcome:
        limits = replace(self.limits, absolute_gap=self.limits.absolute_gap * self.scaling.objective)
        if self.memory_bytes is not None:
            return solve_in_child(scaled, self.backend, limits, self, memory_bytes=self.memory_bytes)
        try:
            return make_backend(self.backend).solve(scaled, limits, self)
        except ImportError as exc:
            raise BackendError(f"{self.backend} is not installed: {exc}") from exc

    def _impossible(self, scaled: MilpProgram, status: MilpStatus) -> MilpResult:
        """Say that the program is infeasible or unbounded, if the solver is able to tell."""
        if not self.scaling.resolves:
            raise BackendError(
                f"{self.backend} calls the program {status}, but a row's coefficients differ by over ten "
                "orders of magnitude, which it cannot judge; rescale the model"
            )
        if status is MilpStatus.UNBOUNDED:
            # Solvers' presolve cannot tell unbounded from infeasible; without an objective they can.
            flat = replace(scaled, objective_V=np.zeros(scaled.num_variables))
            outcome = self._outcome(flat)
            if outcome.value_V is not None:
                return self._without_point(MilpStatus.UNBOUNDED)
            if outcome.status is not MilpStatus.INFEASIBLE:
                return self._without_point(MilpStatus.STOPPED, limit=outcome.limit)
            status = MilpStatus.INFEASIBLE
        bound = float("inf") if status is MilpStatus.INFEASIBLE else float("-inf")
        return self._without_point(status, bound=bound)

    def _without_point(
        self, status: MilpStatus, *, bound: float = float("-inf"), limit: Limit = Limit.NONE
    ) -> MilpResult:
        return MilpResult(
            status=status,
            objective=float("inf"),
            bound=bound,
            value_V=None,
            limit=limit,
            backend=self.backend,
        )

    def _true_bound(self, bound: float) -> float:
        """Return a scaled bound in true units, a step back for the solver's tolerances."""
        if not (self.scaling.resolves and np.isfinite(bound)):
            return float("-inf")
        return self.scaling.true_bound(bound - BOUND_SLACK * abs(bound), self.program)

    def _checked(
        self, value_V: FloatArray, bound: float, limit: Limit, *, rows_hold: bool = True
    ) -> MilpResult:
        """Round, check in true units, and repair the continuous part where rounding broke it."""
        value_V = rounded(self.program, value_V)
        violation, where = worst_violation(self.program, value_V, self.scaling.column_V)
        if violation > 1 or not rows_hold:
            value_V = self._repaired(value_V, where)
        objective = self.program.objective_at(value_V)
        if bound > objective + self._noise(objective, bound):
            raise BackendError(f"{self.backend} bounds the objective by {bound}, above its own {objective}")
        bound = min(bound, objective)
        value_V.setflags(write=False)
        return MilpResult(
            status=MilpStatus.OPTIMAL if self._within_gap(objective, bound) else MilpStatus.FEASIBLE,
            objective=objective,
            bound=bound,
            value_V=value_V,
            limit=limit,
            backend=self.backend,
        )

    def _within_gap(self, objective: float, bound: float) -> bool:
        if bound == float("-inf"):
            return False
        # What was taken off the bound as a precaution is not the solver's gap.
        allowed = max(self.limits.absolute_gap, self.limits.relative_gap * abs(objective))
        return objective - bound <= allowed + self._noise(objective, bound)

    def _noise(self, objective: float, bound: float) -> float:
        """Return what tolerances may put between two figures that mean the same."""
        known = (objective, bound) if np.isfinite(bound) else (objective,)
        moving = max(abs(value - self.program.offset) for value in known)
        return 2 * BOUND_SLACK * moving + 1e-6 / self.scaling.objective

    def _repaired(self, value_V: FloatArray, where: str) -> FloatArray:
        """Keep the integers and choose the continuous variables anew."""
        failure = BackendError(f"{self.backend} gave a point that does not hold: {where}")
        if self.program.integer_V.all():
            raise failure
        rest = fixed_integers(self.program, value_V)
        scaling = make_scaling(rest)
        outcome = make_backend("highs").solve(scaling.apply(rest), Limits(), self)
        if outcome.value_V is None or outcome.status is not MilpStatus.OPTIMAL:
            raise failure
        repaired_V = rounded(self.program, outcome.value_V * scaling.column_V)
        if worst_violation(self.program, repaired_V, scaling.column_V)[0] > 1:
            raise failure
        return repaired_V
