"""HiGHS through its own Python binding: the default backend.

Shape letters: V variables.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from placement.errors import BackendError
from placement.solvers.milp.backend import Limits, Outcome, Watcher
from placement.solvers.milp.formulation import MilpProgram
from placement.solvers.milp.result import Limit, MilpStatus

__all__ = ["HighsBackend", "highs_options", "run_highs"]


class HighsBackend:
    """HiGHS, https://highs.dev."""

    name = "highs"

    def solve(self, program: MilpProgram, limits: Limits, watcher: Watcher) -> Outcome:
        """Solve a program; better points and interrupts go through HiGHS's callbacks."""
        import highspy

        highs = highspy.Highs()
        for option, value in highs_options(limits).items():
            _check(highs.setOptionValue(option, value), f"option {option}={value}")
        _check(highs.passModel(_model(program)), "the program")
        return run_highs(highs, program, watcher)


def run_highs(highs: Any, program: MilpProgram, watcher: Watcher) -> Outcome:
    """Run a loaded ``highspy.Highs`` from the program's start and read its outcome."""
    import highspy

    if program.start_V is not None:
        start = highspy.HighsSolution()
        start.col_value = program.start_V
        _check(highs.setSolution(start), "the start")
    _watch(highs, watcher)
    _check(highs.run(), "the solve")
    return _outcome(highs, program)


def highs_options(limits: Limits) -> dict[str, Any]:
    """Return HiGHS's own options for some limits."""
    options: dict[str, Any] = {
        "output_flag": False,
        "threads": limits.threads,
        "parallel": "on" if limits.threads > 1 else "off",
        "random_seed": limits.seed % (2**31),
        "mip_rel_gap": limits.relative_gap,
        "mip_abs_gap": limits.absolute_gap,
        # The least that HiGHS accepts; smaller coefficients it would drop without a word.
        "small_matrix_value": 1e-12,
    }
    if limits.time_limit_s is not None:
        options["time_limit"] = limits.time_limit_s
    if limits.node_limit is not None:
        options["mip_max_nodes"] = limits.node_limit
    return options


def _check(status: Any, what: str) -> None:
    import highspy

    if status == highspy.HighsStatus.kError:
        raise BackendError(f"highs refused {what}")


def _model(program: MilpProgram) -> Any:
    import highspy

    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = program.num_variables, program.num_rows
    model.col_cost_, model.offset_ = program.objective_V, program.offset
    model.col_lower_, model.col_upper_ = program.lower_V, program.upper_V
    model.row_lower_, model.row_upper_ = program.row_lower_R, program.row_upper_R
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.num_col_, model.a_matrix_.num_row_ = program.num_variables, program.num_rows
    model.a_matrix_.start_ = program.row_start_P.astype(np.int32)
    model.a_matrix_.index_ = program.column_N.astype(np.int32)
    model.a_matrix_.value_ = program.coefficient_N
    if program.integer_V.any():
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        model.integrality_ = [kinds[whole] for whole in program.integer_V.tolist()]
    return model


def _watch(highs: Any, watcher: Watcher) -> None:
    """Pass better points on, and ask the watcher for leave to go on wherever HiGHS asks."""
    import highspy

    kinds = highspy.cb.HighsCallbackType
    interrupts = (
        kinds.kCallbackMipInterrupt,
        kinds.kCallbackSimplexInterrupt,
        kinds.kCallbackIpmInterrupt,
    )

    def tell(kind: Any, _message: str, out: Any, answer: Any, _data: Any) -> None:
        if kind == kinds.kCallbackMipImprovingSolution:
            watcher.improved(np.array(out.mip_solution), float(out.mip_dual_bound))
        elif watcher.stopped():
            answer.user_interrupt = True

    _check(highs.setCallback(tell, None), "the callback")
    for kind in (kinds.kCallbackMipImprovingSolution, *interrupts):
        _check(highs.startCallback(kind), "the callback")


def _outcome(highs: Any, program: MilpProgram) -> Outcome:
    import highspy

    status, info = highs.getModelStatus(), highs.getInfo()
    kinds = highspy.HighsModelStatus
    found = info.primal_solution_status == int(highspy.SolutionStatus.kSolutionStatusFeasible)
    value_V = np.array(highs.getSolution().col_value) if found else None
    bound = float(info.mip_dual_bound) if program.integer_V.any() else float("-inf")
    if status in (kinds.kOptimal, kinds.kModelEmpty):
        if not program.integer_V.any():
            bound = float(info.objective_function_value)
        value_V = np.array(highs.getSolution().col_value)
        return Outcome(status=MilpStatus.OPTIMAL, value_V=value_V, bound=bound)
    if status == kinds.kInfeasible:
        return Outcome(status=MilpStatus.INFEASIBLE)
    if status in (kinds.kUnbounded, kinds.kUnboundedOrInfeasible):
        return Outcome(status=MilpStatus.UNBOUNDED)
    limits = {
        kinds.kTimeLimit: Limit.TIME,
        kinds.kSolutionLimit: Limit.NODES,
        kinds.kIterationLimit: Limit.NODES,
        kinds.kInterrupt: Limit.STOP,
        kinds.kHighsInterrupt: Limit.STOP,
    }
    if status == kinds.kMemoryLimit:
        raise BackendError("highs ran out of memory")
    if status not in limits:
        raise BackendError(f"highs gave up: {highs.modelStatusToString(status)}")
    ended = MilpStatus.STOPPED if value_V is None else MilpStatus.FEASIBLE
    return Outcome(status=ended, value_V=value_V, bound=bound, limit=limits[status])
