"""The recorder's benchmark runs anywhere, in miniature, and its checks pass."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import recorder
from benchmarks.gpu.recorder_check import checks


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_variant_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table and a JSON file: a row for each variant, and one that says why a graph is not measured."""
    eager, _, graph, compiled = recorder.TINY_CASES
    monkeypatch.setattr(recorder, "TINY_CASES", (eager, graph, compiled))
    monkeypatch.setattr(recorder, "checks", lambda device, compiled: [])
    options = ["--rounds", "2", "--block", "0.001", "--out", str(tmp_path)]
    recorder.main(["--tiny", *options])
    rows = json.loads((tmp_path / recorder.FILE).read_text())["rows"]
    measured = [row["variant"] for row in rows if row["status"] == "ok"]
    assert measured == [*recorder.VARIANTS, *recorder.VARIANTS]
    assert all(row["step_ms"]["median"] > 0 for row in rows if row["status"] == "ok")
    assert [row["why"] for row in rows if row["status"] != "ok"] == ["CUDA graphs need a CUDA device"]
    assert capsys.readouterr().out.count("| tiny ") == len(rows)


def test_a_case_without_time_is_told(tmp_path: Path) -> None:
    """Nothing begins after the budget; the file says so."""
    recorder.main(["--tiny", "--budget", "0", "--out", str(tmp_path / "result.json")])
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert {(row["status"], row["why"]) for row in rows} == {("skipped", "no time left")}


def test_training_is_timed() -> None:
    """Forward and backward, with what a user would attach."""
    rows = recorder.measure(recorder.TINY_CASES[1], device=torch.device("cpu"), rounds=1, block_s=0.001)
    assert [row["status"] for row in rows] == ["ok"] * len(recorder.VARIANTS)


def test_the_checks_pass_on_the_cpu() -> None:
    """Tokens through a small ring and loads by window are those that were read back one by one."""
    found = [row for compiled in (False, True) for row in checks(torch.device("cpu"), compiled=compiled)]
    assert [row["check"] for row in found if not row["passed"]] == []
    assert len(found) == 3
