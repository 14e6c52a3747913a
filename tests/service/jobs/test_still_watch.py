"""Counters that stand still, by a clock that the test turns."""

from __future__ import annotations

from service.jobs.watch import StillWatch


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def looks(watch: StillWatch[str], clock: Clock, seconds: float, **counts: int) -> list[str]:
    """Let some seconds pass in steps of one, and look at each."""
    found: list[str] = []
    for _ in range(int(seconds)):
        clock.now += 1.0
        found = watch.look(counts)
    return found


def test_only_what_stands_still_is_told() -> None:
    """A counter that moved within the time is alive."""
    clock = Clock()
    watch = StillWatch[str](still_s=10.0, clock=clock)
    assert looks(watch, clock, 9, a=1, b=1) == []
    assert looks(watch, clock, 1, a=2, b=1) == []
    assert looks(watch, clock, 1, a=2, b=1) == ["b"]
    assert looks(watch, clock, 9, a=2) == ["a"]


def test_a_watcher_that_was_away_begins_anew() -> None:
    """What happened while nobody looked is not held against anyone."""
    clock = Clock()
    watch = StillWatch[str](still_s=10.0, clock=clock)
    assert looks(watch, clock, 9, a=1) == []
    clock.now += 1000.0
    assert looks(watch, clock, 10, a=1) == []
    assert looks(watch, clock, 1, a=1) == ["a"]


def test_what_is_gone_is_forgotten() -> None:
    """A key that comes back starts its time again."""
    clock = Clock()
    watch = StillWatch[str](still_s=10.0, clock=clock)
    looks(watch, clock, 8, a=1)
    looks(watch, clock, 1)
    assert looks(watch, clock, 9, a=1) == []
