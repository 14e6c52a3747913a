"""What surrounds every request: an id, bounds on the body, strict headers, one line in the log."""

from __future__ import annotations

import random
import re
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Connection

from service.api.limits import BoundedBody
from service.api.logs import REQUEST_ID, AccessLine
from service.api.metrics import metrics_of
from service.settings import Settings

__all__ = ["Envelope"]

_GIVEN_ID = re.compile(rb"(?!mp_)[A-Za-z0-9._-]{1,64}")
_STRICT = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_DEFAULTS = [
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
]
"""Headers that a route may set for itself: the pages need scripts, placements may be revalidated."""


class Envelope:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = perf_counter()
        given_id, has_body = _look(scope)
        request_id = given_id or f"{random.getrandbits(64):016x}"
        REQUEST_ID.set(request_id)
        if has_body:
            receive = scope["body"] = BoundedBody(scope, receive, self._settings)
        reply = _Reply(send, request_id)
        try:
            await self._app(scope, receive, reply)
        finally:
            _tell(scope, reply, perf_counter() - begun)


def _tell(scope: Connection, reply: _Reply, seconds: float) -> None:
    caller, found = scope.get("caller"), scope.get("route")
    method, route = scope["method"], "-" if found is None else found.path
    metrics_of(scope["app"]).request(method, route, reply.status, seconds)
    AccessLine.write(
        method=method,
        route=route,
        status=reply.status,
        ms=seconds * 1e3,
        num_bytes=reply.num_bytes,
        caller="-" if caller is None else caller.id,
        request_id=reply.request_id,
    )


class _Reply:
    """ASGI's `send` with our headers, which remembers what was sent."""

    __slots__ = ("_send", "num_bytes", "request_id", "status")

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.status = 0
        self.num_bytes = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), *_STRICT]
            names = {name for name, _ in headers}
            headers += [default for default in _DEFAULTS if default[0] not in names]
            headers.append((b"x-request-id", self.request_id.encode()))
            message["headers"] = headers
        else:
            self.num_bytes += len(message.get("body", b""))
        await self._send(message)


def _look(scope: Connection) -> tuple[str | None, bool]:
    """Return the id that the caller gave to the request, and whether a body comes."""
    given, has_body = None, False
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _GIVEN_ID.fullmatch(value):
            given = value.decode()
        elif (name == b"content-length" and value != b"0") or name == b"transfer-encoding":
            has_body = True
    return given, has_body
