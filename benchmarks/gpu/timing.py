"""Clocks: marks on the device's own time line, read after the fact; wall time where there is no GPU."""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Marks", "hold_back", "marks_for", "summary", "synchronize"]

_CUDA: Any = torch.cuda
"""Untyped there."""

FloatArray = npt.NDArray[np.float64]


class Marks(Protocol):
    """Named moments in order; also a `PhaseClock` of the runtime."""

    def mark(self, phase: str) -> None:
        """Note the moment at which the device has done all that was issued before."""
        ...

    def spans_ms(self) -> dict[str, float]:
        """Return the milliseconds from each mark's predecessor to it, and ``total``; the device is idle."""
        ...


class _EventMarks:
    """Moments on a CUDA stream."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """Record an event; the host does not wait."""
        event: Any = _CUDA.Event(enable_timing=True)
        event.record()
        self._events.append((phase, event))

    def spans_ms(self) -> dict[str, float]:
        """Return times between events."""
        spans: dict[str, float] = {}
        for (_, before), (phase, event) in zip(self._events, self._events[1:], strict=False):
            spans[phase] = spans.get(phase, 0.0) + float(before.elapsed_time(event))
        return {**spans, "total": sum(spans.values())}


class _WallMarks:
    """Moments of the host, which is the device."""

    def __init__(self) -> None:
        self._moments: list[tuple[str, float]] = []

    def mark(self, phase: str) -> None:
        """Note the time."""
        self._moments.append((phase, time.perf_counter()))

    def spans_ms(self) -> dict[str, float]:
        """Return times between moments."""
        spans: dict[str, float] = {}
        for (_, before), (phase, moment) in zip(self._moments, self._moments[1:], strict=False):
            spans[phase] = spans.get(phase, 0.0) + 1e3 * (moment - before)
        return {**spans, "total": sum(spans.values())}


def marks_for(device: torch.device) -> Marks:
    """Return a new clock for work on a device."""
    return _EventMarks() if device.type == "cuda" else _WallMarks()


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def hold_back(device: torch.device, *, milliseconds: float) -> None:
    """Keep a GPU's stream busy, so that the host runs ahead and launches leave no gaps between kernels."""
    if device.type == "cuda":
        _CUDA._sleep(int(milliseconds * 2.0e6))


def summary(value_R: FloatArray) -> dict[str, float]:
    """Return median and spread of repeats."""
    low, middle, high = np.quantile(value_R, [0.1, 0.5, 0.9])
    return {"median": float(middle), "p10": float(low), "p90": float(high), "repeats": int(value_R.size)}
