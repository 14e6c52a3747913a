"""Runs that go wrong are told, not fatal; and the table is made of what there is."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import run as running
from benchmarks.gpu.emulate import emulate
from benchmarks.gpu.folder import read_prepared
from benchmarks.gpu.parts import PARTS, Part, parts_named
from benchmarks.gpu.run import Run, run
from benchmarks.gpu.table import write_table
from placement.errors import InputError


def part(name: str, timeout_s: float = 20.0) -> Part:
    """Return a part of one process."""
    return Part(name=name, worker="emulate", ranks=1, timeout_s=timeout_s)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a part's name be the code that it runs; FILE is where its result goes."""

    def command(one: Part, how: Run, file: Path, instances: Any, *, device: Any) -> list[str]:
        return [sys.executable, "-c", one.name.replace("FILE", repr(str(file)))]

    monkeypatch.setattr(running, "_command", command)


@pytest.mark.usefixtures("scripted")
def test_failures_are_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    """One part fails with a word, one hangs, one leaves a result."""
    good = "open(FILE, 'w').write('{\"cases\": [1]}')"
    parts = [part("raise SystemExit('broken')"), part("import time; time.sleep(60)", 1.0), part(good)]
    results = run(parts, Run(folder=tmp_path, out=tmp_path / "out", tiny=True))
    told = list(results["parts"].values())
    assert [one["status"] for one in told] == ["failed", "timeout", "ok"]
    assert "broken" in told[0]["tail"]
    assert told[2]["result"] == {"cases": [1]}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["parts"] == results["parts"]


@pytest.mark.usefixtures("scripted")
def test_parts_without_gpus_or_time_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of real size is started on a CPU, and nothing without time."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    results = run([part("one")], Run(folder=tmp_path, out=tmp_path / "a"))
    assert "there are 0" in results["parts"]["one"]["tail"]
    results = run([part("one")], Run(folder=tmp_path, out=tmp_path / "b", tiny=True, total_s=1.0))
    assert results["parts"]["one"]["tail"] == "no time left"


def test_parts_fit_the_calls_of_a_lease() -> None:
    """Names are unique, budgets end before time limits, and every part can be tried in miniature."""
    assert len({one.name for one in PARTS}) == len(PARTS)
    assert all(one.budget_s < one.timeout_s <= 600 for one in PARTS)
    tiny = parts_named(None, tiny=True, quick=True)
    assert {name for one in tiny for name in one.instances} == {"tiny-2", "tiny-4"}


def test_emulated_ranks_are_all_timed(prepared: Path) -> None:
    """Every batch, layer, window and policy has a time for each of the four ranks."""
    rows = emulate(read_prepared(prepared, "tiny-4"), torch.device("cpu"), budget_s=60, repeats=2)
    assert len(rows) == 2 * 2 * 2 * 9
    assert all(len(row["rank_ms"]) == 4 and row["tail_ms"]["repeats"] == 2 for row in rows)
    assert all(row["tail_ms"]["median"] >= max(row["rank_ms"]) * 0.5 for row in rows)


def test_the_table_is_made_of_the_last_good_results(prepared: Path, tmp_path: Path) -> None:
    """A later failure does not hide an earlier result; what failed is told."""
    machine: dict[str, Any] = dict.fromkeys(
        ("commit", "driver", "cuda", "nccl", "cpu", "python", "torch", "transformers", "triton"), "1"
    )
    cases = emulate(read_prepared(prepared, "tiny-4"), torch.device("cpu"), budget_s=60, repeats=1)
    good = {"status": "ok", "seconds": 1.0, "result": {"cases": cases}, "tail": ""}
    bad = {"status": "failed", "seconds": 1.0, "result": {}, "tail": "out of memory"}
    for name, parts in (("a", {"emulate": good}), ("b", {"emulate": bad, "recorder": bad})):
        (tmp_path / name).mkdir()
        results = {"machine": {**machine, "gpus": ["GPU"]}, "parts": parts}
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    file = tmp_path / "gpu.md"
    text = write_table([tmp_path / "a", tmp_path / "b"], prepared=prepared, file=file)
    assert file.read_text() == text
    assert "| tiny-4 | prefill-256 | balance+/lp |" in text
    assert "- recorder: failed; out of memory" in text
    assert "- emulate" not in text


def test_a_folder_without_results_is_told(prepared: Path, tmp_path: Path) -> None:
    """The message says what writes one."""
    with pytest.raises(InputError, match=r"benchmarks\.gpu run"):
        write_table([tmp_path], prepared=prepared, file=tmp_path / "gpu.md")
