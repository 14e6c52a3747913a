"""Counts different sequences in a stream without keeping them: their numbers are runs with few gaps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["SequenceCount"]

IntArray = npt.NDArray[np.int64]


class SequenceCount:
    """Different (rank, sequence) pairs so far, kept as runs of consecutive numbers per rank."""

    def __init__(self) -> None:
        self._runs: dict[int | None, IntArray] = {}

    def add(self, sequence_T: IntArray, rank_T: IntArray | None) -> None:
        """Count the sequences of more tokens; without ranks all are of one."""
        if rank_T is None:
            self._add(None, sequence_T)
            return
        # Consecutive tokens of a sequence are looked at once.
        changed_T = np.flatnonzero(
            (np.diff(sequence_T, prepend=-1) != 0) | (np.diff(rank_T, prepend=-1) != 0)
        )
        sequence_T, rank_T = sequence_T[changed_T], rank_T[changed_T]
        order_T = np.argsort(rank_T, kind="stable")
        ranks, first = np.unique(rank_T[order_T], return_index=True)
        for rank, numbers in zip(ranks.tolist(), np.split(sequence_T[order_T], first[1:]), strict=True):
            self._add(rank, numbers)

    def _add(self, rank: int | None, numbers: IntArray) -> None:
        number_N = np.unique(numbers)
        cut = np.flatnonzero(np.diff(number_N) > 1)
        runs = np.stack(
            [number_N[np.append(0, cut + 1)], number_N[np.append(cut, len(number_N) - 1)]], axis=1
        )
        known = self._runs.get(rank)
        self._runs[rank] = runs if known is None else _united(np.concatenate([known, runs]))

    @property
    def count(self) -> int:
        """Different sequences."""
        return sum(int((runs[:, 1] - runs[:, 0] + 1).sum()) for runs in self._runs.values())


def _united(runs: IntArray) -> IntArray:
    """Join runs that overlap or touch."""
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    reach = np.maximum.accumulate(runs[:, 1])
    begins = np.append(True, runs[1:, 0] > reach[:-1] + 1)
    ends = np.append(np.flatnonzero(begins)[1:] - 1, len(runs) - 1)
    return np.stack([runs[begins, 0], reach[ends]], axis=1)
