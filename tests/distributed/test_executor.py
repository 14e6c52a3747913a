"""The executor that is this process, and how one is chosen."""

from __future__ import annotations

import sys

import pytest
import worker_tasks

from placement.errors import InputError
from traces.distributed import executor as module
from traces.distributed.executor import SerialExecutor, make_executor
from traces.distributed.pool import ProcessExecutor
from traces.distributed.task import Task


def test_serial_runs_in_order_and_reports_failures() -> None:
    """Tasks submitted on the way run too; withdrawn ones do not."""
    with SerialExecutor() as executor:
        for i in range(3):
            executor.submit(Task(key=(i,), name=str(i), function=worker_tasks.divide, arguments=(i,)))
        executor.submit(Task(key=("never",), name="never", function=worker_tasks.divide, arguments=(1,)))
        executor.withdraw([("never",)])
        seen = []
        for outcome in executor.outcomes():
            seen.append((outcome.key[0], outcome.value, outcome.failure is None))
            if outcome.key == (1,):
                executor.submit(Task(key=("more",), name="", function=worker_tasks.square, arguments=(3,)))
    assert seen == [(0, None, False), (1, 1.0, True), (2, 0.5, True), ("more", 9, True)]
    assert executor.fetch(9) == 9


def test_cancelling_drops_what_is_left() -> None:
    """Nothing more comes."""
    executor = SerialExecutor()
    for i in range(3):
        executor.submit(Task(key=(i,), name=str(i), function=worker_tasks.square, arguments=(i,)))
    seen = []
    for outcome in executor.outcomes():
        seen.append(outcome.value)
        executor.cancel()
    assert seen == [0]


def test_how_an_executor_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker is this process, several are a pool, and all cores are the default."""
    assert isinstance(make_executor(workers=1), SerialExecutor)
    with make_executor(workers=3) as pool:
        assert isinstance(pool, ProcessExecutor)
        assert pool.num_workers == 3
    monkeypatch.setattr(module, "available_cores", lambda: 5)
    with make_executor() as pool:
        assert pool.num_workers == 5


def test_impossible_choices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker, both kinds at once, and Ray where it is not installed."""
    with pytest.raises(InputError, match="--workers is 0; it must be 1 or more"):
        make_executor(workers=0)
    with pytest.raises(InputError, match="give one"):
        make_executor(workers=2, ray="auto")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'moe-placement\[ray\]'"):
        make_executor(ray="local")
