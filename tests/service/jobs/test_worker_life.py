"""Workers come and go: nothing is lost, and nothing is run to its end twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from service.state.records import JobStatus
from tests.service.jobs.worker_support import Shop, endless, eventually
from tests.service.postgres import Cluster
from tests.service.server import pause_between_transactions, tiny_trace


def num_dones(shop: Shop, job_id: str) -> int:
    """Count how often a job has ended."""
    events = shop.jobs.events(job_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    return sum(event.kind == "done" for event in events)


def test_a_killed_workers_job_goes_on_elsewhere(shop: Shop, trace: str) -> None:
    """Its process dies with it; another worker starts from the incumbent; the second loss is the end."""
    with shop.worker(lease_seconds=60.0) as first, shop.worker(lease_seconds=60.0) as second:
        eventually(lambda: len(shop.workers.list()) == 2, what="both workers")
        job_id = endless(shop, trace)
        shop.wait_incumbent(job_id)
        workers = {row.id: row.pid for row in shop.workers.list()}
        holder = shop.job(job_id).worker
        assert holder is not None
        os.kill(workers[holder], signal.SIGKILL)
        loser, other = (first, second) if first.process.pid == workers[holder] else (second, first)
        # Seen at once on the same machine: long before the lease is over.
        eventually(lambda: shop.job(job_id).attempt == 2, what="the second attempt")
        loser.process.wait()
        eventually(lambda: not loser.children(), what="the end of the first process")
        assert shop.job(job_id).worker != holder
        shop.wait_event(job_id, lambda event: event.data.get("solver") == "start")
        other.kill()
        with shop.worker():
            job = shop.done(job_id)
    assert (job.status, job.lost) == (JobStatus.FAILED, 2)
    assert job.error is not None
    assert job.error["code"] == "worker-lost"
    assert num_dones(shop, job_id) == 1


def test_a_silent_workers_job_is_taken_from_it(shop: Shop, trace: str) -> None:
    """A worker that stood still past its lease finds on its return that the job is another's."""
    with shop.worker(lease_seconds=1.0) as first:
        job_id = endless(shop, trace)
        shop.wait_incumbent(job_id)
        pause_between_transactions(first.process.pid, shop.url)
        with shop.worker(lease_seconds=1.0) as second:
            eventually(lambda: shop.job(job_id).attempt == 2, what="the second attempt")
            first.send(signal.SIGCONT)
            eventually(lambda: not first.children(), what="the end of the first process")
            shop.wait_event(job_id, lambda event: event.data.get("solver") == "start")
            shop.jobs.request_stop(job_id)
            job = shop.done(job_id)
            assert second.process.poll() is None
        assert first.process.poll() is None
        # It goes on with others' jobs.
        assert shop.done(shop.submit(trace, solver="greedy")).status is JobStatus.SUCCEEDED
    assert (job.status, job.attempt, job.lost) == (JobStatus.STOPPED, 2, 1)
    assert num_dones(shop, job_id) == 1


def test_a_worker_that_shuts_down_gives_its_jobs_back(shop: Shop, trace: str) -> None:
    """SIGTERM keeps the incumbent and queues the job again; that does not count as a loss."""
    with shop.worker() as first:
        job_id = endless(shop, trace)
        told = shop.wait_incumbent(job_id).data
        assert first.stop() == 0
        assert first.children() == []
    job = shop.job(job_id)
    assert (job.status, job.lost, job.worker) == (JobStatus.QUEUED, 0, None)
    assert job.incumbent is not None
    assert job.incumbent["objective"] <= told["objective"]
    assert job.incumbent_digest is not None
    assert shop.workers.list() == []
    with shop.worker():
        again = shop.wait_event(job_id, lambda event: event.data.get("solver") == "start")
        if again.kind == "incumbent":
            assert again.data["objective"] == pytest.approx(job.incumbent["objective"])
        shop.jobs.request_stop(job_id)
        job = shop.done(job_id)
    assert job.status is JobStatus.STOPPED
    assert num_dones(shop, job_id) == 1


def test_callers_take_turns(shop: Shop, trace: str) -> None:
    """Many jobs of one caller do not keep another's single one waiting to the end."""
    many = [shop.submit(trace, solver="greedy", caller="many", seed=seed) for seed in range(6)]
    one = shop.submit(trace, solver="greedy", caller="one")
    with shop.worker(cpus=2):
        jobs = [shop.done(job_id) for job_id in [*many, one]]
    assert {job.status for job in jobs} == {JobStatus.SUCCEEDED}
    started = sorted(jobs, key=lambda job: job.started_at or 0.0)
    assert one in [job.id for job in started[:2]]


def test_no_more_threads_than_allowed(shop: Shop, trace: str) -> None:
    """Two threads of jobs run at a time, and priority says which."""
    low = [endless(shop, trace, priority=-1) for _ in range(2)]
    high = [endless(shop, trace, priority=1) for _ in range(2)]
    with shop.worker(cpus=2):
        for job_id in high:
            shop.wait_incumbent(job_id)
        assert [shop.job(job_id).status for job_id in low] == [JobStatus.QUEUED] * 2
        shop.jobs.request_stop(high[0])
        shop.wait_incumbent(low[0])
        assert shop.job(low[1]).status is JobStatus.QUEUED


def test_a_database_that_goes_away_comes_back(durable_cluster: Cluster, tmp_path: Path) -> None:
    """Jobs run on without it, and what they found is written down afterwards."""
    from service.state.database import open_database

    url = durable_cluster.create("away")
    database = open_database(url)
    shop = Shop(tmp_path / "data", url, database)
    trace = shop.keep(tiny_trace(tmp_path / "trace.npz", tokens=4096, layers=8, experts=64))
    with shop.worker(lease_seconds=2.0) as worker:
        job_id = shop.submit(trace, solver="search", time_limit=5.0)
        shop.wait_incumbent(job_id)
        child = worker.child()
        durable_cluster.kill()
        eventually(lambda: child not in worker.children(), what="the end of the solve")
        assert worker.process.poll() is None
        durable_cluster.start()
        job = shop.done(job_id)
    database.close()
    assert (job.status, job.attempt, job.lost) == (JobStatus.SUCCEEDED, 1, 0)
