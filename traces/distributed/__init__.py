"""Statistics and batches on several processes or machines: a local pool by default, Ray where it is wanted.

Whatever executes the tasks, and however many at a time, the result is the same: work is cut by what it is,
never by who does it, and partial results are merged in one fixed shape. The names below are imported on first
use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from traces.distributed.batch import BatchReport, CellWork, run_batch
    from traces.distributed.executor import Executor, SerialExecutor, make_executor
    from traces.distributed.pool import ProcessExecutor
    from traces.distributed.ray_cluster import RayExecutor
    from traces.distributed.spec import BatchSpec, read_spec
    from traces.distributed.statistics import Collected, collect_statistics

_HOME = {
    "BatchReport": "batch",
    "BatchSpec": "spec",
    "CellWork": "batch",
    "Collected": "statistics",
    "Executor": "executor",
    "ProcessExecutor": "pool",
    "RayExecutor": "ray_cluster",
    "SerialExecutor": "executor",
    "collect_statistics": "statistics",
    "make_executor": "executor",
    "read_spec": "spec",
    "run_batch": "batch",
}

__all__ = [
    "BatchReport",
    "BatchSpec",
    "CellWork",
    "Collected",
    "Executor",
    "ProcessExecutor",
    "RayExecutor",
    "SerialExecutor",
    "collect_statistics",
    "make_executor",
    "read_spec",
    "run_batch",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"traces.distributed.{_HOME[name]}"), name)
    raise AttributeError(f"module 'traces.distributed' has no attribute {name!r}")
