"""Keeps one worker process running beside the API process, and takes it along when the API process ends."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Mapping

__all__ = ["WORKER", "Supervisor"]

_log = logging.getLogger(__name__)

WORKER = "service.jobs.worker"

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 30.0
SOUND_S = 60.0
"""A worker that lived this long was not broken by what broke the one before."""


class Supervisor:
    """Starts a worker, starts it again when it dies, and ends it.

    Must be used from the main thread: the kernel ends the worker together with the thread that started it.

    Parameters
    ----------
    environment
        Environment of the worker.
    module
        What to run.
    """

    def __init__(self, environment: Mapping[str, str], *, module: str = WORKER) -> None:
        self._environment = dict(environment)
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._ending = asyncio.Event()
        self.num_restarts = 0

    @property
    def pid(self) -> int | None:
        """Process id of the worker that is alive; None between two."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    async def run(self) -> None:
        """Keep a worker alive until `stop`."""
        pause_s = FIRST_PAUSE_S
        while not self._ending.is_set():
            lived_s = await self._run_one()
            if self._ending.is_set():
                return
            pause_s = FIRST_PAUSE_S if lived_s > SOUND_S else pause_s
            _log.error("the worker process ended; next start in %.1f s", pause_s)
            await self._pause(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            self.num_restarts += 1

    async def stop(self, *, within_s: float) -> None:
        """End the worker: it may finish its doings first, but not for longer than `within_s`."""
        self._ending.set()
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(within_s):
                await _ended(process)
        except TimeoutError:
            _log.error("the worker process did not end within %.0f s, and is killed", within_s)
            process.kill()
            await _ended(process)

    async def _run_one(self) -> float:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "service.lifeline", self._module, str(os.getpid())],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            # A Ctrl-C on the terminal is for this process: the worker is told by us.
            process_group=0,
        )
        await _ended(self._process)
        return loop.time() - began_s

    async def _pause(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(pause_s):
                await self._ending.wait()
        except TimeoutError:
            pass


async def _ended(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a process without a thread that waits."""
    if process.poll() is not None:
        return
    descriptor = os.pidfd_open(process.pid)
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    process.wait()
