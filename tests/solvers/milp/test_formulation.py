"""Programs as arrays: what the builder makes of variables and rows, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from placement.errors import InputError
from placement.solvers.milp import MilpBuilder, MilpProgram


def test_rows_are_compressed_and_repeated_columns_add_up() -> None:
    """2 x0 + x1 with x0 written twice, and a term that cancels out."""
    builder = MilpBuilder()
    x = builder.add_variables(3, upper=[1, 2, 3], integer=True, objective=[1.0, 0.0, -1.0])
    builder.add_rows((x[[0, 1, 0]], 1.0), lower=1)
    builder.add_rows(
        (np.stack([x[:2], x[1:]]), [[1.0, 2.0], [3.0, 0.0]]), (x[[[2], [1]]], [[4.0], [-3.0]]), upper=5
    )
    program = builder.build()
    assert program.row_start_P.tolist() == [0, 2, 5, 5]
    assert program.column_N.tolist() == [0, 1, 0, 1, 2]
    assert program.coefficient_N.tolist() == [2, 1, 1, 2, 4]
    assert program.row_lower_R.tolist() == [1, -np.inf, -np.inf]
    assert program.activity_R(np.array([1.0, 2.0, 3.0])).tolist() == [4, 17, 0]
    assert program.objective_at(np.array([1.0, 2.0, 3.0])) == -2


def test_limits_and_coefficients_broadcast() -> None:
    """Each of three experts sits in one of two clusters."""
    builder = MilpBuilder(offset=2.5)
    x_CE = builder.add_variables((2, 3), upper=1, integer=True)
    builder.add_rows((x_CE.T, 1.0), lower=1, upper=1)
    builder.add_rows((x_CE, [5.0, 6.0, 7.0]), upper=[10.0, 20.0])
    program = builder.build(start_V=np.arange(6))
    assert x_CE.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (program.num_variables, program.num_rows, program.num_nonzeros) == (6, 5, 12)
    assert program.row_upper_R.tolist() == [1, 1, 1, 10, 20]
    assert program.coefficient_N[6:].tolist() == [5, 6, 7, 5, 6, 7]
    assert program.objective_at(np.zeros(6)) == 2.5


def test_arrays_of_a_program_are_read_only() -> None:
    """A program may be shared between backends."""
    builder = MilpBuilder()
    builder.add_variables(2)
    with pytest.raises(ValueError, match="read-only"):
        builder.build().lower_V[0] = 1.0


def arrays(**changes: object) -> dict[str, object]:
    """Return the fields of a program of two variables and one row."""
    fields: dict[str, object] = {
        "objective_V": [1.0, 1.0],
        "lower_V": [0.0, 0.0],
        "upper_V": [1.0, 1.0],
        "integer_V": [True, False],
        "row_start_P": [0, 2],
        "column_N": [0, 1],
        "coefficient_N": [1.0, 1.0],
        "row_lower_R": [0.0],
        "row_upper_R": [1.0],
    }
    return {**fields, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"upper_V": [1.0]}, "over variables have shapes"),
        ({"row_upper_R": [1.0, 2.0]}, "over rows have shapes"),
        ({"column_N": [0]}, "over nonzeros have shapes"),
        ({"row_start_P": [0, 1]}, "rise from 0 to 2"),
        ({"column_N": [0, 2]}, r"outside 0\.\.1"),
        ({"coefficient_N": [1.0, np.nan]}, "coefficient_N holds"),
        ({"objective_V": [np.inf, 1.0]}, "objective_V holds"),
        ({"lower_V": [0.0, 2.0]}, r"variable 1 must lie between 2\.0 and 1\.0"),
        ({"row_lower_R": [np.inf], "row_upper_R": [np.inf]}, "row 0 must lie"),
        ({"start_V": [0.0]}, "the start has shape"),
        ({"offset": np.nan}, "offset is nan"),
    ],
)
def test_inconsistent_programs_are_refused(changes: dict[str, object], message: str) -> None:
    """Shapes, indices, limits and values are checked before any solver sees them."""
    MilpProgram(**arrays())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        MilpProgram(**arrays(**changes))  # type: ignore[arg-type]


def test_terms_of_different_rows_do_not_mix() -> None:
    """The leading axes of all terms are alike."""
    builder = MilpBuilder()
    x = builder.add_variables((2, 3))
    with pytest.raises(InputError, match="terms of rows have shapes"):
        builder.add_rows((x, 1.0), (x.T, 1.0))
