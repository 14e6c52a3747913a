"""Group commit: jobs that arrive while a transaction runs are queued together in the next one.

A durable acknowledgement costs a flush to disk; a hundred callers at once share it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import anyio
from anyio import CapacityLimiter
from fastapi import Request

from placement.errors import InputError
from service.api.context import Context
from service.errors import ConflictError, InvalidError, NotFoundError, ProblemError, QueueFullError
from service.jobs.problem import check_request, for_callers
from service.schemas import EvaluationRequest, SolveRequest
from service.state.backlog import is_known, num_queued
from service.state.records import Artifact, NewJob, Submitted
from service.state.workers import WorkerStore

__all__ = ["Submitter", "Wanted", "submitter_of"]

MOST_AT_ONCE = 200
MOST_SEEN = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A job that a caller wants queued.

    Parameters
    ----------
    job
        The job; its trace is looked up.
    request
        What the caller sent, to be checked as far as that is cheap.
    placement
        Id of the placement to start from or to score, or of the solve that found it.
    placement_key
        Member of the body that named it.
    max_queued
        Jobs of this caller that may wait at a time.
    """

    job: NewJob
    request: SolveRequest | EvaluationRequest
    placement: str | None = None
    placement_key: str = "start_placement_id"
    max_queued: int | None = None


@dataclass(slots=True, eq=False)
class _Batch:
    wanted: list[Wanted] = field(default_factory=list)
    task: asyncio.Task[list[Submitted | ProblemError]] | None = None


class Submitter:
    """Queues jobs, as many in one transaction as have come."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._open: _Batch | None = None
        self._turn = asyncio.Lock()
        self._limiter = CapacityLimiter(1)
        self._workers = WorkerStore(context.database)
        # What an artifact is never changes; whether it is still there is asked each time.
        self._seen: dict[str, Artifact] = {}

    async def submit(self, wanted: Wanted) -> Submitted:
        """Queue a job; returns once it is on disk.

        Raises
        ------
        NotFoundError
            If trace or placement are unknown.
        ConflictError
            If the idempotency key was used for another request, or the named solve has no placement yet.
        QueueFullError
            If the queue is full.
        """
        batch = self._open
        if batch is None or len(batch.wanted) >= MOST_AT_ONCE:
            batch = self._open = _Batch()
        place = len(batch.wanted)
        batch.wanted.append(wanted)
        if batch.task is None:
            batch.task = asyncio.create_task(self._commit(batch))
        # A caller that hangs up must not take the others' transaction along.
        answer = (await asyncio.shield(batch.task))[place]
        if isinstance(answer, ProblemError):
            raise answer
        return answer

    async def _commit(self, batch: _Batch) -> list[Submitted | ProblemError]:
        async with self._turn:
            if self._open is batch:
                self._open = None
            return await anyio.to_thread.run_sync(self._write, batch.wanted, limiter=self._limiter)

    def _write(self, batch: Sequence[Wanted]) -> list[Submitted | ProblemError]:
        """Look up what the jobs name and queue those that can be."""
        resolved = [self._start(wanted) for wanted in batch]
        jobs = [one for one in resolved if isinstance(one, Wanted)]
        known, over = self._known(jobs), self._over(jobs)
        checked = [
            over.get(id(one)) or _missing(one, known) or self._nonsense(one, known) or one
            if isinstance(one, Wanted)
            else one
            for one in resolved
        ]
        good = [one.job for one in checked if isinstance(one, Wanted)]
        answers = iter(self._queue(self._fitting(good)))
        return [next(answers) if isinstance(one, Wanted) else one for one in checked]

    def _start(self, wanted: Wanted) -> Wanted | ProblemError:
        """Turn the id of a solve into that of its placement."""
        named = wanted.placement
        if named is None:
            return wanted
        if named.startswith("sha256:"):
            return replace(wanted, job=replace(wanted.job, start_digest=named))
        job = self._context.jobs.get(named)
        if job is None:
            return NotFoundError(f"{wanted.placement_key}: there is no placement or solve {named!r}")
        digest = job.placement_digest or job.incumbent_digest
        if digest is None:
            return ConflictError(f"{wanted.placement_key}: {named} is {job.status} and has no placement yet")
        return replace(wanted, job=replace(wanted.job, start_digest=digest))

    def _known(self, jobs: Sequence[Wanted]) -> dict[str, Artifact]:
        """Return the named artifacts that are there."""
        named = {one.job.trace_digest for one in jobs} | {one.job.start_digest for one in jobs}
        known = self._context.artifacts.touch(digest for digest in named if digest is not None)
        if len(self._seen) > MOST_SEEN:
            self._seen.clear()
        for digest in known - self._seen.keys():
            found = self._context.artifacts.get(digest)
            if found is not None:
                self._seen[digest] = found
        return {digest: self._seen[digest] for digest in known & self._seen.keys()}

    def _over(self, jobs: Sequence[Wanted]) -> dict[int, ProblemError]:
        """Return the problems of jobs that are more than their callers may have waiting."""
        room: dict[str, int] = {}
        found: dict[int, ProblemError] = {}
        database = self._context.database
        for one in jobs:
            caller, most = one.job.caller, one.max_queued
            if most is None:
                continue
            if caller not in room:
                room[caller] = most - num_queued(database, caller)
            if room[caller] <= 0 and not is_known(database, one.job):
                found[id(one)] = QueueFullError(f"{most} jobs of this token wait, as many as it may have")
            room[caller] -= 1
        return found

    def _nonsense(self, wanted: Wanted, known: Mapping[str, Artifact]) -> ProblemError | None:
        """Say what makes no sense in a request, as far as that is seen without reading the trace."""
        trace = known[wanted.request.trace_id].summary
        try:
            check_request(wanted.request, self._context.settings, trace=trace)
        except InputError as exc:
            return InvalidError(for_callers(str(exc), {}))
        return None

    def _fitting(self, jobs: list[NewJob]) -> list[NewJob]:
        """Have no job wait for more cores than any worker has: it runs on those that there are."""
        if all(job.cpus == 1 for job in jobs):
            return jobs
        most = max((worker.cpus for worker in self._workers.list()), default=None)
        return jobs if most is None else [replace(job, cpus=min(job.cpus, most)) for job in jobs]

    def _queue(self, jobs: list[NewJob]) -> list[Submitted | ProblemError]:
        """Queue all in one transaction; where that cannot be, halve until it is known which cannot."""
        if not jobs:
            return []
        try:
            found = self._context.jobs.submit(jobs, max_queued=self._context.settings.max_queued)
        except (QueueFullError, NotFoundError) as exc:
            if len(jobs) == 1:
                return [exc]
            half = len(jobs) // 2
            return self._queue(jobs[:half]) + self._queue(jobs[half:])
        return [_conflict(one) or one for one in found]


def _missing(wanted: Wanted, known: Mapping[str, Artifact]) -> ProblemError | None:
    """Say which of the named artifacts is not there, or is something else."""
    job = wanted.job
    for member, digest, kind in (
        ("trace_id", job.trace_digest, "trace"),
        (wanted.placement_key, job.start_digest, "placement"),
    ):
        if digest is None:
            continue
        if digest not in known:
            return NotFoundError(f"{member}: there is no {kind} {digest}; upload it with POST /v1/{kind}s")
        if known[digest].kind != kind:
            return InvalidError(f"{member}: {digest} is a {known[digest].kind}, not a {kind}")
    return None


def _conflict(found: Submitted) -> ProblemError | None:
    if not found.conflict:
        return None
    return ConflictError(
        f"this Idempotency-Key was used for {found.job.id} with another request; take a new key",
        job_id=found.job.id,
    )


def submitter_of(request: Request) -> Submitter:
    """Return the submitter of the process that serves a request."""
    state = request.app.state
    found = getattr(state, "submitter", None)
    if found is None:
        found = state.submitter = Submitter(state.context)
    submitter: Submitter = found
    return submitter
