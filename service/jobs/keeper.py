"""Incumbents on their way out: told at most some times a second, each with its file, and the last one always.

The solver's thread only leaves the newest here; a thread of ours writes and tells it. That thread also ends
the process when the solver does not heed a stop: kernels in C run on while it works.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from placement.optimizer import PROVING
from service.jobs.channel import Channel
from service.jobs.findings import Findings

if TYPE_CHECKING:
    from placement.bounds import LowerBound
    from placement.solution import Incumbent

__all__ = ["Keeper"]

LEAST_PAUSE_S = 0.1
"""Between two incumbents that are told."""

COST_SHARE = 5.0
"""Pause after an incumbent, in times of what it cost to write: the solve itself must not suffer."""

LONGEST_PAUSE_S = 5.0

PATIENCE_S = 0.15
"""How long a solver that was told to stop may take; after that its last incumbent is the result."""

BOUND_PAUSE_S = 0.5
"""Between two messages about the bound alone."""


class Keeper:
    """Takes incumbents and the bound from a solver.

    Parameters
    ----------
    channel
        Where they go.
    findings
        Turns them into files and figures.
    end
        Ends the process.
    """

    def __init__(self, channel: Channel, findings: Findings, end: Callable[[], None]) -> None:
        self._channel = channel
        self._findings = findings
        self._end = end
        self._changed = threading.Condition()
        self._pending: Incumbent | None = None
        self._bound: LowerBound | None = None
        self._kept: dict[str, Any] | None = None
        self._num_kept = 0
        self._next_s = 0.0
        self._stop_s: float | None = None
        self._returned = False
        self._phase = ""
        self._phase_s = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True, name="keeper")
        self._thread.start()

    def offer(self, incumbent: Incumbent) -> None:
        """Take an incumbent, instead of the one before if that was not told yet."""
        with self._changed:
            self._pending = incumbent
            self._changed.notify()

    def phase(self, name: str, bound: LowerBound) -> None:
        """Tell what runs now, and the bound."""
        self._bound = bound
        now = time.monotonic()
        if name == self._phase and now - self._phase_s < BOUND_PAUSE_S:
            return
        self._phase, self._phase_s = name, now
        what = {"phase": PROVING} if name == PROVING else {"phase": "solving", "solver": name}
        self._channel.send("progress", {**what, "lower_bound": bound.value})

    def stop(self) -> None:
        """Keep the newest at once, and make it the result soon unless the solver returns."""
        with self._changed:
            if self._stop_s is None:
                self._stop_s = time.monotonic()
            self._changed.notify()

    def close(self) -> None:
        """Take note that the solver has returned: what was not told yet is told, without a file."""
        with self._changed:
            self._returned = True
            self._changed.notify()
        # Does not come back where the process is being ended already.
        self._thread.join()

    def _run(self) -> None:
        while (incumbent := self._next()) is not None:
            self._tell(incumbent)
        if not self._returned:
            self._conclude()

    def _next(self) -> Incumbent | None:
        """Wait for an incumbent that is due; None where there will be no more."""
        with self._changed:
            while True:
                now = time.monotonic()
                is_due = self._returned or self._stop_s is not None or now >= self._next_s
                if self._pending is not None and is_due:
                    incumbent, self._pending = self._pending, None
                    return incumbent
                if self._returned:
                    return None
                if self._stop_s is not None and self._kept is not None and now >= self._stop_s + PATIENCE_S:
                    return None
                self._changed.wait(self._pause_s(now))

    def _pause_s(self, now: float) -> float | None:
        if self._stop_s is not None and self._kept is not None:
            return self._stop_s + PATIENCE_S - now
        return None if self._pending is None else self._next_s - now

    def _tell(self, incumbent: Incumbent) -> None:
        began = time.monotonic()
        bound = self._bound
        assert bound is not None  # a phase begins before there are incumbents
        figures = self._findings.figures(incumbent, bound)
        if not self._returned:
            self._num_kept += 1
            name = f"incumbent-{self._num_kept}.json"
            self._kept = self._findings.written(self._findings.standing(incumbent, bound), name)
            figures["kept"] = self._kept
        self._channel.send("incumbent", figures)
        now = time.monotonic()
        self._next_s = now + min(LONGEST_PAUSE_S, max(LEAST_PAUSE_S, COST_SHARE * (now - began)))

    def _conclude(self) -> None:
        """End the process with the last incumbent as its result."""
        assert self._kept is not None
        with self._changed:
            if self._returned:
                return
            # Held to the end: a solver that returns now waits in `close`.
            self._channel.send("result", self._kept)
            self._end()
