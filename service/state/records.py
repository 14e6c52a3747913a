"""The rows of the state as the rest of the service sees them: frozen, typed, without a database."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = [
    "TERMINAL",
    "Artifact",
    "Claim",
    "Event",
    "Job",
    "JobKind",
    "JobStatus",
    "NewEvent",
    "NewJob",
    "Outcome",
    "Submitted",
]


class JobKind(StrEnum):
    """What a job computes."""

    SOLVE = "solve"
    EVALUATION = "evaluation"
    CHECK = "check"


class JobStatus(StrEnum):
    """Where a job is; the last four are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    STOPPED = "stopped"
    """A caller asked it to stop; what it had found by then stands."""
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    """It ran past the service's limit and was killed, or its time limit passed before any placement."""


TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.STOPPED, JobStatus.FAILED, JobStatus.TIMED_OUT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """Bytes that the service keeps under their digest."""

    digest: str
    kind: str
    size_bytes: int
    format: str
    summary: dict[str, Any]
    created_at: float
    created_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job to queue.

    Parameters
    ----------
    request_hash
        SHA-256 of the request: the same idempotency key with another request is a conflict.
    cpus
        Threads that the job may use.
    """

    kind: JobKind
    caller: str
    spec: dict[str, Any]
    request_hash: str
    trace_digest: str | None = None
    start_digest: str | None = None
    priority: int = 0
    cpus: int = 1
    idempotency_key: str | None = None
    deployment: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as it stands."""

    number: int
    id: str
    kind: JobKind
    status: JobStatus
    priority: int
    caller: str
    deployment: str | None
    spec: dict[str, Any]
    cpus: int
    trace_digest: str | None
    start_digest: str | None
    request_hash: str
    created_at: float
    started_at: float | None
    ended_at: float | None
    attempt: int
    lost: int
    worker: str | None
    stop_requested: bool
    event_seq: int
    incumbent: dict[str, Any] | None
    incumbent_digest: str | None
    result: dict[str, Any] | None
    placement_digest: str | None
    error: dict[str, Any] | None

    @property
    def is_final(self) -> bool:
        """Whether it has ended for good."""
        return self.status in TERMINAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """Answer to a submission.

    Parameters
    ----------
    job
        The job; an earlier one if the idempotency key was known.
    created
        Whether this submission made it.
    conflict
        Whether the key was known with another request: then nothing was queued and `job` is the earlier one.
    """

    job: Job
    created: bool
    conflict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A worker's lease on a job; `attempt` fences writers that have lost theirs."""

    job: Job
    worker: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent:
    """Something to tell the listeners of a job."""

    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An event as it was recorded; `seq` counts from 1 without gaps within a job."""

    job_id: str
    seq: int
    kind: str
    data: dict[str, Any]
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended.

    Parameters
    ----------
    status
        One of the final ones.
    result
        What a caller sees: objective, bound, gap, metrics, notes, seconds.
    placement_digest
        Placement that stands, if any.
    error
        ``{"code", "message"}`` where it failed.
    counters
        What to add to the counters in the same transaction: ``{(name, labels): amount}``.
    """

    status: JobStatus
    result: dict[str, Any] | None = None
    placement_digest: str | None = None
    error: dict[str, Any] | None = None
    counters: dict[tuple[str, str], float] = field(default_factory=dict)
