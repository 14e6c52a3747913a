"""Sends calls and listens to streams: once for those who wait, once for those who await."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from service.client.call import MOST_ANSWER_BYTES, Budget, Call, Reply
from service.client.connection import Connection, translated
from service.client.errors import AnswerError
from service.client.following import Following
from service.client.results import Event
from service.client.retries import tenacity_options
from service.client.steps import Steps
from service.errors import ProblemError

if TYPE_CHECKING:
    import httpx

__all__ = ["AsyncTransport", "Transport"]

T = TypeVar("T")


class Transport:
    """Connections of a caller that waits."""

    def __init__(self, connection: Connection) -> None:
        options = connection.options()
        import httpx

        self.connection = connection
        self._http = httpx.Client(**options)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(self, call: Call[T]) -> T:
        """Send a call, again where that is safe, and return its result."""
        from tenacity import Retrying

        budget = self.connection.budget(call)
        options = tenacity_options(call, self.connection.backoff, budget)
        result: T = Retrying(**options)(self._attempt, call, budget)
        return result

    def _attempt(self, call: Call[T], budget: Budget) -> T:
        request = {**_request(call), "timeout": self.connection.timeout(call, budget)}
        if call.body is not None:
            request["content"] = call.body()
        with translated(call.where, self.connection.url), self._http.stream(**request) as response:
            content = bytearray()
            for chunk in response.iter_bytes():
                _add(content, chunk, call, budget)
        return call.result(_reply(response, bytes(content), call.where))

    def drive(self, work: Steps[T]) -> T:
        """Send what the steps ask for; return what they come to."""
        try:
            call = next(work)
            while True:
                try:
                    answer = self.send(call)
                except ProblemError as exc:
                    call = work.throw(exc)
                else:
                    call = work.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result

    def listen(self, follow: Following) -> Iterator[Event]:
        """Yield the events of one connection."""
        from httpx_sse import EventSource

        request = _listening(self.connection, follow)
        with translated(follow.where, self.connection.url), self._http.stream(**request) as response:
            if response.status_code != 200:
                follow.refused(_reply(response, response.read(), follow.where))
                return
            follow.opened(response.headers.get("content-type", ""))
            for sent in EventSource(response).iter_sse():
                if (event := follow.take(sent)) is not None:
                    yield event
                if follow.ended:
                    return


class AsyncTransport:
    """Connections of a caller that awaits."""

    def __init__(self, connection: Connection) -> None:
        options = connection.options()
        import httpx

        self.connection = connection
        self._http = httpx.AsyncClient(**options)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(self, call: Call[T]) -> T:
        """Send a call, again where that is safe, and return its result."""
        import anyio
        from tenacity import AsyncRetrying

        budget = self.connection.budget(call)
        options = tenacity_options(call, self.connection.backoff, budget)
        result: T = await AsyncRetrying(sleep=anyio.sleep, **options)(self._attempt, call, budget)
        return result

    async def _attempt(self, call: Call[T], budget: Budget) -> T:
        request = {**_request(call), "timeout": self.connection.timeout(call, budget)}
        if call.body is not None:
            body = call.body()
            request["content"] = body if isinstance(body, bytes) else _in_threads(body)
        with translated(call.where, self.connection.url):
            async with self._http.stream(**request) as response:
                content = bytearray()
                async for chunk in response.aiter_bytes():
                    _add(content, chunk, call, budget)
        return call.result(_reply(response, bytes(content), call.where))

    async def drive(self, work: Steps[T]) -> T:
        """Send what the steps ask for; return what they come to."""
        try:
            call = next(work)
            while True:
                try:
                    answer = await self.send(call)
                except ProblemError as exc:
                    call = work.throw(exc)
                else:
                    call = work.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result

    async def listen(self, follow: Following) -> AsyncIterator[Event]:
        """Yield the events of one connection."""
        from httpx_sse import EventSource

        request = _listening(self.connection, follow)
        with translated(follow.where, self.connection.url):
            async with self._http.stream(**request) as response:
                if response.status_code != 200:
                    follow.refused(_reply(response, await response.aread(), follow.where))
                    return
                follow.opened(response.headers.get("content-type", ""))
                async for sent in EventSource(response).aiter_sse():
                    if (event := follow.take(sent)) is not None:
                        yield event
                    if follow.ended:
                        return


def _request(call: Call[Any]) -> dict[str, Any]:
    return {
        "method": call.method,
        "url": call.path,
        "params": dict(call.params),
        "headers": dict(call.headers),
    }


def _listening(connection: Connection, follow: Following) -> dict[str, Any]:
    return {
        "method": "GET",
        "url": follow.path,
        "headers": follow.headers,
        "timeout": connection.stream_timeout(follow.read_s),
    }


def _add(content: bytearray, chunk: bytes, call: Call[Any], budget: Budget) -> None:
    """Take a part of an answer, within the limits of time and size."""
    content += chunk
    budget.check(call.where)
    if len(content) > MOST_ANSWER_BYTES:
        raise AnswerError(f"{call.where}: the answer has more than {MOST_ANSWER_BYTES:,} bytes")


async def _in_threads(body: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Read a body without holding up the event loop."""
    import anyio

    while (chunk := await anyio.to_thread.run_sync(next, body, None)) is not None:
        yield chunk


def _reply(response: httpx.Response, content: bytes, where: str) -> Reply:
    headers = {key.lower(): value for key, value in response.headers.items()}
    return Reply(status=response.status_code, headers=headers, content=content, where=where)
