"""Answers that cost something to make: made once, kept in memory, sent packed and only where they are new."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from functools import partial

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import Request, Response

from service.api.engine_files import IMMUTABLE, names_etag

__all__ = ["Answer", "KeptAnswers", "answer_of", "answer_response"]

MOST_BYTES = 32 << 20
LEAST_PACKED_BYTES = 1 << 12
LEVEL = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Content to send.

    Parameters
    ----------
    packed
        The same through gzip; None where that is not worth it.
    etag
        Digest of the content; with quotes.
    """

    content: bytes
    packed: bytes | None
    etag: str

    @property
    def size_bytes(self) -> int:
        """Memory that it takes."""
        return len(self.content) + len(self.packed or b"")


class KeptAnswers:
    """Makes answers, each once, with the most recent ones in memory; belongs to the event loop."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, asyncio.Task[Answer]] = OrderedDict()
        self._size_bytes = 0
        # It is computing: two at a time, so that requests are served beside it.
        self._limiter = CapacityLimiter(2)

    async def compute(self, key: Hashable, make: Callable[[], bytes]) -> Answer:
        """Return the answer of a key, made in a thread by a function if it is not known."""
        return await self.get(key, partial(anyio.to_thread.run_sync, make, limiter=self._limiter))

    async def get(self, key: Hashable, make: Callable[[], Awaitable[bytes]]) -> Answer:
        """Return the answer of a key, made by a coroutine if it is not known; failures are not kept."""
        task = self._kept.get(key)
        if task is None:
            task = self._kept[key] = asyncio.create_task(self._make(make))
            task.add_done_callback(lambda done: self._settle(key, done))
        else:
            self._kept.move_to_end(key)
        # A caller that hangs up must not take the others' answer along.
        return await asyncio.shield(task)

    async def _make(self, make: Callable[[], Awaitable[bytes]]) -> Answer:
        content = await make()
        return await anyio.to_thread.run_sync(answer_of, content, limiter=self._limiter)

    def _settle(self, key: Hashable, task: asyncio.Task[Answer]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._kept.pop(key, None)
            return
        self._size_bytes += task.result().size_bytes
        for old in list(self._kept):
            if self._size_bytes <= MOST_BYTES:
                break
            if self._kept[old].done():
                self._size_bytes -= self._kept.pop(old).result().size_bytes


def answer_of(content: bytes) -> Answer:
    """Return some content as an answer, packed where that is worth it."""
    packed = gzip.compress(content, LEVEL, mtime=0) if len(content) >= LEAST_PACKED_BYTES else None
    return Answer(content=content, packed=packed, etag=f'"{hashlib.sha256(content).hexdigest()}"')


def _takes_gzip(request: Request) -> bool:
    """Tell whether a caller takes gzip."""
    accepted = request.headers.get("accept-encoding", "").replace(" ", "").lower()
    return "gzip" in accepted and "gzip;q=0" not in accepted


def answer_response(request: Request, answer: Answer, media_type: str = "application/json") -> Response:
    """Answer with some content, packed where the caller takes that, or with 304 if the caller has it."""
    headers = {"ETag": answer.etag, "Cache-Control": IMMUTABLE, "Vary": "Accept-Encoding"}
    if names_etag(request.headers.get("if-none-match", ""), answer.etag):
        return Response(status_code=304, headers=headers)
    content = answer.content
    if answer.packed is not None and _takes_gzip(request):
        headers["Content-Encoding"] = "gzip"
        content = answer.packed
    return Response(content, media_type=media_type, headers=headers)
