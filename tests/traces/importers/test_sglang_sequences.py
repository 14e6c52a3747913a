"""Tests of `traces.importers.sglang_sequences`: requests are followed as far as can be known."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from traces.importers.sglang_sequences import DECODE, EXTEND, SequenceFollower


def follow(
    follower: SequenceFollower,
    positions: list[int],
    *,
    lengths: list[int] | None = None,
    mode: int | None = None,
    valid: list[bool] | None = None,
) -> list[int]:
    """Follow one pass; with lengths it is a prefill pass."""
    return follower.follow(
        np.array(positions, dtype=np.int64),
        mode=mode or (DECODE if lengths is None else EXTEND),
        lengths=None if lengths is None else np.array(lengths, dtype=np.int64),
        valid_T=np.ones(len(positions), dtype=bool) if valid is None else np.array(valid),
    ).tolist()


def test_prompts_go_on_in_decode_passes() -> None:
    """Each token of a decode pass is of the request whose next position it has, in the batch's order."""
    follower = SequenceFollower()
    assert follow(follower, [0, 1, 2, 0, 1], lengths=[3, 2]) == [0, 0, 0, 1, 1]
    assert follow(follower, [3, 2]) == [0, 1]
    assert follow(follower, [0, 1], lengths=[2]) == [2, 2]
    assert follow(follower, [4, 3, 2]) == [0, 1, 2]
    assert follower.known


def test_ended_requests_drop_out() -> None:
    """The positions show which one ended; the others keep their numbers."""
    follower = SequenceFollower()
    follow(follower, [0, 1, 2, 0, 1, 0], lengths=[3, 2, 1])
    assert follow(follower, [3, 1]) == [0, 2]
    assert follow(follower, [2]) == [2]


def test_requests_of_equal_length_keep_their_order() -> None:
    """While all of them go on, nothing is unclear."""
    follower = SequenceFollower()
    follow(follower, [0, 1, 0, 1], lengths=[2, 2])
    assert follow(follower, [2, 2]) == [0, 1]


def test_what_cannot_be_told_apart_begins_anew() -> None:
    """One of two equal requests ended, nobody knows which: what goes on gets a number of its own."""
    follower = SequenceFollower()
    follow(follower, [0, 1, 0, 1, 0, 1, 2, 3], lengths=[2, 2, 4])
    assert follow(follower, [2, 4]) == [3, 2]
    assert follow(follower, [3, 5]) == [3, 2]


def test_chunks_of_a_prompt_are_one_request() -> None:
    """The last prompt of a pass may go on as the first of the next prefill, decode passes in between."""
    follower = SequenceFollower()
    assert follow(follower, [0, 0, 1, 2], lengths=[1, 3]) == [0, 1, 1, 1]
    assert follow(follower, [1]) == [0]
    assert follow(follower, [3, 4, 0], lengths=[2, 1]) == [1, 1, 2]
    assert follow(follower, [2, 5, 1]) == [0, 1, 2]


def test_a_cached_prefix_is_no_chunk() -> None:
    """A prompt that begins past 0 and goes on from nothing is a new request."""
    follower = SequenceFollower()
    follow(follower, [0, 1], lengths=[2])
    assert follow(follower, [7, 8], lengths=[2]) == [1, 1]


def test_requests_under_way_when_recording_starts_are_new() -> None:
    """Their first token that is seen begins them."""
    follower = SequenceFollower()
    assert follow(follower, [40, 7]) == [0, 1]
    assert follow(follower, [41, 8]) == [0, 1]


def test_padding_is_no_request() -> None:
    """Rows that are padding have positions without meaning."""
    follower = SequenceFollower()
    assert follow(follower, [0, 1, 0], lengths=[2], valid=[True, True, False])[:2] == [0, 0]
    assert follow(follower, [2, 0], valid=[True, False])[0] == 0
    assert follow(follower, [0, 0], valid=[False, False]) == [0, 0]
    assert follower.known


def test_passes_that_mix_or_draft_cannot_be_followed() -> None:
    """Then nothing is said of requests."""
    for change in ({"mode": 3, "lengths": [2]}, {"mode": 5}, {"mode": EXTEND}):
        follower = SequenceFollower()
        follow(follower, [0, 1], **change)  # type: ignore[arg-type]
        assert not follower.known


def test_lengths_that_do_not_fit_positions_cannot_be_followed() -> None:
    """Too many tokens, or positions that do not run on."""
    for positions, lengths in (([0, 1], [3]), ([0, 5], [2]), ([0, 1], [-1, 3]), ([0, 1], [0])):
        follower = SequenceFollower()
        follow(follower, positions, lengths=lengths)
        assert not follower.known


def test_a_copy_goes_on_alone() -> None:
    """What the copy follows does not change the original."""
    follower = SequenceFollower()
    follow(follower, [0, 1], lengths=[2])
    copy = follower.copy()
    assert follow(copy, [2]) == [0]
    assert follow(copy, [9]) == [1]
    assert follow(follower, [2]) == [0]


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), max_size=8))
def test_positions_of_a_number_run_on(passes: list[list[int]]) -> None:
    """Whatever the passes, tokens of one number have consecutive positions."""
    follower = SequenceFollower()
    last: dict[int, int] = {}
    for positions in passes:
        numbers = follow(follower, positions)
        assert len(set(numbers)) == len(numbers)
        for number, position in zip(numbers, positions, strict=True):
            assert last.get(number, position - 1) == position - 1
            last[number] = position
