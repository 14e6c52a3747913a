"""Reads that many requests make at once: who comes while one runs shares the next.

Nobody is told what was read before he asked, so an answer is as true as a read of one's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import anyio.to_thread

__all__ = ["SharedReads"]

T = TypeVar("T")


class SharedReads(Generic[T]):
    """Reads by key, of each key one at a time; belongs to the event loop."""

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Task[T]] = {}
        self._next: dict[Hashable, asyncio.Task[T]] = {}

    async def get(self, key: Hashable, read: Callable[[], T]) -> T:
        """Return what `read` returns, begun after this call."""
        task = self._next.get(key)
        if task is None:
            task = asyncio.create_task(self._run(key, read, self._running.get(key)))
            self._next[key] = task
        # A caller that hangs up must not take the others' read along.
        return await asyncio.shield(task)

    async def _run(self, key: Hashable, read: Callable[[], T], before: asyncio.Task[T] | None) -> T:
        if before is not None:
            await asyncio.wait([before])
        own = self._running[key] = self._next.pop(key)
        try:
            return await anyio.to_thread.run_sync(read)
        finally:
            if self._running.get(key) is own:
                del self._running[key]
