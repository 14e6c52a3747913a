"""One expert's way from row to row: between two ranks, or within one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["RowMove", "RowShift"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMove:
    """One expert's copy from a row of one rank to a row of another.

    Parameters
    ----------
    layer, expert
        MoE layer and logical expert.
    source, source_row
        Rank that sends, and its row.
    target, target_row
        Rank that receives, and the row that it writes when the round is switched over.
    """

    layer: int
    expert: int
    source: int
    source_row: int
    target: int
    target_row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowShift:
    """Rows of one rank that move along: the content of each row goes to the next row named.

    Parameters
    ----------
    layer, rank
        Where.
    rows
        In order, at least two.
    closed
        Whether the last row's content goes to the first row, which takes one expert of memory; otherwise the
        last row is free before, and the first one after.
    """

    layer: int
    rank: int
    rows: tuple[int, ...]
    closed: bool

    def copies(self) -> Iterator[tuple[int, int]]:
        """Yield (from, to) of the copies in the order in which they overwrite nothing that is needed.

        In a closed shift the last row's content has to be put aside first, and into the first row at the end.
        """
        for index in range(len(self.rows) - 1, 0, -1):
            yield self.rows[index - 1], self.rows[index]
