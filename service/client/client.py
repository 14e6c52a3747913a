"""The client: every request of the service as a method, tried again where that is safe."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

from placement.errors import ServiceError
from service.client import calls, deployment_calls, steps
from service.client.call import Budget
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
from service.client.transport import Transport
from service.client.uploads import Upload
from service.errors import NotFoundError

__all__ = ["DEADLINE_S", "TIMEOUT_S", "Client"]

DEADLINE_S = 120.0
TIMEOUT_S = 30.0


class Client:
    """A caller of the placement service; a context manager, and safe to use from several threads.

    Failed connections and answers that mean "not now" are tried again, after pauses that grow and are drawn
    at random, as long as `deadline_s` allows: but only requests that do no more when they arrive twice.
    Solves are among these, since each is sent with an idempotency key.

    Parameters
    ----------
    url
        Default: ``MOE_PLACEMENT_URL``, or http://127.0.0.1:8700.
    token, token_file
        Bearer token, or a file that holds it and that not everybody may read. Default:
        ``MOE_PLACEMENT_TOKEN`` or ``MOE_PLACEMENT_TOKEN_FILE``; none is needed on the service's own machine
        while it has no tokens.
    deadline_s
        Seconds that one call may take with all of its attempts; uploads have no such limit.
    timeout_s
        Seconds without any byte after which an attempt is given up.
    allow_http
        Send the token unencrypted to another machine, too.
    backoff
        How attempts are spread.

    Raises
    ------
    InputError
        If the URL is none, the token file may be read by everybody, or the token would go over the network in
        the clear.
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
        self._transport = Transport(connection)
        self._send = self._transport.send

    @property
    def url(self) -> str:
        """The service."""
        return self._transport.connection.url

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Traces and placements

    def upload_trace(self, path: str | os.PathLike[str], *, model: str | None = None) -> Trace:
        """Send a trace, unless the service holds it already.

        Parameters
        ----------
        path
            A file of any trace format, or the folder of a data set.
        model
            Preset of the model, for formats that do not tell its layers.

        Raises
        ------
        InputError
            If it cannot be read, or changes meanwhile.
        ServiceError
            If the service refuses it or cannot be reached.
        """
        upload = Upload(path)
        return self._transport.drive(steps.upload_trace(upload, upload.digest(), model=model))

    def upload_placement(
        self, content: bytes, *, devices: int | None = None, model: str | None = None
    ) -> str:
        """Send a placement file, ours or an engine's; return its id."""
        return self._send(calls.send_placement(content, devices=devices, model=model))

    def placement(self, placement_or_solve_id: str, *, format: str = "native") -> PlacementFile:
        """Return a placement, as our file or as an engine's."""
        return self._send(calls.placement_file(placement_or_solve_id, format=format))

    # Solves and evaluations

    def submit(
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
        """Queue a solve.

        Parameters
        ----------
        topology
            ``KIND:NODESxDEVICES``, or the contents of a topology file.
        model
            A preset's name, or the contents of a model file. Default: the trace's.
        start
            Placement that the result must not be worse than: its id, or that of its solve.
        options
            Named as on the command line, with underscores.
        idempotency_key
            Whoever submits with it again is given the same solve. Default: a new one.
        validate_only
            Have the input checked alone; `Solve.result` says what came of it.

        Raises
        ------
        ServiceError
            If the service refuses it or cannot be reached.
        """
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
        return self._send(call)

    def solve(self, solve_id: str) -> Solve:
        """Return how a solve stands."""
        return self._send(calls.solve(solve_id))

    def solves(
        self, *, status: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> tuple[list[Solve], str | None]:
        """Return a page of solves, newest first, and the cursor of the next one."""
        return self._send(calls.solves(status=status, limit=limit, cursor=cursor))

    def stop(self, solve_id: str) -> Solve:
        """Ask for the early end of a solve; what it has found stands."""
        return self._send(calls.stop(solve_id))

    def events(self, solve_id: str, *, after: int = 0, timeout_s: float | None = None) -> Iterator[Event]:
        """Yield a solve's events, each once and in order, the last one being ``done``.

        A connection that breaks is made anew, and goes on where it was.

        Parameters
        ----------
        after
            Number of the last event that is known already.
        timeout_s
            Seconds after which no more is waited for.
        """
        follow = Following(self._transport.connection, solve_id, after=after, timeout_s=timeout_s)
        while not follow.ended:
            error: ServiceError | None = None
            try:
                yield from self._transport.listen(follow)
            except ServiceError as exc:
                error = exc
            time.sleep(follow.pause_s(error))

    def wait(
        self,
        solve_id: str,
        *,
        on_event: Callable[[Event], None] = lambda _: None,
        timeout_s: float | None = None,
    ) -> Solve:
        """Wait for the end of a solve and return it, or as it stands after `timeout_s`."""
        for event in self.events(solve_id, timeout_s=timeout_s):
            on_event(event)
        return self.solve(solve_id)

    def evaluate(
        self,
        placement_id: str,
        trace_id: str,
        topology: str | Mapping[str, Any],
        *,
        model: str | Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        timeout_s: float = 600.0,
    ) -> Evaluation:
        """Score a placement on a trace.

        Raises
        ------
        JobFailedError
            If it cannot be scored.
        ServiceError
            If the service refuses it, cannot be reached, or takes longer than `timeout_s`.
        """
        work = steps.evaluate(
            placement_id, trace_id, topology, model=model, options=options or {}, limit=Budget(timeout_s)
        )
        return self._transport.drive(work)

    # Deployments

    def put_deployment(
        self, name: str, spec: Mapping[str, Any], *, if_match: str | None = None
    ) -> Deployment:
        """Create or change a deployment: topology, model, options, policy."""
        return self._send(deployment_calls.put_deployment(name, spec, if_match=if_match))

    def deployment(self, name: str) -> Deployment:
        """Return how a deployment stands."""
        return self._send(deployment_calls.deployment(name))

    def deployments(self) -> list[Deployment]:
        """Return all deployments."""
        return self._transport.drive(
            steps.all_pages(lambda cursor: deployment_calls.deployments(cursor=cursor))
        )

    def delete_deployment(self, name: str, *, if_match: str | None = None) -> None:
        """Remove a deployment with its history and its windows; placements stay."""
        self._send(deployment_calls.delete_deployment(name, if_match=if_match))

    def deployment_placement(
        self, name: str, *, etag: str | None = None, wait_s: float = 0.0
    ) -> DeploymentPlacement | None:
        """Return the placement to run, None where it still is the one that `etag` names after `wait_s`."""
        return self._send(deployment_calls.deployment_placement(name, etag=etag, wait_s=wait_s))

    def watch_placement(
        self, name: str, *, etag: str | None = None, timeout_s: float | None = None
    ) -> Iterator[DeploymentPlacement]:
        """Yield the placement to run, and every one that replaces it.

        Parameters
        ----------
        etag
            The one that is known already.
        timeout_s
            Seconds after which no more is waited for; None to go on for ever.
        """
        limit = Budget(timeout_s)
        while not limit.spent:
            wait_s = max(0.0, limit.left_s(steps.WAIT_S))
            try:
                found = self.deployment_placement(name, etag=etag, wait_s=wait_s)
            except NotFoundError:
                # Raised again where it is the deployment that is missing, not its first placement.
                self.deployment(name)
                time.sleep(max(0.0, limit.left_s(1.0)))
                continue
            if found is not None:
                etag = found.etag
                yield found

    def promote(
        self,
        name: str,
        *,
        solve: str | None = None,
        placement: str | None = None,
        why: str = "",
        if_match: str | None = None,
    ) -> Version:
        """Make the placement of a solve, or a placement, the one to run.

        Parameters
        ----------
        if_match
            ETag of the placement that is to be replaced, or its version in quotes.

        Raises
        ------
        PreconditionError
            If another one runs: somebody else was faster.
        """
        return self._send(
            deployment_calls.promote(name, solve=solve, placement=placement, why=why, if_match=if_match)
        )

    def rollback(
        self, name: str, *, version: int | None = None, why: str = "", if_match: str | None = None
    ) -> Version:
        """Return to an earlier placement; default: the one that ran before."""
        return self._send(deployment_calls.rollback(name, version=version, why=why, if_match=if_match))

    def versions(self, name: str) -> list[Version]:
        """Return the history of a deployment, newest first."""
        return self._transport.drive(
            steps.all_pages(lambda cursor: deployment_calls.versions(name, cursor=cursor))
        )

    def post_windows(
        self,
        name: str,
        windows: Iterable[Mapping[str, Any]],
        *,
        rank: int = 0,
        version: int | None = None,
    ) -> WindowsTaken:
        """Report what a rank counted.

        Parameters
        ----------
        windows
            Each ``{"window": number, "load": counts, "tokens": number}``: token-expert pairs of logical
            experts, ``[layers][experts]``, as lists, arrays or tensors; tokens may be left out.
        version
            Version of the placement that ran.
        """
        return self._send(deployment_calls.post_windows(name, windows, rank=rank, version=version))

    def health(self) -> Mapping[str, Any]:
        """Return what the service says of itself; an error where it is not ready."""
        return self._send(calls.health())
