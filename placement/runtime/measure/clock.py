"""Clocks that read intervals of work: events on a GPU's stream, or the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

__all__ = ["Clock", "EventClock", "HostClock", "clock_of", "finish"]


class Clock(Protocol):
    """Reads intervals that its user starts and stops in turn."""

    def start(self) -> None:
        """Begin an interval."""
        ...

    def stop(self) -> None:
        """End it."""
        ...

    def read_ms(self) -> tuple[float, ...]:
        """Wait for all that was issued; return the intervals since the last reading, in milliseconds."""
        ...


class EventClock:
    """Intervals on the current stream of the current GPU; the host runs on meanwhile."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def start(self) -> None:
        """Begin an interval."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)

    def stop(self) -> None:
        """End it."""
        self.start()

    def read_ms(self) -> tuple[float, ...]:
        """Wait for the GPU and return the intervals."""
        torch.cuda.synchronize()
        events, self._events = self._events, []
        return tuple(a.elapsed_time(b) for a, b in zip(events[::2], events[1::2], strict=True))


class HostClock:
    """Intervals on the host, each from when all issued before it is done until what it issued is done.

    Parameters
    ----------
    finish
        Waits for what was issued.
    now
        Seconds.
    """

    def __init__(
        self, finish: Callable[[], None] = lambda: None, *, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._finish, self._now = finish, now
        self._times: list[float] = []

    def start(self) -> None:
        """Begin an interval."""
        self._finish()
        self._times.append(self._now())

    def stop(self) -> None:
        """End it."""
        self.start()

    def read_ms(self) -> tuple[float, ...]:
        """Return the intervals."""
        times, self._times = self._times, []
        return tuple(1e3 * (b - a) for a, b in zip(times[::2], times[1::2], strict=True))


def finish(device: torch.device) -> None:
    """Wait for all that was issued to a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_of(device: torch.device) -> Clock:
    """Return the clock that reads a device's work best."""
    return EventClock() if device.type == "cuda" else HostClock()
