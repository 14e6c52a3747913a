"""Change over time on the command line: budgeted solves, advice, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from placement import diff, read_placement
from placement.cli.app import run

TRACE = Path(__file__).parents[2] / "placement" / "samples" / "traces" / "byte16.npz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with linear costs and a running placement of the bundled trace."""
    path = tmp_path_factory.mktemp("change")
    (path / "linear.json").write_text('{"kind": "linear", "pair_cost": 1, "token_cost": 4}')
    assert run(command(path, "solve", "--solver", "contiguous", "-o", str(path / "start.json"))) == 0
    return path


def command(folder: Path, name: str, *options: str) -> list[str]:
    """Return the arguments of a command on the bundled trace with linear costs."""
    costs = ["--calibration", str(folder / "linear.json"), "--window", "8192"]
    return [name, str(TRACE), "-t", "h100:1x4", *costs, *options]


def started(folder: Path, name: str, *options: str) -> list[str]:
    """Return the arguments of a command that starts from the running placement."""
    return command(folder, name, "--start", str(folder / "start.json"), "--time-limit", "2", *options)


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command that must fail with exit code 2 and one line; return the line."""
    capsys.readouterr()
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    return captured.err


def test_solve_within_a_budget(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file keeps the budget, the report counts the moves, and `diff` agrees."""
    out = tmp_path / "near.json"
    capsys.readouterr()
    assert run(started(folder, "solve", "--max-moves", "6", "-o", str(out), "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    start, near = read_placement(folder / "start.json"), read_placement(out)
    assert report["moves"]["count"] == len(diff(start, near)) <= 6
    assert report["objective"]["value"] <= report["candidates"]["start"]
    assert json.loads(out.read_text())["provenance"]["options"]["max_moves"] == 6
    assert run(["diff", str(folder / "start.json"), str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{report['moves']['count']} of 96 expert copies move")


def test_no_moves_keep_the_start(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A budget of nothing writes the start again."""
    out = tmp_path / "same.json"
    assert run(started(folder, "solve", "--max-moves", "0", "-o", str(out))) == 0
    assert "0 expert copies move" in capsys.readouterr().out
    assert diff(read_placement(folder / "start.json"), read_placement(out)) == ()


def test_a_budget_needs_a_start(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Moves are counted from somewhere, and there are never fewer than none."""
    out = tmp_path / "none.json"
    assert "needs --start" in fails(capsys, command(folder, "solve", "--max-moves", "3", "-o", str(out)))
    message = fails(capsys, started(folder, "solve", "--max-moves", "-3", "-o", str(out)))
    assert "max_moves is -3" in message
    assert not out.exists()


def test_advice_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One object: verdict, reason, interval, and the whole frontier."""
    capsys.readouterr()
    assert run(started(folder, "advise", "--json")) == 0
    advice = json.loads(capsys.readouterr().out)
    assert advice["reason"].startswith("Worth it" if advice["worth_it"] else "Not worth it")
    gain = advice["gain"]
    assert gain["low"] <= gain["value"] <= gain["high"]
    points = advice["frontier"]["points"]
    assert points[0]["moves"] == 0
    assert advice["recommended"] in points
    fitted = [point["fitted"] for point in points]
    assert fitted == sorted(fitted, reverse=True)


def test_advice_in_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sentence comes first, then the table of moves."""
    capsys.readouterr()
    assert run(started(folder, "advise", "--objective", "balance", "--min-gain", "0.9")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Not worth it: ")
    assert any("pay-back steps" in line for line in lines)


def test_bad_advice(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A start that is no file, or of another cluster, and options out of range are named."""
    missing = str(tmp_path / "missing.json")
    assert "missing.json" in fails(capsys, command(folder, "advise", "--start", missing))
    message = fails(capsys, [*started(folder, "advise"), "--horizon-steps", "0"])
    assert "horizon_steps is 0" in message
    assert "--start" in fails(capsys, command(folder, "advise"))
