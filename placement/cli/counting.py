"""Progress of many tasks or tokens: a bar on a terminal that counts what is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["counting_tokens", "showing_count"]


def _ignore(done: int, total: int, text: str) -> None:
    """Take no notice: there is no terminal."""


@contextmanager
def showing_count(text: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar on stderr if it is a terminal; yields what to call with done, total and what ended last."""
    if not sys.stderr.isatty():
        yield _ignore
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=None)

        def tell(done: int, total: int, last: str) -> None:
            bar.update(task, completed=done, total=total, description=escape(f"{text} {last}".strip()))

        yield tell


@contextmanager
def counting_tokens(text: str, num_tokens: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr if it is a terminal; yields what to call with the tokens done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(text, total=num_tokens)
        yield lambda done: bar.update(task, completed=done)
