"""The loop posts, learns and changes over; whatever goes wrong, what runs goes on."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from loop_checks import FakeCounter, FakeSource, FakeTarget, loop_with_fakes, shifted
from ranks import Ranks

from placement.errors import BackendError, InputError
from placement.plan import Placement
from placement.runtime.loop.channel import Channel
from placement.runtime.loop.loop import PlacementLoop


def loop_of(target: FakeTarget, source: FakeSource, *, every_steps: int = 1) -> PlacementLoop:
    """Return a loop of a lone process that runs version 1."""
    return PlacementLoop(target, source, every_steps=every_steps, version=1, first_window=0)


def run(loop: PlacementLoop, steps: int) -> list[int | None]:
    """Step; return the version after each step."""
    found = []
    for _ in range(steps):
        loop.step()
        found.append(loop.version)
    return found


def map_of(placement: Placement) -> list[list[int]]:
    """Return the experts of the slots."""
    found: list[list[int]] = placement.physical_to_logical_map_LS.tolist()
    return found


def test_a_newer_placement_is_changed_over_to(caplog: pytest.LogCaptureFixture) -> None:
    """Offered at the first step, heard at the third; the change takes two more."""
    target, source = FakeTarget(), FakeSource()
    source.promote(shifted(1), 2)
    with caplog.at_level(logging.INFO), loop_of(target, source) as loop:
        assert run(loop, 2) == [1, 1]
        assert not loop.changing
        assert run(loop, 3) == [1, 1, 2]
        assert map_of(loop.placement) == map_of(shifted(1))
    assert target.started == [2]
    assert "changed over to version 2 after step 5" in caplog.text
    assert source.closed


def test_it_is_looked_for_now_and_then() -> None:
    """Once in so many steps, and not while a change is under way."""
    target, source = FakeTarget(takes_steps=100), FakeSource()
    with loop_of(target, source, every_steps=5) as loop:
        run(loop, 24)
        assert source.polls == 4
        source.promote(shifted(1), 2)
        run(loop, 11)
        assert loop.changing
        polls = source.polls
        source.promote(shifted(2), 3)
        run(loop, 50)
        assert (source.polls, loop.version) == (polls, 1)
        run(loop, 200)
    assert (target.started, loop.version) == ([2, 3], 3)


def test_the_same_placement_moves_nothing() -> None:
    """A version with the placement that runs is taken over as it is."""
    target, source = FakeTarget(), FakeSource()
    source.promote(shifted(0), 7)
    with loop_of(target, source) as loop:
        assert run(loop, 4)[-1] == 7
    assert target.started == []


def test_what_does_not_fit_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Rank 0 does not tell the others of it."""
    target, source = FakeTarget(), FakeSource()
    source.promote(shifted(0, num_experts=8), 2)
    with loop_of(target, source) as loop:
        assert set(run(loop, 6)) == {1}
    assert [record.getMessage() for record in caplog.records] == [
        "version 2 is not used: 8 experts do not fit"
    ]


def test_a_change_that_fails_leaves_what_runs(caplog: pytest.LogCaptureFixture) -> None:
    """It is said, tried three times, and then the next version is."""
    target, source = FakeTarget(fails=True), FakeSource()
    source.promote(shifted(1), 2)
    with loop_of(target, source) as loop:
        assert set(run(loop, 30)) == {1}
        assert map_of(loop.placement) == map_of(shifted(0))
        assert target.started == [2, 2, 2]
        source.promote(shifted(2), 3)
        run(loop, 5)
        target.fails = False
        assert run(loop, 8)[-1] == 3
    said = "version {} could not be changed over to, what runs goes on: a copy was spoilt"
    assert [record.getMessage() for record in caplog.records] == [said.format(2)] * 3 + [said.format(3)]


def test_a_newer_version_goes_before_one_that_failed() -> None:
    """What failed is forgotten when there is something newer."""
    target, source = FakeTarget(fails=True), FakeSource()
    source.promote(shifted(1), 2)
    with loop_of(target, source) as loop:
        run(loop, 4)
        source.promote(shifted(2), 3)
        target.fails = False
        assert run(loop, 10)[-1] == 3
        assert run(loop, 20)[-1] == 3
    assert target.started[-1] == 3


def test_windows_are_posted_with_the_version_that_ran() -> None:
    """Numbers go on from the first; the last window is posted at the end."""
    source, counter = FakeSource(), FakeCounter()
    source.promote(shifted(1), 2)
    with PlacementLoop(
        FakeTarget(), source, every_steps=1, counter=counter, version=1, first_window=40
    ) as loop:
        run(loop, 7)
    assert [(window, version) for window, _, _, version in source.posted] == [
        (40, 1),
        (41, 1),
        (42, 2),
        (43, 2),
    ]
    assert [load[0][0] for _, load, _, _ in source.posted] == [0, 1, 2, 3]
    assert counter.closed


def test_numbers_of_windows_follow_the_clock() -> None:
    """So that a job that is started again repeats none."""
    source = FakeSource()
    with PlacementLoop(FakeTarget(), source, counter=FakeCounter()) as loop:
        run(loop, 2)
    assert source.posted[0][0] > 1_700_000_000_000


def test_all_ranks_change_over_after_the_same_step(two_ranks: Ranks) -> None:
    """Rank 0 alone asks; windows have the same numbers everywhere."""
    found = two_ranks.run(loop_with_fakes, 16, 2)
    assert [polls for _, _, polls in found] == [found[0][2], 0]
    # Promoted before step 4 of 16: offered at step 4, there at step 8, moved in two steps.
    assert [versions for versions, _, _ in found] == [[1] * 9 + [2] * 7] * 2
    assert [windows for _, windows, _ in found] == [list(range(100, 108))] * 2


def test_a_lost_rank_zero_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The placement stays, windows are posted on, and it is said once."""

    def beat(channel: Channel, offer: object) -> bytes | None:
        raise BackendError("a rank is lost")

    monkeypatch.setattr(Channel, "beat", beat)
    source = FakeSource()
    with PlacementLoop(
        FakeTarget(), source, every_steps=1, counter=FakeCounter(), version=1, first_window=0
    ) as loop:
        assert set(run(loop, 6)) == {1}
    assert len(source.posted) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "no other placement will be learnt of, the one that runs stays: a rank is lost"
    ]


def test_the_source_is_closed_whatever_happens() -> None:
    """A counter that fails at the end leaves no thread behind."""

    class Failing(FakeCounter):
        def close(self) -> None:
            raise BackendError("the device is gone")

    source = FakeSource()
    loop = PlacementLoop(FakeTarget(), source, counter=Failing())
    with pytest.raises(BackendError, match="the device is gone"):
        loop.close()
    assert source.closed


def test_what_makes_no_sense_is_refused() -> None:
    """Before anything is begun."""
    with pytest.raises(InputError, match="every_steps is 0"):
        PlacementLoop(FakeTarget(), FakeSource(), every_steps=0)
    with pytest.raises(InputError, match="a ndarray has no placement"):
        PlacementLoop(np.zeros(3), FakeSource())  # type: ignore[arg-type]
