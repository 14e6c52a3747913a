"""The queue and every job's life: one row a job, leased by workers, fenced by the number of its attempt.

A lease is kept by counting (`beat`), not by the clock: who watches takes a job from a worker whose count has
stood still for as long as the watcher's own monotonic clock says. A worker that comes back after that finds
its attempt outdated, and nothing that it writes takes effect.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from service.errors import NotFoundError, QueueFullError
from service.state.counters import add_counters
from service.state.database import Database
from service.state.job_rows import (
    JOB_COLUMNS,
    Key,
    append_events,
    done_event,
    event_of,
    held_by,
    job_of,
    key_of,
    last_incumbent,
    row_of,
)
from service.state.line import Room, any_in_line, first_in_line
from service.state.records import Claim, Event, Job, JobKind, JobStatus, NewEvent, NewJob, Outcome, Submitted
from service.state.tables import events, jobs
from service.state.totals import finished_totals

__all__ = ["MOST_ATTEMPTS", "Beat", "Head", "JobStore", "Lease"]

MOST_ATTEMPTS = 2
"""A job whose worker is lost is tried once more."""

_SAME_KEY = ("caller", "kind", "idempotency_key")


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
    """Jobs and their events.

    Parameters
    ----------
    clock
        Seconds since the epoch, for show only: it may jump.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def submit(self, jobs: Sequence[NewJob], *, max_queued: int | None = None) -> list[Submitted]:
        """Queue jobs in one transaction, each once per idempotency key of its caller.

        Processes that submit to PostgreSQL at the same moment do not see each other's jobs yet, and may
        together pass `max_queued` by what they submit in that moment.

        Raises
        ------
        QueueFullError
            If the queue would hold more than `max_queued` jobs: none is queued.
        NotFoundError
            If a job names a trace or placement that is not there: none is queued.
        """
        at = self._clock()
        rows = [row_of(new, at) for new in jobs]
        try:
            with self._database.write() as connection:
                numbers = _insert(connection, rows)
                if numbers and max_queued is not None:
                    _check_room(connection, max_queued)
                known = _with_keys_of(connection, [row for row in rows if row["id"] not in numbers])
        except sa.exc.IntegrityError as exc:
            raise NotFoundError(
                "a trace or placement that the job names is no longer kept: upload it again"
            ) from exc
        return [_submitted(row, numbers, known) for row in rows]

    def get(self, job_id: str) -> Job | None:
        """Return a job."""
        with self._database.read() as connection:
            return _job(connection, jobs.c.id == job_id)

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
        wanted = {"kind": kind, "status": status, "caller": caller, "deployment": deployment}
        statement = sa.select(*JOB_COLUMNS).where(
            *(jobs.c[name] == value for name, value in wanted.items() if value is not None)
        )
        if before is not None:
            statement = statement.where(jobs.c.number < before)
        with self._database.read() as connection:
            found = connection.execute(statement.order_by(jobs.c.number.desc()).limit(limit))
            return [job_of(row) for row in found.mappings()]

    def request_stop(self, job_id: str) -> Job | None:
        """Ask for the end: a queued job is stopped at once (with a ``done`` event), a running one is told."""
        with self._database.write() as connection:
            job = _job(connection, jobs.c.id == job_id, lock=True)
            if job is None or job.is_final or (job.status is JobStatus.RUNNING and job.stop_requested):
                return job
            if job.status is JobStatus.QUEUED:
                note = "it was stopped while it waited to go on; its last incumbent stands"
                self._end(
                    connection, jobs.c.id == job_id, last_incumbent(job, note=note), stop_requested=True
                )
            else:
                self._update(connection, jobs.c.id == job_id, [], stop_requested=True)
            return _job(connection, jobs.c.id == job_id)

    def claim(self, worker: str, *, cpus: int, kinds: Collection[JobKind] = tuple(JobKind)) -> Claim | None:
        """Lease the next job that fits: by priority, then callers with fewest running jobs, then by age.

        Adds a ``progress`` event (``{"phase": "started", "attempt": n}``).

        Parameters
        ----------
        cpus
            Most threads that the job may use.
        kinds
            Kinds of jobs to choose from.
        """
        room = Room(cpus=cpus, kinds=kinds)
        if not self._has_work(room):
            return None
        at = self._clock()
        with self._database.write() as connection:
            job = _take_next(connection, room, worker, at)
            if job is None:
                return None
            started = NewEvent(kind="progress", data={"phase": "started", "attempt": job.attempt})
            append_events(connection, job.id, job.event_seq, [started], at)
        return Claim(job=job, worker=worker, attempt=job.attempt)

    def beat(self, claims: Sequence[Claim]) -> Beat:
        """Renew leases in one transaction."""
        if not claims:
            return Beat(lost=frozenset(), stop=frozenset())
        statement = jobs.update().where(_any_of(claims)).values(beat=jobs.c.beat + 1)
        with self._database.write() as connection:
            rows = connection.execute(statement.returning(jobs.c.id, jobs.c.stop_requested)).all()
        return _beat(claims, {row.id: row.stop_requested for row in rows})

    def look(self, claims: Sequence[Claim]) -> Beat:
        """Return what `beat` would, without renewing: cheap enough to ask many times a second."""
        if not claims:
            return Beat(lost=frozenset(), stop=frozenset())
        with self._database.read() as connection:
            rows = connection.execute(
                sa.select(jobs.c.id, jobs.c.stop_requested).where(_any_of(claims))
            ).all()
        return _beat(claims, {row.id: row.stop_requested for row in rows})

    def record(
        self,
        claim: Claim,
        events: Sequence[NewEvent],
        *,
        incumbent: Mapping[str, Any] | None = None,
        incumbent_digest: str | None = None,
    ) -> bool:
        """Append events, and keep the incumbent; False, and nothing written, if the lease is lost."""
        values: dict[str, Any] = {"beat": jobs.c.beat + 1}  # a sign of life like any other
        if incumbent is not None:
            values["incumbent"] = dict(incumbent)
        if incumbent_digest is not None:
            values["incumbent_digest"] = incumbent_digest
        with self._database.write() as connection:
            return self._update(connection, held_by(claim), events, **values)

    def finish(self, claim: Claim, outcome: Outcome) -> bool:
        """End a job with a ``done`` event, add its counters; False, and nothing written, without lease."""
        with self._database.write() as connection:
            return self._end(connection, held_by(claim), outcome)

    def release(self, claim: Claim) -> bool:
        """Put a job back in the queue with its incumbent; the attempt does not count as lost (shutdown).

        One that was asked to stop is stopped instead.
        """
        with self._database.write() as connection:
            job = _job(connection, held_by(claim), lock=True)
            if job is None:
                return False
            if job.stop_requested:
                note = "its worker shut down before it had stopped; its last incumbent stands"
                return self._end(connection, held_by(claim), last_incumbent(job, note=note))
            return self._requeue(connection, held_by(claim), job, why="its worker shut down")

    def leases(self) -> list[Lease]:
        """Return every running job's lease, for who watches."""
        statement = sa.select(jobs.c.id.label("job_id"), jobs.c.worker, jobs.c.attempt, jobs.c.beat)
        with self._database.read() as connection:
            rows = connection.execute(statement.where(jobs.c.status == JobStatus.RUNNING)).mappings()
            return [Lease(**row) for row in rows]

    def retire(self, lease: Lease) -> JobStatus | None:
        """Take a job from a lost worker if its beat still stands: queue it again, or fail it after two.

        One that was asked to stop is stopped, and keeps its incumbent. Returns its new status, None where it
        lives or somebody else was faster.
        """
        stands = _stands(lease)
        with self._database.write() as connection:
            job = _job(connection, stands, lock=True)
            if job is None:
                return None
            if job.stop_requested:
                outcome = last_incumbent(job, note="its worker was lost; its last incumbent stands")
            elif job.lost + 1 >= MOST_ATTEMPTS:
                outcome = _worker_lost(job)
            else:
                self._requeue(connection, stands, job, why="its worker was lost", lost=job.lost + 1)
                return JobStatus.QUEUED
            self._end(connection, stands, outcome, lost=job.lost + 1)
            return outcome.status

    def heads(self, job_ids: Sequence[str]) -> dict[str, Head]:
        """Return where jobs stand, in one cheap query."""
        statement = sa.select(jobs.c.id, jobs.c.event_seq, jobs.c.status).where(jobs.c.id.in_(job_ids))
        with self._database.read() as connection:
            return {
                row.id: Head(event_seq=row.event_seq, status=JobStatus(row.status))
                for row in connection.execute(statement)
            }

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """Return events with numbers above `after`, in order."""
        statement = (
            sa.select(events)
            .where(events.c.job_id == job_id, events.c.seq > after)
            .order_by(events.c.seq)
            .limit(limit)
        )
        with self._database.read() as connection:
            return [event_of(row) for row in connection.execute(statement).mappings()]

    def counts(self) -> dict[JobStatus, int]:
        """Return how many jobs have each status."""
        statement = sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status)
        with self._database.read() as connection:
            found = {JobStatus(row[0]): int(row[1]) for row in connection.execute(statement)}
        return {status: found.get(status, 0) for status in JobStatus}

    def _has_work(self, room: Room) -> bool:
        """Look before writing, so that idle workers never keep others from it."""
        statement = sa.select(jobs.c.number).where(room.fits())
        with self._database.read() as connection:
            return connection.execute(statement.limit(1)).first() is not None

    def _update(
        self,
        connection: sa.Connection,
        which: sa.ColumnElement[bool],
        news: Sequence[NewEvent],
        **values: Any,
    ) -> bool:
        """Change one job and append events; False if it is not as `which` says."""
        changed = connection.execute(
            jobs.update()
            .where(which)
            .values(event_seq=jobs.c.event_seq + len(news), **values)
            .returning(jobs.c.id, jobs.c.event_seq)
        ).one_or_none()
        if changed is None:
            return False
        append_events(connection, changed.id, changed.event_seq, news, self._clock())
        return True

    def _requeue(
        self, connection: sa.Connection, which: sa.ColumnElement[bool], job: Job, *, why: str, **values: Any
    ) -> bool:
        data = {"phase": "requeued", "attempt": job.attempt, "why": why}
        news = [NewEvent(kind="progress", data=data)]
        return self._update(connection, which, news, status=JobStatus.QUEUED, worker=None, **values)

    def _end(
        self, connection: sa.Connection, which: sa.ColumnElement[bool], outcome: Outcome, **values: Any
    ) -> bool:
        at = self._clock()
        about = connection.execute(sa.select(jobs.c.kind, jobs.c.started_at).where(which)).one_or_none()
        if about is None or not self._update(
            connection,
            which,
            [done_event(outcome)],
            status=outcome.status,
            result=outcome.result,
            placement_digest=outcome.placement_digest,
            error=outcome.error,
            ended_at=at,
            worker=None,
            **values,
        ):
            return False
        totals = finished_totals(about.kind, outcome, started_at=about.started_at, ended_at=at)
        add_counters(connection, {**totals, **outcome.counters})
        return True


def _insert(connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Queue what is new; return the numbers of these by id."""
    if not rows:
        return {}
    firsts: dict[Key | str, Mapping[str, Any]] = {}
    for row in rows:
        firsts.setdefault(key_of(row) or row["id"], row)
    # Keys in order, so that two transactions never wait for each other's.
    ordered = sorted(firsts.values(), key=lambda row: key_of(row) or ("", "", ""))
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = insert(jobs).on_conflict_do_nothing(index_elements=_SAME_KEY)
    made = connection.execute(statement.returning(jobs.c.id, jobs.c.number), ordered)
    return {row.id: row.number for row in made}


def _check_room(connection: sa.Connection, max_queued: int) -> None:
    statement = sa.select(sa.func.count()).where(jobs.c.status == JobStatus.QUEUED)
    queued = connection.execute(statement).scalar_one()
    if queued > max_queued:
        raise QueueFullError(
            f"the queue holds at most {max_queued} jobs, and would hold {queued}: try again later"
        )


def _with_keys_of(connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> dict[Key, Job]:
    """Return the jobs that were queued earlier under the keys of rows."""
    keys = {key for row in rows if (key := key_of(row)) is not None}
    if not keys:
        return {}
    same = sa.tuple_(*(jobs.c[name] for name in _SAME_KEY)).in_(sorted(keys))
    found = connection.execute(sa.select(*JOB_COLUMNS, jobs.c.idempotency_key).where(same)).mappings()
    return {(row["caller"], row["kind"], row["idempotency_key"]): job_of(row) for row in found}


def _submitted(row: Mapping[str, Any], numbers: Mapping[str, int], known: Mapping[Key, Job]) -> Submitted:
    if row["id"] in numbers:
        return Submitted(job=job_of({**row, "number": numbers[row["id"]]}), created=True)
    key = key_of(row)
    assert key is not None  # only a key keeps a row from being written
    job = known[key]
    return Submitted(job=job, created=False, conflict=job.request_hash != row["request_hash"])


def _take_next(connection: sa.Connection, room: Room, worker: str, at: float) -> Job | None:
    for number in first_in_line(connection, room):
        free = sa.select(jobs.c.number).where(jobs.c.number == number, room.fits())
        job = _take(connection, free.with_for_update(skip_locked=True), worker, at)
        if job is not None:
            return job
    return _take(connection, any_in_line(room), worker, at)


def _take(connection: sa.Connection, number: sa.Select[int], worker: str, at: float) -> Job | None:
    values = {
        "status": JobStatus.RUNNING,
        "worker": worker,
        "attempt": jobs.c.attempt + 1,
        "beat": jobs.c.beat + 1,
        "started_at": at,
        "event_seq": jobs.c.event_seq + 1,
    }
    statement = jobs.update().where(jobs.c.number == number.scalar_subquery()).values(values)
    row = connection.execute(statement.returning(*JOB_COLUMNS)).mappings().one_or_none()
    return None if row is None else job_of(row)


def _job(connection: sa.Connection, which: sa.ColumnElement[bool], *, lock: bool = False) -> Job | None:
    statement = sa.select(*JOB_COLUMNS).where(which)
    row = connection.execute(statement.with_for_update() if lock else statement).mappings().one_or_none()
    return None if row is None else job_of(row)


def _any_of(claims: Sequence[Claim]) -> sa.ColumnElement[bool]:
    leases = [(claim.job.id, claim.attempt, claim.worker) for claim in claims]
    return sa.and_(
        jobs.c.id.in_([claim.job.id for claim in claims]),  # finds them by index
        jobs.c.status == JobStatus.RUNNING,
        sa.tuple_(jobs.c.id, jobs.c.attempt, jobs.c.worker).in_(leases),
    )


def _beat(claims: Sequence[Claim], own: Mapping[str, bool]) -> Beat:
    return Beat(
        lost=frozenset(claim.job.id for claim in claims if claim.job.id not in own),
        stop=frozenset(job_id for job_id, is_asked in own.items() if is_asked),
    )


def _stands(lease: Lease) -> sa.ColumnElement[bool]:
    return sa.and_(
        jobs.c.id == lease.job_id,
        jobs.c.status == JobStatus.RUNNING,
        jobs.c.worker == lease.worker,
        jobs.c.attempt == lease.attempt,
        jobs.c.beat == lease.beat,
    )


def _worker_lost(job: Job) -> Outcome:
    message = (
        f"the worker was lost during {job.lost + 1} attempts (killed, out of memory, or its machine gone): "
        "try a smaller problem, or a worker with more memory"
    )
    return Outcome(status=JobStatus.FAILED, error={"code": "worker-lost", "message": message})
