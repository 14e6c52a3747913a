"""The workers: who is there, and whose process has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from service.state.database import Database
from service.state.tables import workers
from service.state.workers import WorkerStore, boot_id, process_started


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with started:
        yield started
        started.kill()


def test_workers_come_and_go(database: Database) -> None:
    """Registered, counted while they live, removed."""
    store = WorkerStore(database, clock=lambda: 5.0)
    made = store.register("w-1", cpus=3)
    assert (made.pid, made.cpus, made.beat, made.started_at) == (os.getpid(), 3, 0, 5.0)
    assert store.list() == [made]
    assert store.beat("w-1")
    assert store.list()[0].beat == 1
    store.remove("w-1")
    store.remove("w-1")
    assert store.list() == []
    assert not store.beat("w-1")


def test_a_killed_process_is_dead_at_once(database: Database, process: subprocess.Popen[bytes]) -> None:
    """Even before its parent has taken note."""
    store = WorkerStore(database)
    store.register("w-own", cpus=1)
    store.register("w-other", cpus=1, pid=process.pid)
    assert store.dead_here() == ()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert [worker.id for worker in store.dead_here()] == ["w-other"]
    process.wait()
    assert [worker.id for worker in store.dead_here()] == ["w-other"]
    with pytest.raises(ProcessLookupError):
        store.register("w-third", cpus=1, pid=process.pid)


def test_a_number_that_came_again_is_another_process(database: Database) -> None:
    """The start of the process tells them apart."""
    store = WorkerStore(database)
    store.register("w-1", cpus=1)
    with database.write() as connection:
        connection.execute(workers.update().values(pid_started=workers.c.pid_started - 1))
    assert [worker.id for worker in store.dead_here()] == ["w-1"]


@pytest.mark.parametrize("column", ["host", "boot_id"])
def test_of_other_machines_nothing_is_known(database: Database, column: str) -> None:
    """Their process numbers mean nothing here."""
    store = WorkerStore(database)
    store.register("w-1", cpus=1)
    with database.write() as connection:
        connection.execute(workers.update().values({column: "elsewhere", "pid": 2**22 + 1}))
    assert store.dead_here() == ()


def test_what_names_a_process_stays() -> None:
    """Read twice, it is the same; of no process it is None."""
    assert process_started(os.getpid()) == process_started(os.getpid()) is not None
    assert boot_id() == boot_id()
    assert len(boot_id()) <= 64
    assert process_started(2**22 + 1) is None
