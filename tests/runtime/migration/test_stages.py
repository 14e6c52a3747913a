"""Stages hold every byte once, in order, and bring a rank no more than it was told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from placement.runtime.migration.moves import RowMove
from placement.runtime.migration.stages import (
    ALIGNMENT,
    LINE_BYTES,
    STAGE_BYTES,
    Message,
    cut,
    leaving,
    peak_bytes,
)

SIZES = {0: [40, 4]}
EXPERT_BYTES = 44


def moves_to(targets: list[int]) -> list[RowMove]:
    return [
        RowMove(layer=0, expert=index, source=9, source_row=0, target=target, target_row=0)
        for index, target in enumerate(targets)
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=6), st.one_of(st.none(), st.integers(1, 100)))
def test_every_byte_once(targets: list[int], chunk_bytes: int | None) -> None:
    """Pieces follow each other, a peer sends one message, and no rank gets more than it was told."""
    stages = cut(moves_to(targets), SIZES, chunk_bytes=chunk_bytes)
    bytes_of: dict[int, list[tuple[int, int]]] = {}
    for stage in stages:
        assert len({(one.source, one.target) for one in stage}) == len(stage) > 0
        for message in stage:
            assert message.piece_bytes <= (chunk_bytes or STAGE_BYTES)
            check_places(message)
            for piece in message.pieces:
                assert targets[piece.move] == message.target
                bytes_of.setdefault(piece.move, []).extend(
                    (piece.tensor, byte) for byte in range(piece.start, piece.end)
                )
    expected = [(0, byte) for byte in range(40)] + [(1, byte) for byte in range(4)]
    assert bytes_of == dict.fromkeys(range(len(targets)), expected)


def check_places(message: Message) -> None:
    """Pieces do not meet, and the checksum comes after them."""
    ends = [piece.place + piece.end - piece.start for piece in message.pieces]
    starts = [piece.place for piece in message.pieces]
    assert starts[0] == 0
    assert all(start % ALIGNMENT == 0 for start in starts)
    assert all(0 <= start - end < ALIGNMENT for end, start in zip(ends[:-1], starts[1:], strict=True))
    assert (message.num_bytes - ALIGNMENT) % LINE_BYTES == 0
    assert ends[-1] <= message.num_bytes - ALIGNMENT


def test_one_expert_at_a_time() -> None:
    """A rank that receives three experts takes three stages; another's go along; small ones all together."""
    assert [len(stage) for stage in cut(moves_to([0, 0, 0, 1]), SIZES)] == [2]
    stages = cut(moves_to([0, 0, 0, 1]), SIZES, chunk_bytes=EXPERT_BYTES)
    found = [{piece.move for message in stage for piece in message.pieces} for stage in stages]
    assert found == [{0, 3}, {1}, {2}]


def test_ranks_begin_with_different_peers() -> None:
    """Each with the next higher one that sends to it."""
    moves = [
        RowMove(layer=0, expert=index, source=source, source_row=0, target=target, target_row=0)
        for index, (source, target) in enumerate([(0, 1), (2, 1), (0, 2), (1, 2), (1, 0), (2, 0)])
    ]
    first, second = cut(moves, SIZES, chunk_bytes=EXPERT_BYTES)
    assert [(one.source, one.target) for one in first] == [(1, 0), (2, 1), (0, 2)]
    assert [(one.source, one.target) for one in second] == [(2, 0), (0, 1), (1, 2)]


def test_what_goes_to_several_is_packed_once() -> None:
    """One expert to two ranks takes one message of memory; another one has another number."""
    moves = [
        replace(move, expert=expert) for move, expert in zip(moves_to([0, 1, 2]), (7, 7, 8), strict=True)
    ]
    (stage,) = stages = cut(moves, SIZES)
    assert len(leaving(stage, 9)) == 2
    assert [one.number for one in stage] == [stage[0].number, stage[0].number, stage[2].number]
    assert stage[0].number != stage[2].number
    size = LINE_BYTES + ALIGNMENT
    assert [peak_bytes(stages, rank) for rank in (9, 0)] == [(0, 2 * size, 0), (size, 0, 0)]


def test_chunks_must_hold_something() -> None:
    """Not zero bytes."""
    with pytest.raises(InputError, match="chunks of 0 bytes"):
        cut(moves_to([0]), SIZES, chunk_bytes=0)
