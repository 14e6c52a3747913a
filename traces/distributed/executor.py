"""Who executes tasks: this process, a pool of processes, or a Ray cluster."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Any, Protocol

from placement.errors import InputError
from traces.distributed.task import Key, Outcome, Task, perform

__all__ = ["MAX_ATTEMPTS", "Executor", "SerialExecutor", "available_cores", "make_executor"]

MAX_ATTEMPTS = 3
"""Times that a task is begun when its workers are lost; then it is to blame, and set aside."""


class Executor(Protocol):
    """Runs tasks in any order, in as many places as it has, and hands out what came of them.

    A worker that is lost (killed, out of memory, its machine gone) costs the others nothing: its task is
    begun anew elsewhere, and set aside with a `Failure` once it took `MAX_ATTEMPTS` workers down. Use it as a
    context, so that workers end with it.
    """

    @property
    def num_workers(self) -> int:
        """Tasks that run at a time."""
        ...

    @property
    def shares_files(self) -> bool:
        """Whether workers see the files of this machine under the same paths."""
        ...

    def submit(self, task: Task) -> None:
        """Take a task; it begins once a worker is free."""
        ...

    def outcomes(self) -> Iterator[Outcome]:
        """Yield outcomes as tasks end, until there is none left; more may be submitted meanwhile."""
        ...

    def fetch(self, kept: Any) -> Any:
        """Return the value of a kept result."""
        ...

    def discard(self, kept: Any) -> None:
        """Forget a kept result that no task needs any more."""
        ...

    def withdraw(self, keys: Collection[Key]) -> None:
        """Drop tasks that have not begun."""
        ...

    def cancel(self) -> None:
        """Drop all tasks and end those that run; their outcomes do not come."""
        ...

    def close(self) -> None:
        """End the workers; nothing can be submitted any more."""
        ...

    def __enter__(self) -> Executor: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class SerialExecutor:
    """Runs one task after the other in this process."""

    num_workers = 1
    shares_files = True

    def __init__(self) -> None:
        self._waiting: deque[Task] = deque()

    def submit(self, task: Task) -> None:
        """Take a task; see `Executor.submit`."""
        self._waiting.append(task)

    def outcomes(self) -> Iterator[Outcome]:
        """Run what is waiting; see `Executor.outcomes`."""
        while self._waiting:
            task = self._waiting.popleft()
            value, failure, elapsed_s = perform(task.function, task.arguments)
            yield Outcome(key=task.key, value=value, failure=failure, elapsed_s=elapsed_s)

    def fetch(self, kept: Any) -> Any:
        """Return `kept`: results stay in memory."""
        return kept

    def discard(self, kept: Any) -> None:
        """Do nothing: memory is freed when nobody refers to it."""

    def withdraw(self, keys: Collection[Key]) -> None:
        """Drop tasks that have not begun."""
        self._waiting = deque(task for task in self._waiting if task.key not in keys)

    def cancel(self) -> None:
        """Drop all tasks."""
        self._waiting.clear()

    def close(self) -> None:
        """Drop all tasks."""
        self.cancel()

    def __enter__(self) -> SerialExecutor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_executor(*, workers: int | None = None, ray: str | None = None) -> Executor:
    """Return the executor that was asked for.

    Parameters
    ----------
    workers
        Processes on this machine; 1 for none beside this one. All cores by default.
    ray
        Address of a Ray cluster instead: ``local`` to start one here, ``auto`` for the one that this machine
        belongs to, or ``HOST:PORT``.

    Raises
    ------
    InputError
        If both are given, `workers` is below 1, or Ray is not installed.
    ServiceError
        If there is no cluster at that address.
    """
    if workers is not None and workers < 1:
        raise InputError(f"--workers is {workers}; it must be 1 or more")
    if ray is not None:
        from traces.distributed.ray_cluster import RayExecutor

        if workers is not None:
            raise InputError("--workers counts processes of this machine and --ray names a cluster; give one")
        return RayExecutor(ray)
    workers = available_cores() if workers is None else workers
    if workers == 1:
        return SerialExecutor()
    from traces.distributed.pool import ProcessExecutor

    return ProcessExecutor(workers)
