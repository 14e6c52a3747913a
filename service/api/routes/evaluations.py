"""``/v1/evaluations``: what a placement costs on a trace."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.api import examples
from service.api.bodies import hash_of, read_body
from service.api.describe import json_answer, problems
from service.api.documents import (
    EvaluationDocument,
    SolveAccepted,
    accepted,
    evaluation_document,
    json_response,
    links_of,
)
from service.api.routes.solves import MOST_BYTES, Here, Reader
from service.api.submission import Wanted, submitter_of
from service.api.submit_parameters import SubmitParameters, described_submission
from service.api.waiting import job_of, refuse_failed, settled
from service.schemas import EvaluationRequest
from service.state.records import JobKind, NewJob

__all__ = ["router"]

router = APIRouter(tags=["evaluations"])

_WAITING = {
    "id": examples.EVALUATED["id"],
    "status": "running",
    "links": examples.EVALUATED["links"],
}


@router.post(
    "/v1/evaluations",
    operation_id="submit_evaluation",
    summary="Score a placement on a trace",
    status_code=200,
    response_class=Response,
    openapi_extra=described_submission(EvaluationRequest, evaluation=examples.EVALUATION_REQUEST),
    responses={
        200: json_answer("The score.", {EvaluationDocument: examples.EVALUATED}),
        202: json_answer("Not done within `wait` seconds.", {SolveAccepted: _WAITING}),
        **problems(404, 409, 415),
    },
)
async def submit_evaluation(request: Request) -> Response:
    """Score a placement, and wait some seconds for the result; after that the link says where it will be."""
    given = await SubmitParameters.of(request)
    body = await read_body(request, EvaluationRequest, most_bytes=MOST_BYTES)
    found = await submitter_of(request).submit(
        Wanted(
            job=_new_job(body, given),
            request=body,
            placement=body.placement_id,
            placement_key="placement_id",
            max_queued=given.caller.limits.max_queued,
        )
    )
    job = await settled(request.app.state.context, found.job, given.wait_s)
    headers = {"Location": links_of(job)["self"]}
    if not job.is_final:
        return json_response(accepted(job), 202, headers=headers)
    refuse_failed(job)
    return json_response(evaluation_document(job), headers=headers)


@router.get(
    "/v1/evaluations/{evaluation_id}",
    operation_id="get_evaluation",
    summary="Look at an evaluation",
    response_class=Response,
    responses={
        200: json_answer("The evaluation.", {EvaluationDocument: examples.EVALUATED}),
        **problems(404),
    },
)
async def get_evaluation(evaluation_id: str, caller: Reader, context: Here) -> Response:
    """Return an evaluation as it stands."""
    return json_response(evaluation_document(await job_of(context, evaluation_id, "e")))


def _new_job(body: EvaluationRequest, given: SubmitParameters) -> NewJob:
    return NewJob(
        kind=JobKind.EVALUATION,
        caller=given.caller.id,
        spec=body.model_dump(mode="json"),
        request_hash=hash_of(body),
        trace_digest=body.trace_id,
        idempotency_key=given.key,
    )
