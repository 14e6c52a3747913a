"""The stopwatch under a clock of the test's own, and medians over ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from placement.runtime.measure.clock import HostClock, clock_of, finish
from placement.runtime.measure.sizes import Pace
from placement.runtime.measure.timing import Stopwatch, Timing, pooled, slowest


class FakeClock:
    """Every call takes what the test says."""

    def __init__(self, call_ms: list[float]) -> None:
        self.now_ms = 0.0
        self.call_ms = call_ms
        self.calls = 0
        self._marks: list[float] = []

    def call(self) -> None:
        """Let time pass."""
        self.now_ms += self.call_ms[self.calls % len(self.call_ms)]
        self.calls += 1

    def start(self) -> None:
        """Note when an interval begins."""
        self._marks.append(self.now_ms)

    def stop(self) -> None:
        """Note when it ends."""
        self._marks.append(self.now_ms)

    def read_ms(self) -> tuple[float, ...]:
        """Return the intervals noted."""
        marks, self._marks = self._marks, []
        return tuple(b - a for a, b in zip(marks[::2], marks[1::2], strict=True))


def stopwatch(clock: FakeClock, pace: Pace, agreed: list[int] | None = None) -> Stopwatch:
    """A stopwatch of the first rank, or of one that is told numbers."""

    def agree(number: int) -> int:
        return number if agreed is None else agreed.pop(0)

    return Stopwatch(clock=clock, pace=pace, agree=agree)


def test_warm_ups_and_pilots_are_not_counted() -> None:
    """3 warm-ups of 100 ms, pilots of 10 ms, then 1 ms each: the budget of 50 ms holds 5 of 10 ms."""
    clock = FakeClock([100.0] * 3 + [10.0] * 2 + [1.0] * 5)
    pace = Pace(warmups=3, least=2, most=40, budget_ms=50.0)
    assert stopwatch(clock, pace).samples(clock.call) == (1.0,) * 5
    assert clock.calls == 10


def test_what_comes_before_a_call_takes_no_time() -> None:
    """Filling the cache is outside the interval, and happens before each timed call."""
    clock = FakeClock([2.0])
    before: list[float] = []

    def prepare() -> None:
        before.append(clock.now_ms)
        clock.now_ms += 7.0

    pace = Pace(warmups=0, least=3, most=3)
    assert stopwatch(clock, pace).samples(clock.call, before=prepare) == (2.0,) * 3
    assert len(before) == 5


def test_too_long_a_call_is_not_repeated() -> None:
    """A pilot beyond the limit leaves no samples."""
    clock = FakeClock([11.0])
    assert stopwatch(clock, Pace(warmups=0, longest_ms=10.0)).samples(clock.call) == ()
    assert clock.calls == 2


def test_repeats_are_those_of_the_first_rank() -> None:
    """Whatever this rank's own timing would say."""
    clock = FakeClock([1e9])
    assert len(stopwatch(clock, Pace(warmups=0), agreed=[4]).samples(clock.call)) == 4


@given(
    one_ms=st.floats(0.0, 1e6),
    least=st.integers(1, 5),
    more=st.integers(0, 40),
    budget_ms=st.floats(0.0, 1e4),
)
def test_repeats_stay_within_their_limits(one_ms: float, least: int, more: int, budget_ms: float) -> None:
    """Between least and most, within the budget but for the least, and none for a call beyond the limit."""
    pace = Pace(least=least, most=least + more, budget_ms=budget_ms, longest_ms=1000.0)
    repeats = pace.repeats(one_ms)
    if one_ms > 1000.0:
        assert repeats == 0
    else:
        assert least <= repeats <= least + more
        assert repeats == least or repeats * one_ms <= budget_ms * (1 + 1e-9)


def test_median_and_spread() -> None:
    """Of 1 to 11 the median is 6, a tenth is below 2 and above 10."""
    timing = Timing.of(range(11, 0, -1))
    assert (timing.ms, timing.spread) == (6.0, [2.0, 10.0])


def test_rates_turn_the_spread_round() -> None:
    """2 MB in 1, 2 and 4 ms: the slow end of the time is the low end of the rate."""
    assert Timing(ms=2.0, p10_ms=1.0, p90_ms=4.0).rates(2e6) == (1.0, [0.5, 2.0])


def test_what_ranks_do_alone_is_pooled() -> None:
    """A slower rank counts as much as the others."""
    assert pooled([(1.0, 1.0, 1.0), (9.0, 9.0), (1.0,)]).ms == 1.0


def test_what_ranks_do_together_ends_with_the_slowest() -> None:
    """The rank with the largest median, with its own spread."""
    assert slowest([(1.0, 1.0, 50.0), (2.0, 3.0, 4.0)]) == Timing.of((2.0, 3.0, 4.0))


@given(samples=st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=30))
def test_the_median_lies_within_the_spread(samples: list[float]) -> None:
    """Whatever the samples."""
    low, high = Timing.of(samples).spread
    assert low <= Timing.of(samples).ms <= high


def test_the_host_clock_waits_before_it_looks() -> None:
    """Work that was issued before an interval is over when it starts, that issued in it when it stops."""
    seen: list[str] = []
    times = iter((1.0, 1.5, 2.0, 2.25))

    def now() -> float:
        seen.append("now")
        return next(times)

    clock = HostClock(lambda: seen.append("finish"), now=now)
    for _ in range(2):
        clock.start()
        clock.stop()
    assert clock.read_ms() == (500.0, 250.0)
    assert clock.read_ms() == ()
    assert seen == ["finish", "now"] * 4


def test_a_cpu_is_read_by_the_host_clock() -> None:
    """There is nothing to wait for."""
    cpu = torch.device("cpu")
    finish(cpu)
    clock = clock_of(cpu)
    assert isinstance(clock, HostClock)
    clock.start()
    clock.stop()
    (passed_ms,) = clock.read_ms()
    assert passed_ms >= 0


def test_an_interval_that_never_stopped_is_a_mistake() -> None:
    """Reading in the middle of an interval fails loudly."""
    clock = HostClock()
    clock.start()
    with pytest.raises(ValueError, match="zip"):
        clock.read_ms()
