"""Tests of `traces.statistics.sequences`: as many sequences as a set would hold."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from traces.statistics.sequences import SequenceCount

TOKENS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), min_size=1, max_size=40)


@given(blocks=st.lists(TOKENS, min_size=1, max_size=5), with_ranks=st.booleans())
def test_sequences_are_counted_once(blocks: list[list[tuple[int, int]]], with_ranks: bool) -> None:
    """Per rank, in whatever order and however often they come."""
    count, seen = SequenceCount(), set()
    for block in blocks:
        rank_T, sequence_T = (np.array(column) for column in zip(*block, strict=True))
        count.add(sequence_T, rank_T if with_ranks else None)
        seen |= set(block) if with_ranks else {(0, sequence) for _, sequence in block}
    assert count.count == len(seen)


def test_sequences_in_order_take_no_room() -> None:
    """A million sequences that follow one another are one run."""
    count = SequenceCount()
    for start in range(0, 1_000_000, 100_000):
        count.add(np.arange(start, start + 100_000), None)
    assert count.count == 1_000_000
    assert [runs.shape for runs in count._runs.values()] == [(1, 2)]
