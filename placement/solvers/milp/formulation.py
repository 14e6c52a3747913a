"""A mixed-integer linear program as plain arrays, and a small builder that keeps model code short.

Every program is a minimisation::

    min  objective_V @ x + offset   subject to   row_lower_R <= A x <= row_upper_R,
                                                 lower_V <= x <= upper_V,   x[integer_V] integer

Shape letters: V variables, R rows, N nonzeros, P row starts (R + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError

__all__ = ["BoolArray", "FloatArray", "IntArray", "MilpBuilder", "MilpProgram"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

Terms = tuple[npt.ArrayLike, npt.ArrayLike]
"""Columns ``[..., terms]`` and their coefficients, which broadcast against them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MilpProgram:
    """A mixed-integer linear program; build it with `MilpBuilder`.

    Parameters
    ----------
    objective_V, offset
        What is minimised: coefficients ``[variables]`` and a constant.
    lower_V, upper_V
        Bounds of the variables, ``[variables]``; infinite where there is none.
    integer_V
        True where the variable must be whole, ``[variables]``.
    row_start_P, column_N, coefficient_N
        The rows in compressed form: row ``r`` holds the nonzeros ``row_start_P[r]:row_start_P[r + 1]``. A
        column occurs at most once in a row.
    row_lower_R, row_upper_R
        Limits of each row, ``[rows]``; infinite where there is none.
    start_V
        A point to start from, ``[variables]``; None where there is none. It need not be feasible.

    Raises
    ------
    InputError
        If the arrays do not fit together or hold values that no program may hold.
    """

    objective_V: FloatArray
    lower_V: FloatArray
    upper_V: FloatArray
    integer_V: BoolArray
    row_start_P: IntArray
    column_N: IntArray
    coefficient_N: FloatArray
    row_lower_R: FloatArray
    row_upper_R: FloatArray
    offset: float = 0.0
    start_V: FloatArray | None = None

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if value is not None:
                array = np.ascontiguousarray(value, dtype=kind).view()
                array.setflags(write=False)
                object.__setattr__(self, name, array)
        self._check_shapes()
        self._check_values()

    def _check_shapes(self) -> None:
        sizes = {
            "variables": (self.objective_V, self.lower_V, self.upper_V, self.integer_V),
            "rows": (self.row_lower_R, self.row_upper_R, self.row_start_P[1:]),
            "nonzeros": (self.column_N, self.coefficient_N),
        }
        for what, arrays in sizes.items():
            if len({array.shape for array in arrays}) > 1 or arrays[0].ndim != 1:
                raise InputError(f"arrays over {what} have shapes {[array.shape for array in arrays]}")
        starts = self.row_start_P
        ends = (int(starts[0]), int(starts[-1])) if starts.size else ()
        if ends != (0, self.num_nonzeros) or (np.diff(starts) < 0).any():
            raise InputError(f"row starts must rise from 0 to {self.num_nonzeros}")
        if self.start_V is not None and self.start_V.shape != self.objective_V.shape:
            raise InputError(f"the start has shape {self.start_V.shape}, not {self.objective_V.shape}")

    def _check_values(self) -> None:
        for name in ("objective_V", "coefficient_N", "start_V"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value).all():
                raise InputError(f"{name} holds a value that is not finite")
        if not np.isfinite(self.offset):
            raise InputError(f"the objective's offset is {self.offset}")
        if self.num_nonzeros and not 0 <= self.column_N.min() <= self.column_N.max() < self.num_variables:
            raise InputError(f"a row names a variable outside 0..{self.num_variables - 1}")
        _check_limits(self.lower_V, self.upper_V, what="variable")
        _check_limits(self.row_lower_R, self.row_upper_R, what="row")

    @property
    def num_variables(self) -> int:
        """Variables."""
        return int(self.objective_V.size)

    @property
    def num_rows(self) -> int:
        """Rows."""
        return int(self.row_lower_R.size)

    @property
    def num_nonzeros(self) -> int:
        """Nonzero coefficients of all rows."""
        return int(self.column_N.size)

    @property
    def row_of_N(self) -> IntArray:
        """Row of each nonzero, ``[nonzeros]``."""
        return np.repeat(np.arange(self.num_rows, dtype=np.int64), np.diff(self.row_start_P))

    def objective_at(self, value_V: FloatArray) -> float:
        """Return the objective of a point, ``[variables]``."""
        return float(self.objective_V @ value_V) + self.offset

    def activity_R(self, value_V: FloatArray) -> FloatArray:
        """Return the left-hand sides of all rows at a point, ``[rows]``."""
        return np.bincount(
            self.row_of_N, self.coefficient_N * value_V[self.column_N], minlength=self.num_rows
        ).astype(np.float64)


_KINDS: dict[str, type[Any]] = {
    "objective_V": np.float64,
    "lower_V": np.float64,
    "upper_V": np.float64,
    "integer_V": np.bool_,
    "row_start_P": np.int64,
    "column_N": np.int64,
    "coefficient_N": np.float64,
    "row_lower_R": np.float64,
    "row_upper_R": np.float64,
    "start_V": np.float64,
}
assert set(_KINDS) == {entry.name for entry in fields(MilpProgram)} - {"offset"}


def _check_limits(lower: FloatArray, upper: FloatArray, *, what: str) -> None:
    bad = np.isnan(lower) | np.isnan(upper) | (lower == np.inf) | (upper == -np.inf) | (lower > upper)
    if bad.any():
        i = int(bad.argmax())
        raise InputError(f"{what} {i} must lie between {lower[i]} and {upper[i]}, which nothing does")


@dataclass(slots=True, eq=False)
class MilpBuilder:
    """Collects variables and rows by the array, then builds a `MilpProgram`.

    >>> builder = MilpBuilder()
    >>> x_CE = builder.add_variables((2, 3), upper=1, integer=True, objective=[4.0, 2.0, 1.0])
    >>> builder.add_rows((x_CE.T, 1.0), lower=1, upper=1)  # each of three experts in one of two clusters
    >>> builder.build().num_rows
    3
    """

    offset: float = 0.0
    _variables: list[tuple[npt.NDArray[Any], ...]] = field(default_factory=list)
    _rows: list[tuple[npt.NDArray[Any], ...]] = field(default_factory=list)
    _num_variables: int = 0
    _num_rows: int = 0

    def add_variables(
        self,
        shape: int | Sequence[int],
        *,
        lower: npt.ArrayLike = 0.0,
        upper: npt.ArrayLike = np.inf,
        integer: bool = False,
        objective: npt.ArrayLike = 0.0,
    ) -> IntArray:
        """Add variables and return their numbers, in an array of the given shape.

        Parameters
        ----------
        lower, upper, objective
            Bounds and objective coefficients; they broadcast against the shape.
        integer
            Whether the variables must be whole.
        """
        index = self._num_variables + np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
        self._num_variables += index.size
        spread = (np.broadcast_to(_floats(value), index.shape).ravel() for value in (objective, lower, upper))
        self._variables.append((*spread, np.full(index.size, integer)))
        return index

    def add_rows(self, *terms: Terms, lower: npt.ArrayLike = -np.inf, upper: npt.ArrayLike = np.inf) -> None:
        """Add one row for each leading index of the columns.

        Parameters
        ----------
        terms
            Pairs of columns ``[..., terms]`` and coefficients that broadcast against them. The leading axes
            of all pairs must be alike; a one-dimensional pair is one row. A column that occurs several
            times in a row counts with the sum of its coefficients.
        lower, upper
            Limits of the rows; they broadcast against the leading axes.
        """
        column_T = [np.asarray(columns, dtype=np.int64) for columns, _ in terms]
        leading = column_T[0].shape[:-1]
        if any(columns.shape[:-1] != leading for columns in column_T):
            raise InputError(f"terms of rows have shapes {[columns.shape for columns in column_T]}")
        rows = int(np.prod(leading))
        spread = [
            np.broadcast_to(_floats(value), columns.shape)
            for columns, (_, value) in zip(column_T, terms, strict=True)
        ]
        column_RT = np.concatenate([columns.reshape(rows, -1) for columns in column_T], axis=1)
        coefficient_RT = np.concatenate([value.reshape(rows, -1) for value in spread], axis=1)
        row_RT = np.broadcast_to(self._num_rows + np.arange(rows)[:, None], column_RT.shape)
        limits = (np.broadcast_to(_floats(limit), leading).ravel() for limit in (lower, upper))
        self._rows.append((row_RT.ravel(), column_RT.ravel(), coefficient_RT.ravel(), *limits))
        self._num_rows += rows

    def build(self, *, start_V: npt.ArrayLike | None = None) -> MilpProgram:
        """Return the program.

        Parameters
        ----------
        start_V
            A point to start from, ``[variables]``.

        Raises
        ------
        InputError
            If the program is inconsistent; see `MilpProgram`.
        """
        objective_V, lower_V, upper_V, integer_V = _joined(self._variables, (float, float, float, bool))
        row_N, column_N, value_N, low_R, up_R = _joined(self._rows, (np.int64, np.int64, float, float, float))
        row_N, column_N, value_N = _merged(row_N, column_N, value_N)
        start_P = np.concatenate([[0], np.cumsum(np.bincount(row_N, minlength=self._num_rows))])
        return MilpProgram(
            objective_V=objective_V,
            lower_V=lower_V,
            upper_V=upper_V,
            integer_V=integer_V,
            row_start_P=start_P,
            column_N=column_N,
            coefficient_N=value_N,
            row_lower_R=low_R,
            row_upper_R=up_R,
            offset=self.offset,
            start_V=None if start_V is None else _floats(start_V),
        )


def _floats(values: npt.ArrayLike) -> FloatArray:
    return np.asarray(values, dtype=np.float64)


def _joined(parts: list[tuple[npt.NDArray[Any], ...]], kinds: Sequence[type[Any]]) -> list[npt.NDArray[Any]]:
    """Concatenate the parts position by position."""
    return [
        np.concatenate([np.empty(0, dtype=kind), *(part[i] for part in parts)]).astype(kind)
        for i, kind in enumerate(kinds)
    ]


def _merged(
    row_N: IntArray, column_N: IntArray, value_N: FloatArray
) -> tuple[IntArray, IntArray, FloatArray]:
    """Sort the nonzeros by row and column, add up those that share both, and drop zeros."""
    order = np.lexsort((column_N, row_N))
    row_N, column_N, value_N = row_N[order], column_N[order], value_N[order]
    if row_N.size:
        first = np.concatenate([[True], (np.diff(row_N) != 0) | (np.diff(column_N) != 0)])
        value_N = np.add.reduceat(value_N, np.nonzero(first)[0])
        row_N, column_N = row_N[first], column_N[first]
    kept = value_N != 0
    return row_N[kept], column_N[kept], value_N[kept]
