"""Tokens by where they come from: ranks are numbered as they turn up, and tokens sorted by rank or domain.

Shape letters: T tokens, G groups, R ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError

__all__ = ["Ranks", "by_group"]

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]

_NO_ROW = -1
_HIGHEST_RANK = (1 << 20) - 1


def by_group(group_T: IntArray, num_groups: int) -> tuple[IntArray, IntArray]:
    """Sort tokens by their group, without those of none (-1).

    Returns
    -------
    order_T, stop_G
        The tokens group by group, and where each group ends.

    Raises
    ------
    InputError
        If there is no such group.
    """
    highest = int(group_T.max())
    if highest >= num_groups:
        raise InputError(f"a token belongs to group {highest} of {num_groups}")
    # Two bytes are sorted by counting, wider numbers by comparing.
    order_T = np.argsort(group_T.astype(np.int16) if num_groups < 1 << 15 else group_T, kind="stable")
    count_G = np.bincount(group_T + 1, minlength=num_groups + 1)
    return order_T[count_G[0] :], np.cumsum(count_G[1:])


class Ranks:
    """Ranks of origin in the order in which they turn up, and their tokens."""

    def __init__(self) -> None:
        self._row_of_rank = np.full(0, _NO_ROW, dtype=np.int64)
        self._ranks: list[int] = []
        self._tokens = np.zeros(0, dtype=np.int64)

    @property
    def num_ranks(self) -> int:
        """Different ranks so far."""
        return len(self._ranks)

    def rows(self, rank_T: IntArray) -> IntArray:
        """Return the row of each token's rank, and count the tokens."""
        highest = int(rank_T.max())
        if highest > _HIGHEST_RANK:
            raise InputError(f"a token has rank {highest}; ranks up to {_HIGHEST_RANK} can be counted")
        if highest >= len(self._row_of_rank):
            more = np.full(highest + 1 - len(self._row_of_rank), _NO_ROW)
            self._row_of_rank = np.concatenate([self._row_of_rank, more])
        row_T = self._row_of_rank[rank_T]
        if (row_T == _NO_ROW).any():
            for rank in np.unique(rank_T[row_T == _NO_ROW]).tolist():
                self._row_of_rank[rank] = len(self._ranks)
                self._ranks.append(rank)
            row_T = self._row_of_rank[rank_T]
            more = np.zeros(len(self._ranks) - len(self._tokens), dtype=np.int64)
            self._tokens = np.concatenate([self._tokens, more])
        self._tokens += np.bincount(row_T, minlength=len(self._tokens))
        return row_T

    def sorted(self, load_RLE: Array | None) -> tuple[IntArray | None, IntArray | None, Array | None]:
        """Return ranks, tokens and loads by ascending rank; nothing if no rank is known."""
        if not self._ranks:
            return None, None, None
        rank_R = np.array(self._ranks)
        order_R = np.argsort(rank_R)
        load = None if load_RLE is None else load_RLE[order_R]
        return rank_R[order_R], self._tokens[order_R], load
