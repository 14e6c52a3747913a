"""The worker processes: who is there, on which machine, and which of them are known to be gone."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from service.state.database import Database
from service.state.tables import workers

__all__ = ["Worker", "WorkerStore", "boot_id", "process_started"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker process.

    Parameters
    ----------
    boot_id
        Start of the machine and space of its process numbers: only within it does `pid` name a process.
    pid_started
        When the process started, in ticks since the machine did: process numbers come again.
    seen_at
        When it last gave a sign of life, for show.
    """

    id: str
    host: str
    boot_id: str
    pid: int
    pid_started: float
    cpus: int
    started_at: float
    beat: int
    seen_at: float


class WorkerStore:
    """The rows of the workers.

    Parameters
    ----------
    clock
        Seconds since the epoch, for show only: it may jump.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def register(self, worker_id: str, *, cpus: int, pid: int | None = None) -> Worker:
        """Name a process of this machine, by default the present one, as a worker.

        Raises
        ------
        ProcessLookupError
            If there is no such process.
        """
        pid = os.getpid() if pid is None else pid
        started = process_started(pid)
        if started is None:
            raise ProcessLookupError(f"no process {pid}")
        now = self._clock()
        worker = Worker(
            id=worker_id,
            host=socket.gethostname(),
            boot_id=boot_id(),
            pid=pid,
            pid_started=started,
            cpus=cpus,
            started_at=now,
            beat=0,
            seen_at=now,
        )
        values = {name: getattr(worker, name) for name in Worker.__dataclass_fields__}
        with self._database.write() as connection:
            connection.execute(workers.insert().values(values))
        return worker

    def beat(self, worker_id: str) -> bool:
        """Give a sign of life; False if the worker was taken for lost and removed."""
        statement = workers.update().where(workers.c.id == worker_id)
        with self._database.write() as connection:
            changed = connection.execute(statement.values(beat=workers.c.beat + 1, seen_at=self._clock()))
            return changed.rowcount == 1

    def remove(self, worker_id: str) -> None:
        """Forget a worker; an unknown one is gone already."""
        with self._database.write() as connection:
            connection.execute(workers.delete().where(workers.c.id == worker_id))

    def list(self) -> list[Worker]:
        """Return all workers, the longest running first."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(workers).order_by(workers.c.started_at, workers.c.id))
            return [Worker(**row) for row in rows.mappings()]

    def dead_here(self) -> tuple[Worker, ...]:
        """Return workers of this machine whose process has ended; of others only their beats tell."""
        here = (socket.gethostname(), boot_id())
        return tuple(
            worker
            for worker in self.list()
            if (worker.host, worker.boot_id) == here and process_started(worker.pid) != worker.pid_started
        )


def boot_id() -> str:
    """Return what names the start of this machine and the space of its process numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    # Containers may share a machine and its name, but not its process numbers.
    return f"{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"


def process_started(pid: int) -> float | None:
    """Return when a process started, in ticks since the machine did; None if it has ended."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = line.rpartition(")")[2].split()  # the name before may hold anything
    return None if state in {"Z", "X"} else float(fields[18])
