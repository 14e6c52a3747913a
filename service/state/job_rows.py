"""Rows of jobs and their events: how they are read, appended to and brought to an end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from service.ids import new_id
from service.state.records import Claim, Event, Job, JobKind, JobStatus, NewEvent, NewJob, Outcome
from service.state.tables import events, jobs

__all__ = [
    "JOB_COLUMNS",
    "append_events",
    "done_event",
    "event_of",
    "held_by",
    "job_of",
    "key_of",
    "last_incumbent",
    "row_of",
]

Key = tuple[str, str, str]
"""Caller, kind and idempotency key."""

PREFIXES = {JobKind.SOLVE: "s", JobKind.EVALUATION: "e", JobKind.CHECK: "c"}
JOB_COLUMNS = [jobs.c[name] for name in Job.__dataclass_fields__]


def row_of(new: NewJob, at: float) -> dict[str, Any]:
    """Return the row of a job to queue, which gets its id here and its number from the database."""
    return {
        "id": new_id(PREFIXES[new.kind]),
        "kind": new.kind.value,
        "status": JobStatus.QUEUED.value,
        "priority": new.priority,
        "caller": new.caller,
        "deployment": new.deployment,
        "spec": new.spec,
        "cpus": new.cpus,
        "trace_digest": new.trace_digest,
        "start_digest": new.start_digest,
        "idempotency_key": new.idempotency_key,
        "request_hash": new.request_hash,
        "created_at": at,
        "attempt": 0,
        "lost": 0,
        "beat": 0,
        "stop_requested": False,
        "event_seq": 0,
    }


def key_of(row: Mapping[str, Any]) -> Key | None:
    """Return what makes a submission the same as an earlier one; None where its caller gave no key."""
    key: str | None = row["idempotency_key"]
    return None if key is None else (row["caller"], row["kind"], key)


def job_of(row: Mapping[Any, Any]) -> Job:
    """Return a job from its row; what the row does not have yet is empty."""
    values: dict[str, Any] = {name: row.get(name) for name in Job.__dataclass_fields__}
    values |= {"kind": JobKind(row["kind"]), "status": JobStatus(row["status"])}
    return Job(**values)


def event_of(row: Mapping[Any, Any]) -> Event:
    """Return an event from its row."""
    return Event(**row)


def held_by(claim: Claim) -> sa.ColumnElement[bool]:
    """Return the condition that a lease still stands."""
    return sa.and_(
        jobs.c.id == claim.job.id,
        jobs.c.status == JobStatus.RUNNING,
        jobs.c.attempt == claim.attempt,
        jobs.c.worker == claim.worker,
    )


def append_events(
    connection: sa.Connection, job_id: str, last: int, news: Sequence[NewEvent], at: float
) -> None:
    """Write events whose numbers end with `last`, to which the job's row was counted up before.

    That update holds the row, so that numbers have no gaps and listeners see them in order.
    """
    if not news:
        return
    first = last - len(news) + 1
    rows = [
        {"job_id": job_id, "seq": first + index, "kind": new.kind, "data": new.data, "at": at}
        for index, new in enumerate(news)
    ]
    connection.execute(events.insert(), rows)


def done_event(outcome: Outcome) -> NewEvent:
    """Return the last event of a job."""
    data = {"status": outcome.status.value, "result": outcome.result, "error": outcome.error}
    return NewEvent(kind="done", data=data)


def last_incumbent(job: Job, *, note: str) -> Outcome:
    """Return the end of a job that was asked to stop and that nobody computes any more.

    Its last kept incumbent, if there is one, stands as its placement.
    """
    if job.incumbent_digest is None:
        return Outcome(status=JobStatus.STOPPED)
    found = job.incumbent or {}
    result = {
        "objective": {name: found.get(name) for name in ("name", "unit", "lower_bound", "gap")}
        | {"value": found.get("objective")},
        "termination": "stopped",
        "solver": found.get("solver"),
        "notes": [note],
        "elapsed_s": found.get("elapsed_s"),
        "placement_id": job.incumbent_digest,
    }
    return Outcome(status=JobStatus.STOPPED, result=result, placement_digest=job.incumbent_digest)
