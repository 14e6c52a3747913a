"""Progress on stderr, and Ctrl-C as a wish to stop early."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from placement.solution import Incumbent
    from placement.stopping import Cancellation

__all__ = ["Progress", "cancel_on_interrupt", "showing_progress"]


@contextmanager
def cancel_on_interrupt(cancellation: Cancellation) -> Iterator[None]:
    """Let the first Ctrl-C (or SIGTERM) end the solve early with its incumbent, the second one kill it."""

    def stop(number: int, frame: FrameType | None) -> None:
        if cancellation():
            raise KeyboardInterrupt
        cancellation.cancel()
        sys.stderr.write("moe-placement: stopping early with the best placement so far\n")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """A line on a terminal: what runs, the incumbent, its bound and gap."""

    def __init__(self, show: object = None) -> None:
        self._show = show

    def task(self, text: str) -> None:
        """Say what runs now."""
        self._update(text)

    def incumbent(self, incumbent: Incumbent) -> None:
        """Show an improvement."""
        self._update(
            f"{incumbent.solver}: {incumbent.objective:.6g}, bound {incumbent.lower_bound:.6g}, "
            f"gap {incumbent.gap:.1%}"
        )

    def _update(self, text: str) -> None:
        if self._show is not None:
            self._show.update(description=text)  # type: ignore[attr-defined]


class _Task:
    def __init__(self, bar: object, task: object) -> None:
        self._bar, self._task = bar, task

    def update(self, *, description: str) -> None:
        self._bar.update(self._task, description=description)  # type: ignore[attr-defined]


@contextmanager
def showing_progress(text: str, *, limit_s: float | None = None) -> Iterator[Progress]:
    """Show a bar on stderr if it is a terminal; against the time limit where there is one."""
    if not sys.stderr.isatty():
        yield Progress()
        return
    import threading

    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=limit_s)
        ended = threading.Event()
        began_s = time.monotonic()

        def tick() -> None:
            while not ended.wait(0.2):
                bar.update(task, completed=time.monotonic() - began_s)

        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        try:
            yield Progress(_Task(bar, task))
        finally:
            ended.set()
            ticker.join()
