"""Events of a job as server-sent events: without gaps or repeats, read once however many listen."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass

import anyio
import orjson
from anyio import CapacityLimiter
from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

from service.api.metrics import metrics_of
from service.api.watch import GONE, Watcher
from service.errors import UnavailableError
from service.state.jobs import JobStore
from service.state.records import Event

__all__ = ["Chunk", "EventFeed", "EventStream", "feed_of"]

_log = logging.getLogger(__name__)

KEEP_ALIVE_S = 15.0
RETRY_MS = 1000
SEND_TIMEOUT_S = 30.0
"""How long a listener may take nothing in before it is let go; it resumes where it was."""

MOST_EVENTS = 200
MOST_CHUNKS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Some events of a job, as they go over the wire.

    Parameters
    ----------
    last
        Number of the last event.
    done
        Whether it is the last one of the job.
    """

    content: bytes
    last: int
    done: bool


class EventFeed:
    """Reads the events of jobs once for all listeners of this process.

    Events never change, so what follows on a number may be kept: it is a beginning of what is to come.
    """

    def __init__(self, jobs: JobStore) -> None:
        self._jobs = jobs
        self._chunks: OrderedDict[tuple[str, int], asyncio.Task[Chunk | None]] = OrderedDict()
        self._limiter = CapacityLimiter(4)

    async def after(self, job_id: str, seq: int) -> Chunk | None:
        """Return events that follow on a number, None if there are none yet."""
        key = (job_id, seq)
        task = self._chunks.get(key)
        if task is None:
            task = asyncio.create_task(self._read(job_id, seq))
            self._chunks[key] = task
            task.add_done_callback(lambda done: self._settle(key, done))
        # One listener that goes away must not take the read from the others.
        return await asyncio.shield(task)

    async def _read(self, job_id: str, seq: int) -> Chunk | None:
        def read() -> Chunk | None:
            events = self._jobs.events(job_id, after=seq, limit=MOST_EVENTS)
            return _chunk_of(events) if events else None

        return await anyio.to_thread.run_sync(read, limiter=self._limiter)

    def _settle(self, key: tuple[str, int], task: asyncio.Task[Chunk | None]) -> None:
        """Keep what was found; nothing and failures are asked for again."""
        if task.cancelled() or task.exception() is not None or task.result() is None:
            self._chunks.pop(key, None)
        elif key in self._chunks:
            self._chunks.move_to_end(key)
        while len(self._chunks) > MOST_CHUNKS:
            self._chunks.popitem(last=False)


def _chunk_of(events: list[Event]) -> Chunk:
    content = b"".join(
        ServerSentEvent(
            orjson.dumps(event.data).decode(), event=event.kind, id=str(event.seq), sep="\n"
        ).encode()
        for event in events
    )
    return Chunk(content=content, last=events[-1].seq, done=events[-1].kind == "done")


async def _content(feed: EventFeed, watcher: Watcher, job_id: str, after: int) -> AsyncIterator[bytes]:
    """Yield what a listener is to receive until the job is done, gone, or the server ends."""
    yield f"retry: {RETRY_MS}\n\n".encode()
    last = after
    try:
        while not watcher.closed:
            chunk = await feed.after(job_id, last)
            if chunk is not None:
                yield chunk.content
                last = chunk.last
                if chunk.done:
                    return
            elif await watcher.wait("job", job_id, last, KEEP_ALIVE_S) == GONE:
                return
    except UnavailableError as exc:
        # The answer has begun: the listener learns of it by coming back.
        yield ServerSentEvent(comment=exc.detail, sep="\n").encode()


class EventStream(EventSourceResponse):
    """Answer that carries the events of a job from a number on.

    Parameters
    ----------
    after
        Number of the last event that the listener has.
    """

    def __init__(self, feed: EventFeed, watcher: Watcher, job_id: str, *, after: int = 0) -> None:
        super().__init__(
            _content(feed, watcher, job_id, after),
            ping=KEEP_ALIVE_S,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            send_timeout=SEND_TIMEOUT_S,
            sep="\n",
        )
        self._job_id = job_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send; a listener that takes nothing in is let go without an error of the server's."""
        try:
            with metrics_of(scope["app"]).event_listeners.track_inprogress():
                await super().__call__(scope, receive, send)
        except SendTimeoutError:
            _log.info("a listener of %s takes nothing in; its connection ends", self._job_id)


def feed_of(request: Request) -> EventFeed:
    """Return the feed of the process that serves a request."""
    state = request.app.state
    found = getattr(state, "event_feed", None)
    if found is None:
        found = state.event_feed = EventFeed(state.context.jobs)
    feed: EventFeed = found
    return feed
