"""Group commit on its own: what cannot be queued is told apart, and the rest is queued."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.api.context import Context
from service.api.submission import Submitter, Wanted
from service.errors import ProblemError, QueueFullError
from service.schemas import SolveRequest
from service.serve import make_context
from service.settings import Settings
from service.state.records import JobKind, JobStatus, NewJob, Submitted
from service.state.workers import WorkerStore

TRACE = "sha256:" + "1" * 64
REQUEST = SolveRequest(trace_id=TRACE, topology="h100:1x2")


@pytest.fixture
def context(database_url: str, tmp_path: Path) -> Iterator[Context]:
    """The stores of a process whose queue takes ten jobs, with one trace."""
    settings = Settings(
        MOE_PLACEMENT_DATABASE_URL=database_url,  # type: ignore[call-arg]
        data_dir=tmp_path / "data",
        max_queued=10,
    )
    opened = make_context(settings)
    opened.artifacts.add(
        digest=TRACE, kind="trace", size_bytes=1, format="npz", summary={}, created_by="local"
    )
    yield opened
    opened.watcher.close()
    opened.tokens.close()
    opened.database.close()


def wanted(*, key: str | None = None, caller: str = "a", most: int | None = None, cpus: int = 1) -> Wanted:
    job = NewJob(
        kind=JobKind.SOLVE,
        caller=caller,
        spec={},
        request_hash="0" * 64,
        trace_digest=TRACE,
        idempotency_key=key,
        cpus=cpus,
    )
    return Wanted(job=job, request=REQUEST, max_queued=most)


def submit(context: Context, *several: Wanted) -> list[Submitted | ProblemError]:
    """Submit all at once."""

    async def run() -> list[Submitted | BaseException]:
        submitter = Submitter(context)
        return await asyncio.gather(*map(submitter.submit, several), return_exceptions=True)

    return [_checked(one) for one in asyncio.run(run())]


def _checked(found: Submitted | BaseException) -> Submitted | ProblemError:
    if not isinstance(found, (Submitted, ProblemError)):
        raise found
    return found


def test_a_full_queue_takes_what_still_fits(context: Context) -> None:
    """Of fifteen jobs at once ten are queued; a repeated key is answered all the same."""
    found = submit(context, wanted(key="k"), *(wanted() for _ in range(14)))
    assert sum(isinstance(one, Submitted) for one in found) == 10
    assert sum(isinstance(one, QueueFullError) for one in found) == 5
    assert context.jobs.counts()[JobStatus.QUEUED] == 10
    (again,) = submit(context, wanted(key="k"))
    assert isinstance(again, Submitted)
    assert not again.created


def test_a_caller_has_no_more_waiting_than_allowed(context: Context) -> None:
    """Its limit counts what waits already and what comes with it; others are not held to it."""
    found = submit(context, *(wanted(key=f"k{n}", most=2) for n in range(4)), wanted(caller="b"))
    assert [isinstance(one, Submitted) for one in found] == [True, True, False, False, True]
    (refused,) = submit(context, wanted(most=2))
    assert isinstance(refused, QueueFullError)
    assert refused.detail.startswith("2 jobs of this token wait")
    (again,) = submit(context, wanted(key="k1", most=2))
    assert isinstance(again, Submitted)
    assert not again.created


def test_no_job_waits_for_more_cores_than_there_are(context: Context) -> None:
    """A job for more threads than any worker has would wait for ever; it gets all that there are."""
    (before,) = submit(context, wanted(cpus=8))
    WorkerStore(context.database).register("w-1", cpus=2)
    (after,) = submit(context, wanted(cpus=8))
    assert isinstance(before, Submitted)
    assert isinstance(after, Submitted)
    assert (before.job.cpus, after.job.cpus) == (8, 2)
