"""A pool of processes that outlives the loss of its workers.

`concurrent.futures` gives up a whole pool when one of its processes is killed; here the lost task alone is
begun anew, on a fresh process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from placement.errors import InputError
from traces.distributed.executor import MAX_ATTEMPTS
from traces.distributed.task import Failure, Key, Outcome, Task, perform

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

__all__ = ["KeptFile", "ProcessExecutor"]

ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)
"""Environment of a worker unless it is set already: processes share the cores, so each takes one."""

_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A result that lies in a file of the pool's own folder."""

    path: Path

    def load_kept(self) -> Any:
        """Return the value."""
        with self.path.open("rb") as file:
            return pickle.load(file)  # noqa: S301 (written by a worker into a folder that is ours alone)


@dataclass(slots=True, eq=False)
class _Job:
    task: Task
    attempts: int = 0


@dataclass(slots=True, eq=False)
class _Worker:
    process: SpawnProcess
    pipe: Connection
    job: _Job | None = field(default=None)


class ProcessExecutor:
    """Tasks on processes of this machine.

    Processes are spawned, not forked: nothing of this one's threads and locks reaches them. They end when
    this process does, however it ends, and leave Ctrl-C to it.

    Parameters
    ----------
    num_workers
        Processes at a time.
    max_attempts
        Times that a task is begun when it takes its process down.

    Raises
    ------
    InputError
        If a number is below 1.
    """

    shares_files = True

    def __init__(self, num_workers: int, *, max_attempts: int = MAX_ATTEMPTS) -> None:
        if num_workers < 1 or max_attempts < 1:
            raise InputError(f"{num_workers} workers and {max_attempts} attempts; both must be 1 or more")
        self.num_workers = num_workers
        self.max_attempts = max_attempts
        self._context = multiprocessing.get_context("spawn")
        self._waiting: deque[_Job] = deque()
        self._workers: list[_Worker] = []
        self._folder: Path | None = None
        self._num_kept = 0

    def submit(self, task: Task) -> None:
        """Take a task; see `Executor.submit`."""
        self._waiting.append(_Job(task))

    def outcomes(self) -> Iterator[Outcome]:
        """Yield outcomes as processes send them; see `Executor.outcomes`."""
        while self._waiting or any(worker.job for worker in self._workers):
            self._hand_out()
            pipes = {worker.pipe: worker for worker in self._workers if worker.job}
            for ready in connection.wait(list(pipes)):
                outcome = self._receive(pipes[ready])  # type: ignore[index]
                if outcome is not None:
                    yield outcome

    def _hand_out(self) -> None:
        """Give every idle process a task, starting processes as they are needed."""
        while self._waiting:
            worker = next((worker for worker in self._workers if worker.job is None), None)
            if worker is None:
                if len(self._workers) >= self.num_workers:
                    return
                worker = self._start()
            job = self._waiting.popleft()
            kept = None if not job.task.keep else self._kept_path()
            message = pickle.dumps((job.task.function, job.task.arguments, kept), protocol=5)
            try:
                worker.pipe.send_bytes(message)
            except OSError:
                # It died while it was idle; the task never began.
                self._waiting.appendleft(job)
                self._remove(worker)
                continue
            job.attempts += 1
            worker.job = job

    def _start(self) -> _Worker:
        ours, its = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(its,), daemon=True, name="moe-placement worker")
        with _environment(ONE_THREAD):
            process.start()
        # Ours must be the only other end, so that its death reads as the end of the file.
        its.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker

    def _receive(self, worker: _Worker) -> Outcome | None:
        """Return what a process says of its task; None where it is to be begun again."""
        job = worker.job
        assert job is not None
        try:
            answer = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            return self._lose(worker, job)
        value, failure, elapsed_s = pickle.loads(answer)  # noqa: S301 (sent by our own worker)
        worker.job = None
        return Outcome(
            key=job.task.key, value=value, failure=failure, attempts=job.attempts, elapsed_s=elapsed_s
        )

    def _lose(self, worker: _Worker, job: _Job) -> Outcome | None:
        how = self._remove(worker)
        if job.attempts < self.max_attempts:
            self._waiting.appendleft(job)
            return None
        message = f"its process ended {job.attempts} times without an answer, the last time {how}"
        failure = Failure(kind="WorkerLost", message=message)
        return Outcome(key=job.task.key, failure=failure, attempts=job.attempts)

    def _remove(self, worker: _Worker) -> str:
        """Bury a process; return what it died of."""
        self._workers.remove(worker)
        worker.pipe.close()
        worker.process.join(_GRACE_S)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        code = worker.process.exitcode or 0
        worker.process.close()
        if code >= 0:
            return f"with exit code {code}"
        memory = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"by {signal.Signals(-code).name}{memory}"

    def _kept_path(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="moe-placement-"))
        self._num_kept += 1
        return self._folder / f"{self._num_kept:08d}.pickle"

    def fetch(self, kept: Any) -> Any:
        """Return the value of a kept result."""
        return kept.load_kept() if isinstance(kept, KeptFile) else kept

    def discard(self, kept: Any) -> None:
        """Delete the file of a kept result."""
        if isinstance(kept, KeptFile):
            kept.path.unlink(missing_ok=True)

    def withdraw(self, keys: Collection[Key]) -> None:
        """Drop tasks that have not begun."""
        self._waiting = deque(job for job in self._waiting if job.task.key not in keys)

    def cancel(self) -> None:
        """Drop all tasks and kill the processes that run one; idle ones stay."""
        self._waiting.clear()
        for worker in [worker for worker in self._workers if worker.job]:
            worker.process.kill()
            self._remove(worker)

    def close(self) -> None:
        """End all processes and delete kept results."""
        self.cancel()
        for worker in self._workers:
            # Nothing to read any more ends an idle process.
            worker.pipe.close()
        for worker in list(self._workers):
            self._remove(worker)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> ProcessExecutor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Add what is missing to the environment that a process starts with."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _serve(pipe: Connection) -> None:
    """Perform tasks until the pipe ends: the life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Solvers in C++ print remarks; results have standard output to themselves.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        value, failure, elapsed_s = perform(_call, (message,))
        try:
            answer = pickle.dumps((value, failure, elapsed_s), protocol=5)
        except (pickle.PicklingError, TypeError, AttributeError) as exc:
            answer = pickle.dumps((None, Failure.of(exc), elapsed_s))
        try:
            pipe.send_bytes(answer)
        except BrokenPipeError:
            return


def _call(message: bytes) -> Any:
    """Unpack a task and call it; a result that is to be kept goes to its file."""
    function, arguments, kept = pickle.loads(message)  # noqa: S301 (sent by the parent process)
    value = function(*arguments)
    if kept is None:
        return value
    with kept.open("wb") as file:
        pickle.dump(value, file, protocol=5)
    return KeptFile(kept)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
