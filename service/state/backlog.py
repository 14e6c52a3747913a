"""How much of the queue is one caller's."""

from __future__ import annotations

import sqlalchemy as sa

from service.state.database import Database
from service.state.records import JobStatus, NewJob
from service.state.tables import jobs

__all__ = ["is_known", "num_queued"]


def num_queued(database: Database, caller: str) -> int:
    """Return how many jobs of a caller wait."""
    waiting = sa.select(sa.func.count()).where(jobs.c.status == JobStatus.QUEUED, jobs.c.caller == caller)
    with database.read() as connection:
        return int(connection.scalar(waiting) or 0)


def is_known(database: Database, job: NewJob) -> bool:
    """Tell whether a submission repeats the idempotency key of an earlier one, and so queues nothing."""
    if job.idempotency_key is None:
        return False
    same = (
        (jobs.c.caller == job.caller)
        & (jobs.c.kind == job.kind.value)
        & (jobs.c.idempotency_key == job.idempotency_key)
    )
    with database.read() as connection:
        return connection.scalar(sa.select(jobs.c.number).where(same)) is not None
