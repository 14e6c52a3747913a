"""Processes of a gloo group that run functions for tests, started once for many checks.

Functions are sent by name: they have to be importable, and their arguments small and picklable.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

START_S = 60.0
"""A process imports torch and transformers first."""

RUN_S = 60.0
GROUP_S = 20.0

_PRELOADED = ("torch", "torch.distributed", "transformers", "placement.runtime.tiny")


class RankError(AssertionError):
    """A rank raised; its traceback is the message."""


class Ranks:
    """Ranks of one process group; `run` has each of them call a function and returns what they return."""

    def __init__(self, world_size: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOADED))
        self.world_size = world_size
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []
        store = folder / f"store-{os.getpid()}-{time.monotonic_ns()}"
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world_size, str(store)), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)
        self._collect(range(world_size), START_S)

    def run(self, function: Callable[..., Any], *args: Any, within_s: float = RUN_S) -> list[Any]:
        """Return what every rank's ``function(rank, *args)`` returns.

        Raises
        ------
        RankError
            If one raises, dies or takes longer.
        """
        return [_value(outcome) for outcome in self.outcomes(function, *args, within_s=within_s)]

    def outcomes(self, function: Callable[..., Any], *args: Any, within_s: float = RUN_S) -> list[Any]:
        """Return what every rank's call came to: its value, or what it raised, as an exception."""
        for pipe in self._pipes:
            with suppress(BrokenPipeError):
                pipe.send((function, args))
        return self._collect(range(self.world_size), within_s)

    def _collect(self, ranks: range, within_s: float) -> list[Any]:
        end_s = time.monotonic() + within_s
        return [self._answer(rank, end_s) for rank in ranks]

    def _answer(self, rank: int, end_s: float) -> Any:
        pipe = self._pipes[rank]
        try:
            if pipe.poll(max(0.0, end_s - time.monotonic())):
                return pipe.recv()
        except (EOFError, ConnectionResetError):
            return RankError(f"rank {rank} died")
        self.close()
        return RankError(f"rank {rank} did not answer in time")

    def num_threads(self) -> int:
        """Return the threads of the process that has most of them; 0 where all have ended."""
        counts = [0]
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                counts.append(psutil.Process(process.pid).num_threads())
        return max(counts)

    def close(self) -> None:
        """End all processes, at once."""
        for process in self.processes:
            process.kill()
            process.join(10)


def _value(outcome: Any) -> Any:
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _serve(pipe: Connection, rank: int, world_size: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=GROUP_S),
    )
    pipe.send(None)
    with suppress(EOFError):
        while True:
            function, args = pipe.recv()
            pipe.send(_outcome(function, rank, args))


def _outcome(function: Callable[..., Any], rank: int, args: tuple[Any, ...]) -> Any:
    from placement.errors import PlacementError

    try:
        return function(rank, *args)
    except PlacementError as exc:
        return exc
    except Exception as exc:  # noqa: BLE001 - handed to the test, whatever it is
        return RankError(f"rank {rank}: {type(exc).__name__}: {exc}\n{traceback.format_exc()}")


@contextmanager
def ranks(world_size: int, folder: Path) -> Iterator[Ranks]:
    """Run processes for a while."""
    started = Ranks(world_size, folder)
    try:
        yield started
    finally:
        started.close()
