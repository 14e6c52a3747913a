"""The process pool: results, failures, lost workers, and no process left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import worker_tasks

from placement.errors import InputError
from traces.distributed.pool import ProcessExecutor
from traces.distributed.task import Outcome, Task


@pytest.fixture
def pool() -> Iterator[ProcessExecutor]:
    """Yield a pool of two processes."""
    with ProcessExecutor(2) as executor:
        yield executor


def run(executor: ProcessExecutor, *tasks: Task) -> dict[str, Outcome]:
    """Run tasks; return their outcomes by name."""
    for task in tasks:
        executor.submit(task)
    return {str(outcome.key[0]): outcome for outcome in executor.outcomes()}


def test_results_and_failures_come_back(pool: ProcessExecutor) -> None:
    """A value, an error of ours with its exit code, and an unforeseen one with its traceback."""
    outcomes = run(
        pool,
        Task(key=("square",), name="square", function=worker_tasks.square, arguments=(7,)),
        Task(key=("ours",), name="ours", function=worker_tasks.refuse, arguments=("no\nsuch file",)),
        Task(key=("bug",), name="bug", function=worker_tasks.divide, arguments=(0,)),
        Task(key=("unsendable",), name="unsendable", function=worker_tasks.make_function),
    )
    assert outcomes["square"].value == 49
    ours = outcomes["ours"].failure
    assert ours is not None
    assert (ours.kind, ours.message, ours.exit_code, ours.is_input) == ("InputError", "no such file", 2, True)
    assert str(ours.error("cell a")) == "cell a: no such file"
    bug = outcomes["bug"].failure
    assert bug is not None
    assert (bug.kind, bug.exit_code, bug.is_input) == ("ZeroDivisionError", None, False)
    error = bug.error("cell b")
    assert (str(error), error.exit_code) == ("cell b: ZeroDivisionError: division by zero", 1)
    assert "in divide" in error.__notes__[0]
    unsendable = outcomes["unsendable"].failure
    assert unsendable is not None
    assert "make_function" in unsendable.message


def test_kept_results_feed_later_tasks(pool: ProcessExecutor) -> None:
    """A kept result stays in a file until it is needed, and its file goes when it is not."""
    first = run(
        pool,
        Task(key=("a",), name="a", function=worker_tasks.square, arguments=(2,), keep=True),
        Task(key=("b",), name="b", function=worker_tasks.square, arguments=(3,), keep=True),
    )
    kept = (first["a"].value, first["b"].value)
    files = [part.path for part in kept]
    total = run(pool, Task(key=("sum",), name="sum", function=worker_tasks.add, arguments=(*kept, 1)))
    assert total["sum"].value == 14
    assert pool.fetch(kept[0]) == 4
    pool.discard(kept[0])
    assert [file.exists() for file in files] == [False, True]
    pool.close()
    assert not files[1].parent.exists()


def test_a_killed_worker_costs_its_task_another_try(pool: ProcessExecutor, tmp_path: Path) -> None:
    """The task is begun anew on a fresh process; the others do not notice."""
    outcomes = run(
        pool,
        Task(key=("dies",), name="dies", function=worker_tasks.die_first, arguments=(tmp_path, 2)),
        *(Task(key=(str(i),), name=str(i), function=worker_tasks.square, arguments=(i,)) for i in range(6)),
    )
    assert outcomes["dies"].value == 3
    assert outcomes["dies"].attempts == 3
    assert [outcomes[str(i)].value for i in range(6)] == [i * i for i in range(6)]


def test_a_task_that_kills_every_worker_is_set_aside(pool: ProcessExecutor, tmp_path: Path) -> None:
    """It is named as lost, with how its last process ended, and the pool goes on."""
    outcomes = run(
        pool,
        Task(key=("dies",), name="dies", function=worker_tasks.die_first, arguments=(tmp_path, 99)),
        Task(key=("lives",), name="lives", function=worker_tasks.square, arguments=(5,)),
    )
    failure = outcomes["dies"].failure
    assert failure is not None
    assert failure.was_lost
    assert "3 times" in failure.message
    assert "SIGKILL (out of memory?)" in failure.message
    assert len(list(tmp_path.iterdir())) == 3
    assert outcomes["lives"].value == 25


def test_workers_take_one_thread_and_leave_the_environment_alone(pool: ProcessExecutor) -> None:
    """Numerical libraries of a worker use one thread, whatever this process does."""
    before = dict(os.environ)
    name = "NUMBA_NUM_THREADS"
    outcomes = run(pool, Task(key=("env",), name="env", function=worker_tasks.environment, arguments=(name,)))
    assert outcomes["env"].value == before.get(name, "1")
    assert dict(os.environ) == before


def test_withdrawn_and_cancelled_tasks_do_not_come() -> None:
    """Tasks that have not begun are dropped; a running one dies with its process."""
    with ProcessExecutor(1) as pool:
        for i in range(4):
            pool.submit(Task(key=(i,), name=str(i), function=worker_tasks.square, arguments=(i,)))
        pool.withdraw([(1,), (2,)])
        seen = []
        for outcome in pool.outcomes():
            seen.append(outcome.key)
            if outcome.key == (3,):
                pool.submit(Task(key=(4,), name="4", function=time.sleep, arguments=(600,)))
                pool.submit(Task(key=(5,), name="5", function=worker_tasks.square, arguments=(5,)))
                pool.cancel()
        assert seen == [(0,), (3,)]
        # It still works.
        pool.submit(Task(key=(6,), name="6", function=worker_tasks.square, arguments=(6,)))
        assert [outcome.value for outcome in pool.outcomes()] == [36]


def test_numbers_below_one_are_refused() -> None:
    """A pool has workers, and tries every task."""
    with pytest.raises(InputError, match="0 workers"):
        ProcessExecutor(0)
    with pytest.raises(InputError, match="0 attempts"):
        ProcessExecutor(1, max_attempts=0)


DRIVER = """
import sys
from pathlib import Path
import worker_tasks
from traces.distributed.pool import ProcessExecutor
from traces.distributed.task import Task

if __name__ == "__main__":
    with ProcessExecutor(2) as pool:
        for i in range(2):
            function, arguments = worker_tasks.note_and_sleep, (Path(sys.argv[1]), 600.0)
            pool.submit(Task(key=(i,), name="sleep", function=function, arguments=arguments))
        list(pool.outcomes())
"""


def test_workers_end_with_a_killed_driver(tmp_path: Path) -> None:
    """After kill -9 of the process that owns the pool, its workers are gone within seconds."""
    script, folder = tmp_path / "driver.py", tmp_path / "ids"
    script.write_text(DRIVER)
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, str(script), str(folder)], env=environment) as driver:
        wait_for(lambda: len(list(folder.iterdir())) == 2)
        driver.kill()
    ids = [int(path.name) for path in folder.iterdir()]
    wait_for(lambda: not any(is_running(number) for number in ids))


def is_running(process: int) -> bool:
    """Tell whether a process is there and no zombie."""
    status = Path(f"/proc/{process}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: object) -> None:
    """Wait until a condition holds; fail after two minutes."""
    end_s = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end_s, "waited for two minutes"
        time.sleep(0.02)
