"""Waiting for short jobs: their POST answers with what they found, if that does not take long."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import anyio

from service.api.context import Context
from service.api.watch import GONE
from service.errors import InvalidError, NotFoundError, ProblemError, UnavailableError
from service.state.records import Job

__all__ = ["job_of", "look", "refuse_failed", "settled"]

P = ParamSpec("P")
T = TypeVar("T")


async def look(context: Context, find: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a look-up by primary key: at once where it takes microseconds, else in a thread."""
    if context.database.is_sqlite:
        return find(*args, **kwargs)
    return await anyio.to_thread.run_sync(lambda: find(*args, **kwargs))


async def job_of(context: Context, job_id: str, prefixes: str) -> Job:
    """Return a job of the named kinds.

    Parameters
    ----------
    prefixes
        First letters of the ids that are meant: ``s`` solve, ``e`` evaluation, ``c`` check.

    Raises
    ------
    NotFoundError
        If there is none.
    """
    if len(job_id) == 28 and job_id.isascii() and job_id.replace("-", "").isalnum() and job_id[0] in prefixes:
        job = await look(context, context.jobs.get, job_id)
        if job is not None:
            return job
    what = "evaluation" if prefixes == "e" else "solve"
    raise NotFoundError(f"there is no {what} {job_id[:80].encode('ascii', 'replace').decode()!r}")


async def settled(context: Context, job: Job, wait_s: float) -> Job:
    """Return a job once it has ended, or as it stands after some seconds.

    Raises
    ------
    NotFoundError
        If it was removed meanwhile.
    """
    deadline = time.monotonic() + wait_s
    while not job.is_final and not context.watcher.closed and (left := deadline - time.monotonic()) > 0:
        if await context.watcher.wait("job", job.id, job.event_seq, left) == GONE:
            raise NotFoundError(f"{job.id} was removed")
        job = await job_of(context, job.id, job.id[0])
    return job


def refuse_failed(job: Job) -> None:
    """Answer with the problem that a failed job met.

    Raises
    ------
    ProblemError
        If it has failed.
    """
    if job.result is not None and job.error is None:
        return
    error = job.error or {
        "code": str(job.status),
        "message": f"{job.id} was stopped before its end",
    }
    code, message = error["code"], error["message"]
    if code == "worker-lost":
        raise UnavailableError(message, job_id=job.id)
    if code == "internal":
        raise ProblemError(message, job_id=job.id)
    raise InvalidError(message, reason=code, job_id=job.id)
