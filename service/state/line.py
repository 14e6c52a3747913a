"""Who is next: by priority, then callers with the fewest running jobs, then by age.

Each question is answered from an index, however long the queue is: there may be a hundred thousand jobs in
line, and on SQLite nobody else can write meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from service.state.records import JobKind, JobStatus
from service.state.tables import jobs

__all__ = ["Room", "any_in_line", "first_in_line"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a worker can take.

    Parameters
    ----------
    cpus
        Most threads that the job may use.
    kinds
        Kinds of jobs to choose from.
    """

    cpus: int
    kinds: Collection[JobKind] = tuple(JobKind)

    def fits(self, table: sa.FromClause = jobs) -> sa.ColumnElement[bool]:
        """Return the condition that a job waits and fits."""
        waits = sa.and_(table.c.status == JobStatus.QUEUED, table.c.cpus <= self.cpus)
        return waits if set(self.kinds) == set(JobKind) else sa.and_(waits, table.c.kind.in_(self.kinds))


def first_in_line(connection: sa.Connection, room: Room) -> list[int]:
    """Return the numbers of the jobs that may be next, the best one first: of every caller the oldest."""
    priority = connection.execute(sa.select(sa.func.max(jobs.c.priority)).where(room.fits())).scalar_one()
    if priority is None:
        return []
    running = {row.caller: row.running for row in connection.execute(_running())}
    oldest = connection.execute(_oldest(priority, room)).all()
    return [row.number for row in sorted(oldest, key=lambda row: (running.get(row.caller, 0), row.number))]


def any_in_line(room: Room) -> sa.Select[int]:
    """Return what finds the next job among all, past those that others are about to take."""
    share = _running().subquery("share")
    return (
        sa.select(jobs.c.number)
        .select_from(jobs.outerjoin(share, share.c.caller == jobs.c.caller))
        .where(room.fits())
        .order_by(jobs.c.priority.desc(), sa.func.coalesce(share.c.running, 0), jobs.c.number)
        .limit(1)
        .with_for_update(of=jobs, skip_locked=True)
    )


def _running() -> sa.Select[str, int]:
    busy = jobs.alias("busy")
    return (
        sa.select(busy.c.caller, sa.func.count().label("running"))
        .where(busy.c.status == JobStatus.RUNNING)
        .group_by(busy.c.caller)
    )


def _oldest(priority: int, room: Room) -> sa.Select[str, int]:
    """Return what finds every caller's oldest job, one caller from the other in the index."""
    others = jobs.alias("others")

    def first(*more: sa.ColumnElement[bool]) -> sa.Label[int]:
        # An order that one index alone has: by number, PostgreSQL would go through all history.
        statement = sa.select(others.c.number).where(room.fits(others), others.c.priority == priority, *more)
        ordered = statement.order_by(others.c.caller, others.c.number).limit(1)
        return ordered.scalar_subquery().label("number")

    oldest = sa.select(first()).cte("oldest", recursive=True)
    before = jobs.alias("before")
    caller = sa.select(before.c.caller).where(before.c.number == oldest.c.number).correlate(oldest)
    following = sa.select(first(others.c.caller > caller.scalar_subquery())).where(
        oldest.c.number.is_not(None)
    )
    oldest = oldest.union_all(following)
    return sa.select(jobs.c.caller, jobs.c.number).join_from(oldest, jobs, jobs.c.number == oldest.c.number)
