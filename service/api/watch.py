"""News for whoever waits: one task asks the database after every awaited key at once, and wakes its waiters.

State is changed by other processes, so somebody has to look; that a thousand listeners look costs as much as
one, because keys are asked for in bulk and only while somebody waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from sqlalchemy.exc import SQLAlchemyError

from placement.errors import ServiceError
from service.errors import UnavailableError
from service.state.jobs import JobStore

__all__ = ["GONE", "Heads", "Watcher", "job_heads"]

_log = logging.getLogger(__name__)

Heads = Callable[[Sequence[str]], Mapping[str, int]]
"""Asks the database, in one query, how far the counters of some keys are; unknown keys are left out."""

GONE = -1
"""What a waiter is told of a key that is not there (any more)."""

MOST_KEYS = 500
PATIENCE_S = 5.0

Key = tuple[str, str]


def job_heads(jobs: JobStore) -> Heads:
    """Return the counters of the topic ``job``: the number of the last event by the job's id."""
    return lambda ids: {job_id: head.event_seq for job_id, head in jobs.heads(ids).items()}


@dataclass(slots=True, eq=False)
class _Waiter:
    seen: int
    news: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def tell(self, value: int) -> None:
        if not self.news.done() and (value > self.seen or value == GONE):
            self.news.set_result(value)

    def end(self, value: int) -> None:
        if not self.news.done():
            self.news.set_result(value)

    def fail(self, why: str) -> None:
        if not self.news.done():
            self.news.set_exception(UnavailableError(why))


class Watcher:
    """Waits for counters in the database to go up.

    All methods but `nudge` belong to the event loop of the server.

    Parameters
    ----------
    topics
        Who knows the counters of which topic: ``{"job": job_heads(jobs), "deployment": deployments.heads}``.
    poll_s
        Seconds between two looks while somebody waits.
    patience_s
        Seconds without an answer of the database after which waiters are let go with an error.
    """

    def __init__(
        self, topics: Mapping[str, Heads], *, poll_s: float = 0.05, patience_s: float = PATIENCE_S
    ) -> None:
        self._topics = dict(topics)
        self._poll_s = poll_s
        self._patience_s = patience_s
        self._waiters: dict[Key, set[_Waiter]] = {}
        self._values: dict[Key, int] = {}
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._kick = asyncio.Event()
        # A thread of its own: requests that fill the common pool must not hold up the news.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="watcher")

    @property
    def closed(self) -> bool:
        """Whether the server is about to end: who waits in a loop leaves it."""
        return self._closed

    @property
    def num_waiting(self) -> int:
        """How many waiters there are."""
        return sum(map(len, self._waiters.values()))

    async def wait(self, topic: str, key: str, seen: int, timeout_s: float) -> int:
        """Return the counter of a key as soon as it exceeds `seen`.

        Returns `GONE` once there is no such key, and the last known value, which may be `seen`, after
        `timeout_s` seconds or when the server ends (see `closed`).

        Raises
        ------
        UnavailableError
            If the database has not answered for a while.
        """
        where = (topic, key)
        if self._closed or timeout_s <= 0:
            return self._known(where, seen)
        waiter = _Waiter(seen)
        self._waiters.setdefault(where, set()).add(waiter)
        self._start()
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter.news
        except TimeoutError:
            return self._known(where, seen)
        finally:
            self._leave(where, waiter)

    def nudge(self, topic: str, key: str) -> None:
        """Look at once, because this process has just changed a key; callable from any thread."""
        if (topic, key) in self._waiters and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._kick.set)

    def close(self) -> None:
        """Let every waiter go, now and in future; call it when the server begins to shut down."""
        self._closed = True
        for where, waiters in self._waiters.items():
            for waiter in waiters:
                waiter.end(self._known(where, waiter.seen))
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _known(self, where: Key, seen: int) -> int:
        return max(seen, self._values.get(where, seen))

    def _leave(self, where: Key, waiter: _Waiter) -> None:
        """Forget a waiter, and its key with the last one."""
        waiters = self._waiters.get(where, set())
        waiters.discard(waiter)
        if not waiters:
            self._waiters.pop(where, None)
            self._values.pop(where, None)

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._loop = asyncio.get_running_loop()
            self._task = self._loop.create_task(self._run(), name="watcher")

    async def _run(self) -> None:
        """Look at every awaited key again and again until nobody waits."""
        while self._waiters:
            await self._pause()
            try:
                await self._look()
            except (SQLAlchemyError, ServiceError, OSError, TimeoutError) as exc:
                await self._bear(exc)

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(self._poll_s):
                await self._kick.wait()
        except TimeoutError:
            pass
        self._kick.clear()

    async def _look(self) -> None:
        by_topic: dict[str, list[str]] = {}
        for topic, key in self._waiters:
            by_topic.setdefault(topic, []).append(key)
        for topic, keys in by_topic.items():
            for first in range(0, len(keys), MOST_KEYS):
                some = keys[first : first + MOST_KEYS]
                self._tell(topic, some, await self._ask(topic, some))

    async def _ask(self, topic: str, keys: Sequence[str]) -> Mapping[str, int]:
        """Ask in the watcher's thread; a database that does not answer leaves the waiters not hanging."""
        loop = asyncio.get_running_loop()
        answer = loop.run_in_executor(self._thread, self._topics[topic], keys)
        while not answer.done():
            done, _ = await asyncio.wait({answer}, timeout=self._patience_s)
            if not done:
                self._fail("the database does not answer; try again in a while")
        return answer.result()

    def _tell(self, topic: str, keys: Sequence[str], values: Mapping[str, int]) -> None:
        for key in keys:
            where = (topic, key)
            value = values.get(key, GONE)
            waiters = self._waiters.get(where, ())
            if waiters:
                self._values[where] = value
            for waiter in waiters:
                waiter.tell(value)

    async def _bear(self, first: Exception) -> None:
        """Keep asking for as long as patience lasts, then let the waiters go."""
        _log.warning("cannot look for news: %s", " ".join(str(first).split()))
        deadline = asyncio.get_running_loop().time() + self._patience_s
        while self._waiters and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(max(self._poll_s, 0.2))
            try:
                return await self._look()
            except (SQLAlchemyError, ServiceError, OSError, TimeoutError):
                continue
        return self._fail("the database cannot be reached; try again in a while")

    def _fail(self, why: str) -> None:
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.fail(why)
