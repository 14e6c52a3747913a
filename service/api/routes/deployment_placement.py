"""``/v1/deployments/{name}/placement``: fetched by launchers, promoted, rolled back, and its history."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.routing import APIRoute
from sqlalchemy.exc import IntegrityError
from starlette.requests import ClientDisconnect

from service.api.bodies import read_body
from service.api.context import Context
from service.api.deployed import (
    BUSY,
    MOST_SPEC_BYTES,
    NAME,
    Here,
    IfMatch,
    Reader,
    Writer,
    check_name,
    deployment_of,
    unknown,
    version_expected,
)
from service.api.describe import json_answer, json_body, problems
from service.api.documents import json_response
from service.api.engine_files import check_format, engine_files_of
from service.api.logs import REQUEST_ID
from service.api.metrics import metrics_of
from service.api.security import Scope, authenticate
from service.api.stored import in_thread
from service.deployments import counting
from service.deployments import documents as docs
from service.deployments.promotion import Candidates, previous_of
from service.deployments.records import Cause, Current, NewVersion, Version
from service.deployments.serving import Ready, ReadyPlacements, ReadyResponse, names
from service.errors import ForbiddenError, InvalidError, NotFoundError
from service.state.deployments import ANY, Expected

__all__ = ["router"]

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class _ByHand(APIRoute):
    """A route whose function reads its request by itself: no parameters are solved, which costs more."""

    def get_route_handler(self) -> Handler:
        """Return the function as it is."""
        handler: Handler = self.endpoint
        return handler


router = APIRouter(prefix="/v1/deployments", tags=["deployments"])
"""Of all routes of deployments: one router, since every level of routers costs each request."""

MOST_WAIT_S = 300.0
LOOK_AGAIN_S = 5.0
"""A deployment that was removed and made again counts its revisions anew: who waits looks now and then."""

_PLACEMENT_PARAMETERS = [
    {
        "name": "name",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "pattern": f"^{NAME.pattern}$"},
    },
    {
        "name": "format",
        "in": "query",
        "description": "native, or an engine's format.",
        "schema": {"type": "string", "default": "native", "maxLength": 40},
    },
    {
        "name": "wait",
        "in": "query",
        "description": "Most seconds to wait for a placement that If-None-Match does not name.",
        "schema": {"type": "number", "default": 0, "minimum": 0, "maximum": MOST_WAIT_S},
    },
    {
        "name": "If-None-Match",
        "in": "header",
        "description": "ETag of the placement that the caller has.",
        "schema": {"type": "string"},
    },
]


async def get_current_placement(request: Request) -> Response:
    """Return the placement that is to run, as our own file or that of an engine.

    With `If-None-Match` the answer is 304 as long as nothing has changed; with `wait` it comes only then, or
    as soon as something has. Before the first promotion it is 404, with `wait` as soon as there is one.
    """
    # Asked thousands of times a second: parameters are read by hand.
    caller = await authenticate(request.scope)
    if Scope.READ not in caller.scopes:
        raise ForbiddenError("this needs the scope read")
    context: Context = request.app.state.context
    name = request.path_params["name"]
    to, wait_s = "native", 0.0
    if request.scope["query_string"]:
        to, wait_s = _placement_query(request)
    known, packed = b"", False
    for key, value in request.scope["headers"]:
        if key == b"if-none-match":
            known = known + b"," + value if known else value
        elif key == b"accept-encoding":
            packed = b"gzip" in value and b"gzip;q=0" not in value
    ready = await _ready(request, context, name, to, packed)
    if wait_s and (ready is None or names(known, ready.etag)):
        ready = await _awaited(request, context, name, to, packed, known, wait_s)
    if ready is None:
        raise NotFoundError(
            f"deployment {name} has no placement yet; promote one with PUT /v1/deployments/{name}/placement"
        )
    return ReadyResponse(ready, changed=not (known and names(known, ready.etag)))


router.add_api_route(
    "/{name}/placement",
    get_current_placement,
    route_class_override=_ByHand,
    summary="Fetch the current placement",
    response_class=Response,
    openapi_extra={"parameters": _PLACEMENT_PARAMETERS, "security": [{"bearer": []}]},
    responses={
        200: {
            "description": "The file. X-Placement-Version and X-Placement-Solve say what it is.",
            "content": {"application/json": {"schema": {}}, "application/yaml": {"schema": {}}},
        },
        304: {"description": "The caller has it already."},
        **problems(404),
    },
)


def _placement_query(request: Request) -> tuple[str, float]:
    to = request.query_params.get("format", "native")
    check_format(to)
    text = request.query_params.get("wait", "0")
    try:
        wait_s = float(text)
    except ValueError:
        wait_s = -1.0
    if not 0 <= wait_s <= MOST_WAIT_S:
        raise InvalidError(f"wait: must be a number of seconds from 0 to {MOST_WAIT_S:.0f}")
    return to, wait_s


async def _current(request: Request, context: Context, name: str) -> Current:
    if NAME.fullmatch(name) is None:
        raise unknown(name)
    if context.database.is_sqlite:
        current = context.deployments.current(name)
    else:
        shared = request.app.state.shared_reads
        current = await shared.get(("deployment", name), partial(context.deployments.current, name))
    if current is None:
        raise unknown(name)
    return current


async def _ready(request: Request, context: Context, name: str, to: str, packed: bool) -> Ready | None:
    """Return the answer as things stand; None before the first promotion."""
    current = await _current(request, context, name)
    if current.digest is None:
        return None
    placements = _placements_of(request)
    found = placements.kept(name, current, to, packed=packed)
    metrics_of(request.app).placement_reads[found is not None].inc()
    return found if found is not None else await placements.get(name, current, to, packed=packed)


async def _awaited(
    request: Request, context: Context, name: str, to: str, packed: bool, known: bytes, wait_s: float
) -> Ready | None:
    """Return the answer once it is another than the caller has, or as things stand after some seconds."""
    deadline = time.monotonic() + wait_s
    gone = asyncio.create_task(_disconnected(request))
    try:
        while True:
            seen = (await _current(request, context, name)).revision
            ready = await _ready(request, context, name, to, packed)
            left_s = deadline - time.monotonic()
            if (ready is not None and not names(known, ready.etag)) or left_s <= 0 or context.watcher.closed:
                return ready
            waiting = asyncio.create_task(
                context.watcher.wait("deployment", name, seen, min(left_s, LOOK_AGAIN_S))
            )
            try:
                await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    raise ClientDisconnect
                await waiting
            finally:
                waiting.cancel()
    finally:
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await gone


async def _disconnected(request: Request) -> None:
    """Return once the caller has hung up, who need not be waited for any more."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _placements_of(request: Request) -> ReadyPlacements:
    """Return the placements that this process has made ready."""
    state = request.app.state
    found: ReadyPlacements | None = getattr(state, "ready_placements", None)
    if found is None:
        found = state.ready_placements = ReadyPlacements(state.context.deployments, engine_files_of(request))
    return found


@router.put(
    "/{name}/placement",
    summary="Promote a placement",
    response_class=Response,
    openapi_extra=json_body(docs.Promotion, solve=docs.PROMOTION),
    responses={200: json_answer("It is current.", {docs.VersionDocument: docs.VERSION}), **BUSY},
)
async def promote_placement(
    name: str, request: Request, caller: Writer, context: Here, if_match: IfMatch = None
) -> Response:
    """Make the placement of a solve, or one that was uploaded, the current one.

    It is checked first against layers, experts, devices, slots and memory of the deployment. With `If-Match`
    one of several callers wins, the others get 412. To promote what runs already changes nothing.
    """
    body = await read_body(request, docs.Promotion, most_bytes=MOST_SPEC_BYTES)

    def promote() -> Version:
        found = context.deployments.get(name)
        expected = version_expected(if_match, request.headers.get("if-none-match"), context, found)
        candidates = Candidates(context.jobs, context.artifacts, context.files)
        chosen = candidates.find(body, found)
        new = NewVersion(
            digest=chosen.digest,
            cause=Cause.MANUAL,
            by=caller.id,
            why=body.why,
            job_id=chosen.job_id,
            predicted=chosen.predicted,
        )
        return _promote(context, name, new, expected)

    check_name(name)
    return await _promoted(context, name, await in_thread(promote))


@router.post(
    "/{name}/rollback",
    summary="Return to an earlier placement",
    response_class=Response,
    openapi_extra=json_body(docs.Rollback, last={"why": "throughput fell"}, named={"to": 1}),
    responses={200: json_answer("It is current.", {docs.VersionDocument: docs.VERSION}), **BUSY},
)
async def roll_back(
    name: str, request: Request, caller: Writer, context: Here, if_match: IfMatch = None
) -> Response:
    """Make an earlier placement the current one, as a new version: the last other one, or the one named."""
    body = await read_body(request, docs.Rollback, most_bytes=MOST_SPEC_BYTES)

    def roll() -> Version:
        found = context.deployments.get(name)
        expected = version_expected(if_match, None, context, found)
        before = previous_of(context.deployments, found, body.to)
        Candidates(context.jobs, context.artifacts, context.files).check(before.placement_digest, found)
        new = NewVersion(
            digest=before.placement_digest,
            cause=Cause.ROLLBACK,
            by=caller.id,
            why=body.why,
            job_id=before.job_id,
            of_version=before.version,
            predicted=before.predicted,
        )
        # Which version is the last other one depends on the current one.
        expected = found.version if body.to is None and expected is ANY else expected
        return _promote(context, name, new, expected)

    check_name(name)
    return await _promoted(context, name, await in_thread(roll))


@router.get(
    "/{name}/versions",
    summary="List what was promoted",
    response_class=Response,
    responses={
        200: json_answer("A page.", {docs.VersionPage: {"items": [docs.VERSION], "next_cursor": None}}),
        **problems(404),
    },
)
async def list_versions(
    name: str,
    caller: Reader,
    context: Here,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    cursor: Annotated[int | None, Query(ge=1, le=(1 << 31) - 1, description="`next_cursor`.")] = None,
) -> Response:
    """List versions, newest first: who, why, what was predicted, and what was observed since."""
    found = await deployment_of(context, name)
    page = await in_thread(context.deployments.versions, name, before=cursor, limit=limit + 1)
    items = [docs.version_document(one, current=found.version) for one in page[:limit]]
    following = page[limit - 1].version if len(page) > limit else None
    return json_response({"items": items, "next_cursor": following})


def _promote(context: Context, name: str, new: NewVersion, expected: Expected) -> Version:
    try:
        return context.deployments.promote(
            name,
            new,
            expected=expected,
            counters=counting.promotion(name, new.cause),
            request_id=REQUEST_ID.get(),
        )
    except IntegrityError as exc:
        raise NotFoundError(f"placement {new.digest} was removed just now; upload it again") from exc


async def _promoted(context: Context, name: str, made: Version) -> Response:
    context.watcher.nudge("deployment", name)
    headers = {"ETag": f'"{made.placement_digest}"', "X-Placement-Version": str(made.version)}
    return json_response(docs.version_document(made, current=made.version), headers=headers)
