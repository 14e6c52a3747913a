"""``moe-placement calibrate``: checks, measuring with the measurement replaced, and its refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from layer_files import CURVES, counts, layer_row, write_layers

from placement.calibration import MeasuredCalibration, read_calibration
from placement.cli import calibrate as command
from placement.cli.app import run

LAYER = counts([[2000, 1500], [1800, 2700]])


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Return measured layers, each a quarter slower than predicted, and the curves."""
    layers = write_layers(tmp_path / "layers.csv", [layer_row(LAYER, dedup=False, slower=1.25)] * 3)
    curves = tmp_path / "curves.json"
    curves.write_text(json.dumps(CURVES))
    return str(layers), str(curves)


def test_check_prints_one_object(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """The contract's keys, and more."""
    assert run(["calibrate", "--check", files[0], "--calibration", files[1], "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["median_error"] == report["p95_error"] == pytest.approx(0.2, abs=1e-5)
    assert report["layers"] == 3
    assert {"compared", "groups", "phases"} <= set(report)


def test_check_for_people(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """A line in all, one for each group and phase."""
    assert run(["calibrate", "--check", files[0], "--calibration", files[1]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 layers: median error 20.0%, p95 20.0%")
    assert [line.split()[0] for line in lines[1:]] == [
        "wire",
        "prepare",
        "dispatch",
        "experts",
        "combine",
        "unpermute",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check", "layers.csv"], "--check needs --calibration FILE"),
        (["--calibration", "curves.json"], "give --check MEASURED.csv too"),
        (["--check", "layers.csv", "--out", "x.json"], "--out is for measuring"),
        (["--check", "layers.csv", "--quick"], "--quick is for measuring"),
        (["--check", "layers.csv", "--models", "olmoe"], "--models is for measuring"),
        (["--check", "none.csv", "--calibration", "none.json"], "none.csv cannot be read"),
        (["--devices-per-node", "two"], "devices-per-node"),
    ],
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Options that do not belong together, and files that are not there."""
    assert message in refused(capsys, arguments)


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run the command, which must end with exit code 2 and one line; return the line."""
    assert run(["calibrate", *arguments]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    return captured.err


def test_measuring_needs_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without one, or with one process, the line says how to start it; without torch, what to install."""
    monkeypatch.setattr(command, "find_spec", lambda name: object())
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert "start it with torchrun" in refused(capsys, [])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "the launcher started 1" in refused(capsys, [])
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert "measuring needs torch; install with" in refused(capsys, [])


Measure = Callable[..., "dict[str, object] | None"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Measure], None]:
    """Return what makes this process a rank of two whose measurement is a function."""

    def launch(rank: int, measure: Measure) -> None:
        module = ModuleType("placement.runtime.measure")
        module.calibrate = measure  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "placement.runtime.measure", module)
        monkeypatch.setattr(command, "find_spec", lambda name: object())
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")

    return launch


def measured(
    *,
    models: Sequence[str],
    devices_per_node: int | None,
    quick: bool,
    progress: Callable[[str], None],
    measured_at: str,
) -> dict[str, object]:
    """Return a calibration that remembers what was asked for."""
    progress("experts of small")
    asked: dict[str, Any] = {"models": list(models), "devices_per_node": devices_per_node, "quick": quick}
    return {"format": "moe-placement-calibration/1", **CURVES, "asked": asked, "measured_at": measured_at}


def test_measuring_writes_a_file_that_can_be_read(
    launched: Callable[[int, Measure], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first rank writes; models may be separated by commas; progress goes to stderr."""
    launched(0, measured)
    out = tmp_path / "machine.json"
    options = ["--models", "olmoe,qwen3-30b-a3b", "--models", "mixtral-8x7b", "--quick"]
    assert run(["calibrate", "--out", str(out), "--devices-per-node", "2", *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == "moe-placement: experts of small\n"
    assert captured.out == f"measured 2 x NVIDIA H100 80GB HBM3\nwritten to {out}\n"
    assert json.loads(out.read_text())["asked"] == {
        "models": ["olmoe", "qwen3-30b-a3b", "mixtral-8x7b"],
        "devices_per_node": 2,
        "quick": True,
    }
    assert isinstance(read_calibration(out), MeasuredCalibration)
    assert run(["calibrate", "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["calibration"], report["world_size"]) == (str(out), 2)
    assert report["measured_at"].endswith("+00:00")
    assert json.loads(out.read_text())["asked"]["models"] == []


def test_other_ranks_write_and_say_nothing(
    launched: Callable[[int, Measure], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They take part in the measurement only."""

    def elsewhere(*, progress: Callable[[str], None], **options: object) -> None:
        progress("not shown")

    launched(1, elsewhere)
    monkeypatch.chdir(tmp_path)
    assert run(["calibrate"]) == 0
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_said_before_measuring(
    launched: Callable[[int, Measure], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Minutes of measuring are not lost for want of a folder."""

    def too_late(**options: object) -> dict[str, object]:
        raise AssertionError("measured although the file cannot be written")

    launched(0, too_late)
    assert "its folder does not exist" in refused(capsys, ["--out", str(tmp_path / "no" / "x.json")])
