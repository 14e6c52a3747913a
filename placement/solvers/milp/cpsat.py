"""OR-Tools' CP-SAT, which knows whole numbers only: it gets a relaxation in integers.

A continuous variable becomes a whole number of steps, and coefficients are multiplied and rounded. Every row
is then widened by the most that rounding can change its left-hand side: the integer program is a relaxation,
so its bound, less the most that rounding can change the objective, is a bound of the true program. Its
point keeps the integers; `solve_milp` chooses the continuous variables anew where widening shows.

Shape letters: V variables, R rows, N nonzeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from placement.errors import BackendError
from placement.solvers.milp.backend import Limits, Outcome, Watcher
from placement.solvers.milp.formulation import FloatArray, IntArray, MilpProgram
from placement.solvers.milp.result import Limit, MilpStatus

__all__ = ["CpSatBackend", "IntegerRelaxation", "integer_relaxation"]

STEPS = 2**28
"""Steps that the range of a continuous variable is cut into, at most."""

ROW_SIZE = 2.0**56
"""Size that the sum of a row's terms is brought to: the larger, the smaller the rounding; CP-SAT adds up in
64 bits and wants room."""

LARGEST_BOUND = 2.0**44


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IntegerRelaxation:
    """A program in whole numbers that admits every point of the true one.

    Parameters
    ----------
    lower_V, upper_V
        Bounds of the whole numbers, ``[variables]``.
    origin_V, step_V
        True value = origin + step x whole number, up to half a step for continuous variables.
    coefficient_N, row_lower_R, row_upper_R
        The rows, in the true program's order; infinite limits stay infinite.
    objective_V, objective_scale, objective_constant, objective_error
        True objective = (whole objective / scale) + constant, up to the error.
    """

    lower_V: IntArray
    upper_V: IntArray
    origin_V: FloatArray
    step_V: FloatArray
    coefficient_N: IntArray
    row_lower_R: FloatArray
    row_upper_R: FloatArray
    objective_V: IntArray
    objective_scale: float
    objective_constant: float
    objective_error: float

    def true_values(self, whole_V: FloatArray) -> FloatArray:
        """Return the point of the true program that a point of this one stands for."""
        return self.origin_V + self.step_V * whole_V

    def true_bound(self, bound: float) -> float:
        """Return a bound of the true program from one of this."""
        return bound / self.objective_scale + self.objective_constant - self.objective_error


def integer_relaxation(program: MilpProgram) -> IntegerRelaxation:
    """Widen and round a program.

    Raises
    ------
    BackendError
        If a variable has no finite bounds, or too wide ones.
    """
    lower_V, upper_V = _bounds(program)
    whole_V = program.integer_V
    width_V = upper_V - lower_V
    # Steps that are powers of two leave whole coefficients whole in the end: nothing is rounded.
    step_V = np.exp2(np.ceil(np.log2(np.where(width_V > 0, width_V, 1.0) / STEPS)))
    step_V = np.where(whole_V | (width_V == 0), 1.0, step_V)
    origin_V = np.where(whole_V, 0.0, lower_V)
    least_V = np.where(whole_V, lower_V, 0.0)
    most_V = np.where(whole_V, upper_V, np.ceil(width_V / step_V))
    # A true value lies within half a step of a whole number of steps; where the range is one point, on it.
    blur_V = np.where(whole_V | (width_V == 0), 0.0, 0.5)
    size_V = np.maximum(np.abs(least_V), np.abs(most_V))

    column_N, row_N = program.column_N, program.row_of_N
    true_N = program.coefficient_N * step_V[column_N]
    scale_R = _scales(true_N, np.abs(true_N) * (size_V + 1)[column_N], row_N, program.num_rows)
    scaled_N = true_N * scale_R[row_N]
    rounded_N = np.rint(scaled_N)
    error_N = np.abs(scaled_N - rounded_N) * (size_V + 1)[column_N] + np.abs(scaled_N) * blur_V[column_N]
    error_R = np.bincount(row_N, error_N, minlength=program.num_rows).astype(np.float64)
    shift_R = np.bincount(row_N, program.coefficient_N * origin_V[column_N], minlength=program.num_rows)
    low_R, up_R = ((limit - shift_R) * scale_R for limit in (program.row_lower_R, program.row_upper_R))
    # Limits are products of floating-point numbers: a further step covers their own rounding.
    low_R, up_R = _off(low_R, error_R, -1), _off(up_R, error_R, 1)

    true_V = program.objective_V * step_V
    scale = float(_scales(true_V, np.abs(true_V) * (size_V + 1), np.zeros(true_V.size, np.int64), 1)[0])
    objective_V = np.rint(true_V * scale)
    wrong_V = np.abs(true_V * scale - objective_V) * (size_V + 1) + np.abs(true_V * scale) * blur_V
    return IntegerRelaxation(
        lower_V=least_V.astype(np.int64),
        upper_V=most_V.astype(np.int64),
        origin_V=origin_V,
        step_V=step_V,
        coefficient_N=rounded_N.astype(np.int64),
        row_lower_R=low_R,
        row_upper_R=up_R,
        objective_V=objective_V.astype(np.int64),
        objective_scale=scale,
        objective_constant=program.offset + float(program.objective_V @ origin_V),
        objective_error=float(wrong_V.sum()) / scale,
    )


def _bounds(program: MilpProgram) -> tuple[FloatArray, FloatArray]:
    lower_V = np.where(program.integer_V, np.ceil(program.lower_V), program.lower_V)
    upper_V = np.where(program.integer_V, np.floor(program.upper_V), program.upper_V)
    wide_V = ~(np.maximum(np.abs(lower_V), np.abs(upper_V)) <= LARGEST_BOUND)
    if wide_V.any():
        variable = int(wide_V.argmax())
        raise BackendError(
            f"cp-sat needs bounds within {LARGEST_BOUND:.3g} of zero; those of variable {variable} are "
            f"{lower_V[variable]} and {upper_V[variable]}"
        )
    return lower_V, upper_V


def _scales(true_N: FloatArray, size_N: FloatArray, group_N: IntArray, groups: int) -> FloatArray:
    """Factor of each row: 1 where all coefficients are whole, else a power of two that makes it large."""
    total = np.bincount(group_N, size_N, minlength=groups)
    whole = np.bincount(group_N, true_N != np.rint(true_N), minlength=groups) == 0
    keep = (whole & (total <= ROW_SIZE)) | (total == 0)
    return np.asarray(np.exp2(np.floor(np.log2(ROW_SIZE / np.where(keep, ROW_SIZE, total)))))


def _off(limit_R: FloatArray, error_R: FloatArray, sign: int) -> FloatArray:
    """Move limits outwards to whole numbers; by nothing where rows are whole and nothing was rounded."""
    slack_R = np.where(error_R > 0, error_R + 1e-12 * np.abs(np.where(np.isfinite(limit_R), limit_R, 0)), 0.0)
    moved_R = limit_R + sign * (slack_R + 1e-9)
    return np.floor(moved_R) if sign > 0 else np.ceil(moved_R)


class CpSatBackend:
    """OR-Tools CP-SAT, https://developers.google.com/optimization/cp."""

    name = "cp-sat"

    def solve(self, program: MilpProgram, limits: Limits, watcher: Watcher) -> Outcome:
        """Solve the integer relaxation; `Limits.node_limit` counts conflicts."""
        from ortools.sat.python import cp_model

        relaxed = integer_relaxation(program)
        if (relaxed.lower_V > relaxed.upper_V).any():
            return Outcome(status=MilpStatus.INFEASIBLE)
        model, variables = _model(program, relaxed)
        solver = cp_model.CpSolver()
        _set_parameters(solver.parameters, limits, relaxed)

        class Teller(cp_model.CpSolverSolutionCallback):
            def on_solution_callback(self) -> None:
                if watcher.stopped():
                    self.stop_search()
                whole_V = np.array([self.value(variable) for variable in variables], dtype=np.float64)
                watcher.improved(relaxed.true_values(whole_V), relaxed.true_bound(self.best_objective_bound))

        status = solver.solve(model, Teller())
        whole = bool(program.integer_V.all())
        return _outcome(solver, status, variables, relaxed, limits, whole=whole)


def _model(program: MilpProgram, relaxed: IntegerRelaxation) -> tuple[Any, list[Any]]:
    from ortools.sat.python import cp_model

    model, sum_of = cp_model.CpModel(), cp_model.LinearExpr.weighted_sum
    bounds = zip(relaxed.lower_V.tolist(), relaxed.upper_V.tolist(), strict=True)
    variables = [model.new_int_var(low, up, "") for low, up in bounds]
    starts, columns = program.row_start_P.tolist(), program.column_N.tolist()
    coefficients = relaxed.coefficient_N.tolist()
    for row in range(program.num_rows):
        part = slice(starts[row], starts[row + 1])
        terms = sum_of([variables[i] for i in columns[part]], coefficients[part])
        low, up = (
            int(limit) if abs(limit) < 2.0**62 else int(np.sign(limit)) * 2**62
            for limit in (relaxed.row_lower_R[row], relaxed.row_upper_R[row])
        )
        model.add_linear_constraint(terms, low, up)
    model.minimize(sum_of(variables, relaxed.objective_V.tolist()))
    if program.start_V is not None:
        hint_V = np.rint((program.start_V - relaxed.origin_V) / relaxed.step_V)
        for variable, value in zip(variables, hint_V.astype(np.int64).tolist(), strict=True):
            model.add_hint(variable, value)
    return model, variables


def _set_parameters(parameters: Any, limits: Limits, relaxed: IntegerRelaxation) -> None:
    parameters.num_workers = limits.threads
    parameters.random_seed = limits.seed % (2**31)
    parameters.relative_gap_limit = limits.relative_gap
    # Both the bound and the point's objective are off by the error at most.
    absolute_gap = max(0.0, limits.absolute_gap - 2 * relaxed.objective_error)
    parameters.absolute_gap_limit = absolute_gap * relaxed.objective_scale
    if limits.time_limit_s is not None:
        parameters.max_time_in_seconds = limits.time_limit_s
    if limits.node_limit is not None:
        parameters.max_number_of_conflicts = limits.node_limit


def _outcome(
    solver: Any,
    status: Any,
    variables: list[Any],
    relaxed: IntegerRelaxation,
    limits: Limits,
    *,
    whole: bool,
) -> Outcome:
    from ortools.sat.python import cp_model

    if status == cp_model.INFEASIBLE:
        return Outcome(status=MilpStatus.INFEASIBLE)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE, cp_model.UNKNOWN):
        raise BackendError(f"cp-sat gave up: {solver.status_name(status)} {solver.solution_info()}".strip())
    ended = Limit.TIME if limits.time_limit_s is not None else Limit.NODES
    if status == cp_model.UNKNOWN:
        return Outcome(status=MilpStatus.STOPPED, limit=ended)
    whole_V = np.array([solver.value(variable) for variable in variables], dtype=np.float64)
    optimal = status == cp_model.OPTIMAL
    return Outcome(
        status=MilpStatus.OPTIMAL if optimal else MilpStatus.FEASIBLE,
        value_V=relaxed.true_values(whole_V),
        bound=relaxed.true_bound(solver.best_objective_bound),
        limit=Limit.NONE if optimal else ended,
        rows_hold=whole,
    )
