"""What rank 0 says reaches all at the same beat."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_checks import hear, lose_rank_zero, share
from parallel_checks import random_placement
from ranks import Ranks, ranks

from placement.runtime.loop.announcement import Announcement
from placement.runtime.loop.channel import Channel


@given(messages=st.lists(st.binary(min_size=1, max_size=40), max_size=4))
@settings(max_examples=20)
def test_one_rank_talks_to_itself(messages: list[bytes]) -> None:
    """Without a process group messages come through, each once and in order."""
    assert [message for _, message in hear(0, messages, 20)] == messages


def test_all_ranks_hear_the_same_at_the_same_beat(two_ranks: Ranks) -> None:
    """Long and short messages, each two beats after it was offered."""
    messages = [b"x" * 100_000, b"y", b"z" * 1000]
    found = two_ranks.run(hear, messages, 12)
    assert found[0] == found[1]
    assert [message for _, message in found[0]] == messages
    assert [beat for beat, _ in found[0]] == [2, 5, 8]


def test_a_number_and_bytes_are_shared(two_ranks: Ranks) -> None:
    """All have what rank 0 has."""
    assert two_ranks.run(share, 5) == [(5, b"bytes of rank 0")] * 2


@pytest.mark.slow
def test_a_rank_zero_that_is_lost_is_said(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Who waits for it hears of it in one line, and does not wait for ever."""
    with ranks(2, tmp_path_factory.mktemp("lost")) as started:
        found = started.run(lose_rank_zero)
    assert found[0] == "away"
    assert found[1].startswith("a rank is lost, or the network: ")
    assert "\n" not in found[1]


@given(seed=st.integers(0, 1 << 31), devices=st.integers(1, 4), version=st.none() | st.integers(1, 1 << 31))
@settings(max_examples=30, deadline=None)
def test_an_announcement_arrives_as_it_was(seed: int, devices: int, version: int | None) -> None:
    """Placement and version."""
    placement = random_placement(seed, num_layers=3, num_devices=devices)
    found = Announcement.decode(Announcement(placement=placement, version=version).encode())
    assert found.version == version
    assert (
        found.placement.physical_to_logical_map_LS.tolist() == placement.physical_to_logical_map_LS.tolist()
    )
    assert found.placement.device_of_slot_S.tolist() == placement.device_of_slot_S.tolist()
    assert (found.placement.num_experts, found.placement.num_devices) == (
        placement.num_experts,
        placement.num_devices,
    )


def test_a_lone_process_needs_no_group() -> None:
    """It is rank 0, and has its own number."""
    channel = Channel()
    assert (channel.rank, channel.share(9)) == (0, 9)
    channel.close()
