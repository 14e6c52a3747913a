"""A server on a real socket that answers as it is told to: late, in parts, with nonsense, or not at all."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

__all__ = [
    "Request",
    "ScriptedServer",
    "Step",
    "answer",
    "drip",
    "drop",
    "event",
    "json_answer",
    "problem",
    "raw",
    "stall",
    "stream",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


Step = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]


class ScriptedServer:
    """Takes each request with the next step of a script; the last step stays.

    Parameters
    ----------
    steps
        What to do, request by request.
    """

    def __init__(self, *steps: Step) -> None:
        self.requests: list[Request] = []
        self._steps = list(steps)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result()
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            # One request a connection: every answer says that it closes.
            request = await _read(reader)
            if request is not None:
                self.requests.append(request)
                step = self._steps.pop(0) if len(self._steps) > 1 else self._steps[0]
                await step(request, writer)
        except ConnectionError:
            pass
        finally:
            self._tasks.discard(task)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def _read(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    except asyncio.IncompleteReadError:
        return None
    method, path, _ = head[0].split(" ")
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)
    }
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(method=method, path=path, headers=headers, body=body)


def raw(content: bytes) -> Step:
    """Send bytes as they are, and close."""

    async def step(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(content)
        await writer.drain()

    return step


def answer(status: int, body: bytes = b"", **headers: str) -> Step:
    """Send an answer; an underscore in a header's name is a hyphen."""
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def json_answer(document: Any, status: int = 200, **headers: str) -> Step:
    """Send JSON."""
    return answer(status, json.dumps(document).encode(), content_type="application/json", **headers)


def problem(status: int, code: str, detail: str = "that is so", **headers: str) -> Step:
    """Send a problem document."""
    document = {"status": status, "code": code, "detail": detail, "title": "X"}
    return answer(status, json.dumps(document).encode(), content_type="application/problem+json", **headers)


def drop() -> Step:
    """Close without an answer."""
    return raw(b"")


def stall(content: bytes = b"") -> Step:
    """Send something, and then nothing more."""

    async def step(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(content)
        await writer.drain()
        await asyncio.sleep(3600)

    return step


def drip() -> Step:
    """Send an answer for ever, a byte at a time."""

    async def step(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 X\r\ncontent-length: 1000000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.01)

    return step


def event(seq: int, kind: str = "progress", **data: Any) -> bytes:
    """Return an event as the service writes it."""
    return f"id: {seq}\nevent: {kind}\ndata: {json.dumps(data or {'n': seq})}\n\n".encode()


def stream(*parts: bytes, then: Step | None = None) -> Step:
    """Send parts of an event stream, and then close or do something else."""

    async def step(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 X\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
        if then is not None:
            await then(request, writer)

    return step
