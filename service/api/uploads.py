"""Takes uploaded files: streamed to disk within bounds, unpacked on the way, never held in memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Protocol

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import Request

from service.api.limits import BoundedBody
from service.api.security import Caller
from service.artifacts import Draft
from service.errors import InvalidError, TooLargeError, UnsupportedMediaError
from service.settings import Settings

__all__ = ["PLACEMENT_TYPES", "TRACE_TYPES", "check_content_type", "limit_of", "receive_upload"]

FLUSH_BYTES = 1 << 20
"""Bytes that are gathered before a thread writes them."""

_BINARY = ("application/octet-stream", "binary/octet-stream")
_JSON = ("application/json", "text/json")
TRACE_TYPES = frozenset(
    {
        *_BINARY,
        *_JSON,
        "application/zip",
        "application/x-zip-compressed",
        "application/gzip",
        "application/x-gzip",
        "application/x-tar",
        "application/x-gtar",
        "application/x-npz",
        "application/x-npy",
        "application/x-ndjson",
        "application/jsonl",
    }
)
PLACEMENT_TYPES = frozenset(
    {*_BINARY, *_JSON, "application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml", "text/plain"}
)


class _Decoder(Protocol):
    def feed(self, data: bytes) -> None: ...

    def end(self) -> None: ...


class _Plain:
    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.feed = write

    def end(self) -> None:
        """Nothing is held back."""


class _Gzip:
    """Decompresses piece by piece, so that a bomb goes off no further than its limit."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._member = zlib.decompressobj(wbits=31)

    def feed(self, data: bytes) -> None:
        try:
            while data:
                if self._member.eof:
                    self._member = zlib.decompressobj(wbits=31)
                self._write(self._member.decompress(data, FLUSH_BYTES))
                data = self._member.unconsumed_tail or self._member.unused_data
        except zlib.error as exc:
            raise InvalidError(f"the body is no gzip data as its Content-Encoding says: {exc}") from exc

    def end(self) -> None:
        # What is left of the output comes in pieces as well: a megabyte in may hold a gigabyte.
        while not self._member.eof:
            piece = self._member.decompress(b"", FLUSH_BYTES)
            if not piece:
                raise InvalidError("the body's gzip data ends too early; send it again")
            self._write(piece)


def limit_of(settings: Settings, caller: Caller) -> int:
    """Return how large an upload of a caller may be."""
    return min(settings.max_upload_bytes, caller.limits.max_upload_bytes or settings.max_upload_bytes)


def check_content_type(request: Request, allowed: frozenset[str]) -> None:
    """Refuse bodies of types that are not taken; no type at all is fine, the content tells.

    Raises
    ------
    UnsupportedMediaError
        If it is another.
    """
    given = request.headers.get("content-type")
    kind = "" if given is None else given.partition(";")[0].strip().lower()
    if given is None or kind in allowed:
        return
    hint = ""
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        hint = ": send the file itself as the body"
    raise UnsupportedMediaError(
        f"Content-Type {kind[:80]!r} is not taken{hint}; use application/octet-stream"
    )


def encoding_of(request: Request) -> str:
    """Return the body's content encoding: ``identity``, ``gzip`` or ``zstd``.

    Raises
    ------
    UnsupportedMediaError
        If it is another, or several.
    """
    given = request.headers.get("content-encoding", "identity").strip().lower()
    found = {"": "identity", "x-gzip": "gzip"}.get(given, given)
    if found not in ("identity", "gzip", "zstd"):
        raise UnsupportedMediaError(f"Content-Encoding {given[:80]!r} is not taken; use gzip, zstd or none")
    return found


async def receive_upload(request: Request, draft: Draft, *, most_bytes: int) -> None:
    """Write a request's body to a draft; gzip is unpacked, zstd comes as it is.

    Parameters
    ----------
    most_bytes
        Size that is taken, as sent and once decompressed.

    Raises
    ------
    TooLargeError
        If it is larger.
    InvalidError
        If there is none, or it is not encoded as the header says.
    SlowBodyError
        If it stops coming.
    """
    body: BoundedBody | None = request.scope.get("body")
    if body is None:
        raise InvalidError("the body is empty; it must be the file itself")
    body.most_bytes = most_bytes

    def write(chunk: bytes) -> None:
        if draft.size_bytes + len(chunk) > most_bytes:
            raise TooLargeError(f"the body unpacks to more than the limit of {most_bytes} bytes")
        draft.write(chunk)

    decoder: _Decoder = _Gzip(write) if encoding_of(request) == "gzip" else _Plain(write)
    limiter: CapacityLimiter = request.app.state.upload_threads
    pending: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        pending.append(chunk)
        size += len(chunk)
        if size >= FLUSH_BYTES:
            await anyio.to_thread.run_sync(decoder.feed, b"".join(pending), limiter=limiter)
            pending, size = [], 0
    await anyio.to_thread.run_sync(_finish, decoder, b"".join(pending), limiter=limiter)
    if not draft.size_bytes:
        raise InvalidError("the body is empty; it must be the file itself")


def _finish(decoder: _Decoder, rest: bytes) -> None:
    decoder.feed(rest)
    decoder.end()
