"""``/v1/solves``: submit, look, listen, stop, fetch."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Header, Query, Request, Response

from service.api import examples
from service.api.bodies import hash_of, read_body
from service.api.context import Context, context_of
from service.api.describe import events_answer, json_answer, problems
from service.api.documents import (
    CheckDocument,
    SolveAccepted,
    SolveDocument,
    SolvePage,
    accepted,
    json_response,
    links_of,
    solve_document,
)
from service.api.engine_files import FormatName, engine_files_of, file_response
from service.api.logs import REQUEST_ID
from service.api.security import Caller, Scope, require
from service.api.streams import EventStream, feed_of
from service.api.submission import Wanted, submitter_of
from service.api.submit_parameters import SubmitParameters, described_submission
from service.api.waiting import job_of, refuse_failed, settled
from service.errors import InvalidError, NotFoundError
from service.schemas import SolveRequest
from service.state.records import Job, JobKind, JobStatus, NewJob

__all__ = ["MOST_BYTES", "Here", "Reader", "router"]

router = APIRouter(tags=["solves"])

MOST_BYTES = 4 << 20
"""Body of a request; topology and calibration are the long parts."""
MOST_ITEMS = 200
MOST_SEQ = 2**31 - 1

Reader = Annotated[Caller, Depends(require(Scope.READ))]
Writer = Annotated[Caller, Depends(require(Scope.SUBMIT))]
Here = Annotated[Context, Depends(context_of)]


@router.post(
    "/v1/solves",
    operation_id="submit_solve",
    summary="Queue a solve, or only check its request",
    status_code=202,
    response_class=Response,
    openapi_extra=described_submission(
        SolveRequest,
        solve=examples.SOLVE_REQUEST,
        check={**examples.SOLVE_REQUEST, "validate_only": True},
    ),
    responses={
        200: json_answer(
            "The job that was queued before with this Idempotency-Key; with `validate_only` what the "
            "problem is.",
            {SolveAccepted: examples.ACCEPTED, CheckDocument: examples.CHECKED},
        ),
        202: json_answer(
            "Queued, durably. With `validate_only`: not checked within `wait` seconds.",
            {SolveAccepted: examples.ACCEPTED},
        ),
        **problems(404, 409, 415),
    },
)
async def submit_solve(request: Request) -> Response:
    """Queue a solve; the answer comes once it is on disk.

    With an `Idempotency-Key` the same request is queued once, however often it is sent: 202 the first time,
    200 with the same job afterwards. The key with another request is a conflict.
    """
    given = await SubmitParameters.of(request)
    body = await read_body(request, SolveRequest, most_bytes=MOST_BYTES)
    found = await submitter_of(request).submit(
        Wanted(
            job=_new_job(body, given),
            request=body,
            placement=body.start_placement_id,
            max_queued=given.caller.limits.max_queued,
        )
    )
    if body.validate_only:
        return _checked(await settled(request.app.state.context, found.job, given.wait_s))
    return _accepted(found.job, 202 if found.created else 200)


@router.get(
    "/v1/solves",
    operation_id="list_solves",
    summary="List solves, newest first",
    response_class=Response,
    responses={
        200: json_answer("A page.", {SolvePage: {"items": [examples.SOLVE], "next_cursor": "MTAyNA"}}),
    },
)
async def list_solves(
    caller: Reader,
    context: Here,
    status: Annotated[JobStatus | None, Query(description="Only those that stand so.")] = None,
    deployment: Annotated[
        str | None,
        Query(max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$", description="Only refreshes of a deployment."),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_ITEMS)] = 50,
    cursor: Annotated[
        str | None, Query(max_length=40, description="`next_cursor` of the page before.")
    ] = None,
) -> Response:
    """List solves, newest first; jobs that arrive meanwhile do not shift the pages.

    `request` is null in a list.
    """
    before = None if cursor is None else _number_of(cursor)

    def page() -> list[Job]:
        return context.jobs.page(status=status, deployment=deployment, before=before, limit=limit + 1)

    jobs = await anyio.to_thread.run_sync(page)
    following = _cursor_of(jobs[limit - 1]) if len(jobs) > limit else None
    items = [solve_document(job, whole=False) for job in jobs[:limit]]
    return json_response({"items": items, "next_cursor": following})


@router.get(
    "/v1/solves/{solve_id}",
    operation_id="get_solve",
    summary="Look at a solve",
    response_class=Response,
    responses={200: json_answer("The solve.", {SolveDocument: examples.SOLVE}), **problems(404)},
)
async def get_solve(solve_id: str, caller: Reader, context: Here) -> Response:
    """Return status, incumbent, bound, gap, elapsed time and result; also of a job that only checks."""
    return json_response(solve_document(await job_of(context, solve_id, "sc")))


@router.delete(
    "/v1/solves/{solve_id}",
    operation_id="stop_solve",
    summary="Stop a solve early and keep its incumbent",
    response_class=Response,
    responses={
        200: json_answer("It has ended.", {SolveDocument: examples.SOLVE}),
        202: json_answer("It was told to stop.", {SolveDocument: examples.SOLVE}),
        **problems(404),
    },
)
async def stop_solve(solve_id: str, caller: Writer, context: Here) -> Response:
    """Ask for the end: what was found by then stands as the result. Asking again changes nothing."""
    job = await job_of(context, solve_id, "sc")
    if not job.is_final:
        found = await anyio.to_thread.run_sync(_stop, context, job, caller)
        if found is None:
            raise NotFoundError(f"there is no solve {solve_id!r}")
        context.watcher.nudge("job", solve_id)
        job = found
    return json_response(solve_document(job), 200 if job.is_final else 202)


@router.get(
    "/v1/solves/{solve_id}/placement",
    operation_id="get_solve_placement",
    summary="Fetch the placement that a solve found",
    response_class=Response,
    responses={
        200: {
            "description": "The file; its ETag is the placement's id where it is our own.",
            "content": {
                "application/json": {"schema": {}, "example": examples.PLACEMENT},
                "application/yaml": {"schema": {"type": "string"}},
            },
        },
        304: {"description": "The caller has it already."},
        **problems(404),
    },
)
async def get_solve_placement(
    solve_id: str,
    request: Request,
    caller: Reader,
    context: Here,
    to: Annotated[FormatName, Query(alias="format", description="Whose file.")] = "native",
    incumbent: Annotated[
        bool, Query(description="Before the end: the best so far, where it is kept already.")
    ] = False,
) -> Response:
    """Return our own file exactly as it is stored, or that of an engine."""
    job = await job_of(context, solve_id, "s")
    digest = job.placement_digest
    if digest is None and incumbent:
        digest = job.incumbent_digest
    if digest is None:
        raise NotFoundError(_lack(job, incumbent=incumbent), job_status=str(job.status))
    return file_response(request, await engine_files_of(request).get(digest, to))


@router.get(
    "/v1/solves/{solve_id}/events",
    operation_id="listen_to_solve",
    summary="Listen to a solve",
    response_class=Response,
    responses={
        200: events_answer("Server-sent events.", examples.EVENTS),
        204: {"description": "The listener has seen the last event: it need not come back."},
        **problems(404),
    },
)
async def listen_to_solve(
    solve_id: str,
    request: Request,
    caller: Reader,
    context: Here,
    after: Annotated[
        int | None, Query(ge=0, le=MOST_SEQ, description="Number of the last event that is known.")
    ] = None,
    last_event_id: Annotated[
        int | None, Header(ge=0, le=MOST_SEQ, description="The same, as browsers send it; it goes first.")
    ] = None,
) -> Response:
    """Send the events of a solve: `progress`, `incumbent`, and `done` as the last one.

    They are numbered from 1 without gaps. Whoever comes back with the number of the last event that arrived
    misses none and sees none twice, at any server of the service.
    """
    job = await job_of(context, solve_id, "sc")
    seen = (after or 0) if last_event_id is None else last_event_id
    if seen > job.event_seq:
        raise InvalidError(f"event {seen} of {solve_id} does not exist; its last one is {job.event_seq}")
    if job.is_final and seen == job.event_seq:
        return Response(status_code=204)
    return EventStream(feed_of(request), context.watcher, solve_id, after=seen)


def _new_job(body: SolveRequest, given: SubmitParameters) -> NewJob:
    return NewJob(
        kind=JobKind.CHECK if body.validate_only else JobKind.SOLVE,
        caller=given.caller.id,
        spec=body.model_dump(mode="json", exclude={"validate_only", "priority"}),
        request_hash=hash_of(body),
        trace_digest=body.trace_id,
        priority=body.priority,
        cpus=body.options.threads,
        idempotency_key=given.key,
    )


def _accepted(job: Job, status: int) -> Response:
    return json_response(accepted(job), status, headers={"Location": links_of(job)["self"]})


def _checked(job: Job) -> Response:
    """Answer to `validate_only`: what the problem is, or why it is none."""
    if not job.is_final:
        return _accepted(job, 202)
    refuse_failed(job)
    return json_response({"id": job.id, "status": job.status, "valid": True, "result": job.result})


def _stop(context: Context, job: Job, caller: Caller) -> Job | None:
    found = context.jobs.request_stop(job.id)
    if not job.stop_requested:
        context.audit.record(who=caller.id, action="solve.stop", target=job.id, request_id=REQUEST_ID.get())
    return found


def _lack(job: Job, *, incumbent: bool) -> str:
    """Say why there is no placement."""
    if job.is_final:
        return f"{job.id} is {job.status} and has no placement"
    more = "" if incumbent or job.incumbent_digest is None else "; ?incumbent=true gives the best so far"
    return f"{job.id} is {job.status} and has no placement yet{more}"


def _cursor_of(job: Job) -> str:
    return base64.urlsafe_b64encode(str(job.number).encode()).decode().rstrip("=")


def _number_of(cursor: str) -> int:
    try:
        text = base64.urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4)).decode("ascii")
    except (binascii.Error, UnicodeError) as exc:
        raise InvalidError("cursor is none of ours; take next_cursor of the page before") from exc
    if not text.isascii() or not text.isdigit() or int(text) >= 2**63:
        raise InvalidError("cursor is none of ours; take next_cursor of the page before")
    return int(text)
