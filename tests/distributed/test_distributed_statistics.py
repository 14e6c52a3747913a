"""Statistics collected in parts equal those of one pass, however they are cut, run, damaged or resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import BackendError, InputError
from traces.distributed import counting
from traces.distributed.counting import SourceAt, cut_ranges
from traces.distributed.pool import ProcessExecutor
from traces.distributed.statistics import collect_statistics
from traces.distributed.work import MANIFEST
from traces.source import MemorySource
from traces.statistics import collect, merge
from traces.store import DatasetSource, write_dataset
from traces.synthesize import synthesize

WINDOW = 64
FRAGMENT_TOKENS = 1000

TRACE = synthesize(num_tokens=5000, num_layers=3, num_experts=8, top_k=2, sequence_tokens=100, seed=3)
SOURCE = MemorySource(TRACE)


@pytest.fixture(scope="module")
def whole() -> str:
    """Return the digest of the statistics of one pass."""
    return collect(SOURCE, window_tokens=WINDOW).digest


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Return the trace as a data set of five fragments."""
    write_dataset(TRACE, tmp_path / "trace", fragment_tokens=FRAGMENT_TOKENS)
    return tmp_path / "trace"


def damage(dataset: Path, number: int) -> Path:
    """Change a byte in the middle of a fragment; return its file."""
    path = sorted(dataset.glob("*.parquet"))[number]
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(bytes(content))
    return path


@given(
    tokens=st.integers(1, 10**6),
    first=st.integers(0, 50),
    window=st.integers(1, 5000),
    layers=st.integers(1, 61),
    cells=st.integers(0, 10**7),
    task=st.one_of(st.none(), st.integers(100, 10**6)),
    places=st.lists(st.integers(1, 10**7), max_size=30),
)
def test_ranges_cover_everything_once(
    tokens: int, first: int, window: int, layers: int, cells: int, task: int | None, places: list[int]
) -> None:
    """Ranges begin windows and leave no gap; without natural cuts they differ by a window at most."""
    start = first * window
    sizes: dict[str, Any] = {
        "window_tokens": window,
        "num_layers": layers,
        "cells": cells,
        "task_tokens": task,
    }
    ranges = cut_ranges(start, start + tokens, **sizes)
    windows = [(end - begin) // window for begin, end in ranges]
    assert max(windows) - min(windows) <= 1
    assert len(ranges) <= counting.MOST_TASKS
    natural = sorted(place for place in places if place < start + tokens)
    for cut in (ranges, cut_ranges(start, start + tokens, natural=natural, **sizes)):
        assert (cut[0][0], cut[-1][1], len(cut)) == (start, start + tokens, len(ranges))
        assert all(before[1] == after[0] for before, after in pairwise(cut))
        assert all(begin % window == 0 and begin < end for begin, end in cut)


def test_ranges_end_where_fragments_do() -> None:
    """A cut moves to the end of a fragment that is near and begins a window, or else stays."""
    sizes: dict[str, Any] = {"window_tokens": 10, "num_layers": 1, "cells": 0, "task_tokens": 100}
    assert cut_ranges(0, 300, natural=[90, 205, 225], **sizes) == [(0, 90), (90, 200), (200, 300)]


@settings(max_examples=6, deadline=None)
@given(task_tokens=st.integers(1, 6000), first=st.integers(0, 3), left=st.integers(0, 200))
def test_any_cut_gives_one_pass(task_tokens: int, first: int, left: int) -> None:
    """Merged parts have the digest of a single pass over the same tokens."""
    bounds = {"start": first * WINDOW, "stop": TRACE.num_tokens - left}
    parts = collect_statistics(SOURCE, window_tokens=WINDOW, task_tokens=task_tokens, **bounds)
    assert parts.statistics.digest == collect(SOURCE, window_tokens=WINDOW, **bounds).digest
    assert (parts.missing, parts.num_lost) == ((), 0)


def test_little_memory_thins_parts_alike() -> None:
    """Where not every window can be kept, parts keep those that one pass keeps."""
    options = {"window_tokens": 4, "memory_bytes": 160_000}
    one = collect(SOURCE, **options)
    assert one.window_stride > 1
    assert collect_statistics(SOURCE, task_tokens=600, **options).statistics.digest == one.digest


def test_a_pool_gives_one_pass(dataset: Path) -> None:
    """Two processes, each reading for itself."""
    one = collect(DatasetSource(dataset), window_tokens=WINDOW).digest
    seen: list[tuple[int, int]] = []
    with ProcessExecutor(2) as pool:
        collected = collect_statistics(
            dataset,
            window_tokens=WINDOW,
            task_tokens=512,
            executor=pool,
            progress=lambda done, total, _: seen.append((done, total)),
        )
    assert (collected.statistics.digest, collected.num_tasks) == (one, 10)
    assert seen[-1] == (5000, 5000)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_damaged_fragment_ends_the_run_by_name(dataset: Path) -> None:
    """One line names the tokens and the fragment."""
    path = damage(dataset, 2)
    with pytest.raises(InputError, match=f"tokens .*{path.name}"):
        collect_statistics(dataset, window_tokens=WINDOW, task_tokens=512)


def test_a_damaged_fragment_is_set_aside_and_named(dataset: Path, tmp_path: Path) -> None:
    """Only the windows that touch it are missing; a repaired one is counted by the next run."""
    good = sorted(dataset.glob("*.parquet"))[2].read_bytes()
    path = damage(dataset, 2)
    options = {"window_tokens": WINDOW, "task_tokens": 1500, "checkpoint": tmp_path / "work"}
    collected = collect_statistics(dataset, on_error="skip", **options)
    assert [gap.fragment for gap in collected.missing] == [path.name]
    gap = collected.missing[0]
    assert (gap.start, gap.stop) == (2000 // WINDOW * WINDOW, -(-3000 // WINDOW) * WINDOW)
    assert path.name in gap.reason
    assert collected.missing_tokens == gap.stop - gap.start
    assert collected.missing_windows() == (gap.stop - gap.start) // WINDOW
    around = merge(
        [
            collect(SOURCE, window_tokens=WINDOW, stop=gap.start),
            collect(SOURCE, window_tokens=WINDOW, start=gap.stop),
        ]
    )
    assert (collected.statistics.load_LE == around.load_LE).all()
    assert (collected.statistics.window_index_W == around.window_index_W).all()
    path.write_bytes(good)
    repaired = collect_statistics(dataset, **options)
    assert repaired.missing == ()
    assert repaired.num_resumed > 0
    assert repaired.statistics.digest == collect(DatasetSource(dataset), window_tokens=WINDOW).digest


def test_nothing_readable_is_an_error(dataset: Path) -> None:
    """With every fragment damaged there is no answer to give."""
    for number in range(5):
        damage(dataset, number)
    with pytest.raises(InputError, match="no token could be read"):
        collect_statistics(dataset, window_tokens=WINDOW, task_tokens=1500, on_error="skip")


class deadly_source:  # noqa: N801
    """A trace of which one token kills whoever reads it."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.header, self.num_tokens, self.digest = SOURCE.header, SOURCE.num_tokens, SOURCE.digest

    def __call__(self) -> deadly_source:
        """Return itself."""
        return self

    def blocks(self, start: int = 0, stop: int | None = None, *, max_tokens: int = 1) -> object:
        """Read, and die of the token."""
        if start <= self.token < (self.num_tokens if stop is None else stop):
            os.kill(os.getpid(), signal.SIGKILL)
        return SOURCE.blocks(start, stop, max_tokens=max_tokens)


def test_tokens_that_kill_their_worker_are_set_aside() -> None:
    """The range is cut down until little more than the token is missing; without skip it is named."""
    options = {"window_tokens": 1024, "task_tokens": 2500}
    with ProcessExecutor(1, max_attempts=1) as pool:
        collected = collect_statistics(deadly_source(2100), executor=pool, on_error="skip", **options)
        assert [(gap.start, gap.stop) for gap in collected.missing] == [(2048, 3072)]
        assert "SIGKILL" in collected.missing[0].reason
        assert collected.statistics.num_tokens == 5000 - 1024
        with pytest.raises(BackendError, match=r"tokens .*SIGKILL"):
            collect_statistics(deadly_source(2100), executor=pool, **options)


KILLED = """
import json, os, signal, sys
from traces.distributed import work
from traces.distributed.statistics import collect_statistics

# Every task is written down at once: on a slow disk the run would end before the third one was.
work._SAVE_SHARE = float("inf")

def watch(done, total, text):
    manifest = json.load(open(os.path.join(sys.argv[2], "manifest.json")))
    if len(manifest["done"]) >= 3:
        os.kill(os.getpid(), signal.SIGKILL)

collect_statistics(sys.argv[1], window_tokens=64, task_tokens=256, checkpoint=sys.argv[2], progress=watch)
"""


def test_a_killed_run_goes_on_where_it_stopped(dataset: Path, tmp_path: Path) -> None:
    """After kill -9 what was counted is not counted again, and the result is that of one pass."""
    command = [sys.executable, "-c", KILLED, str(dataset), str(tmp_path / "work")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    collected = collect_statistics(
        dataset, window_tokens=WINDOW, task_tokens=256, checkpoint=tmp_path / "work"
    )
    assert 3 <= collected.num_resumed < collected.num_tasks
    opened = SourceAt(path=str(dataset))()
    assert collected.statistics.digest == collect(opened, window_tokens=WINDOW).digest


def test_other_options_do_not_take_up_a_run(dataset: Path, tmp_path: Path) -> None:
    """A checkpoint of other windows is refused, naming the difference."""
    options = {"checkpoint": tmp_path / "work", "task_tokens": 1000}
    collect_statistics(dataset, window_tokens=WINDOW, **options)
    with pytest.raises(InputError, match="window_tokens was 64 and is 32 now"):
        collect_statistics(dataset, window_tokens=32, **options)


def test_an_interrupt_keeps_what_is_done(tmp_path: Path) -> None:
    """Ctrl-C ends the run at once; the manifest names what was counted."""
    count = 0

    def interrupt(done: int, total: int, text: str) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt

    options = {"window_tokens": WINDOW, "task_tokens": 500, "checkpoint": tmp_path / "work"}
    with pytest.raises(KeyboardInterrupt):
        collect_statistics(SOURCE, progress=interrupt, **options)
    assert collect_statistics(SOURCE, **options).num_resumed == 4


def test_workers_must_see_the_same_trace() -> None:
    """A worker whose copy of the trace is another one says so."""
    other = MemorySource(TRACE.select_tokens(slice(0, 4000)))
    lengths = iter([SOURCE, other])
    with pytest.raises(InputError, match="has 4000 tokens here and 5000 where the run began"):
        collect_statistics(lambda: next(lengths), window_tokens=WINDOW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, "--on-error is 'ignore'"),
        ({"task_tokens": 0}, "tasks of 0 tokens"),
        ({"start": 64, "stop": 64}, "nothing to collect"),
        ({"stop": 5001}, "5001 are asked for"),
        ({"window_tokens": 0}, "window of 0"),
    ],
)
def test_impossible_options(options: dict[str, object], message: str) -> None:
    """Refused before anything runs."""
    with pytest.raises(InputError, match=message):
        collect_statistics(SOURCE, **{"window_tokens": WINDOW, **options})  # type: ignore[arg-type]


def test_counts_alone_are_refused(tmp_path: Path) -> None:
    """There is nothing to collect where no token is known."""
    path = tmp_path / "counts.json"
    path.write_text('{"logical_count": [[1, 2], [3, 4]]}')
    with pytest.raises(InputError, match=r"counts\.json"):
        collect_statistics(path, window_tokens=WINDOW)


def test_the_manifest_lists_the_parts(tmp_path: Path) -> None:
    """Parts are named by their tokens, in files that any tool for statistics reads."""
    collect_statistics(SOURCE, window_tokens=WINDOW, task_tokens=2500, checkpoint=tmp_path)
    assert sorted(path.name for path in tmp_path.glob("tokens-*")) == [
        "tokens-0-2496.statistics",
        "tokens-2496-5000.statistics",
    ]
    assert (tmp_path / MANIFEST).is_file()
