"""Jobs as callers see them: the JSON of a solve and of an evaluation, and the models that describe it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

import orjson
from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field

from service.state.records import Job, JobKind

__all__ = [
    "CheckDocument",
    "EvaluationDocument",
    "JobError",
    "SolveAccepted",
    "SolveDocument",
    "SolvePage",
    "accepted",
    "evaluation_document",
    "json_response",
    "links_of",
    "solve_document",
]

Status = Literal["queued", "running", "succeeded", "stopped", "failed", "timed_out"]


class _Document(BaseModel):
    model_config = ConfigDict(extra="allow")


class JobError(_Document):
    """Why a job failed."""

    code: str = Field(
        description="invalid, infeasible, no-placement, out-of-memory, timed-out, worker-lost or internal."
    )
    message: str


class SolveAccepted(_Document):
    """A job that is queued, and where to follow it."""

    id: str
    status: Status
    links: dict[str, str]


class SolveDocument(_Document):
    """A solve as it stands."""

    id: str
    kind: str
    status: Status
    priority: int
    created_at: float = Field(description="Seconds since the epoch.")
    started_at: float | None = None
    ended_at: float | None = None
    elapsed_s: float | None = Field(default=None, description="Seconds since it began, or that it took.")
    elapsed: float | None = Field(default=None, description="The same.")
    attempt: int = Field(description="Times that a worker began it.")
    stop_requested: bool
    incumbent: dict[str, Any] | None = Field(
        default=None, description="Best placement so far: objective, lower_bound, gap, solver, elapsed_s."
    )
    objective: float | None = None
    lower_bound: float | None = None
    bound: float | None = Field(default=None, description="The same as lower_bound.")
    gap: float | None = Field(default=None, description="(objective - lower_bound) / objective.")
    result: dict[str, Any] | None = Field(default=None, description="What it found, once it has ended.")
    error: JobError | None = None
    placement_id: str | None = None
    trace_id: str | None = None
    deployment: str | None = Field(default=None, description="Deployment whose refresh it is.")
    caller: str
    last_event: int = Field(description="Number of its last event.")
    request: dict[str, Any] | None = Field(default=None, description="What was asked for.")
    links: dict[str, str]


class SolvePage(_Document):
    """Solves, newest first."""

    items: list[SolveDocument]
    next_cursor: str | None = Field(description="For the next page; null on the last one.")


class CheckDocument(_Document):
    """What a problem is, that was only checked."""

    id: str
    status: Status
    valid: bool
    result: dict[str, Any] = Field(description="Layers, experts, devices, slots, windows, notes.")


class EvaluationDocument(_Document):
    """An evaluation as it stands."""

    id: str
    status: Status
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    elapsed_s: float | None = None
    result: dict[str, Any] | None = Field(
        default=None, description="As `moe-placement evaluate --json` prints it."
    )
    error: JobError | None = None
    placement_id: str | None = None
    trace_id: str | None = None
    request: dict[str, Any] | None = None
    links: dict[str, str]


def json_response(
    document: Any, status_code: int = 200, *, headers: Mapping[str, str] | None = None
) -> Response:
    """Answer with JSON; what is no number leaves as null."""
    content = orjson.dumps(document, option=orjson.OPT_NON_STR_KEYS)
    return Response(content, status_code, media_type="application/json", headers=headers)


def links_of(job: Job) -> dict[str, str]:
    """Return where what belongs to a job is found."""
    if job.kind is JobKind.EVALUATION:
        return {"self": f"/v1/evaluations/{job.id}"}
    links = {"self": f"/v1/solves/{job.id}", "events": f"/v1/solves/{job.id}/events"}
    if job.kind is JobKind.SOLVE:
        links["placement"] = f"/v1/solves/{job.id}/placement"
    if job.trace_digest is not None:
        links["trace"] = f"/v1/traces/{job.trace_digest}"
    return links


def accepted(job: Job) -> dict[str, Any]:
    """Return the answer to a submission."""
    return {"id": job.id, "status": job.status, "links": links_of(job)}


def solve_document(job: Job, *, whole: bool = True) -> dict[str, Any]:
    """Return a solve as JSON.

    Parameters
    ----------
    whole
        With the request, which may be long.
    """
    value, bound, gap = _figures(job)
    elapsed_s = _elapsed_s(job)
    return {
        "id": job.id,
        "kind": job.kind,
        "status": job.status,
        "priority": job.priority,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "ended_at": job.ended_at,
        "elapsed_s": elapsed_s,
        "elapsed": elapsed_s,
        "attempt": job.attempt,
        "stop_requested": job.stop_requested,
        "incumbent": job.incumbent,
        "objective": value,
        "lower_bound": bound,
        "bound": bound,
        "gap": gap,
        "result": job.result,
        "error": job.error,
        "placement_id": job.placement_digest,
        "trace_id": job.trace_digest,
        "deployment": job.deployment,
        "caller": job.caller,
        "last_event": job.event_seq,
        "request": job.spec if whole else None,
        "links": links_of(job),
    }


def evaluation_document(job: Job) -> dict[str, Any]:
    """Return an evaluation as JSON."""
    return {
        "id": job.id,
        "status": job.status,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "ended_at": job.ended_at,
        "elapsed_s": _elapsed_s(job),
        "result": job.result,
        "error": job.error,
        "placement_id": job.start_digest,
        "trace_id": job.trace_digest,
        "request": job.spec,
        "links": links_of(job),
    }


def _figures(job: Job) -> tuple[Any, Any, Any]:
    """Return objective, bound and gap: of the result, or of the incumbent."""
    if job.result is not None and isinstance(found := job.result.get("objective"), dict):
        return found.get("value"), found.get("lower_bound"), found.get("gap")
    if job.incumbent is not None:
        return tuple(job.incumbent.get(key) for key in ("objective", "lower_bound", "gap"))  # type: ignore[return-value]
    return None, None, None


def _elapsed_s(job: Job) -> float | None:
    if job.started_at is None:
        return None
    return max(0.0, (time.time() if job.ended_at is None else job.ended_at) - job.started_at)
