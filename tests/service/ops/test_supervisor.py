"""The supervisor: a worker that dies is started again, and none outlives its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from service.supervisor import Supervisor
from tests.service.server import eventually

PATIENT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("started", flush=True)
time.sleep(600)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Environment in which the modules `patient` and `stubborn` can be run."""
    (tmp_path / "patient.py").write_text(PATIENT, encoding="utf-8")
    (tmp_path / "stubborn.py").write_text(STUBBORN, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition while the loop goes on."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


def test_a_killed_worker_is_started_again(environment: dict[str, str]) -> None:
    """However it died; and the one that is told to end is not."""

    async def scenario() -> None:
        supervisor = Supervisor(environment, module="patient")
        keeping = asyncio.create_task(supervisor.run())
        await until(lambda: supervisor.pid)
        first = supervisor.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: supervisor.pid not in (None, first))
        assert supervisor.num_restarts == 1
        second = psutil.Process(supervisor.pid)
        await supervisor.stop(within_s=10)
        await keeping
        assert supervisor.pid is None
        assert not second.is_running()

    asyncio.run(scenario())


def test_a_worker_that_does_not_end_is_killed(environment: dict[str, str]) -> None:
    """The server's end has a bound."""

    async def scenario() -> None:
        supervisor = Supervisor(environment, module="stubborn")
        keeping = asyncio.create_task(supervisor.run())
        await until(lambda: supervisor.pid)
        await supervisor.stop(within_s=0.5)
        await keeping
        assert supervisor.pid is None

    asyncio.run(scenario())


def test_no_worker_outlives_a_killed_parent(environment: dict[str, str], tmp_path: Path) -> None:
    """The kernel tells it, so that nobody has to be alive for it."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import asyncio, os\n"
            "from service.supervisor import Supervisor\n"
            "asyncio.run(Supervisor(os.environ, module='patient').run())\n",
        ],
        env=environment,
        stdout=subprocess.PIPE,
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        (worker,) = psutil.Process(parent.pid).children()
        parent.kill()
    eventually(lambda: not worker.is_running(), what="the worker has ended")


def test_a_worker_whose_parent_is_gone_already_does_not_begin(environment: dict[str, str]) -> None:
    """Between the fork and the request to the kernel the parent may die."""
    command = [sys.executable, "-m", "service.lifeline", "patient", "1"]
    ended = subprocess.run(command, env=environment, timeout=20, check=False, capture_output=True)
    assert (ended.returncode, ended.stdout) == (0, b"")


SWALLOWING = """
import os, signal, time, weakref

class Thing:
    pass

thing = Thing()
dying = weakref.ref(thing, lambda _: [os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.1)])
del thing
time.sleep(600)
"""


def test_a_signal_that_comes_in_a_callback_is_heeded(tmp_path: Path) -> None:
    """Python swallows exceptions in callbacks of its own, such as those of imports: the end must be none."""
    (tmp_path / "swallowing.py").write_text(SWALLOWING, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "service.lifeline", "swallowing"]
    assert subprocess.run(command, env=environment, timeout=30, check=False).returncode == 0
