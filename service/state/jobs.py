"""The queue and every job's life: one row a job, leased by workers, fenced by the number of its attempt.

A lease is kept by counting (`beat`), not by the clock: who watches takes a job from a worker whose count has
stood still for as long as the watcher's own monotonic clock says. A worker that comes back after that finds
its attempt outdated, and nothing that it writes takes effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.state.database import Database
from service.state.records import Claim, Event, Job, JobKind, JobStatus, NewEvent, NewJob, Outcome, Submitted

__all__ = ["MOST_ATTEMPTS", "Beat", "Head", "JobStore", "Lease"]

MOST_ATTEMPTS = 2
"""A job whose worker is lost is tried once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a listener must know to see whether there is news."""

    event_seq: int
    status: JobStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A running job as a watcher sees it."""

    job_id: str
    worker: str
    attempt: int
    beat: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a worker learns when it renews its leases.

    Parameters
    ----------
    lost
        Jobs that are no longer its own: it kills them and writes nothing.
    stop
        Jobs that a caller asked to stop.
    """

    lost: frozenset[str]
    stop: frozenset[str]


class JobStore:
    """Jobs and their events."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def submit(self, jobs: Sequence[NewJob], *, max_queued: int | None = None) -> list[Submitted]:
        """Queue jobs in one transaction, each once per idempotency key of its caller.

        Raises
        ------
        QueueFullError
            If the queue would hold more than `max_queued` jobs: none is queued.
        """
        raise NotImplementedError

    def get(self, job_id: str) -> Job | None:
        """Return a job."""
        raise NotImplementedError

    def page(
        self,
        *,
        kind: JobKind = JobKind.SOLVE,
        status: JobStatus | None = None,
        caller: str | None = None,
        deployment: str | None = None,
        before: int | None = None,
        limit: int = 50,
    ) -> list[Job]:
        """Return jobs, newest first, whose number is below `before`."""
        raise NotImplementedError

    def request_stop(self, job_id: str) -> Job | None:
        """Ask for the end: a queued job is stopped at once (with a ``done`` event), a running one is told."""
        raise NotImplementedError

    def claim(self, worker: str, *, cpus: int) -> Claim | None:
        """Lease the next job that fits: by priority, then callers with fewest running jobs, then by age.

        Adds a ``progress`` event (``{"phase": "started", "attempt": n}``).
        """
        raise NotImplementedError

    def beat(self, claims: Sequence[Claim]) -> Beat:
        """Renew leases in one transaction."""
        raise NotImplementedError

    def record(
        self,
        claim: Claim,
        events: Sequence[NewEvent],
        *,
        incumbent: Mapping[str, Any] | None = None,
        incumbent_digest: str | None = None,
    ) -> bool:
        """Append events, and keep the incumbent; False, and nothing written, if the lease is lost."""
        raise NotImplementedError

    def finish(self, claim: Claim, outcome: Outcome) -> bool:
        """End a job with a ``done`` event, add its counters; False, and nothing written, without lease."""
        raise NotImplementedError

    def release(self, claim: Claim) -> bool:
        """Put a job back in the queue with its incumbent; the attempt does not count as lost (shutdown)."""
        raise NotImplementedError

    def leases(self) -> list[Lease]:
        """Return every running job's lease, for who watches."""
        raise NotImplementedError

    def retire(self, lease: Lease) -> JobStatus | None:
        """Take a job from a lost worker if its beat still stands: queue it again, or fail it after two.

        Returns its new status, None where it lives or somebody else was faster.
        """
        raise NotImplementedError

    def heads(self, job_ids: Sequence[str]) -> dict[str, Head]:
        """Return where jobs stand, in one cheap query."""
        raise NotImplementedError

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """Return events with numbers above `after`, in order."""
        raise NotImplementedError

    def counts(self) -> dict[JobStatus, int]:
        """Return how many jobs have each status."""
        raise NotImplementedError
