"""``moe-placement trace statistics`` spread over workers: the same file, resumed, with damage named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from placement.cli.app import run
from traces.store import write_dataset
from traces.synthesize import synthesize

TRACE = synthesize(num_tokens=4000, num_layers=2, num_experts=8, top_k=2, sequence_tokens=100, seed=3)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Return a data set of four fragments."""
    write_dataset(TRACE, tmp_path / "trace", fragment_tokens=1000)
    return tmp_path / "trace"


def counted(capsys: pytest.CaptureFixture[str], dataset: Path, *options: str) -> tuple[dict[str, Any], str]:
    """Run the command; return its report and what it says on stderr."""
    out = dataset.parent / "statistics"
    capsys.readouterr()
    arguments = ["trace", "statistics", str(dataset), "-o", str(out), "--window", "100", "--json", *options]
    assert run(arguments) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_workers_write_what_one_pass_writes(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The digest does not depend on who counted; a second run takes up the parts of the first."""
    one, _ = counted(capsys, dataset)
    two, said = counted(capsys, dataset, "--workers", "2", "--checkpoint", str(tmp_path / "work"))
    assert (two["digest"], two["missing"], said) == (one["digest"], [], "")
    again, said = counted(capsys, dataset, "--workers", "1", "--checkpoint", str(tmp_path / "work"))
    assert again["digest"] == one["digest"]
    assert said == f"moe-placement: {dataset}: 1 parts were counted before\n"


def test_damage_ends_the_run_or_is_named(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 2, or with skip the tokens, windows and fragment that are missing."""
    path = sorted(dataset.glob("*.parquet"))[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(bytes(content))
    out = dataset.parent / "statistics"
    arguments = ["trace", "statistics", str(dataset), "-o", str(out), "--window", "100", "--workers", "1"]
    assert run(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("moe-placement: error: tokens 0 to 4000: ")
    assert path.name in line
    assert line.count("\n") == 1
    assert not out.exists()
    report, said = counted(capsys, dataset, "--on-error", "skip")
    (gap,) = report["missing"]
    assert (gap["trace"], gap["start"], gap["stop"]) == (str(dataset), 1000, 2000)
    assert gap["fragment"] == path.name
    assert report["tokens"] == 3000
    assert "tokens 1000 to 2000 are set aside" in said
    assert "10 windows, 1000 tokens in all, are not in the statistics" in said


def test_bad_wishes_are_one_line(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, nothing written."""
    out = dataset.parent / "statistics"
    arguments = ["trace", "statistics", str(dataset), "-o", str(out), "--window", "100"]
    for options, message in (
        (["--workers", "0"], "--workers is 0"),
        (["--on-error", "ignore"], "--on-error is 'ignore'"),
        (["--workers", "2", "--ray", "local"], "give one"),
    ):
        assert run([*arguments, *options]) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
