"""Powers of two that bring a program's coefficients near one, without rounding any of them.

Rows and continuous columns are divided by the geometric mean of their smallest and largest coefficient, in
turn, as in Fourer (1982); integer columns keep their unit. Solvers' tolerances are absolute, so
``1e-12 x >= 1e-12`` as it stands is satisfied by ``x = 0``.

Shape letters: V variables, R rows, N nonzeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from placement.solvers.milp.formulation import FloatArray, IntArray, MilpProgram

__all__ = ["Scaling", "make_scaling"]

PASSES = 6

OBJECTIVE_SIZE = 2.0**10
"""Size that the largest objective coefficient is brought to."""

WIDEST_ROW = 1e10
"""Largest quotient of two coefficients of a scaled row that tolerances of 1e-7 or so still resolve."""

EXPONENT = 500
"""Largest power of two that is used: far from overflow, whatever it is multiplied with."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scaling:
    """Units of a scaled program.

    Parameters
    ----------
    row_R
        Factor of each row, ``[rows]``.
    column_V
        Unit of each variable, ``[variables]``: the scaled value times this is the true one. 1 for integers.
    objective
        Factor of the objective.
    resolves
        False where some row spans more orders of magnitude than a solver resolves even when scaled: its
        solutions can be checked, its claims about what is impossible cannot.
    """

    row_R: FloatArray
    column_V: FloatArray
    objective: float
    resolves: bool

    def apply(self, program: MilpProgram) -> MilpProgram:
        """Return the program in scaled units."""
        start_V = program.start_V
        return replace(
            program,
            objective_V=program.objective_V * self.column_V * self.objective,
            offset=0.0,
            lower_V=program.lower_V / self.column_V,
            upper_V=program.upper_V / self.column_V,
            coefficient_N=program.coefficient_N
            * self.row_R[program.row_of_N]
            * self.column_V[program.column_N],
            row_lower_R=program.row_lower_R * self.row_R,
            row_upper_R=program.row_upper_R * self.row_R,
            start_V=None if start_V is None else start_V / self.column_V,
        )

    def true_bound(self, bound: float, program: MilpProgram) -> float:
        """Return a bound of the scaled program in the units of the true one."""
        return bound / self.objective + program.offset


def make_scaling(program: MilpProgram) -> Scaling:
    """Choose the units of a program."""
    row_N, column_N = program.row_of_N, program.column_N
    size_N = np.log2(np.where(program.coefficient_N == 0, 1.0, np.abs(program.coefficient_N)))
    row_R = np.zeros(program.num_rows)
    column_V = np.zeros(program.num_variables)
    for _ in range(PASSES):
        row_R = -_middle(size_N + column_V[column_N], row_N, program.num_rows)
        column_V = np.where(
            program.integer_V, 0.0, -_middle(size_N + row_R[row_N], column_N, program.num_variables)
        )
    row_R, column_V = _power(row_R), _power(column_V)
    largest = np.abs(program.objective_V * column_V).max(initial=0.0)
    objective = float(_power(np.log2(OBJECTIVE_SIZE / largest))) if largest > 0 else 1.0
    scaled_N = size_N + np.log2(column_V)[column_N]
    return Scaling(
        row_R=row_R,
        column_V=column_V,
        objective=objective,
        resolves=bool((_spread(scaled_N, row_N, program.num_rows) <= np.log2(WIDEST_ROW)).all()),
    )


def _power(exponent: FloatArray | np.float64) -> FloatArray:
    return np.asarray(np.exp2(np.clip(np.rint(exponent), -EXPONENT, EXPONENT)))


def _extremes(size_N: FloatArray, group_N: IntArray, groups: int) -> tuple[FloatArray, FloatArray]:
    least, most = np.full(groups, np.inf), np.full(groups, -np.inf)
    np.minimum.at(least, group_N, size_N)
    np.maximum.at(most, group_N, size_N)
    empty = least == np.inf
    return np.where(empty, 0.0, least), np.where(empty, 0.0, most)


def _middle(size_N: FloatArray, group_N: IntArray, groups: int) -> FloatArray:
    least, most = _extremes(size_N, group_N, groups)
    return (least + most) / 2


def _spread(size_N: FloatArray, group_N: IntArray, groups: int) -> FloatArray:
    least, most = _extremes(size_N, group_N, groups)
    return most - least
