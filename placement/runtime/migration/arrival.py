"""Whether copies under way have arrived, without waiting for them: a CUDA event, or a thread that waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

__all__ = ["Arrival", "EventArrival", "ThreadArrival", "record_event"]


_PAUSE_S = 0.05


def record_event(stream: Any, *, timing: bool = False) -> Any:
    """Return an event that comes when all is done that a CUDA stream has been given so far."""
    cuda: Any = torch.cuda
    event = cuda.Event(enable_timing=timing)
    event.record(stream)
    return event


class Arrival(Protocol):
    """Copies under way."""

    def done(self) -> bool:
        """Whether all of them are through.

        Raises
        ------
        RuntimeError
            If one failed.
        """
        ...

    def pause(self) -> None:
        """Wait a little, at most until they are through."""
        ...

    def seconds(self, before: Any) -> float:
        """Time they took, once they are through; or since the ones of the same kind `before` were."""
        ...


class ThreadArrival:
    """Waits for the works of a backend that only says when it is done to who waits (gloo).

    Parameters
    ----------
    works
        Copies under way.
    start_s
        When they were begun, by ``time.perf_counter``.
    """

    def __init__(self, works: Sequence[dist.Work], start_s: float) -> None:
        self._works = works
        self._error: RuntimeError | None = None
        self._start_s = self._end_s = start_s
        # Not a daemon: one that still waits when the interpreter ends would bring the process down. The
        # group's time limit ends it.
        self._thread = threading.Thread(target=self._wait, name="migration-arrival")
        self._thread.start()

    def _wait(self) -> None:
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as exc:
            self._error = exc
        self._end_s = time.perf_counter()

    def done(self) -> bool:
        """Whether all of them are through."""
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def pause(self) -> None:
        """Wait a little, at most until they are through."""
        self._thread.join(_PAUSE_S)

    def seconds(self, before: ThreadArrival | None) -> float:
        """Time they took, or since the ones before were through."""
        start_s = self._start_s if before is None else max(self._start_s, before._end_s)
        return max(0.0, self._end_s - start_s)


class EventArrival:
    """Events around copies on streams.

    Parameters
    ----------
    start
        Recorded with timing before the copies.
    stream
        Waits for the copies.
    """

    def __init__(self, start: Any, stream: Any) -> None:
        self._start = start
        self._end = record_event(stream, timing=True)

    def done(self) -> bool:
        """Whether all of them are through."""
        return bool(self._end.query())

    def pause(self) -> None:
        """Let other threads run; a sleep would be longer than most copies, a wait might never end."""
        time.sleep(0)

    def seconds(self, before: EventArrival | None) -> float:
        """Time they took, or since the ones before were through."""
        starts = [self._start] if before is None else [self._start, before._end]
        return max(0.0, 1e-3 * min(float(start.elapsed_time(self._end)) for start in starts))
