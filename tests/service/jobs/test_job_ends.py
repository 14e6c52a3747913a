"""How jobs end before their time: stopped, out of time, out of memory, killed, or with a full disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from service.state.records import Job, JobKind, JobStatus
from tests.service.jobs.worker_support import Shop, WorkerProcess, endless, eventually
from tests.service.server import tiny_trace

MIB = 1 << 20


def checked(shop: Shop, job: Job) -> dict[str, object]:
    """Return the placement file of a job that was cut short; its figures are the result's."""
    assert job.result is not None
    assert job.placement_digest == job.result["placement_id"]
    document: dict[str, object] = json.loads(shop.files.read(job.placement_digest))
    assert document["format"] == "moe-placement/1"
    assert document["objective"] == job.result["objective"]
    assert document["metrics"] == job.result["metrics"]
    return document


def test_a_stop_keeps_the_incumbent(shop: Shop, trace: str) -> None:
    """What was found by then stands, whole, and no worse than the last that was told."""
    with shop.worker():
        job_id = endless(shop, trace)
        told = shop.wait_incumbent(job_id).data
        shop.jobs.request_stop(job_id)
        job = shop.done(job_id)
    assert (job.status, job.error) == (JobStatus.STOPPED, None)
    assert checked(shop, job)["provenance"]["termination"] == "stopped"  # type: ignore[index]
    assert job.result is not None
    assert job.result["objective"]["value"] <= told["objective"]
    assert shop.jobs.events(job_id)[-1].kind == "done"


def test_a_stop_before_anything_was_found(shop: Shop, trace: str) -> None:
    """The job ends as stopped, without a placement."""
    with shop.worker():
        job_id = endless(shop, trace)
        shop.wait_event(job_id, lambda event: event.data.get("phase") == "started")
        shop.jobs.request_stop(job_id)
        job = shop.done(job_id)
    assert job.status is JobStatus.STOPPED
    assert job.error is None


def test_a_solver_that_does_not_heed_a_stop_is_killed(shop: Shop, trace: str) -> None:
    """Its last kept incumbent stands, with all figures."""
    with shop.worker(stop_grace_seconds=0.2) as worker:
        job_id = endless(shop, trace)
        shop.wait_incumbent(job_id)
        child = worker.child()
        os.kill(child, signal.SIGSTOP)
        shop.jobs.request_stop(job_id)
        job = shop.done(job_id)
        eventually(lambda: not worker.children(), what="the end of the process")
    assert job.status is JobStatus.STOPPED
    checked(shop, job)
    assert job.result is not None
    assert "its last incumbent stands" in job.result["notes"][-1]


def test_a_time_limit_of_its_own_is_a_success(shop: Shop, trace: str) -> None:
    """As on the command line, the limit ends the solve and the placement is written."""
    with shop.worker():
        job = shop.done(shop.submit(trace, solver="search", time_limit=3.0))
    assert (job.status, job.error) == (JobStatus.SUCCEEDED, None)
    checked(shop, job)


def test_the_services_limit_keeps_the_incumbent(shop: Shop, trace: str) -> None:
    """Past the service's limit the job has timed out, and says so; what it found stands."""
    with shop.worker(max_solve_seconds=6.0):
        job = shop.done(endless(shop, trace))
    assert job.status is JobStatus.TIMED_OUT
    assert job.error is not None
    assert job.error["code"] == "timed-out"
    checked(shop, job)


def test_memory_is_bounded(shop: Shop, tmp_path: Path) -> None:
    """A problem that needs more than it may have fails as such, and the worker goes on."""
    trace = shop.keep(tiny_trace(tmp_path / "small.npz"))
    # Loads of 4,096 windows, 16 layers and 512 devices are 256 MiB alone.
    ids_TLK = (np.arange(8192)[:, None, None] * 7 + np.arange(2)) % 512 + np.zeros((1, 16, 1), dtype=int)
    large = tmp_path / "large.npz"
    np.savez(large, topk=ids_TLK.astype(np.uint16), num_experts=np.int64(512))
    with shop.worker(solve_memory_bytes=256 * MIB):
        job = shop.done(shop.submit(large, topology="h100:64x8", window=2))
        after = shop.done(shop.submit(trace, solver="greedy"))
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert job.error["code"] == "out-of-memory"
    assert "256 MiB" in job.error["message"]
    assert after.status is JobStatus.SUCCEEDED


def test_a_killed_process_is_tried_once_more(shop: Shop, trace: str) -> None:
    """The second attempt goes on from the incumbent; after a second kill the job has failed."""
    with shop.worker() as worker:
        job_id = endless(shop, trace)
        first = shop.wait_incumbent(job_id)
        os.kill(worker.child(), signal.SIGKILL)
        again = shop.wait_event(
            job_id, lambda event: event.kind == "incumbent" and event.data["solver"] == "start"
        )
        last = [e for e in shop.jobs.events(job_id) if e.kind == "incumbent" and e.seq < again.seq][-1]
        assert again.data["objective"] == pytest.approx(last.data["objective"])
        assert again.seq > first.seq
        os.kill(worker.child(), signal.SIGKILL)
        job = shop.done(job_id)
    assert (job.status, job.attempt, job.lost) == (JobStatus.FAILED, 2, 2)
    assert job.error is not None
    assert job.error["code"] == "worker-lost"


def test_a_retry_keeps_to_the_budget_of_moves(shop: Shop, trace: str) -> None:
    """Moves are counted from the caller's start, not from what the lost attempt had found."""
    with shop.worker() as worker:
        start = shop.done(shop.submit(trace, solver="contiguous")).placement_digest
        assert start is not None
        job_id = shop.submit(trace, start=start, max_moves=4, time_limit=8.0)
        shop.wait_event(job_id, lambda event: event.data.get("solver") == "change")
        os.kill(worker.child(), signal.SIGKILL)
        job = shop.done(job_id)
    assert job.status is JobStatus.SUCCEEDED, job.error
    assert job.result is not None
    assert job.result["moves"]["count"] <= 4
    assert job.attempt == 2


def test_a_crash_is_told_and_not_repeated(shop: Shop, trace: str) -> None:
    """A process that ends with another signal has failed by itself."""
    with shop.worker() as worker:
        job_id = endless(shop, trace)
        shop.wait_incumbent(job_id)
        os.kill(worker.child(), signal.SIGSEGV)
        job = shop.done(job_id)
    assert (job.status, job.attempt) == (JobStatus.FAILED, 1)
    assert job.error is not None
    assert job.error["code"] == "internal"
    assert "SIGSEGV" in job.error["message"]


def test_quick_jobs_do_not_wait_for_solves(shop: Shop, trace: str) -> None:
    """With every thread taken a check still runs."""
    with shop.worker(cpus=1):
        busy = endless(shop, trace)
        waiting = endless(shop, trace)
        shop.wait_incumbent(busy)
        check = shop.done(shop.submit(trace, kind=JobKind.CHECK))
        assert check.status is JobStatus.SUCCEEDED
        assert shop.job(waiting).status is JobStatus.QUEUED
        assert shop.job(busy).status is JobStatus.RUNNING


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("needs root to mount a small file system")
    options = [mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(options, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        with suppress(OSError):
            while True:
                os.write(descriptor, bytes(4096))
    finally:
        os.close(descriptor)


def test_a_full_disk_fails_the_job_and_not_the_worker(
    tmp_path: Path, small_disk: Path, postgresql_url: str
) -> None:
    """The error says what happened; with room again the next job succeeds."""
    from service.state.database import open_database

    database = open_database(postgresql_url)
    shop = Shop(small_disk / "data", postgresql_url, database)
    trace = shop.keep(tiny_trace(tmp_path / "trace.npz"))
    ballast = small_disk / "ballast"
    worker = WorkerProcess(shop, {}, log_folder=tmp_path)
    try:
        eventually(shop.workers.list, what="the worker")
        fill(ballast)
        full = shop.done(shop.submit(trace, solver="greedy"))
        ballast.unlink()
        after = shop.done(shop.submit(trace, solver="greedy"))
        assert worker.process.poll() is None
    finally:
        worker.kill()
        database.close()
    assert full.status is JobStatus.FAILED
    assert full.error is not None
    assert full.error["code"] == "internal"
    assert "No space left" in full.error["message"] or "full" in full.error["message"]
    assert after.status is JobStatus.SUCCEEDED, after.error
