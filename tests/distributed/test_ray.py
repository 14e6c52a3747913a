"""The same work on a real Ray cluster of two nodes on this machine: same results, whoever is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import worker_tasks

from placement.cli.batch_cell import CELL_WORK
from placement.errors import ServiceError
from traces.distributed.batch import run_batch
from traces.distributed.executor import SerialExecutor
from traces.distributed.ray_cluster import RayExecutor, _connect, _import_ray
from traces.distributed.spec import read_spec
from traces.distributed.statistics import collect_statistics
from traces.distributed.task import Outcome, Task
from traces.source import MemorySource
from traces.statistics import collect
from traces.store import write_dataset, write_npz
from traces.synthesize import synthesize

pytestmark = pytest.mark.timeout(180)

WINDOW = 64
STORE_BYTES = 80 * 2**20

TRACE = synthesize(num_tokens=5000, num_layers=3, num_experts=8, top_k=2, sequence_tokens=100, seed=3)
SOURCE = MemorySource(TRACE)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Yield a cluster of two nodes with one core each."""
    _import_ray()
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    cluster.add_node(**size)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def executor(cluster: Any) -> Iterator[RayExecutor]:
    """Yield an executor on both nodes."""
    with RayExecutor(cluster.address, modules=[Path(worker_tasks.__file__)]) as executor:
        yield executor


def run(executor: RayExecutor, *tasks: Task) -> dict[str, Outcome]:
    """Run tasks; return their outcomes by name."""
    for task in tasks:
        executor.submit(task)
    return {str(outcome.key[0]): outcome for outcome in executor.outcomes()}


def test_results_failures_and_lost_workers(executor: RayExecutor, tmp_path: Path) -> None:
    """Values, kept values, errors of ours, a worker lost once, and a task that loses every worker."""
    once, always = tmp_path / "once", tmp_path / "always"
    for folder in (once, always):
        folder.mkdir()
    assert executor.num_workers == 2
    outcomes = run(
        executor,
        Task(key=("kept",), name="kept", function=worker_tasks.square, arguments=(7,), keep=True),
        Task(key=("ours",), name="ours", function=worker_tasks.refuse, arguments=("no such file",)),
        Task(key=("once",), name="once", function=worker_tasks.die_first, arguments=(once, 1)),
        Task(key=("always",), name="always", function=worker_tasks.die_first, arguments=(always, 99)),
    )
    kept = outcomes["kept"].value
    assert executor.fetch(kept) == 49
    total = run(executor, Task(key=("sum",), name="sum", function=worker_tasks.add, arguments=(kept, 1)))
    assert total["sum"].value == 50
    ours = outcomes["ours"].failure
    assert ours is not None
    assert (ours.message, ours.exit_code) == ("no such file", 2)
    assert outcomes["once"].value == 2
    lost = outcomes["always"].failure
    assert lost is not None
    assert lost.was_lost
    assert "3 times" in lost.message
    assert len(list(always.iterdir())) == 3


def test_cancelled_tasks_do_not_come(executor: RayExecutor) -> None:
    """A running task ends with its worker, waiting ones are dropped, and the cluster works on."""
    for i in range(6):
        executor.submit(Task(key=(i,), name=str(i), function=worker_tasks.square, arguments=(i,)))
    executor.withdraw([(5,)])
    executor.submit(Task(key=("long",), name="long", function=time.sleep, arguments=(600,)))
    seen = []
    for outcome in executor.outcomes():
        seen.append(outcome.key[0])
        if len(seen) == 5:
            executor.cancel()
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert (
        run(executor, Task(key=("a",), name="a", function=worker_tasks.square, arguments=(2,)))["a"].value
        == 4
    )


def test_statistics_are_those_of_one_pass(executor: RayExecutor, tmp_path: Path) -> None:
    """Bit for bit, also with parts saved on the way and taken up again."""
    write_dataset(TRACE, tmp_path / "trace", fragment_tokens=1000)
    options: dict[str, Any] = {"window_tokens": WINDOW, "task_tokens": 512}
    one = collect_statistics(tmp_path / "trace", **options)
    assert one.num_tasks == 10
    spread = collect_statistics(tmp_path / "trace", executor=executor, **options)
    assert spread.statistics.digest == one.statistics.digest
    for resumed in (0, 10):
        saved = collect_statistics(
            tmp_path / "trace", executor=executor, checkpoint=tmp_path / "work", **options
        )
        assert (saved.statistics.digest, saved.num_resumed) == (one.statistics.digest, resumed)


def test_a_damaged_fragment_is_set_aside_and_named(executor: RayExecutor, tmp_path: Path) -> None:
    """As on a pool or in one process: the same windows are missing."""
    write_dataset(TRACE, tmp_path / "trace", fragment_tokens=1000)
    path = sorted((tmp_path / "trace").glob("*.parquet"))[2]
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(bytes(content))
    options: dict[str, Any] = {"window_tokens": WINDOW, "task_tokens": 1500, "on_error": "skip"}
    here = collect_statistics(tmp_path / "trace", **options)
    there = collect_statistics(tmp_path / "trace", executor=executor, **options)
    assert [gap.fragment for gap in there.missing] == [path.name]
    assert there.missing == here.missing
    assert there.statistics.digest == here.statistics.digest


def test_a_batch_is_that_of_one_process(executor: RayExecutor, tmp_path: Path) -> None:
    """Rows and placements, whole cells and layers apart, up to the time they took."""
    write_npz(TRACE, tmp_path / "trace.npz")
    for split in ("false", "true"):
        spec = tmp_path / f"split-{split}.yaml"
        spec.write_text(
            "traces: [trace.npz, gone.npz]\ntopologies: [h100:1x2, h100:1x3]\n"
            f"solve: {{window: 256, objective: balance, solver: search}}\nsplit_layers: {split}\n"
        )
        reports = [
            run_batch(
                read_spec(spec), tmp_path / f"{name}-{split}", work=CELL_WORK, executor=where, on_error="skip"
            )
            for name, where in (("here", SerialExecutor()), ("there", executor))
        ]
        here, there = ([without_time(row) for row in (*report.rows, *report.set_aside)] for report in reports)
        assert there == here
        assert [row["status"] for row in there] == ["done", "infeasible", "failed", "failed"]


def without_time(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without what depends on the clock."""
    return {name: value for name, value in row.items() if name != "elapsed_s"}


def test_a_node_may_go_in_mid_run(cluster: Any, executor: RayExecutor) -> None:
    """What ran or lay on it is done again on the other one, and the result is the same."""
    done: list[int] = []

    def watch(tokens: int, total: int, text: str) -> None:
        done.append(tokens)
        if len(done) == 6:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    collected = collect_statistics(
        worker_tasks.SlowSource(SOURCE),
        window_tokens=WINDOW,
        task_tokens=256,
        executor=executor,
        progress=watch,
    )
    assert len(done) == collected.num_tasks > 6
    assert collected.missing == ()
    assert collected.statistics.digest == collect(SOURCE, window_tokens=WINDOW).digest


def test_an_address_without_a_cluster_is_one_line() -> None:
    """What Ray raises becomes an error of the service kind that says how to start one."""

    def refuse(**options: Any) -> None:
        assert options["address"] == "10.0.0.1:6379"
        raise ConnectionError("Could not find any running Ray instance.\nmore")

    with pytest.raises(
        ServiceError, match=r"no Ray cluster at '10\.0\.0\.1:6379' \(Could not find .*ray start"
    ):
        _connect(SimpleNamespace(init=refuse), "10.0.0.1:6379", None, 3)
