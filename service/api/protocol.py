"""uvicorn's HTTP protocol with bounds on what comes before a request is known: size and time of its head."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["BoundedProtocol"]

MOST_HEAD_BYTES = 64 << 10
HEAD_S = 30.0
"""How long a connection may take for its first bytes, and a request for its head."""
MOST_DRAINED_BYTES = 16 << 20
"""What is still read, and dropped, of a body whose request was answered: who is cut off while sending does
not see the answer."""


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections whose request does not begin, does not stop beginning, or does not end."""

    _chunk_bytes = 0
    _drained_bytes = 0
    _head_bytes = 0
    _is_in_head = True
    _has_begun = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; those of an unfinished head are counted and timed."""
        self._chunk_bytes = len(data)
        super().data_received(data)
        if not self._is_in_head:
            return
        self._head_bytes += len(data)
        if self._head_bytes > MOST_HEAD_BYTES:
            self._refuse(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "head-too-large", "the head is too large"
            )
        elif self._timer is None:
            self._wait()

    def on_message_begin(self) -> None:
        """Begin a head."""
        super().on_message_begin()
        # What it begins in is not counted: it may be the end of a body.
        self._head_bytes, self._is_in_head, self._has_begun = -self._chunk_bytes, True, True

    def on_headers_complete(self) -> None:
        """End a head."""
        self._is_in_head = False
        if self._timer is not None:
            self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body; one that nobody waits for any more comes to an end."""
        super().on_body(body)
        if self.cycle.response_complete:
            self._drained_bytes += len(body)
            if self._drained_bytes > MOST_DRAINED_BYTES:
                self.transport.close()

    def on_message_complete(self) -> None:
        """End a request."""
        if self._timer is not None:
            self._stop_waiting()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """End an answer, which may come before its request has ended."""
        super().on_response_complete()
        if self.cycle.more_body and not self._is_in_head and self._timer is None:
            self._drained_bytes = 0
            self._wait()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, "invalid", "this is no HTTP request")

    def _wait(self) -> None:
        self._timer = self.loop.call_later(HEAD_S, self._give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._has_begun and self._is_in_head:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "request-timeout", f"no whole request in {HEAD_S:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: HTTPStatus, code: str, detail: str) -> None:
        """Answer without a request, and close; nothing to answer if it is closed already."""
        if self.transport.is_closing():
            return
        problem = {
            "type": f"urn:moe-placement:problem:{code}",
            "title": status.phrase,
            "status": int(status),
            "code": code,
            "detail": detail,
        }
        body = orjson.dumps(problem)
        head = (
            f"HTTP/1.1 {int(status)} {status.phrase}\r\ncontent-type: application/problem+json\r\n"
            f"content-length: {len(body)}\r\nx-content-type-options: nosniff\r\ncache-control: no-store\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
