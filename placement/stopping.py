"""When a solve must end: a deadline, a cancelled flag, or either. Clocks come in here and nowhere else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from placement.errors import InputError

__all__ = ["AnyOf", "Cancellation", "Deadline", "Never", "StoppingCriterion"]


class StoppingCriterion(Protocol):
    """Says whether to stop now; asked often, so it must be cheap."""

    def __call__(self) -> bool:
        """Return True once the solve must end."""


class Never:
    """Let the solver end by itself."""

    def __call__(self) -> bool:
        """Return False."""
        return False


class Deadline:
    """Stop when a number of seconds has passed since the criterion was made.

    Parameters
    ----------
    seconds
        Time allowed, above 0.
    clock
        Source of seconds; monotonic.

    Raises
    ------
    InputError
        If `seconds` is not a positive number.
    """

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        if not seconds > 0:
            raise InputError(f"time limit is {seconds} s; it must be above 0")
        self.seconds = seconds
        self._clock = clock
        self._end = clock() + seconds

    def __call__(self) -> bool:
        """Return whether the time is up."""
        return self._clock() >= self._end


class Cancellation:
    """Stop when somebody calls `cancel` (Ctrl-C, a client that has seen enough)."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Ask the solve to end with what it has."""
        self._event.set()

    def __call__(self) -> bool:
        """Return whether `cancel` was called."""
        return self._event.is_set()


class AnyOf:
    """Stop as soon as one of several criteria says so."""

    def __init__(self, *criteria: StoppingCriterion) -> None:
        self._criteria = criteria

    def __call__(self) -> bool:
        """Return whether any criterion stops."""
        return any(criterion() for criterion in self._criteria)
