"""OR-Tools' MathOpt, one interface to solvers inside the OR-Tools package: here HiGHS and SCIP.

It tells of no point before the end, so a solve that is stopped (not one that runs into its time limit)
leaves nothing but the start.

Shape letters: V variables.
"""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np

from placement.errors import BackendError
from placement.solvers.milp.backend import Limits, Outcome, Watcher
from placement.solvers.milp.formulation import FloatArray, MilpProgram
from placement.solvers.milp.result import Limit, MilpStatus

__all__ = ["MathOptBackend"]


class MathOptBackend:
    """MathOpt, https://developers.google.com/optimization/math_opt, with one of its solvers."""

    def __init__(self, solver: str) -> None:
        self._solver = solver

    @property
    def name(self) -> str:
        """Name in options and results."""
        return f"mathopt-{self._solver}"

    def solve(self, program: MilpProgram, limits: Limits, watcher: Watcher) -> Outcome:
        """Solve a program."""
        from ortools.math_opt.python import mathopt

        kind = {"highs": mathopt.SolverType.HIGHS, "scip": mathopt.SolverType.GSCIP}[self._solver]
        model = mathopt.Model.from_model_proto(_proto(program))
        variables = list(model.variables())
        hints = mathopt.ModelSolveParameters()
        if program.start_V is not None:
            start = dict(zip(variables, program.start_V.tolist(), strict=True))
            hints.solution_hints.append(mathopt.SolutionHint(variable_values=start))
        try:
            result = mathopt.solve(model, kind, params=self._parameters(limits), model_params=hints)
        except (RuntimeError, ValueError, AttributeError) as exc:
            # OR-Tools 9.15 raises an AttributeError where it fails to translate a solver's own error.
            raise BackendError(f"{self.name} failed: {exc}") from exc
        return _outcome(self.name, result, variables)

    def _parameters(self, limits: Limits) -> Any:
        from ortools.math_opt.python import mathopt

        parameters = mathopt.SolveParameters(
            relative_gap_tolerance=limits.relative_gap,
            absolute_gap_tolerance=limits.absolute_gap,
            random_seed=limits.seed % (2**31),
            node_limit=limits.node_limit,
        )
        if limits.time_limit_s is not None:
            parameters.time_limit = datetime.timedelta(seconds=limits.time_limit_s)
        if self._solver == "highs":
            # MathOpt's HiGHS fails where `threads` is set; its own option of the same name works.
            parameters.highs.int_options["threads"] = limits.threads
        else:
            parameters.threads = limits.threads
        return parameters


def _proto(program: MilpProgram) -> Any:
    from ortools.math_opt import model_pb2

    proto = model_pb2.ModelProto()
    proto.variables.ids.extend(range(program.num_variables))
    proto.variables.lower_bounds.extend(program.lower_V.tolist())
    proto.variables.upper_bounds.extend(program.upper_V.tolist())
    proto.variables.integers.extend(program.integer_V.tolist())
    priced = np.nonzero(program.objective_V)[0]
    proto.objective.offset = program.offset
    proto.objective.linear_coefficients.ids.extend(priced.tolist())
    proto.objective.linear_coefficients.values.extend(program.objective_V[priced].tolist())
    proto.linear_constraints.ids.extend(range(program.num_rows))
    proto.linear_constraints.lower_bounds.extend(program.row_lower_R.tolist())
    proto.linear_constraints.upper_bounds.extend(program.row_upper_R.tolist())
    proto.linear_constraint_matrix.row_ids.extend(program.row_of_N.tolist())
    proto.linear_constraint_matrix.column_ids.extend(program.column_N.tolist())
    proto.linear_constraint_matrix.coefficients.extend(program.coefficient_N.tolist())
    return proto


def _outcome(name: str, result: Any, variables: list[Any]) -> Outcome:
    from ortools.math_opt.python import mathopt

    termination, reasons = result.termination, mathopt.TerminationReason
    value_V = _values(result, variables)
    if termination.reason is reasons.INFEASIBLE:
        return Outcome(status=MilpStatus.INFEASIBLE)
    if termination.reason in (reasons.UNBOUNDED, reasons.INFEASIBLE_OR_UNBOUNDED):
        return Outcome(status=MilpStatus.UNBOUNDED)
    if termination.reason is reasons.OPTIMAL:
        # A bare Termination() says optimal, with bounds of 0: without a point nothing is proved.
        if value_V is None:
            raise BackendError(f"{name} claims an optimum but shows no point")
        bound = float(termination.objective_bounds.dual_bound)
        return Outcome(status=MilpStatus.OPTIMAL, value_V=value_V, bound=bound)
    if termination.reason not in (reasons.FEASIBLE, reasons.NO_SOLUTION_FOUND):
        raise BackendError(f"{name} gave up: {termination.reason.name} {termination.detail}".strip())
    by_time = termination.limit is mathopt.Limit.TIME
    return Outcome(
        status=MilpStatus.STOPPED if value_V is None else MilpStatus.FEASIBLE,
        value_V=value_V,
        bound=float(termination.objective_bounds.dual_bound),
        limit=Limit.TIME if by_time else Limit.NODES,
    )


def _values(result: Any, variables: list[Any]) -> FloatArray | None:
    if not result.has_primal_feasible_solution():
        return None
    value = result.variable_values()
    return np.array([value[variable] for variable in variables], dtype=np.float64)
