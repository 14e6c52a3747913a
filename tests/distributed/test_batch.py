"""The batch engine: rows and files, whatever fails, and however often it is begun again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worker_tasks import EASY_WORK

from placement.errors import InputError
from traces.distributed.batch import RESULTS, BatchReport, run_batch
from traces.distributed.executor import SerialExecutor
from traces.distributed.pool import ProcessExecutor
from traces.distributed.spec import BatchSpec, read_spec

GRID = """
traces: [good.npz, {name: bad, path: bad.npz}]
topologies: [h100:1x4, {name: small, topology: h100:1x1}]
grid: {seed: [0, 1]}
"""


def spec_of(folder: Path, text: str = GRID) -> BatchSpec:
    """Read a batch file."""
    path = folder / "grid.yaml"
    path.write_text(text)
    (folder / "good.npz").write_bytes(b"good")
    return read_spec(path)


def run(spec: BatchSpec, out: Path, **options: Any) -> BatchReport:
    """Run a batch in this process."""
    return run_batch(spec, out, work=EASY_WORK, executor=SerialExecutor(), **options)


def results(out: Path) -> list[dict[str, Any]]:
    """Read the table."""
    return [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]


def test_every_cell_has_its_row(tmp_path: Path) -> None:
    """Placements are written, infeasible cells are rows, and what failed is set aside by name."""
    report = run(spec_of(tmp_path), tmp_path / "out", on_error="skip")
    rows = results(tmp_path / "out")
    assert [(row["cell"], row["status"]) for row in rows] == [
        ("good/h100-1x4/seed=0", "done"),
        ("good/h100-1x4/seed=1", "done"),
        ("good/small/seed=0", "infeasible"),
        ("good/small/seed=1", "infeasible"),
        ("bad/h100-1x4/seed=0", "failed"),
        ("bad/h100-1x4/seed=1", "failed"),
        ("bad/small/seed=0", "infeasible"),
        ("bad/small/seed=1", "infeasible"),
    ]
    done = rows[1]
    assert (done["options"], done["objective"]) == ({"seed": 1}, {"value": 1.0})
    assert json.loads((tmp_path / "out" / done["placement"]).read_text()) == {"seed": 1}
    assert rows[2]["error"] == "8 experts do not fit 4 slots"
    bad = tmp_path / "bad.npz"
    assert rows[4]["error"] == f"bad/h100-1x4/seed=0: {bad}: is damaged"
    assert [list(report.done), len(report.rows), len(report.set_aside)] == [rows[:2], 6, 2]


def test_a_failure_ends_the_batch_and_keeps_what_is_done(tmp_path: Path) -> None:
    """The first failure is raised with the cell's name; a later run goes on behind it."""
    spec = spec_of(tmp_path)
    with pytest.raises(InputError, match=r"bad/h100-1x4/seed=0: .*bad\.npz: is damaged"):
        run(spec, tmp_path / "out")
    assert [row["status"] for row in results(tmp_path / "out")] == [
        "done",
        "done",
        "infeasible",
        "infeasible",
    ]
    with pytest.raises(InputError, match="go on with --resume"):
        run(spec, tmp_path / "out")
    report = run(spec, tmp_path / "out", resume=True, on_error="skip")
    assert (report.num_resumed, report.num_changed, len(report.set_aside)) == (4, 0, 2)
    fresh = run(spec, tmp_path / "fresh", on_error="skip")
    assert fresh.rows == report.rows
    assert results(tmp_path / "fresh") == results(tmp_path / "out")


def test_what_has_changed_is_solved_again(tmp_path: Path) -> None:
    """Cells of a changed trace, with a damaged placement, and new ones run; the others are taken over."""
    text = "traces: [good.npz, other.npz]\ntopologies: [h100:1x4]\n"
    (tmp_path / "other.npz").write_bytes(b"other")
    run(spec_of(tmp_path, text), tmp_path / "out")
    spec = spec_of(tmp_path, text + "grid: {seed: [0]}\n")
    report = run(spec, tmp_path / "out", resume=True)
    assert (report.num_resumed, report.num_changed) == (0, 0)
    (tmp_path / "other.npz").write_bytes(b"changed")
    report = run(spec, tmp_path / "out", resume=True)
    assert (report.num_resumed, report.num_changed) == (1, 1)
    (tmp_path / "out" / report.rows[0]["placement"]).write_text("{")
    report = run(spec, tmp_path / "out", resume=True)
    assert report.num_resumed == 1
    assert json.loads((tmp_path / "out" / report.rows[0]["placement"]).read_text()) == {"seed": 0}


def test_layers_are_solved_apart_and_joined(tmp_path: Path) -> None:
    """Three tasks a cell, joined in the order of layers; nothing of them stays behind."""
    text = GRID.replace("bad.npz", "good.npz").replace("name: bad", "name: too") + "split_layers: true\n"
    told: list[str] = []
    report = run(
        spec_of(tmp_path, text), tmp_path / "out", progress=lambda done, total, last: told.append(last)
    )
    assert [row["layers"] for row in report.rows] == [[0, 1, 2]] * 8
    assert list((tmp_path / "out").rglob("layer-*")) == []
    assert "good/h100-1x4/seed=0: layer 2 of 3" in told


def test_a_failing_layer_fails_its_cell_alone(tmp_path: Path) -> None:
    """The layer is named; layers that are done are not solved again once it can be."""
    spec = spec_of(
        tmp_path, GRID.replace("{name: small, topology: h100:1x1}", "a100:1x4") + "split_layers: true"
    )
    report = run(spec, tmp_path / "out", on_error="skip")
    assert [row["status"] for row in report.rows] == ["done"] * 4
    assert report.set_aside[0]["error"] == "bad/h100-1x4/seed=0 layer 1: layer is damaged"
    assert len(list((tmp_path / "out" / "cells" / "bad").rglob("layer-00000.json"))) == 4
    solved: list[int] = []

    def solve_layer(cell: object, layer: int) -> dict[str, Any]:
        solved.append(layer)
        return {"layer": layer}

    work = replace(EASY_WORK, solve_layer=solve_layer)
    again = run_batch(spec, tmp_path / "out", work=work, executor=SerialExecutor(), resume=True)
    assert [row["layers"] for row in again.rows] == [[0, 1, 2]] * 8
    assert 0 not in solved


def test_a_pool_gives_the_same_table(tmp_path: Path) -> None:
    """Two processes or this one: the same rows in the same order."""
    spec = spec_of(tmp_path)
    run(spec, tmp_path / "serial", on_error="skip")
    with ProcessExecutor(2) as pool:
        run_batch(spec, tmp_path / "pool", work=EASY_WORK, executor=pool, on_error="skip")
    assert results(tmp_path / "pool") == results(tmp_path / "serial")


KILLED = """
import json, os, signal, sys, time
from pathlib import Path
from traces.distributed.batch import run_batch
from traces.distributed.executor import SerialExecutor
from traces.distributed.spec import read_spec
from worker_tasks import EASY_WORK

def watch(done, total, text):
    time.sleep(0.1)  # The manifest is not written more often than that is worth.
    if len(json.loads((Path(sys.argv[2]) / "manifest.json").read_text())["done"]) >= 2:
        os.kill(os.getpid(), signal.SIGKILL)

spec, out = read_spec(sys.argv[1]), Path(sys.argv[2])
run_batch(spec, out, work=EASY_WORK, executor=SerialExecutor(), progress=watch)
"""


def test_a_killed_batch_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """After kill -9 the cells that were done are taken over."""
    spec = spec_of(
        tmp_path, "traces: [good.npz]\ntopologies: [h100:1x4]\ngrid: {seed: [0, 1, 2, 3, 4, 5, 6]}\n"
    )
    command = [sys.executable, "-c", KILLED, str(tmp_path / "grid.yaml"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run(command, check=False, env=environment).returncode == -signal.SIGKILL
    report = run(spec, tmp_path / "out", resume=True)
    assert 2 <= report.num_resumed < 7
    assert [row["objective"]["value"] for row in report.rows] == [0, 1, 2, 3, 4, 5, 6]


def test_foreign_folders_and_unknown_wishes_are_refused(tmp_path: Path) -> None:
    """Nothing is written where something else lies."""
    spec = spec_of(tmp_path)
    with pytest.raises(InputError, match="is not empty, and no work folder"):
        run(spec, tmp_path)
    with pytest.raises(InputError, match="--on-error is 'stop'"):
        run(spec, tmp_path / "out", on_error="stop")
    assert not (tmp_path / "out").exists()
