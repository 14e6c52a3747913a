"""The worker: leases jobs, runs each in a process of its own, and writes down what comes.

``python -m service.jobs.worker``, as ``moe-placement serve --role worker`` runs it. One thread talks to the
database; while that is away, jobs run on and what they find waits.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from placement.errors import PlacementError
from service.api.logs import configure_logs
from service.artifacts import ArtifactFiles
from service.deployments.controller import Controller
from service.errors import UnavailableError
from service.ids import new_id
from service.jobs.task import QUICK, Bench, Task
from service.jobs.watch import StillWatch
from service.settings import Settings, read_settings
from service.state.artifacts import ArtifactStore
from service.state.database import Database, open_database
from service.state.jobs import JobStore, Lease
from service.state.records import JobKind
from service.state.workers import Worker as WorkerRow
from service.state.workers import WorkerStore

__all__ = ["Worker", "main"]

_log = logging.getLogger(__name__)

BEATS_PER_LEASE = 5
WATCH_S = 0.5
"""How often the other workers are looked at."""
FORGET_LEASES = 4
"""A worker that gave no sign for so many leases is forgotten; its jobs were taken from it long before."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
"""Between attempts to reach a database that is away."""
FAREWELL_S = 5.0
"""How long a worker that shuts down tries to tell a database that is away."""
ANY = 1 << 30


@dataclass(slots=True)
class _Timer:
    """Something to do every so often, by the monotonic clock."""

    every_s: float
    next_s: float = 0.0

    def is_due(self) -> bool:
        now = time.monotonic()
        if now < self.next_s:
            return False
        self.next_s = now + self.every_s
        return True


class Worker:
    """One worker process.

    Parameters
    ----------
    settings
        Limits and intervals.
    database
        State and queue.
    files
        Artifacts.
    """

    def __init__(self, settings: Settings, database: Database, files: ArtifactFiles) -> None:
        self.id = new_id("w")
        self._settings = settings
        self._jobs = JobStore(database)
        self._workers = WorkerStore(database)
        self._num_cpus = settings.cpus or len(os.sched_getaffinity(0))
        self._bench = Bench(
            settings=settings,
            files=files,
            artifacts=ArtifactStore(database),
            jobs=self._jobs,
            num_cpus=self._num_cpus,
            pid=os.getpid(),
        )
        self._tasks: list[Task] = []
        self._gone: list[Task] = []
        self._news = threading.Event()
        self._closing = False
        self._is_registered = False
        self._beat = _Timer(settings.lease_seconds / BEATS_PER_LEASE)
        self._watch = _Timer(min(WATCH_S, settings.lease_seconds / BEATS_PER_LEASE))
        self._leases: StillWatch[tuple[str, str, int]] = StillWatch(still_s=settings.lease_seconds)
        self._rows: StillWatch[str] = StillWatch(still_s=FORGET_LEASES * settings.lease_seconds)

    def close(self) -> None:
        """Have `run` come to an end."""
        self._closing = True
        self._news.set()

    def run(self) -> None:
        """Work until `close`; then give every job back with what it has found."""
        pause_s = FIRST_PAUSE_S
        while not self._closing:
            try:
                self._turn()
                pause_s = FIRST_PAUSE_S
            except UnavailableError as exc:
                _log.error("something is away, next try in %.1f s: %s", pause_s, exc)
                self._sleep(pause_s)
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
                continue
            self._sleep(self._settings.poll_seconds)
        self._shut_down()

    def _sleep(self, seconds: float) -> None:
        """Wait for news, or for so long."""
        self._news.wait(seconds)
        if not self._closing:
            self._news.clear()

    def _turn(self) -> None:
        self._register()
        # First the leases: a store of artifacts that is away must not cost them.
        self._look()
        self._record()
        if self._watch.is_due():
            self._watch_others()
        self._claim()
        self._tidy()

    def _register(self) -> None:
        if not self._is_registered:
            self._workers.register(self.id, cpus=self._num_cpus)
            self._is_registered = True
            _log.info("worker %s takes jobs, %d threads at a time", self.id, self._num_cpus)

    def _record(self) -> None:
        trouble = None
        for task in self._tasks:
            try:
                task.record()
            except UnavailableError as exc:
                trouble = exc
        self._gone += [task for task in self._tasks if task.is_over]
        self._tasks = [task for task in self._tasks if not task.is_over]
        if trouble is not None:
            raise trouble

    def _look(self) -> None:
        """See which jobs are to stop and which are ours no more; renew the leases in time."""
        claims = [task.claim for task in self._tasks]
        if self._beat.is_due():
            seen = self._jobs.beat(claims)
            self._is_registered = self._workers.beat(self.id)
        else:
            seen = self._jobs.look(claims)
        for task in self._tasks:
            if task.job.id in seen.lost:
                task.lose()
            elif task.job.id in seen.stop:
                task.stop()

    def _watch_others(self) -> None:
        """Take jobs from workers that are gone."""
        leases = {(lease.job_id, lease.worker, lease.attempt): lease for lease in self._jobs.leases()}
        rows = self._workers.list()
        dead = {row.id for row in self._workers.dead_here()}
        overdue = self._leases.look({key: lease.beat for key, lease in leases.items()})
        for key, lease in leases.items():
            if lease.worker in dead or key in overdue:
                self._retire(lease)
        self._forget(rows, dead)

    def _retire(self, lease: Lease) -> None:
        status = self._jobs.retire(lease)
        if status is not None:
            _log.error("worker %s is gone; its job %s is %s", lease.worker, lease.job_id, status)

    def _forget(self, rows: list[WorkerRow], dead: set[str]) -> None:
        silent = self._rows.look({row.id: row.beat for row in rows})
        for worker_id in dead.union(silent) - {self.id}:
            self._workers.remove(worker_id)

    def _claim(self) -> None:
        """Start what fits: quick jobs first, and one of them beside a full house."""
        while (room := self._num_cpus - sum(task.num_cpus for task in self._tasks)) > -1:
            if any(task.is_quick for task in self._tasks) and room < 1:
                return
            # One that wants more threads than are free starts all the same: none must wait for ever.
            claim = self._jobs.claim(self.id, cpus=ANY, kinds=QUICK)
            if claim is None and room > 0:
                claim = self._jobs.claim(self.id, cpus=ANY, kinds=(JobKind.SOLVE,))
            if claim is None:
                return
            task = Task(claim, self._bench, self._news.set)
            self._tasks.append(task)
            task.record()

    def _tidy(self) -> None:
        """Clear away after processes that are gone."""
        for task in [task for task in self._gone if task.is_gone]:
            self._gone.remove(task)
            task.close()

    def _shut_down(self) -> None:
        _log.info("worker %s shuts down with %d jobs", self.id, len(self._tasks))
        for task in self._tasks:
            task.shut_down()
        deadline = time.monotonic() + self._settings.stop_grace_seconds + FAREWELL_S
        while self._tasks and time.monotonic() < deadline:
            self._news.clear()
            self._farewell(self._record)
            if self._tasks:
                self._news.wait(self._settings.poll_seconds)
        for task in self._tasks:
            task.drop()
        for task in self._gone + self._tasks:
            task.close()
        self._farewell(lambda: self._workers.remove(self.id))

    def _farewell(self, step: Callable[[], None]) -> None:
        try:
            step()
        except UnavailableError as exc:
            _log.error("the database is away while the worker shuts down: %s", exc)
            time.sleep(FIRST_PAUSE_S)


def main() -> int:
    """Run a worker until SIGTERM."""
    try:
        settings = read_settings()
        configure_logs(settings)
        database = open_database(settings.database)
        files = ArtifactFiles(settings.data_dir, url=settings.artifact_url)
    except PlacementError as exc:
        sys.stderr.write(f"moe-placement: error: {' '.join(str(exc).split())}\n")
        return exc.exit_code
    worker = Worker(settings, database, files)
    controller = Controller(database, settings)

    def end(number: int, frame: FrameType | None) -> None:
        controller.stop()
        worker.close()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    controller.start()
    try:
        worker.run()
    finally:
        controller.stop()
        controller.join(FAREWELL_S)
        database.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
