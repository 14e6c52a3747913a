"""Nothing that a foreign solver says is believed: points are rounded and checked in the program's own units.

Shape letters: V variables, R rows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placement.solvers.milp.formulation import FloatArray, MilpProgram

__all__ = ["ROW_TOLERANCE", "fixed_integers", "rounded", "worst_violation"]

ROW_TOLERANCE = 1e-6
"""Violation that is let pass, as a share of the largest term of the row."""


def rounded(program: MilpProgram, value_V: FloatArray) -> FloatArray:
    """Return a point with whole integer variables, inside the bounds of all variables."""
    lower_V = np.where(program.integer_V, np.ceil(program.lower_V), program.lower_V)
    upper_V = np.where(program.integer_V, np.floor(program.upper_V), program.upper_V)
    whole_V = np.where(program.integer_V, np.rint(value_V), value_V)
    # Adding zero turns -0.0 into 0.0.
    return np.asarray(np.minimum(np.maximum(whole_V, lower_V), upper_V) + 0.0)


def worst_violation(program: MilpProgram, value_V: FloatArray, unit_V: FloatArray) -> tuple[float, str]:
    """Return by how much a point violates the program, and a line that names where.

    Parameters
    ----------
    value_V
        A point inside the bounds of all variables, ``[variables]``.
    unit_V
        Size below which a continuous variable counts as zero when it is judged what is small,
        ``[variables]``.

    Returns
    -------
    float, str
        The largest violation of a row as a share of `ROW_TOLERANCE` times its largest term; the point is
        feasible at 1 or less.
    """
    if not np.isfinite(value_V).all():
        return np.inf, f"variable {int(np.argmin(np.isfinite(value_V)))} is not finite"
    outside_V = (value_V < program.lower_V) | (value_V > program.upper_V)
    if outside_V.any():
        variable = int(outside_V.argmax())
        return np.inf, f"no whole number lies between the bounds of variable {variable}"
    if program.num_rows == 0:
        return 0.0, ""
    activity_R = program.activity_R(value_V)
    below_R, above_R = program.row_lower_R - activity_R, activity_R - program.row_upper_R
    short_R = np.maximum(0.0, np.maximum(below_R, above_R))
    limit_R = np.where(below_R > above_R, program.row_lower_R, program.row_upper_R)
    largest_R = np.where(short_R > 0, np.abs(limit_R), 0.0)
    size_V = np.where(program.integer_V, np.abs(value_V), np.maximum(np.abs(value_V), unit_V))
    np.maximum.at(largest_R, program.row_of_N, np.abs(program.coefficient_N) * size_V[program.column_N])
    share_R = np.zeros(program.num_rows)
    violated = short_R > 0
    with np.errstate(divide="ignore"):
        share_R[violated] = short_R[violated] / (ROW_TOLERANCE * largest_R[violated])
    row = int(share_R.argmax())
    return float(share_R[row]), (
        f"row {row} is {activity_R[row]:.17g}, outside {program.row_lower_R[row]:.17g} to "
        f"{program.row_upper_R[row]:.17g}"
    )


def fixed_integers(program: MilpProgram, value_V: FloatArray) -> MilpProgram:
    """Return the linear program that is left when the integer variables take a point's values."""
    whole_V = program.integer_V
    return replace(
        program,
        lower_V=np.where(whole_V, value_V, program.lower_V),
        upper_V=np.where(whole_V, value_V, program.upper_V),
        integer_V=np.zeros_like(whole_V),
        start_V=None,
    )
