"""Lets a recording end well when a signal ends the process: flush first, then the signal's own course."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from placement.errors import InputError

__all__ = ["SignalGuard"]


class SignalGuard:
    """Calls something when a signal comes, but not in the middle of a write.

    Parameters
    ----------
    stop
        What to do first; afterwards the signal goes to the handler that was there before, or is raised
        again for the system to act on.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._before: dict[int, Any] = {}
        self._came: int | None = None
        self._holding = 0

    def install(self, numbers: Sequence[int]) -> None:
        """Take over these signals; again for one taken over does nothing.

        Raises
        ------
        InputError
            Outside the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise InputError("signals can be handled in the main thread alone; call stop_on_signals there")
        for number in numbers:
            if number not in self._before:
                self._before[number] = signal.signal(number, self._handle)

    def remove(self) -> None:
        """Put the handlers back that were there before, unless somebody replaced ours meanwhile."""
        if threading.current_thread() is not threading.main_thread():
            return  # ours stay, and only pass signals on
        for number, before in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, before if before is not None else signal.SIG_DFL)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Put a signal off to the end of the block."""
        self._holding += 1
        try:
            yield
        finally:
            self._holding -= 1
            if not self._holding and self._came is not None:
                came, self._came = self._came, None
                self._handle(came, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._came = number
            return
        try:
            self._stop()
        finally:
            before = self._before.get(number)
            if callable(before):
                before(number, frame)
            elif before != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
