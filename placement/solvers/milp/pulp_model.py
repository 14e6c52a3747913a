"""A program as PuLP sees it, and what PuLP says after solving it.

PuLP's `status` is Optimal at a time limit; only `sol_status` tells.

Shape letters: V variables.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from placement.errors import BackendError
from placement.solvers.milp.backend import Outcome
from placement.solvers.milp.formulation import FloatArray, MilpProgram
from placement.solvers.milp.result import Limit, MilpStatus

__all__ = ["pulp_outcome", "pulp_problem"]


def pulp_problem(program: MilpProgram) -> tuple[Any, list[Any]]:
    """Return the program as a ``pulp.LpProblem``, and its variables in order."""
    import pulp

    problem = pulp.LpProblem("placement", pulp.LpMinimize)
    variables = [
        problem.add_variable(
            # PuLP sorts by name: with leading zeros the order stays ours.
            f"x{i:09d}",
            None if lower == -np.inf else lower,
            None if upper == np.inf else upper,
            pulp.LpInteger if whole else pulp.LpContinuous,
        )
        for i, (lower, upper, whole) in enumerate(
            zip(program.lower_V.tolist(), program.upper_V.tolist(), program.integer_V.tolist(), strict=True)
        )
    ]
    # PuLP knows the variables of its objective and rows only: the objective names all, at 0 where need be.
    objective = zip(variables, program.objective_V.tolist(), strict=True)
    problem.setObjective(pulp.LpAffineExpression(list(objective), constant=program.offset))
    _add_rows(problem, variables, program)
    if program.start_V is not None:
        for variable, value in zip(variables, program.start_V.tolist(), strict=True):
            variable.setInitialValue(value, check=False)
    return problem, variables


def _add_rows(problem: Any, variables: list[Any], program: MilpProgram) -> None:
    import pulp

    starts, columns = program.row_start_P.tolist(), program.column_N.tolist()
    coefficients = program.coefficient_N.tolist()
    limits = zip(program.row_lower_R.tolist(), program.row_upper_R.tolist(), strict=True)
    for row, (lower, upper) in enumerate(limits):
        part = slice(starts[row], starts[row + 1])
        terms = [(variables[i], value) for i, value in zip(columns[part], coefficients[part], strict=True)]
        senses = [(pulp.LpConstraintEQ, lower)] if lower == upper else []
        if not senses:
            # PuLP's rows have one limit.
            senses = [(pulp.LpConstraintGE, lower), (pulp.LpConstraintLE, upper)]
        for sense, limit in senses:
            if np.isfinite(limit):
                expression = pulp.LpAffineExpression(terms)
                problem.addConstraint(pulp.LpConstraint(expression, sense, rhs=limit))


def pulp_outcome(name: str, problem: Any, variables: list[Any], *, bound: float, limit: Limit) -> Outcome:
    """Read the outcome off a solved problem.

    Parameters
    ----------
    bound
        The solver's bound, which PuLP does not know.
    limit
        What ended the solve where it is not optimal.
    """
    import pulp

    said = problem.sol_status
    # "Integer infeasible" of CBC shows in `status` alone.
    if said == pulp.LpSolutionInfeasible or problem.status == pulp.LpStatusInfeasible:
        return Outcome(status=MilpStatus.INFEASIBLE)
    if said == pulp.LpSolutionUnbounded:
        return Outcome(status=MilpStatus.UNBOUNDED)
    if said == pulp.LpSolutionNoSolutionFound:
        return Outcome(status=MilpStatus.STOPPED, bound=bound, limit=limit)
    optimal = said == pulp.LpSolutionOptimal
    return Outcome(
        status=MilpStatus.OPTIMAL if optimal else MilpStatus.FEASIBLE,
        value_V=_values(name, variables),
        bound=bound,
        limit=Limit.NONE if optimal else limit,
    )


def _values(name: str, variables: list[Any]) -> FloatArray:
    values = [variable.varValue for variable in variables]
    if any(value is None for value in values):
        raise BackendError(f"{name} claims a point but leaves variable {values.index(None)} open")
    return np.array(values, dtype=np.float64)
