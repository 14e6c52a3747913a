"""The trace store against Arrow itself: writing, reading, spooling, and what a billion records cost.

Run ``python -m benchmarks.store``; writes ``benchmarks/results/store.md`` and appends to ``store.jsonl``. A
record is one token in one layer with its 8 ids of 256 experts, 58 layers. The ceiling is pyarrow alone,
writing and reading the same columns with the same codec to and from a file, in the same process and in turn
with ours. Everything runs on one thread; times are CPU time, the least of several rounds, because the machine
may be busy. The billion records are one fragment, linked 132 times by `merge_datasets`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import RESULTS, environment

__all__ = ["main"]

SEED = 0
LAYERS, EXPERTS, TOP_K = 58, 256, 8
TOKENS = 1 << 17
DISTINCT_TOKENS = 1 << 14
BLOCK_TOKENS = 1 << 16
ROUNDS = 5
BILLION = 132


def skewed_ids(tokens: int) -> Any:
    """Draw 8 distinct experts per token and layer, popular ones more often, other ones in every layer."""
    rng = np.random.default_rng(SEED)
    drawn = min(tokens, DISTINCT_TOKENS)
    weight_E = np.log(1 / np.arange(1, EXPERTS + 1) ** 0.6)
    ids = np.empty((tokens, LAYERS, TOP_K), dtype=np.uint8)
    for layer in range(LAYERS):
        key_TE = weight_E + rng.gumbel(size=(drawn, EXPERTS)).astype(np.float32)
        top_TK = np.argpartition(-key_TE, TOP_K, axis=1)[:, :TOP_K].astype(np.uint8)
        for start in range(0, tokens, drawn):
            # Named anew in every repetition, so that no compressor finds it.
            name_E = rng.permutation(EXPERTS).astype(np.uint8)
            ids[start : start + drawn, layer] = name_E[top_TK[: tokens - start]]
    return ids


def least_s(*runs: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Return the least CPU time of each of some runs, taken in turn."""
    least = [float("inf")] * len(runs)
    for _ in range(rounds):
        for number, run in enumerate(runs):
            began_s = time.process_time()
            run()
            least[number] = min(least[number], time.process_time() - began_s)
    return least


def drained(blocks: Iterable[Any]) -> int:
    """Read a stream to its end; return its tokens."""
    return sum(block.num_tokens for block in blocks)


def against_arrow(folder: Path, trace: Any) -> list[dict[str, Any]]:
    """Write and read one trace with the store and with pyarrow alone."""
    import pyarrow.parquet as pq

    from traces.source import TraceHeader
    from traces.store import DatasetSource, write_dataset
    from traces.store.arrow import table_of
    from traces.store.columns import turn_to_layers
    from traces.store.encode import PARQUET, row_group_tokens

    records = trace.num_tokens * trace.num_layers
    header = TraceHeader.of(trace)
    table = table_of(header, trace, turn_to_layers(trace.experts_TLK)).combine_chunks()
    ceiling, ours = folder / "ceiling.parquet", folder / "set"
    groups = row_group_tokens(header)

    def arrow_writes() -> None:
        pq.write_table(table, ceiling, row_group_size=groups, **PARQUET)

    def arrow_reads() -> object:
        return pq.ParquetFile(ceiling).read(use_threads=False)

    writes_s = least_s(arrow_writes, lambda: write_dataset(trace, ours, overwrite=True))
    source = DatasetSource(ours)
    reads_s = least_s(
        arrow_reads,
        lambda: drained(source.columns(max_tokens=BLOCK_TOKENS)),
        lambda: drained(source.blocks(max_tokens=BLOCK_TOKENS)),
    )
    rows = [
        ("write", "pyarrow", writes_s[0], writes_s[0]),
        ("write", "write_dataset", writes_s[1], writes_s[0]),
    ]
    names = ("pyarrow", "DatasetSource.columns", "DatasetSource.blocks")
    rows += [("read", name, seconds, reads_s[0]) for name, seconds in zip(names, reads_s, strict=True)]
    return [
        {
            "what": what,
            "by": by,
            "mrecords_per_s": records / seconds / 1e6,
            "times_ceiling": seconds / ceiling_s,
            "bytes_per_record": (ceiling.stat().st_size if by == "pyarrow" else source.size_bytes) / records,
        }
        for what, by, seconds, ceiling_s in rows
    ]


def recording(folder: Path, trace: Any, *, batch_tokens: int) -> list[dict[str, Any]]:
    """Append batches as a recorder does, checked, with and without the spool."""
    from traces.store import DatasetWriter

    def record(spool: bool) -> None:
        with DatasetWriter(
            folder / "recorded",
            num_layers=LAYERS,
            num_experts=EXPERTS,
            top_k=TOP_K,
            overwrite=True,
            spool=spool,
        ) as out:
            for start in range(0, trace.num_tokens, batch_tokens):
                rows = slice(start, start + batch_tokens)
                out.append(trace.experts_TLK[rows], sequence_T=trace.sequence_T[rows])

    records = trace.num_tokens * trace.num_layers
    without_s, with_s = least_s(lambda: record(False), lambda: record(True), rounds=3)
    return [
        {"what": f"append {batch_tokens} tokens", "by": by, "mrecords_per_s": records / seconds / 1e6}
        for by, seconds in (("without spool", without_s), ("with spool", with_s))
    ]


PEAK = """
import re
from pathlib import Path
peak_kb = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
sys.stdout.flush()
print("peak_kb", peak_kb, file=sys.stderr)
"""
STREAM = """
import sys
from traces.store import DatasetSource
source = DatasetSource(sys.argv[1])
tokens = sum(block.num_tokens for block in source.columns(max_tokens=int(sys.argv[2])))
assert tokens == source.num_tokens
"""
INFO = """
import sys
from placement.cli.app import run
assert run(["trace", "info", sys.argv[1], "--json"]) == 0
"""
BARE = """
import sys
import pyarrow.parquet
"""


def child(code: str, *arguments: str) -> dict[str, float]:
    """Run Python code; return its wall time, CPU time and peak memory (its own, not what a fork inherits)."""
    began_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code + PEAK, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed with status {status}: {said}")
    return {
        "wall_s": time.perf_counter() - began_s,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mb": int(said.split()[-1]) / 1024,
    }


def a_billion(folder: Path, *, links: int) -> list[dict[str, Any]]:
    """Look into and stream data sets made of links to one fragment."""
    from traces.store import DatasetSource, merge_datasets

    rows = []
    for name, ranks in (("1 rank", "keep"), (f"{links} ranks", "renumber")):
        path = folder / ranks
        began_s = time.process_time()
        merge_datasets([folder / "set"] * links, path, ranks=ranks)  # type: ignore[arg-type]
        merged = {"wall_s": float("nan"), "cpu_s": time.process_time() - began_s, "peak_mb": float("nan")}
        source = DatasetSource(path)
        records = source.num_tokens * LAYERS
        about = {"records": records, "ranks": name, "stored_gb": source.size_bytes / 1e9}
        rows.append({"what": "merge (links)", **about, **merged})
        for run in range(2):
            found = child(INFO, str(path))
            rows.append({"what": f"trace info, run {run + 1}", **about, **found})
        rows.append({"what": "stream all", **about, **child(STREAM, str(path), str(BLOCK_TOKENS))})
    return rows


def report(rows: dict[str, list[dict[str, Any]]], about: dict[str, str], limits: str) -> str:
    """Return the page."""
    lines = [
        "# Trace store",
        "",
        f"Commit {about['commit']}; {about['machine']}; Python {about['python']}, numpy {about['numpy']}, "
        f"numba {about['numba']}, pyarrow {version('pyarrow')}; seed {SEED}, one thread. "
        "Made by `python -m benchmarks.store`.",
        "",
        f"{limits} A record is one token in one of {LAYERS} layers, top-{TOP_K} of {EXPERTS}, skewed. "
        f"CPU time, the least of {ROUNDS} rounds taken in turn.",
        "",
        "| what | by | million records/s | time / pyarrow's | bytes/record |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['what']} | {row['by']} | {row['mrecords_per_s']:.1f} | {row['times_ceiling']:.2f} | "
        f"{row['bytes_per_record']:.2f} |"
        for row in rows["arrow"]
    ]
    lines += ["", "As a recorder appends, every batch validated:", ""]
    lines += ["| what | by | million records/s |", "|---|---|---|"]
    lines += [f"| {row['what']} | {row['by']} | {row['mrecords_per_s']:.1f} |" for row in rows["recording"]]
    lines += [
        "",
        "Many records; wall time is that of a machine others use too. Bare Python with pyarrow takes "
        f"{rows['bare'][0]['cpu_s']:.1f} s of CPU time and {rows['bare'][0]['peak_mb']:.0f} MB.",
        "",
        "| what | records | ranks | stored GB | wall s | CPU s | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['what']} | {row['records']:,} | {row['ranks']} | {row['stored_gb']:.1f} | "
        f"{row['wall_s']:.1f} | {row['cpu_s']:.1f} | {row['peak_mb']:.0f} |"
        for row in rows["billion"]
    ]
    return "\n".join(lines).replace("nan", "-") + "\n"


def main() -> None:
    """Measure and write the page."""
    from traces.trace import Trace

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--links", type=int, default=BILLION, help="links to the fragment")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    options = parser.parse_args()
    about = environment()
    folder = Path(tempfile.mkdtemp(prefix="store-"))
    token_T = np.arange(options.tokens)
    trace = Trace(
        experts_TLK=skewed_ids(options.tokens),
        num_experts=EXPERTS,
        sequence_T=token_T // 512,
        position_T=token_T % 512,
        rank_T=np.zeros(options.tokens, dtype=np.int64),
    )
    try:
        rows = {
            "arrow": against_arrow(folder, trace),
            "recording": [
                row for tokens in (4096, 64) for row in recording(folder, trace, batch_tokens=tokens)
            ],
            "bare": [child(BARE)],
        }
        del trace
        rows["billion"] = a_billion(folder, links=options.links)
    finally:
        shutil.rmtree(folder)
    page = report(rows, about, f"{options.tokens:,} tokens.")
    print(page)
    print(f"peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    (RESULTS / "store.md").write_text(page, encoding="utf-8")
    with (RESULTS / "store.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"environment": about, **rows}) + "\n")


if __name__ == "__main__":
    main()
