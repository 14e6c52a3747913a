"""What several processes save on statistics, and what a hundred times the data would cost.

Run ``python -m benchmarks.distributed [--records MILLIONS] [--repeats N] [--ray]``; writes
``benchmarks/results/distributed.md`` and appends to ``distributed.jsonl``. Seeded synthetic data sets on the
disk of this machine, all parts counted (loads, transitions, co-activation, homes, domains, a sample), one
thread a worker. One pass in one process is compared with the same ranges in one process, a pool, and on Ray;
every result has the digest of the one pass.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import RESULTS, environment
from traces.distributed.counting import SourceAt, cut_ranges, merge_parts, table_cells
from traces.distributed.executor import Executor, SerialExecutor, available_cores
from traces.distributed.pool import ProcessExecutor
from traces.distributed.reduction import FAN_IN, TreeReduction
from traces.distributed.statistics import Collected, collect_statistics
from traces.source import TraceSource
from traces.statistics import RoutingStatistics, collect, plan_memory
from traces.store import DatasetWriter
from traces.synthesize import synthesize
from traces.trace import Trace

__all__ = ["main"]

SEED = 0
WINDOW = 4096
BLOCK = 1 << 14
MEMORY_BYTES = 1 << 30
HUNDRED = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A data set: `records` are token-layer pairs of `top_k` ids each."""

    name: str
    layers: int
    experts: int
    records: int
    top_k: int = 8

    @property
    def tokens(self) -> int:
        """Tokens, whole windows and a tail."""
        return self.records // self.layers + 100


def instances(records: int) -> tuple[Instance, ...]:
    """Return the instances, each of about so many records."""
    return (
        Instance(name="48 layers x 128 experts", layers=48, experts=128, records=records),
        Instance(name="58 layers x 256 experts", layers=58, experts=256, records=records),
    )


def write(instance: Instance, folder: Path) -> None:
    """Write a data set: one synthetic block again and again, experts renamed, tokens shuffled each time."""
    sizes = {"num_layers": instance.layers, "num_experts": instance.experts, "top_k": instance.top_k}
    block = synthesize(num_tokens=BLOCK, sequence_tokens=512, seed=SEED, **sizes)
    rng = np.random.default_rng(SEED)
    with DatasetWriter(folder, **sizes) as writer:
        for start in range(0, instance.tokens, BLOCK):
            tokens = min(BLOCK, instance.tokens - start)
            name_E = rng.permutation(instance.experts).astype(block.experts_TLK.dtype)
            order_T = rng.permutation(BLOCK)[:tokens]
            writer.append_trace(
                Trace(experts_TLK=name_E[block.experts_TLK[order_T]], num_experts=instance.experts)
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Wall and processor seconds, the latter of this process and of all its children that ended."""

    wall_s: float
    cpu_s: float


def processor_s() -> float:
    """Processor seconds of this process and its ended children."""
    return sum(os.times()[:4])


def timed(work: Callable[[], Any]) -> tuple[Any, Timing]:
    """Run once; return the result and its time."""
    wall_s, cpu_s = time.perf_counter(), processor_s()
    result = work()
    return result, Timing(wall_s=time.perf_counter() - wall_s, cpu_s=processor_s() - cpu_s)


def own_s(work: Callable[[], Any]) -> float:
    """Processor seconds of this process for one call, finer than those of `timed`."""
    began_s = time.process_time()
    work()
    return time.process_time() - began_s


@contextmanager
def pool(workers: int) -> Iterator[Executor]:
    """Yield a pool, its processes ended with the context."""
    with ProcessExecutor(workers) as executor:
        yield executor


def spread(path: Path, make: Callable[[], Any]) -> Collected:
    """Collect with an executor made for it, start and end of its workers included."""
    with make() as executor:
        return collect_statistics(path, window_tokens=WINDOW, memory_bytes=MEMORY_BYTES, executor=executor)


def measure(instance: Instance, folder: Path, *, ray: bool, repeats: int) -> list[dict[str, Any]]:
    """Time every way on one data set; the least of some runs."""
    path = folder / "trace"
    _, wrote = timed(lambda: write(instance, path))
    disk_bytes = sum(file.stat().st_size for file in path.iterdir())
    print(
        f"{instance.name}: {instance.tokens} tokens, {disk_bytes / 1e9:.2f} GB, written in "
        f"{wrote.wall_s:.0f} s",
        flush=True,
    )
    source = SourceAt(path=str(path))()

    def one_pass() -> RoutingStatistics:
        return collect(source, window_tokens=WINDOW, memory_bytes=MEMORY_BYTES, threads=1)

    one_pass_digest = one_pass().digest
    ways: dict[str, Callable[[], Any]] = {"one pass": one_pass}
    ways["ranges, 1 process"] = lambda: spread(path, SerialExecutor)
    for workers in sorted({1, 2, available_cores()}):
        ways[f"pool of {workers}"] = lambda workers=workers: spread(path, lambda: pool(workers))
    if ray:
        from traces.distributed.ray_cluster import RayExecutor

        ways["Ray, local"] = lambda: spread(path, lambda: RayExecutor("local"))
    rows: list[dict[str, Any]] = []
    for name, way in ways.items():
        timings = []
        for _ in range(repeats):
            result, timing = timed(way)
            statistics = result.statistics if isinstance(result, Collected) else result
            assert statistics.digest == one_pass_digest, name
            timings.append(timing)
        best = min(timings, key=lambda timing: timing.wall_s)
        rows.append(
            {
                "instance": instance.name,
                "records": instance.tokens * instance.layers,
                "disk_bytes": disk_bytes,
                "way": name,
                "wall_s": best.wall_s,
                "cpu_s": min(timing.cpu_s for timing in timings),
                "speed_up": rows[0]["wall_s"] / best.wall_s if rows else 1.0,
                "tasks": result.num_tasks if isinstance(result, Collected) else 1,
            }
        )
        print(rows[-1], flush=True)
    cpu_s = {row["way"]: float(row["cpu_s"]) for row in rows}
    start_s = max(0.0, cpu_s["pool of 1"] - cpu_s["ranges, 1 process"])
    rows[0] |= {"start_s": start_s, **parts(source, instance)}
    return rows


def parts(source: TraceSource, instance: Instance) -> dict[str, Any]:
    """Measure what a partial result weighs and what merging two of them takes."""
    half = instance.tokens // 2 // WINDOW * WINDOW
    ranges = [*ranges_of(source, instance, instance.tokens), (half, instance.tokens)]
    options = {"window_tokens": WINDOW, "memory_bytes": MEMORY_BYTES, "threads": 1}
    first, second = (collect(source, start=start, stop=stop, **options) for start, stop in ranges[:2])
    sent = pickle.dumps(first, protocol=5)
    merge_s = [own_s(lambda: merge_parts(first, second)) for _ in range(9)]
    move_s = [own_s(lambda: pickle.loads(pickle.dumps(first, protocol=5))) for _ in range(9)]  # noqa: S301
    return {
        "part_bytes": len(sent),  # about what a kept result takes
        "merge_s": min(merge_s),
        "move_s": min(move_s),
        "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }


def ranges_of(source: TraceSource, instance: Instance, tokens: int) -> list[tuple[int, int]]:
    """Return the ranges that a data set of so many tokens is cut into."""
    plan = plan_memory(source.header, num_tokens=tokens, window_tokens=WINDOW, memory_bytes=MEMORY_BYTES)
    cells = table_cells(source.header, plan)
    return cut_ranges(0, tokens, window_tokens=WINDOW, num_layers=instance.layers, cells=cells)


def extrapolated(rows: list[dict[str, Any]], instance: Instance, source: TraceSource) -> list[str]:
    """Return what a hundred times the data costs, by the figures measured.

    Counting grows with records; a merge costs the same however long its parts are, and there is one less than
    there are parts.
    """
    one = rows[0]
    tokens = HUNDRED * instance.tokens
    ranges = ranges_of(source, instance, tokens)
    depth = TreeReduction(len(ranges)).depth
    counting_s = HUNDRED * one["cpu_s"]
    merging_s = (len(ranges) - 1) * one["merge_s"]
    moves = len(ranges) + (len(ranges) - 1) // (FAN_IN - 1)
    moving_s = moves * one["move_s"]
    last_s = depth * (FAN_IN - 1) * (one["merge_s"] + one["move_s"])
    total_s = counting_s + merging_s + moving_s
    lines = [
        f"{HUNDRED * one['records'] / 1e9:.1f} G records, {HUNDRED * one['disk_bytes'] / 1e9:.0f} GB on the "
        f"disk, read once: {len(ranges)} ranges, a tree of {depth} levels.",
        f"Counting {counting_s / 3600:.2f} core-hours, merging {merging_s / 3600:.3f}, moving parts "
        f"{moving_s / 3600:.3f} ({moves * one['part_bytes'] / 1e9:.1f} GB): {total_s / 3600:.2f} in all, "
        f"{total_s / counting_s - 1:.1%} more than counting alone. The last levels of the tree, when few "
        f"merges are left, take {last_s:.1f} s.",
        "",
        "| workers | minutes | disk, GB/s | memory, GiB |",
        "|---|---|---|---|",
    ]
    for workers in (2, 8, 32, 128):
        wall_s = one["start_s"] + total_s / workers + last_s
        rate = HUNDRED * one["disk_bytes"] / wall_s / 1e9
        memory = workers * max(MEMORY_BYTES, one["peak_bytes"]) / 2**30
        lines.append(f"| {workers} | {wall_s / 60:.1f} | {rate:.2f} | {memory:.0f} |")
    return lines


def table(
    measured: list[tuple[Instance, list[dict[str, Any]], list[str]]], where: dict[str, str], repeats: int
) -> str:
    """Return the page."""
    lines = [
        "# Distributed statistics",
        "",
        f"Commit {where['commit']}; {where['machine']}; Python {where['python']}, numba {where['numba']}; "
        f"seed {SEED}, windows of {WINDOW} tokens, {MEMORY_BYTES >> 20} MiB a worker, least of {repeats} "
        f"runs, page cache warm, load average {os.getloadavg()[1]:.1f} at the end. Made by "
        "`python -m benchmarks.distributed`.",
        "",
        "Statistics with all parts, top-8. `one pass` is `traces.statistics.collect` on one thread; all",
        "others cut the trace into the same ranges and merge in the same tree, and have its digest. Times of",
        "pools and Ray include the start and the end of their workers. CPU seconds are those of all",
        "processes but Ray's, and tell what spreading costs on a machine that others use too.",
        "",
        "| instance | records | way | tasks | wall s | CPU s | M records/s | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for _, rows, _ in measured:
        lines += [
            f"| {row['instance']} | {row['records'] / 1e6:.0f} M | {row['way']} | {row['tasks']} "
            f"| {row['wall_s']:.1f} | {row['cpu_s']:.1f} | {row['records'] / row['wall_s'] / 1e6:.1f} "
            f"| {row['speed_up']:.2f} |"
            for row in rows
        ]
    lines += [
        "",
        "## A hundred times as much, on paper",
        "",
        "Counting grows with the records. Ranges are cut so that a range counts at least 8 records for each",
        "cell of the tables of pairs, so merging stays a small share however much there is; results stay",
        f"with the workers and are merged there, {FAN_IN} to one, and only the last one comes to the process",
        "that began the run. Ranges are independent, so what limits the number of workers is the disk.",
    ]
    for instance, rows, text in measured:
        one = rows[0]
        lines += [
            "",
            f"### {instance.name}",
            "",
            f"Measured: {one['cpu_s'] / one['records'] * 1e9:.0f} ns a record, a partial result of "
            f"{one['part_bytes'] / 1e6:.1f} MB, {one['merge_s'] * 1e3:.0f} ms to merge two, "
            f"{one['move_s'] * 1e3:.0f} ms to write and read one, {one['start_s']:.1f} s to start a worker; "
            "largest worker "
            f"{one['peak_bytes'] / 2**20:.0f} MiB.",
            *text,
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=float, default=300, help="millions of records of each instance")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way")
    parser.add_argument("--ray", action="store_true", help="Ray on this machine too")
    options = parser.parse_args()
    where = environment()
    measured = []
    for instance in instances(int(options.records * 1e6)):
        with tempfile.TemporaryDirectory(prefix="moe-placement-benchmark-") as folder:
            rows = measure(instance, Path(folder), ray=options.ray, repeats=options.repeats)
            source = SourceAt(path=str(Path(folder) / "trace"))()
            measured.append((instance, rows, extrapolated(rows, instance, source)))
    text = table(measured, where, options.repeats)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "distributed.md").write_text(text, encoding="utf-8")
    with (RESULTS / "distributed.jsonl").open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps({**where, **row}) + "\n" for _, rows, _ in measured for row in rows)


if __name__ == "__main__":
    main()
