"""Gives every recorded token its sequence, its position and its domain.

Each row of a prefill is a new sequence; later passes with the same cache continue their rows' sequences;
packed rows are cut where their positions start again.

Shape letters: B rows of a batch, N token places of a row (padding included), P places of all rows,
T recorded tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from traces.trace import UNKNOWN_DOMAIN

if TYPE_CHECKING:
    from traces.record.passes import ForwardPass

__all__ = ["Numbering", "Rows"]

IntArray = npt.NDArray[np.int64]


class Rows:
    """Which sequence each row of a running batch belongs to; -1 until its first token is numbered."""

    def __init__(self, num_rows: int) -> None:
        self.sequence_B = np.full(num_rows, -1, dtype=np.int64)


class Numbering:
    """Numbers sequences as they come, from the first number on, and follows them through caches."""

    def __init__(self, first: int = 0) -> None:
        self._rows_of: WeakKeyDictionary[Any, Rows] = WeakKeyDictionary()
        self.num_sequences = first

    def rows(self, one: ForwardPass) -> Rows:
        """Rows that a pass continues, by its cache, or new ones."""
        num_rows = (one.shape or (0, 0))[0]
        known = self._rows_of.get(one.cache) if one.past_tokens else None
        return Rows(num_rows) if known is None or len(known.sequence_B) != num_rows else known

    def follow(self, cache: Any, rows: Rows) -> None:
        """Remember whose cache that is."""
        self._rows_of[cache] = rows

    def name(
        self, one: ForwardPass, rows: Rows
    ) -> tuple[npt.NDArray[np.bool_], IntArray, IntArray, IntArray]:
        """Which places of a pass are kept ``[places]``, and sequence, position and domain of those."""
        shape, labels = one.shape or (0, 0), one.labels
        given_BN = None if labels is None else labels.sequence_BN
        domain_BN = None if labels is None else labels.domain_BN
        kept_BN = np.ones(shape, dtype=bool) if one.kept_BN is None else one.kept_BN.cpu().numpy()
        if given_BN is not None:
            kept_BN = kept_BN & (given_BN >= 0)
        row_T = np.nonzero(kept_BN)[0]
        position_T = one.positions()[kept_BN]
        sequence_T = self._number(rows, shape, row_T, position_T) if given_BN is None else given_BN[kept_BN]
        rows.sequence_B[row_T] = sequence_T
        self.num_sequences = max(self.num_sequences, int(sequence_T.max(initial=-1)) + 1)
        domain_T = np.full_like(row_T, UNKNOWN_DOMAIN) if domain_BN is None else domain_BN[kept_BN]
        return kept_BN.ravel(), sequence_T, position_T, domain_T

    def _number(self, rows: Rows, shape: tuple[int, int], row_T: IntArray, position_T: IntArray) -> IntArray:
        """Sequence of each token: its row's, or a new one where a row or a packed sequence starts."""
        if shape[1] == 1 and (rows.sequence_B >= 0).all():  # a decode step: the usual case by far
            return rows.sequence_B[row_T]
        place_T = np.arange(row_T.size)
        first_of_row_T = np.diff(row_T, prepend=-1) > 0
        starts_T = np.where(first_of_row_T, rows.sequence_B[row_T] < 0, np.diff(position_T, prepend=0) <= 0)
        last_start_T = np.maximum.accumulate(np.where(starts_T, place_T, -1))
        row_start_T = np.maximum.accumulate(np.where(first_of_row_T, place_T, 0))
        new_T = self.num_sequences + np.cumsum(starts_T) - 1
        return np.where(last_start_T < row_start_T, rows.sequence_B[row_T], new_T)
