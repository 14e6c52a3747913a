"""How fast traffic is counted, and in how much memory.

Run ``python -m benchmarks.statistics``. A record is one token in one layer with its top-k ids. Tokens are
drawn once with experts as unevenly popular as in real traces (Zipf 0.5) and then handed out again and again,
each layer taking another layer's turn, so that making them costs nothing. Speeds are by CPU time with one
thread (the fastest of several passes) and by wall time with two. At the end a billion records are counted in
fresh processes; printed is how much the resident set grew beyond that of a process that has counted a small
trace.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.environment import RESULTS, environment
from traces.source import BLOCK_TOKENS, TraceHeader, TraceSource, check_token_range
from traces.trace import ExpertArray, Trace

if TYPE_CHECKING:
    from traces.statistics import RoutingStatistics
    from traces.store import ColumnBlock

__all__ = ["main"]

SHAPES = ((58, 256, 8), (26, 64, 6), (48, 128, 8), (60, 512, 8))
"""Layers, experts and top-k of DeepSeek-V3, DeepSeek-V2-Lite, Qwen3-30B-A3B, and one with two-byte ids."""

WINDOW_TOKENS = 4096
MEASURED_TOKENS = 1 << 17
PASSES = 3
SEED = 0
BILLION = 10**9
ALL = ("transitions", "coactivation", "first-transitions", "homes", "domains")
WORK = {
    "loads": ((), 0),
    "loads, transitions": (("transitions",), 0),
    "loads, co-activation": (("coactivation",), 0),
    "loads, transitions, co-activation": (("transitions", "coactivation"), 0),
    "everything": (ALL, None),
}
"""Parts that are counted, and the sample."""


def drawn_ids(rng: np.random.Generator, num_tokens: int, num_experts: int, top_k: int) -> ExpertArray:
    """Draw distinct experts for every token, popularity falling as rank ** -0.5."""
    weight_E = rng.permutation(-0.5 * np.log(np.arange(1, num_experts + 1)))
    ids_TK = np.empty((num_tokens, top_k), dtype=np.uint8 if num_experts <= 256 else np.uint16)
    for start in range(0, num_tokens, 4096):
        piece = ids_TK[start : start + 4096]
        score = rng.gumbel(size=(len(piece), num_experts)) + weight_E
        piece[:] = np.argsort(-score, axis=1)[:, :top_k]
    return ids_TK


class Cycle:
    """A source that never reads: a pool of tokens that comes again and again, layers taking turns."""

    def __init__(self, num_tokens: int, shape: tuple[int, int, int], *, pool_tokens: int = 1 << 16) -> None:
        layers, experts, top_k = shape
        rng = np.random.default_rng(SEED)
        self.header = TraceHeader(
            num_layers=layers, num_experts=experts, top_k=top_k, domain_names=("code", "prose")
        )
        self.num_tokens = num_tokens
        self.digest = "sha256:cycle"
        distinct = drawn_ids(rng, pool_tokens, experts, top_k)
        # Each layer has its own array; its experts are those of the first one under other names.
        names = [rng.permutation(experts).astype(distinct.dtype) for _ in range(layers)]
        self._pool = [name[np.roll(distinct, 7 * layer, axis=0)] for layer, name in enumerate(names)]
        self._rank_T = rng.integers(0, 8, pool_tokens)
        self._domain_T = rng.integers(0, 2, pool_tokens)

    def columns(
        self, start: int = 0, stop: int | None = None, *, max_tokens: int = BLOCK_TOKENS
    ) -> Iterator[ColumnBlock]:
        """Yield the pool, cut as asked."""
        from traces.store import ColumnBlock

        start, stop = check_token_range(start, stop, self.num_tokens)
        size = min(max_tokens, len(self._rank_T))
        for turn, first in enumerate(range(start, stop, size)):
            piece = slice(0, min(size, stop - first))
            first_layer = turn % self.header.num_layers
            order = (*range(first_layer, self.header.num_layers), *range(first_layer))
            yield ColumnBlock(
                ids_LTK=tuple(self._pool[layer][piece] for layer in order),
                rank_T=self._rank_T[piece],
                domain_T=self._domain_T[piece],
            )

    def blocks(
        self, start: int = 0, stop: int | None = None, *, max_tokens: int = BLOCK_TOKENS
    ) -> Iterator[Trace]:
        """Yield the same tokens as traces."""
        for block in self.columns(start, stop, max_tokens=max_tokens):
            yield Trace(
                experts_TLK=np.stack(block.ids_LTK, axis=1),
                num_experts=self.header.num_experts,
                rank_T=block.rank_T,
                domain_T=block.domain_T,
                domain_names=self.header.domain_names,
            )


class InBlocks:
    """The tokens of a trace in memory, token by token as a file of another format would give them."""

    def __init__(self, source: Cycle) -> None:
        self.header, self.num_tokens, self.digest = source.header, source.num_tokens, source.digest
        self._blocks = list(source.blocks(0, source.num_tokens))

    def blocks(
        self, start: int = 0, stop: int | None = None, *, max_tokens: int = BLOCK_TOKENS
    ) -> Iterator[Trace]:
        """Yield the blocks as they lie in memory."""
        yield from self._blocks


def count(source: TraceSource, work: str, threads: int = 1) -> RoutingStatistics:
    """Count one kind of work over a source."""
    from traces.statistics import collect

    parts, sample = WORK[work]
    return collect(
        source, window_tokens=WINDOW_TOKENS, parts=parts, max_sampled_tokens=sample, threads=threads
    )


def best_s(action: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return the seconds of the fastest pass."""
    action()
    taken = []
    for _ in range(PASSES):
        began = clock()
        action()
        taken.append(clock() - began)
    return min(taken)


def speeds() -> list[str]:
    """Measure every kind of work on every shape, from memory; return table rows."""
    rows = []
    for shape in SHAPES:
        columns = Cycle(MEASURED_TOKENS, shape)
        blocks = InBlocks(Cycle(MEASURED_TOKENS // 4, shape))
        for work in WORK:
            records = MEASURED_TOKENS * shape[0] / 1e6
            one = records / best_s(lambda: count(columns, work), time.process_time)  # noqa: B023
            two = records / best_s(lambda: count(columns, work, 2), time.perf_counter)  # noqa: B023
            turned = records / 4 / best_s(lambda: count(blocks, work), time.process_time)  # noqa: B023
            name = f"{shape[0]} x {shape[1]}, top-{shape[2]}"
            rows.append(f"| {name} | {work} | {one:.1f} | {two:.1f} | {turned:.1f} |")
            print(rows[-1], flush=True)
    return rows


def from_data_set() -> list[str]:
    """Measure counting from a recorded data set, end to end."""
    from traces.readers import open_trace
    from traces.store import write_dataset

    rows = []
    shape = SHAPES[0]
    whole = list(Cycle(MEASURED_TOKENS, shape).blocks())
    from traces.trace import joined

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        write_dataset(joined(whole), path)
        for work in WORK:

            def end_to_end(work: str = work, threads: int = 1) -> None:
                source = open_trace(path)
                count(source, work, threads)  # type: ignore[arg-type]

            records = MEASURED_TOKENS * shape[0] / 1e6
            one = records / best_s(end_to_end, time.process_time)
            two = records / best_s(lambda: end_to_end(threads=2), time.perf_counter)
            rows.append(f"| {work} | {one:.1f} | {two:.1f} |")
            print(rows[-1], flush=True)
    return rows


def memory(budgets: Sequence[int], tokens: int) -> list[str]:
    """Count a billion records under each budget, each in a fresh process."""
    rows = []
    for budget in budgets:
        command = [sys.executable, "-m", "benchmarks.statistics", "--one-budget", str(budget), str(tokens)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        rows.append(done.stdout.strip() or f"| {budget >> 20} MiB | failed: {done.stderr.strip()[-200:]} |")
        print(rows[-1], flush=True)
    return rows


def one_budget(budget: int, tokens: int) -> None:
    """Count under a budget in this process, and print a table row."""
    from traces.statistics import collect

    shape = SHAPES[0]
    # Compiled code and libraries are there before the count begins.
    collect(Cycle(3 * WINDOW_TOKENS, shape, pool_tokens=WINDOW_TOKENS), window_tokens=WINDOW_TOKENS)
    before = _peak_bytes(reset=True)
    source = Cycle(tokens, shape)
    began = time.perf_counter()
    statistics = collect(source, window_tokens=WINDOW_TOKENS, memory_bytes=budget)
    taken = time.perf_counter() - began
    grown = _peak_bytes() - before
    sample = statistics.sample
    print(
        f"| {budget >> 20} MiB | {grown / (1 << 20):.0f} MiB | {grown / budget:.0%} | "
        f"{tokens * shape[0] / 1e9:.2f} G | {taken:.0f} s | 1 of {statistics.window_stride} | "
        f"{0 if sample is None else sample.num_tokens:,} | {_exact(statistics)} |"
    )


def _exact(statistics: RoutingStatistics) -> str:
    error = max(statistics.errors.values(), default=0.0)
    return f"{len(statistics.errors)} of 3 estimated, +-{error:.2%}" if error else "all exact"


def _peak_bytes(*, reset: bool = False) -> int:
    """Return the highest resident size; with `reset`, begin again from the present one."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


SPEED_HEAD = """| layers x experts | counted | 1 core | 2 cores | 1 core, token by token |
|---|---|---|---|---|"""
DATA_SET_HEAD = """| counted | 1 core | 2 cores |
|---|---|---|"""
MEMORY_HEAD = """| budget | grown | of budget | records | wall | windows kept | sampled | pair counts |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Print the tables and write them down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one-budget", nargs=2, type=int, metavar=("BYTES", "TOKENS"))
    parser.add_argument("--no-memory", action="store_true", help="leave out the billion records")
    given = parser.parse_args()
    if given.one_budget:
        one_budget(*given.one_budget)
        return
    about = environment()
    print(about)
    rows = speeds()
    stored = from_data_set()
    tokens = BILLION // SHAPES[0][0] + 1
    grown = [] if given.no_memory else memory([128 << 20, 1 << 30], tokens)
    text = "\n".join(
        [
            "# Statistics in one pass",
            "",
            "`python -m benchmarks.statistics`. Million records a second; a record is one token in one",
            "layer. One core by CPU time, two by wall time.",
            f"Windows of {WINDOW_TOKENS}, {MEASURED_TOKENS:,} tokens a pass, best of {PASSES}, seed {SEED}.",
            ", ".join(f"{name} {value}" for name, value in about.items()) + ".",
            "",
            "## From memory",
            "",
            SPEED_HEAD,
            *rows,
            "",
            "## From a recorded data set, opened, read and counted (58 x 256, top-8)",
            "",
            DATA_SET_HEAD,
            *stored,
            "",
            "## Memory (58 x 256, top-8, everything)",
            "",
            MEMORY_HEAD,
            *grown,
            "",
        ]
    )
    (RESULTS / "statistics.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
