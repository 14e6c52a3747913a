"""Tests of ``trace statistics``: a small file that stands in for traces, and that each day is added to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from placement.cli.app import run
from placement.cli.trace_statistics import parse_bytes
from placement.errors import InputError
from traces.readers import read_trace
from traces.statistics import collect, load, merge
from traces.store import write_npz
from traces.synthesize import synthesize


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two days' traces and a linear calibration."""
    path = tmp_path_factory.mktemp("statistics")
    for seed, name in enumerate(("monday", "tuesday")):
        trace = synthesize(num_tokens=2048, num_layers=2, num_experts=16, top_k=2, seed=seed)
        write_npz(trace, path / f"{name}.npz")
    (path / "linear.json").write_text('{"kind": "linear", "pair_cost": 1, "token_cost": 4}')
    return path


def counted(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, object]:
    """Run the command; return what it printed."""
    capsys.readouterr()
    assert run(["trace", "statistics", *map(str, arguments), "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must fail in one line; return the line."""
    capsys.readouterr()
    assert run([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_trace_is_counted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file holds what collecting gives, and the answer says what is in it."""
    answer = counted(capsys, folder / "monday.npz", "-o", tmp_path / "day.stats", "--threads", "1")
    expected = collect(read_trace(folder / "monday.npz"), window_tokens=128)
    assert load(tmp_path / "day.stats").digest == expected.digest
    assert answer["digest"] == expected.digest
    assert (answer["tokens"], answer["window_tokens"], answer["windows"]) == (2048, 128, 16)
    assert (answer["sampled_tokens"], answer["errors"]) == (2048, {})
    assert answer["exact"] == ["transitions", "first_transitions", "coactivation"]


def test_days_are_added(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Day by day into one file, both at once, or from files of each: the same."""
    monday, tuesday, both = folder / "monday.npz", folder / "tuesday.npz", tmp_path / "both.stats"
    counted(capsys, monday, "-o", both, "--window", "64")
    grown = counted(capsys, tuesday, "--add", both, "-o", both)
    at_once = counted(capsys, monday, tuesday, "-o", tmp_path / "once.stats", "--window", "64")
    counted(capsys, tuesday, "-o", tmp_path / "tuesday.stats", "--window", "64")
    counted(capsys, monday, "-o", tmp_path / "monday.stats", "--window", "64")
    merged = counted(
        capsys, tmp_path / "monday.stats", tmp_path / "tuesday.stats", "-o", tmp_path / "merged.stats"
    )
    assert grown["digest"] == at_once["digest"] == merged["digest"]
    assert grown["tokens"] == 4096
    expected = merge([collect(read_trace(path), window_tokens=64) for path in (monday, tuesday)])
    assert load(both).digest == expected.digest


def test_statistics_stand_in_for_the_trace(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Solving on them gives the placement and the objective of solving on the trace."""
    statistics = tmp_path / "day.stats"
    counted(capsys, folder / "monday.npz", "-o", statistics, "--window", "256")
    values = []
    for number, source in enumerate((folder / "monday.npz", statistics)):
        out = tmp_path / f"{number}.json"
        options = ["-t", "h100:1x4", "--calibration", str(folder / "linear.json"), "-o", str(out)]
        assert run(["solve", str(source), "--window", "256", *options]) == 0
        values.append(json.loads(out.read_text()))
        assert "sampled" not in capsys.readouterr().err
    assert values[0]["physical_to_logical_map"] == values[1]["physical_to_logical_map"]
    assert values[0]["objective"] == values[1]["objective"]
    assert run(["trace", "info", str(statistics), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 2048


def test_what_statistics_cannot_follow_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another window or sample is not possible any more; without tokens, loads alone can be priced."""
    statistics = tmp_path / "day.stats"
    counted(capsys, folder / "monday.npz", "-o", statistics, "--no-sample")
    assert load(statistics).sample is None
    options = ["-t", "h100:1x4", "-o", str(tmp_path / "p.json"), "--objective", "balance"]
    assert run(["solve", str(statistics), "--window", "64", "--sample", "100", *options]) == 0
    said = capsys.readouterr().err
    assert "--window has no effect: the statistics have windows of 128 tokens" in said
    assert "--sample has no effect" in said
    assert "the statistics keep no tokens" in said


def test_memory_bounds_what_is_kept(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Little memory keeps fewer windows, and adding days does not grow beyond it."""
    both = tmp_path / "both.stats"
    arguments = ("--window", "2", "--memory", "64KiB")
    answer = counted(capsys, folder / "monday.npz", "-o", both, *arguments)
    assert answer["windows"] == 1024
    assert answer["windows_kept"] == len(load(both).load_WLE)
    assert len(load(both).load_WLE) < 1024
    for _ in range(3):
        counted(capsys, folder / "tuesday.npz", "--add", both, "-o", both, *arguments)
    grown = load(both)
    assert grown.num_windows == 4096
    assert merge([grown]).size_bytes <= 64 << 10
    assert grown.window_index_W.tolist() == [*range(0, 1024, grown.window_stride)] * 4
    assert grown.profile().num_windows == len(grown.load_WLE)


def test_plain_answers_name_the_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And how good what is estimated is."""
    out = tmp_path / "day.stats"
    arguments = ["trace", "statistics", str(folder / "monday.npz"), "-o", str(out), "--memory", "30KiB"]
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: 2,048 tokens, 2 layers, top-2 of 16 experts")
    assert f"windows of 128 tokens: {len(load(out).load_WLE)} of 16" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-sample", "--sample", "5"], "--sample and --no-sample contradict each other"),
        (["--window", "0"], "--window is 0"),
        (["--memory", "lots"], "--memory 'lots' is no size; write it like 512MiB"),
        (["--sample", "3"], "sample of 3 tokens leaves some of 16 windows empty"),
        (["--add", "missing.stats"], "missing.stats: cannot be read"),
    ],
)
def test_bad_options_are_refused(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    """In one line, and nothing is written."""
    out = tmp_path / "day.stats"
    assert message in fails(capsys, "trace", "statistics", folder / "monday.npz", "-o", out, *arguments)
    assert not out.exists()


def test_windows_have_to_agree(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counts by other windows cannot be added."""
    monday, old, new = folder / "monday.npz", tmp_path / "old.stats", tmp_path / "new.stats"
    counted(capsys, monday, "-o", old, "--window", "64")
    counted(capsys, monday, "-o", new, "--window", "32")
    assert "earlier statistics have windows of 64" in fails(
        capsys, "trace", "statistics", monday, "--add", old, "-o", old, "--window", "32"
    )
    assert f"{new}: has windows of 32 tokens, not 64" in fails(
        capsys, "trace", "statistics", new, "--add", old, "-o", old
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("1KiB", 1024), ("2 mb", 2 << 20), ("1.5G", 3 << 29), ("1TiB", 1 << 40)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    """With and without a unit."""
    assert parse_bytes(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1e9", "GiB", "1 PiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """By the option's name."""
    with pytest.raises(InputError, match="--memory"):
        parse_bytes(text, "--memory")
