"""Tasks on a Ray cluster. Ray is an optional extra, imported when a cluster is asked for.

Ray itself begins lost tasks anew and recomputes results that were lost with their machine, from the tasks
that made them.
"""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from placement.errors import InputError, ServiceError
from traces.distributed.executor import MAX_ATTEMPTS
from traces.distributed.pool import ONE_THREAD
from traces.distributed.task import Failure, Key, Outcome, Task, perform

__all__ = ["KeptObject", "RayExecutor"]

_LOCAL = ("local", None)
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_PER_CORE = 2
"""Tasks in Ray's hands per core: enough to keep workers busy, few enough to drop quickly."""


@dataclass(frozen=True, slots=True)
class KeptObject:
    """A result that lies in the cluster's object store."""

    reference: Any


class RayExecutor:
    """Tasks on a Ray cluster, one core each.

    Workers of a cluster that runs already get this version of the packages from here, and need the rest of
    the installation (numpy, numba, pyarrow). Traces must lie under the same path on all machines, or at a
    URL.

    Parameters
    ----------
    address
        ``local`` or None to start Ray on this machine and end it again, ``auto`` for the cluster that this
        machine belongs to, or ``HOST:PORT``.
    max_attempts
        Times that a task is begun when it takes its worker down.
    num_cpus
        Cores of a Ray started here; all by default.
    modules
        Further packages (folders) or modules (files) that tasks come from, for the workers to get.

    Raises
    ------
    InputError
        If Ray is not installed.
    ServiceError
        If there is no cluster at that address.
    """

    shares_files = False

    def __init__(
        self,
        address: str | None = None,
        *,
        max_attempts: int = MAX_ATTEMPTS,
        num_cpus: int | None = None,
        modules: Sequence[Path] = (),
    ) -> None:
        self._ray = _import_ray()
        self._ours = not self._ray.is_initialized()
        if self._ours:
            _connect(self._ray, address, num_cpus, max_attempts, modules)
        self._remote = self._ray.remote(_perform_remotely)
        self._options = {
            "num_cpus": 1,
            "num_returns": 2,
            "max_retries": max_attempts - 1,
            "scheduling_strategy": "SPREAD",
        }
        self.max_attempts = max_attempts
        self._waiting: deque[Task] = deque()
        self._running: dict[Any, tuple[Task, Any]] = {}

    @property
    def num_workers(self) -> int:
        """Cores of the cluster, as it is now."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def submit(self, task: Task) -> None:
        """Take a task; see `Executor.submit`."""
        self._waiting.append(task)

    def outcomes(self) -> Iterator[Outcome]:
        """Yield outcomes as the cluster reports them; see `Executor.outcomes`."""
        while self._waiting or self._running:
            self._hand_out()
            ready, _ = self._ray.wait(list(self._running), num_returns=1)
            for report in ready:
                # The one who takes an outcome may cancel all others.
                if report in self._running:
                    yield self._outcome(report)

    def _hand_out(self) -> None:
        most = _PER_CORE * self.num_workers
        while self._waiting and len(self._running) < most:
            task = self._waiting.popleft()
            given = (part.reference if isinstance(part, KeptObject) else part for part in task.arguments)
            begin = self._remote.options(name=task.name, **self._options)
            report, value = begin.remote(task.function, *given)
            self._running[report] = (task, value)

    def _outcome(self, report: Any) -> Outcome:
        task, value = self._running.pop(report)
        errors = self._ray.exceptions
        try:
            failure, elapsed_s = self._ray.get(report)
            if failure is not None:
                return Outcome(key=task.key, failure=failure, elapsed_s=elapsed_s)
            kept = KeptObject(value) if task.keep else self._ray.get(value)
        except (
            errors.WorkerCrashedError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
            errors.ObjectLostError,
            errors.LocalRayletDiedError,
        ) as exc:
            message = f"its worker ended {self.max_attempts} times without an answer ({_first_line(exc)})"
            return Outcome(
                key=task.key,
                failure=Failure(kind="WorkerLost", message=message),
                attempts=self.max_attempts,
            )
        except errors.RayError as exc:
            # Raised by Ray, not by the task: what a task raises comes back as its failure.
            return Outcome(key=task.key, failure=Failure(kind=type(exc).__name__, message=_first_line(exc)))
        return Outcome(key=task.key, value=kept, elapsed_s=elapsed_s)

    def fetch(self, kept: Any) -> Any:
        """Return the value of a kept result."""
        return self._ray.get(kept.reference) if isinstance(kept, KeptObject) else kept

    def discard(self, kept: Any) -> None:
        """Do nothing: the cluster frees what nobody refers to."""

    def withdraw(self, keys: Collection[Key]) -> None:
        """Drop tasks that have not begun."""
        self._waiting = deque(task for task in self._waiting if task.key not in keys)

    def cancel(self) -> None:
        """Drop all tasks and kill the workers that run one."""
        self._waiting.clear()
        for report in self._running:
            self._ray.cancel(report, force=True)
        self._running.clear()

    def close(self) -> None:
        """Drop all tasks, and end Ray where it was started or joined here."""
        if self._ray.is_initialized():
            self.cancel()
            if self._ours:
                self._ray.shutdown()

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _perform_remotely(function: Any, *arguments: Any) -> tuple[tuple[Failure | None, float], Any]:
    """Run a task on a worker of Ray: a small report, and the value apart so that it can stay there."""
    value, failure, elapsed_s = perform(function, arguments)
    return (failure, elapsed_s), value


def _import_ray() -> Any:
    # No figures about its use go to Ray's makers, and it is not to change what workers see of accelerators.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as exc:
        raise InputError("Ray is not installed; install it with: pip install 'moe-placement[ray]'") from exc
    return ray


def _connect(
    ray: Any, address: str | None, num_cpus: int | None, max_attempts: int, modules: Sequence[Path] = ()
) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address in _LOCAL:
        # Workers of this machine run this installation.
        here = {"env_vars": {**ONE_THREAD, "PYTHONPATH": _python_path(modules)}}
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            runtime_env=here,
            _system_config={"task_oom_retries": max_attempts - 1},
            **quiet,
        )
        return
    runtime = {
        "env_vars": ONE_THREAD,
        "py_modules": [str(path) for path in (*_packages(), *modules)],
        "excludes": ["__pycache__", "/samples"],
    }
    try:
        ray.init(address=address, runtime_env=runtime, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as exc:
        raise ServiceError(
            f"there is no Ray cluster at {address!r} ({_first_line(exc)}); start one with: ray start --head, "
            "or use --ray local"
        ) from exc


def _packages() -> list[Path]:
    import placement
    import traces

    return [Path(package.__file__ or "").parent for package in (placement, traces)]


def _python_path(modules: Sequence[Path]) -> str:
    roots = [str(path.absolute().parent) for path in (_packages()[0], *modules)]
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*roots, *([given] if given else [])])


def _first_line(exc: BaseException) -> str:
    """Return what an error of Ray says in one line, without colours; of a wrapped one what it wraps says."""
    said = _COLOR.sub("", str(getattr(exc, "cause", None) or exc))
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[0] if lines else type(exc).__name__
