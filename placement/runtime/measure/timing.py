"""A measured time and how far it scattered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from placement.runtime.measure.clock import Clock
from placement.runtime.measure.sizes import Pace

__all__ = ["Samples", "Stopwatch", "Timing", "pooled", "slowest"]

Samples = tuple[float, ...]
"""Milliseconds of equal calls; empty where one took too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Median and spread of equal calls, in milliseconds.

    Parameters
    ----------
    ms
        Median.
    p10_ms, p90_ms
        A tenth of the calls were faster than the first, a tenth slower than the second.
    """

    ms: float
    p10_ms: float
    p90_ms: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Return the timing of samples in milliseconds, one or more."""
        p10, median, p90 = (round(float(value), 6) for value in np.percentile(samples, (10, 50, 90)))
        return cls(ms=median, p10_ms=p10, p90_ms=p90)

    @property
    def spread(self) -> list[float]:
        """The 10th and the 90th percentile, in milliseconds."""
        return [self.p10_ms, self.p90_ms]

    def rates(self, amount: float) -> tuple[float, list[float]]:
        """Return the median rate of an amount in bytes, and its spread, in GB/s."""
        slow, median, fast = (amount / ms / 1e6 for ms in (self.p90_ms, self.ms, self.p10_ms))
        return round(median, 3), [round(slow, 3), round(fast, 3)]


def pooled(samples_D: Sequence[Samples]) -> Timing:
    """Return the timing of what every rank did by itself, all ranks' calls together."""
    return Timing.of([sample for samples in samples_D for sample in samples])


def slowest(samples_D: Sequence[Samples]) -> Timing:
    """Return the timing of what the ranks did together: that of the rank it took longest."""
    return max((Timing.of(samples) for samples in samples_D), key=lambda timing: timing.ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopwatch:
    """Times a call many times.

    Parameters
    ----------
    clock
        Reads the intervals.
    pace
        How often.
    agree
        Returns the first rank's number on every rank: exchanges need the same number of calls everywhere.
    """

    clock: Clock
    pace: Pace
    agree: Callable[[int], int]

    def samples(self, call: Callable[[], object], *, before: Callable[[], None] = lambda: None) -> Samples:
        """Return the milliseconds of equal calls; none where the first rank's took too long.

        Parameters
        ----------
        before
            Called in front of every call, outside the interval.
        """
        for _ in range(self.pace.warmups):
            call()
        pilot_ms = Timing.of(self._timed(call, before, 2)).ms
        return self._timed(call, before, self.agree(self.pace.repeats(pilot_ms)))

    def _timed(self, call: Callable[[], object], before: Callable[[], None], repeats: int) -> Samples:
        for _ in range(repeats):
            before()
            self.clock.start()
            call()
            self.clock.stop()
        return self.clock.read_ms()
