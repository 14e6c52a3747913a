"""The asynchronous client: the same calls as `Client`, awaited."""

from __future__ import annotations

import inspect
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any

from placement.errors import ServiceError
from service.client import calls, deployment_calls, steps
from service.client.call import Budget
from service.client.client import DEADLINE_S, TIMEOUT_S
from service.client.connection import Connection
from service.client.following import Following
from service.client.results import (
    Deployment,
    DeploymentPlacement,
    Evaluation,
    Event,
    PlacementFile,
    Solve,
    Trace,
    Version,
    WindowsTaken,
)
from service.client.retries import Backoff
from service.client.transport import AsyncTransport
from service.client.uploads import Upload
from service.errors import NotFoundError

__all__ = ["AsyncClient"]


class AsyncClient:
    """A caller of the placement service in an event loop; parameters and methods are those of `Client`.

    Wrap the iterators in `contextlib.aclosing` where they are left before their end.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        token_file: str | os.PathLike[str] | None = None,
        deadline_s: float = DEADLINE_S,
        timeout_s: float = TIMEOUT_S,
        allow_http: bool = False,
        backoff: Backoff | None = None,
    ) -> None:
        connection = Connection.of(
            url,
            token=token,
            token_file=token_file,
            allow_http=allow_http,
            deadline_s=deadline_s,
            timeout_s=timeout_s,
            backoff=backoff,
        )
        self._transport = AsyncTransport(connection)
        self._send = self._transport.send

    @property
    def url(self) -> str:
        """The service."""
        return self._transport.connection.url

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Traces and placements

    async def upload_trace(self, path: str | os.PathLike[str], *, model: str | None = None) -> Trace:
        """As `Client.upload_trace`; files are read in threads."""
        import anyio

        upload = await anyio.to_thread.run_sync(Upload, path)
        digest = await anyio.to_thread.run_sync(upload.digest)
        return await self._transport.drive(steps.upload_trace(upload, digest, model=model))

    async def upload_placement(
        self, content: bytes, *, devices: int | None = None, model: str | None = None
    ) -> str:
        """As `Client.upload_placement`."""
        return await self._send(calls.send_placement(content, devices=devices, model=model))

    async def placement(self, placement_or_solve_id: str, *, format: str = "native") -> PlacementFile:
        """As `Client.placement`."""
        return await self._send(calls.placement_file(placement_or_solve_id, format=format))

    # Solves and evaluations

    async def submit(
        self,
        trace_id: str,
        topology: str | Mapping[str, Any],
        *,
        model: str | Mapping[str, Any] | None = None,
        start: str | None = None,
        options: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        priority: int = 0,
        validate_only: bool = False,
    ) -> Solve:
        """As `Client.submit`."""
        call = calls.submit(
            trace_id,
            topology,
            model=model,
            start=start,
            options=options or {},
            idempotency_key=idempotency_key or uuid.uuid4().hex,
            priority=priority,
            validate_only=validate_only,
            wait_s=steps.WAIT_S,
        )
        return await self._send(call)

    async def solve(self, solve_id: str) -> Solve:
        """As `Client.solve`."""
        return await self._send(calls.solve(solve_id))

    async def solves(
        self, *, status: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> tuple[list[Solve], str | None]:
        """As `Client.solves`."""
        return await self._send(calls.solves(status=status, limit=limit, cursor=cursor))

    async def stop(self, solve_id: str) -> Solve:
        """As `Client.stop`."""
        return await self._send(calls.stop(solve_id))

    async def events(
        self, solve_id: str, *, after: int = 0, timeout_s: float | None = None
    ) -> AsyncIterator[Event]:
        """As `Client.events`."""
        import anyio

        follow = Following(self._transport.connection, solve_id, after=after, timeout_s=timeout_s)
        while not follow.ended:
            error: ServiceError | None = None
            try:
                async with aclosing(self._transport.listen(follow)) as stream:  # type: ignore[type-var]
                    async for event in stream:
                        yield event
            except ServiceError as exc:
                error = exc
            await anyio.sleep(follow.pause_s(error))

    async def wait(
        self,
        solve_id: str,
        *,
        on_event: Callable[[Event], Awaitable[None] | None] = lambda _: None,
        timeout_s: float | None = None,
    ) -> Solve:
        """As `Client.wait`; what `on_event` returns is awaited where it can be."""
        async for event in self.events(solve_id, timeout_s=timeout_s):
            told = on_event(event)
            if inspect.isawaitable(told):
                await told
        return await self.solve(solve_id)

    async def evaluate(
        self,
        placement_id: str,
        trace_id: str,
        topology: str | Mapping[str, Any],
        *,
        model: str | Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        timeout_s: float = 600.0,
    ) -> Evaluation:
        """As `Client.evaluate`."""
        work = steps.evaluate(
            placement_id, trace_id, topology, model=model, options=options or {}, limit=Budget(timeout_s)
        )
        return await self._transport.drive(work)

    # Deployments

    async def put_deployment(
        self, name: str, spec: Mapping[str, Any], *, if_match: str | None = None
    ) -> Deployment:
        """As `Client.put_deployment`."""
        return await self._send(deployment_calls.put_deployment(name, spec, if_match=if_match))

    async def deployment(self, name: str) -> Deployment:
        """As `Client.deployment`."""
        return await self._send(deployment_calls.deployment(name))

    async def deployments(self) -> list[Deployment]:
        """As `Client.deployments`."""
        return await self._transport.drive(
            steps.all_pages(lambda cursor: deployment_calls.deployments(cursor=cursor))
        )

    async def delete_deployment(self, name: str, *, if_match: str | None = None) -> None:
        """As `Client.delete_deployment`."""
        await self._send(deployment_calls.delete_deployment(name, if_match=if_match))

    async def deployment_placement(
        self, name: str, *, etag: str | None = None, wait_s: float = 0.0
    ) -> DeploymentPlacement | None:
        """As `Client.deployment_placement`."""
        return await self._send(deployment_calls.deployment_placement(name, etag=etag, wait_s=wait_s))

    async def watch_placement(
        self, name: str, *, etag: str | None = None, timeout_s: float | None = None
    ) -> AsyncIterator[DeploymentPlacement]:
        """As `Client.watch_placement`."""
        import anyio

        limit = Budget(timeout_s)
        while not limit.spent:
            wait_s = max(0.0, limit.left_s(steps.WAIT_S))
            try:
                found = await self.deployment_placement(name, etag=etag, wait_s=wait_s)
            except NotFoundError:
                await self.deployment(name)
                await anyio.sleep(max(0.0, limit.left_s(1.0)))
                continue
            if found is not None:
                etag = found.etag
                yield found

    async def promote(
        self,
        name: str,
        *,
        solve: str | None = None,
        placement: str | None = None,
        why: str = "",
        if_match: str | None = None,
    ) -> Version:
        """As `Client.promote`."""
        call = deployment_calls.promote(name, solve=solve, placement=placement, why=why, if_match=if_match)
        return await self._send(call)

    async def rollback(
        self, name: str, *, version: int | None = None, why: str = "", if_match: str | None = None
    ) -> Version:
        """As `Client.rollback`."""
        return await self._send(deployment_calls.rollback(name, version=version, why=why, if_match=if_match))

    async def versions(self, name: str) -> list[Version]:
        """As `Client.versions`."""
        pages = steps.all_pages(lambda cursor: deployment_calls.versions(name, cursor=cursor))
        return await self._transport.drive(pages)

    async def post_windows(
        self,
        name: str,
        windows: Iterable[Mapping[str, Any]],
        *,
        rank: int = 0,
        version: int | None = None,
    ) -> WindowsTaken:
        """As `Client.post_windows`."""
        return await self._send(deployment_calls.post_windows(name, windows, rank=rank, version=version))

    async def health(self) -> Mapping[str, Any]:
        """As `Client.health`."""
        return await self._send(calls.health())
