"""How much a caller may send: requests per minute, bytes per body, seconds between bytes."""

from __future__ import annotations

import asyncio
import math
import time

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.types import Message, Receive
from starlette.types import Scope as Connection

from service.api.security import Caller, authenticate
from service.errors import SlowBodyError, TooLargeError, TooManyRequestsError
from service.settings import Settings

__all__ = ["BoundedBody", "Rates"]

SLOWEST_BYTES_PER_S = 1024
"""A body that comes slower than this, on average, is given up."""


class Rates:
    """Counts the requests of every token, in this process: two numbers a token, however many requests.

    Parameters
    ----------
    default_per_minute
        For callers without a limit of their own; 0 for any number.
    """

    def __init__(self, default_per_minute: int) -> None:
        self._default = default_per_minute
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._items: dict[int, RateLimitItem] = {}

    def count(self, caller: Caller) -> None:
        """Count a request.

        Raises
        ------
        TooManyRequestsError
            If the minute before it held as many as allowed.
        """
        most = caller.limits.requests_per_minute or self._default
        if not most:
            return
        item = self._items.setdefault(most, RateLimitItemPerMinute(most))
        if not self._limiter.hit(item, caller.id):
            reset = self._limiter.get_window_stats(item, caller.id).reset_time
            wait_s = max(1, math.ceil(reset - time.time()))
            raise TooManyRequestsError(
                f"more than {most} requests in a minute; try again in {wait_s} s", retry_after=wait_s
            )


class BoundedBody:
    """The body of a request: nothing of it is read before the caller is known, and no more than allowed.

    It takes the place of ASGI's `receive`; a route that takes more sets `most_bytes`.
    """

    __slots__ = ("_connection", "_idle_s", "_is_over", "_receive", "_started", "most_bytes", "taken_bytes")

    def __init__(self, connection: Connection, receive: Receive, settings: Settings) -> None:
        self.most_bytes = settings.max_body_bytes
        self.taken_bytes = 0
        self._idle_s = settings.body_idle_seconds
        self._connection = connection
        self._receive = receive
        self._started = 0.0
        self._is_over = False

    async def __call__(self) -> Message:
        """Receive the next part.

        Raises
        ------
        TooLargeError
            If it is more than `most_bytes`.
        SlowBodyError
            If it does not come in time.
        """
        if self._is_over:
            # What comes after the body is the news that the caller went away, however late.
            return await self._receive()
        if not self.taken_bytes:
            await authenticate(self._connection)
            self.check_declared()
        message = await self._next()
        self._is_over = not message.get("more_body", False)
        self.taken_bytes += len(message.get("body", b""))
        if self.taken_bytes > self.most_bytes:
            raise _too_large(self.most_bytes)
        return message

    def check_declared(self) -> None:
        """Refuse by the declared length, before anything is read."""
        for name, value in self._connection["headers"]:
            if name == b"content-length" and value.isdigit() and int(value[:20]) > self.most_bytes:
                raise _too_large(self.most_bytes)

    async def _next(self) -> Message:
        loop = asyncio.get_running_loop()
        self._started = self._started or loop.time()
        latest = self._started + self._idle_s + self.taken_bytes / SLOWEST_BYTES_PER_S
        try:
            async with asyncio.timeout_at(min(loop.time() + self._idle_s, latest)):
                return await self._receive()
        except TimeoutError:
            raise SlowBodyError(
                f"the body stopped after {self.taken_bytes} bytes: nothing came for {self._idle_s:g} s, "
                f"or less than {SLOWEST_BYTES_PER_S} bytes a second did"
            ) from None


def _too_large(most_bytes: int) -> TooLargeError:
    return TooLargeError(f"the body is larger than the limit of {most_bytes} bytes", limit_bytes=most_bytes)
