"""``moe-placement batch`` as users meet it: a grid solved, resumed, interrupted, and wrong in many ways."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placement import CostModel, optimize, read_placement
from placement.cli.app import run
from placement.cli.batch_cell import CELL_WORK
from placement.tasks.problem import ProblemInputs
from traces.distributed.batch import run_batch
from traces.distributed.executor import SerialExecutor
from traces.distributed.pool import ProcessExecutor
from traces.distributed.spec import read_spec
from traces.store import write_npz
from traces.synthesize import synthesize

SPEC = """
traces: [trace.npz]
topologies: [h100:1x2, {name: four, topology: h100:1x4, price_per_device_hour: 3.6}]
solve: {window: 256, model: model.yaml, solver: greedy}
grid: {spare_slots: [0, 2]}
exclude: [{topology: four, spare_slots: 2}]
"""

MODEL = "num_layers: 3\nnum_experts: 8\ntop_k: 2\nhidden_size: 512\nexpert_hidden_size: 1024\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small trace, the sizes of its model and a linear calibration."""
    path = tmp_path_factory.mktemp("batch")
    trace = synthesize(num_tokens=4096, num_layers=3, num_experts=8, top_k=2, sequence_tokens=128, seed=3)
    write_npz(trace, path / "trace.npz")
    (path / "model.yaml").write_text(MODEL)
    (path / "linear.json").write_text('{"kind": "linear", "pair_cost": 1, "token_cost": 4}')
    return path


def spec_of(folder: Path, text: str, name: str) -> Path:
    """Write a batch file."""
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Read the table without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("elapsed_s", None)
    return rows


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> str:
    """Run a command that must fail with a code and one line; return the line."""
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_a_grid_is_solved_scored_and_summed_up(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Placements follow the contract, rows say what they cost where not fitted, the best is named."""
    spec, out = spec_of(folder, SPEC, "grid"), tmp_path / "out"
    assert run(["batch", str(spec), "-o", str(out), "--workers", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["name"], report["cells"], report["done"], report["excluded"]) == ("grid", 3, 3, 1)
    assert [row["cell"] for row in report["rows"]] == [
        "trace/h100-1x2/spare_slots=0",
        "trace/h100-1x2/spare_slots=2",
        "trace/four/spare_slots=0",
    ]
    row = report["rows"][2]
    placement = json.loads((out / row["placement"]).read_text())
    assert (placement["format"], placement["num_devices"]) == ("moe-placement/1", 4)
    assert placement["objective"] == row["objective"]
    assert placement["provenance"]["options"]["topology"] == "h100:1x4"
    # What the row says is what the parts say by themselves.
    options = {
        "trace": str(folder / "trace.npz"),
        "topology": "h100:1x4",
        "model": str(folder / "model.yaml"),
    }
    problem, _ = ProblemInputs(window=256, **options).problem()
    even, odd = problem.profile.split_alternate()
    fitted, held = problem.with_profile(even), CostModel(problem.with_profile(odd))
    solution = optimize(fitted, solver="greedy")
    np.testing.assert_array_equal(
        read_placement(out / row["placement"]).physical_to_logical_map_LS,
        solution.placement.physical_to_logical_map_LS,
    )
    assert row["objective"]["value"] == solution.objective
    assert row["objective"]["lower_bound"] == solution.lower_bound
    assert row["held_out"]["objective"] == held.objective(solution.placement)
    for name in ("contiguous", "eplb"):
        assert row["held_out"][name] == held.objective(optimize(fitted, solver=name).placement)
    step = row["held_out"]["step"]
    assert row["cost"] == {
        "seconds_per_token": pytest.approx(step / 256),
        "device_seconds_per_million_tokens": pytest.approx(step / 256 * 4e6),
        "price_per_million_tokens": pytest.approx(step / 256 * 4e6 * 3.6 / 3600),
    }
    best = report["best"][0]
    assert (best["trace"], best["objective"], len(best["topologies"])) == ("trace", "step-time", 2)
    values = [entry["value"] for entry in best["topologies"]]
    assert values == sorted(values)
    assert sum(entry["cheapest"] for entry in best["topologies"]) == 1
    assert run(["batch", str(spec), "-o", str(out), "--workers", "1", "--resume"]) == 0
    text = capsys.readouterr().out
    assert "3 cells solved, 3 of them before" in text
    assert "trace: step-time, best first" in text


def test_layers_on_a_pool_join_to_the_documented_placement(folder: Path, tmp_path: Path) -> None:
    """Each row of the placement is that of its layer solved alone; workers do not change a bit of it."""
    text = (
        "traces: [trace.npz]\ntopologies: [h100:1x2]\nsplit_layers: true\nheld_out: none\n"
        "solve: {window: 512, objective: balance, solver: search, seed: 5}\n"
    )
    spec = read_spec(spec_of(folder, text, "layers"))
    report = run_batch(spec, tmp_path / "one", work=CELL_WORK, executor=SerialExecutor())
    with ProcessExecutor(2) as pool:
        run_batch(spec, tmp_path / "two", work=CELL_WORK, executor=pool)
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one")
    placements = [read_placement(tmp_path / name / report.rows[0]["placement"]) for name in ("one", "two")]
    maps = [placement.physical_to_logical_map_LS for placement in placements]
    np.testing.assert_array_equal(maps[0], maps[1])
    inputs = ProblemInputs(
        trace=str(folder / "trace.npz"), topology="h100:1x2", window=512, objective="balance"
    )
    problem, _ = inputs.problem()
    for layer in range(3):
        alone = optimize(problem.one_layer(layer), solver="search", seed=5)
        np.testing.assert_array_equal(maps[0][layer], alone.placement.physical_to_logical_map_LS[0])
    row = report.rows[0]
    assert row["objective"]["value"] == CostModel(problem).objective(placements[0])
    assert 0 < row["objective"]["lower_bound"] <= row["objective"]["value"]
    assert row["held_out"] is None


def test_infeasible_and_damaged_cells_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What does not fit is a row, what cannot be read is set aside, and the rest is solved."""
    (folder / "broken.npz").write_bytes((folder / "trace.npz").read_bytes()[:1000])
    text = SPEC.replace("[trace.npz]", "[trace.npz, broken.npz]").replace("h100:1x2", "h100:1x3")
    spec, out = spec_of(folder, text, "mixed"), tmp_path / "out"
    assert run(["batch", str(spec), "-o", str(out), "--workers", "1", "--on-error", "skip"]) == 0
    captured = capsys.readouterr()
    assert "1 cells solved, 2 infeasible, 3 set aside" in captured.out
    assert "infeasible: trace/h100-1x3/spare_slots=0: 8 slots do not divide evenly" in captured.err
    assert f"set aside: broken/four/spare_slots=0: {folder / 'broken.npz'}: is damaged" in captured.err
    statuses = [row["status"] for row in rows_of(out)]
    assert statuses == ["infeasible", "infeasible", "done", "failed", "failed", "failed"]
    line = fails(capsys, ["batch", str(spec), "-o", str(tmp_path / "other"), "--workers", "1"], 2)
    assert "broken/h100-1x3/spare_slots=0: " in line


def test_a_batch_without_any_placement_has_the_code_of_its_first_cell(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """3 where nothing fits, 2 where nothing can be read; the rows are printed all the same."""
    text = "traces: [trace.npz]\ntopologies: [h100:1x3]\nsolve: {window: 256, calibration: linear.json}\n"
    spec = spec_of(folder, text, "none")
    assert run(["batch", str(spec), "-o", str(tmp_path / "a"), "--workers", "1", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["rows"][0]["status"] == "infeasible"
    spec = spec_of(folder, text.replace("trace.npz", "gone.npz"), "gone")
    options = ["--workers", "1", "--on-error", "skip"]
    assert run(["batch", str(spec), "-o", str(tmp_path / "b"), *options]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "--workers is 0; it must be 1 or more"),
        (["--workers", "2", "--ray", "local"], "give one"),
        (["--on-error", "stop", "--workers", "1"], "--on-error is 'stop'"),
    ],
)
def test_bad_use_is_one_line_and_writes_nothing(
    options: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2."""
    spec = spec_of(folder, SPEC, "bad")
    assert message in fails(capsys, ["batch", str(spec), "-o", str(tmp_path / "out"), *options], 2)
    assert not (tmp_path / "out").exists()


def test_a_used_folder_and_a_missing_spec(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither is written to."""
    spec = spec_of(folder, SPEC, "used")
    (tmp_path / "precious.txt").touch()
    assert "is not empty" in fails(capsys, ["batch", str(spec), "-o", str(tmp_path), "--workers", "1"], 2)
    assert "cannot be read" in fails(capsys, ["batch", str(folder / "no.yaml"), "-o", str(tmp_path)], 2)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_ctrl_c_keeps_what_is_done(folder: Path, tmp_path: Path) -> None:
    """Exit code 130, the table of what is done, no worker left; --resume goes on."""
    text = SPEC.replace("spare_slots: [0, 2]", f"seed: {list(range(40))}").replace(
        "exclude: [{topology: four, spare_slots: 2}]", ""
    )
    spec, out = spec_of(folder, text, "many"), tmp_path / "out"
    command = [sys.executable, "-m", "placement.cli", "batch", str(spec), "-o", str(out), "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        end_s = time.monotonic() + 120
        while done_in(out) < 2:
            assert time.monotonic() < end_s, "no cell was done in two minutes"
            time.sleep(0.05)
        # As a terminal does: to the command and to its workers.
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert said.startswith(f"moe-placement: what is done is in {out}; go on with --resume\n")
    kept = len(rows_of(out))
    assert 2 <= kept < 80
    end_s = time.monotonic() + 120
    while group_is_there(process.pid):
        assert time.monotonic() < end_s, "a worker is left"
        time.sleep(0.05)


def group_is_there(process: int) -> bool:
    """Tell whether a process group has a member."""
    try:
        os.killpg(process, 0)
    except ProcessLookupError:
        return False
    return True


def done_in(out: Path) -> int:
    """Return how many cells the manifest lists."""
    manifest = out / "manifest.json"
    return len(json.loads(manifest.read_text())["done"]) if manifest.exists() else 0
