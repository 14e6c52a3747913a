"""Real workers on a real database: what the tests of jobs stand on."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil

from service.artifacts import ArtifactFiles
from service.ids import new_id
from service.settings import Settings
from service.state.artifacts import ArtifactStore
from service.state.database import Database
from service.state.jobs import JobStore
from service.state.records import Event, Job, JobKind, NewJob
from service.state.workers import WorkerStore

ROOT = Path(__file__).parents[3]
BYTE16 = ROOT / "placement/samples/traces/byte16.npz"
LINEAR = {"kind": "linear", "pair_cost": 1.0, "token_cost": 4.0}

T = TypeVar("T")


def eventually(condition: Callable[[], T], *, within_s: float = 60.0, what: str = "") -> T:
    """Return the first true value of a condition."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what or condition}; last: {found!r}")
        time.sleep(0.01)
    return found


class Shop:
    """A data directory and a database, without a worker yet."""

    def __init__(self, data_dir: Path, url: str, database: Database) -> None:
        self.data_dir = data_dir
        self.url = url
        self.files = ArtifactFiles(data_dir)
        self.artifacts = ArtifactStore(database)
        self.jobs = JobStore(database)
        self.workers = WorkerStore(database)
        self.database = database

    def keep(self, path: Path, kind: str = "trace") -> str:
        """Store a file."""
        digest = self.files.put(path.read_bytes())
        self.artifacts.add(
            digest=digest,
            kind=kind,
            size_bytes=path.stat().st_size,
            format="test",
            summary={},
            created_by="tester",
        )
        return digest

    def submit(
        self,
        trace: Path | str = BYTE16,
        *,
        kind: JobKind = JobKind.SOLVE,
        caller: str = "tester",
        topology: Any = "h100:1x4",
        model: Any = None,
        start: str | None = None,
        priority: int = 0,
        **options: Any,
    ) -> str:
        """Queue a job; return its id."""
        digest = trace if isinstance(trace, str) else self.keep(trace)
        spec = {
            "trace_id": digest,
            "topology": topology,
            "model": model,
            "start_placement_id": start,
            "options": {"calibration": LINEAR, **options},
        }
        new = NewJob(
            kind=kind,
            caller=caller,
            spec=spec,
            request_hash=hashlib.sha256(repr(spec).encode()).hexdigest(),
            trace_digest=digest,
            start_digest=start,
            priority=priority,
            cpus=options.get("threads", 1),
        )
        (submitted,) = self.jobs.submit([new])
        return submitted.job.id

    def job(self, job_id: str) -> Job:
        """Return a job as it stands."""
        job = self.jobs.get(job_id)
        assert job is not None
        return job

    def done(self, job_id: str, *, within_s: float = 60.0) -> Job:
        """Wait for a job's end."""

        def is_final() -> Job | None:
            job = self.job(job_id)
            return job if job.is_final else None

        return eventually(is_final, within_s=within_s, what=f"the end of {job_id}")

    def wait_event(self, job_id: str, wanted: Callable[[Event], bool], *, within_s: float = 60.0) -> Event:
        """Wait for an event of a job."""

        def find() -> Event | None:
            return next(filter(wanted, self.jobs.events(job_id)), None)

        return eventually(find, within_s=within_s, what=f"an event of {job_id}")

    def wait_incumbent(self, job_id: str) -> Event:
        """Wait until a job has a kept incumbent."""
        return self.wait_event(job_id, lambda event: "placement_id" in event.data)

    @contextmanager
    def worker(self, **settings: Any) -> Iterator[WorkerProcess]:
        """Run a worker."""
        process = WorkerProcess(self, settings)
        try:
            yield process
        finally:
            process.kill()


class WorkerProcess:
    """``python -m service.jobs.worker`` in a process group of its own."""

    def __init__(self, shop: Shop, settings: dict[str, Any], *, log_folder: Path | None = None) -> None:
        self.mark = new_id("m")
        given = {"lease_seconds": 2.0, "cpus": 2, "data_dir": shop.data_dir, "database_url": shop.url}
        chosen = Settings(**{**given, **settings})
        self.log_path = (log_folder or shop.data_dir.parent) / f"{self.mark}.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.jobs.worker"],
                cwd=ROOT,
                env={**chosen.environment(), "MOE_PLACEMENT_TEST_MARK": self.mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """What it wrote."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def children(self) -> list[int]:
        """Return the processes of its jobs, orphans too."""
        return [
            process.pid
            for process in psutil.process_iter()
            if process.pid != self.process.pid and _carries(process, self.mark)
        ]

    def child(self) -> int:
        """Wait for a job's process."""
        return eventually(self.children, what="a job's process")[0]

    def send(self, number: int) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def stop(self, *, within_s: float = 20.0) -> int:
        """End it gracefully; return its exit code."""
        self.send(signal.SIGTERM)
        return self.process.wait(within_s)

    def kill(self) -> None:
        """End it and its jobs at once."""
        for pid in (self.process.pid, *self.children()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return mark.encode() in Path(f"/proc/{process.pid}/environ").read_bytes()
    except (psutil.NoSuchProcess, OSError):
        return False


def endless(shop: Shop, trace: str, **options: object) -> str:
    """Queue a solve that goes on for minutes, with an incumbent soon."""
    return shop.submit(trace, **{"solver": "search", "time_limit": 900.0, **options})
