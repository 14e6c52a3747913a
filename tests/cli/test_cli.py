"""The command as users meet it: results, exit codes, one-line errors, files whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from placement import read_placement
from placement.cli.app import run
from placement.tasks.problem import default_window
from traces.store import write_npz
from traces.synthesize import synthesize

TOPOLOGY = "h100:1x4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small trace and a linear calibration."""
    path = tmp_path_factory.mktemp("cli")
    trace = synthesize(num_tokens=8192, num_layers=2, num_experts=16, top_k=2, sequence_tokens=128, seed=3)
    write_npz(trace, path / "trace.npz")
    (path / "linear.json").write_text('{"kind": "linear", "pair_cost": 1, "token_cost": 4}')
    return path


def command(folder: Path, name: str, *options: str) -> list[str]:
    """Return the arguments of a command on the folder's trace with linear costs."""
    calibration = ["--calibration", str(folder / "linear.json")]
    return [name, str(folder / "trace.npz"), "-t", TOPOLOGY, "--window", "512", *calibration, *options]


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> str:
    """Run a command that must fail with a code and one line; return the line."""
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("moe-placement: error: ")
    return captured.err


def test_solve_writes_a_placement_that_evaluate_prices_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file follows the contract, and evaluating it gives the objective that it states."""
    out = tmp_path / "placement.json"
    assert run(command(folder, "solve", "-o", str(out), "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    values = json.loads(out.read_text())
    assert values["format"] == "moe-placement/1"
    assert (values["num_layers"], values["num_experts"], values["num_devices"]) == (2, 16, 4)
    assert values["model"]["moe_layer_ids"] == [0, 1]
    assert values["objective"]["lower_bound"] <= values["objective"]["value"]
    assert values["provenance"]["trace"].startswith("sha256:")
    assert report["objective"] == values["objective"]
    for baseline in ("contiguous", "greedy", "eplb"):
        assert values["objective"]["value"] <= report["candidates"][baseline]
    trace = ["-t", TOPOLOGY, "--window", "512", "--calibration", str(folder / "linear.json"), "--json"]
    page = tmp_path / "evaluation.html"
    assert run(["evaluate", str(out), str(folder / "trace.npz"), *trace, "--html", str(page)]) == 0
    assert "on this very trace: here it is 0.0" in page.read_text(encoding="utf-8")
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["objective"]["value"] == pytest.approx(values["objective"]["value"], rel=1e-12)
    assert evaluated["balance"] == pytest.approx(values["metrics"]["balance"], rel=1e-12)


def test_solve_repeats_exactly(folder: Path, tmp_path: Path) -> None:
    """The same seed on one thread gives the same placement."""
    for name in ("a.json", "b.json"):
        assert run(command(folder, "solve", "-o", str(tmp_path / name), "--seed", "5")) == 0
    first, second = (read_placement(tmp_path / name) for name in ("a.json", "b.json"))
    np.testing.assert_array_equal(first.physical_to_logical_map_LS, second.physical_to_logical_map_LS)


def test_warm_start_and_held_out(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A start is never worsened, and another trace scores the result."""
    out = tmp_path / "first.json"
    assert run(command(folder, "solve", "-o", str(out), "--json")) == 0
    first = json.loads(capsys.readouterr().out)["objective"]["value"]
    options = ["--start", str(out), "--solver", "greedy", "--held-out", str(folder / "trace.npz"), "--json"]
    assert run(command(folder, "solve", "-o", str(tmp_path / "second.json"), *options)) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["objective"]["value"] <= first
    assert second["held_out"]["objective"] == pytest.approx(second["objective"]["value"])


def test_compare_prints_a_table_and_writes_a_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every policy is listed, held-out, and the page is there."""
    page = tmp_path / "report.html"
    assert run(command(folder, "compare", "--html", str(page), "--time-limit", "2")) == 0
    captured = capsys.readouterr()
    for policy in ("contiguous", "greedy", "eplb", "balance-only", "traffic-only", "auto"):
        assert policy in captured.out
    assert "best baseline" in captured.out
    assert "<html" in page.read_text()


def test_compare_json_is_one_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures of both halves, and the bound, in one object."""
    assert run(command(folder, "compare", "--json", "--time-limit", "2")) == 0
    values = json.loads(capsys.readouterr().out)
    auto = values["policies"][-1]
    assert auto["name"] == "auto"
    assert values["lower_bound"] <= auto["fitted"]["objective"]
    assert values["fitted_windows"] == values["held_out_windows"] == 8


def test_diff_counts_moves_bytes_and_seconds(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Swapping two experts moves two copies; with sizes and links there are bytes and seconds."""
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    assert run(command(folder, "solve", "-o", str(before), "--solver", "contiguous")) == 0
    values = json.loads(before.read_text())
    row = values["physical_to_logical_map"][1]
    row[0], row[4] = row[4], row[0]
    after.write_text(json.dumps(values))
    sizes = tmp_path / "model.yaml"
    sizes.write_text(
        "{num_layers: 2, num_experts: 16, top_k: 2, hidden_size: 64, expert_hidden_size: 32, name: toy}"
    )
    capsys.readouterr()
    arguments = ["diff", str(before), str(after), "-t", TOPOLOGY, "--model", str(sizes), "--json"]
    assert run(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_moves"] == 2
    assert report["moves_per_layer"] == [0, 2]
    assert report["moves_by_tier"] == {"node": 2}
    # Two experts of 3 * 64 * 32 weights in 2 bytes.
    assert report["total_bytes"] == 2 * 3 * 64 * 32 * 2
    # Each device sends one expert and receives one, at once: one expert over 450 GB/s at 55 %.
    assert report["seconds"] == pytest.approx(3 * 64 * 32 * 2 / (450e9 * 0.55))
    assert run(["diff", str(before), str(before)]) == 0
    assert "0 of 32 expert copies move" in capsys.readouterr().out


def test_stay_put_and_spare_slots(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other semantics and replicas go through the same door."""
    for options in (
        ["--semantics", "stay-put", "--objective", "traffic", "--max-imbalance", "1.3"],
        ["--semantics", "allgather"],
        ["--spare-slots", "4", "--objective", "balance"],
        ["--risk", "cvar95"],
    ):
        out = tmp_path / "p.json"
        assert run(command(folder, "solve", "-o", str(out), "--time-limit", "3", *options)) == 0
        capsys.readouterr()
        read_placement(out)


def test_default_window_gives_short_traces_sixteen_windows() -> None:
    """4096 tokens where the trace is long, else a power of two."""
    assert default_window(1_000_000) == 4096
    assert default_window(8192) == 512
    assert default_window(3) == 1


BAD_USE = {
    "unknown option": (["--no-such-option"], "No such option"),
    "unknown solver": (["--solver", "serch"], "search"),
    "unknown semantics": (["--semantics", "dispach"], "dispatch"),
    "unknown objective": (["--objective", "steptime"], "step-time"),
    "unknown risk": (["--risk", "worst"], "mean"),
    "unknown model": (["--model", "mixtral-8x7"], "mixtral-8x7b"),
    "another model's shape": (["--model", "mixtral-8x7b"], "32 MoE layers, the trace 2"),
    "window of nothing": (["--window", "0"], "--window is 0"),
    "window beyond the trace": (["--window", "100000"], "100000"),
    "no time": (["--time-limit", "0"], "above 0"),
    "no thread": (["--threads", "0"], "threads is 0"),
    "negative spare slots": (["--spare-slots", "-8"], "spare_slots is -8"),
    "imbalance below 1": (["--max-imbalance", "0.9"], "max_imbalance is 0.9"),
    "imbalance that is no number": (["--max-imbalance", "nan"], "max_imbalance is nan"),
    "missing calibration": (["--calibration", "/nowhere.json"], "/nowhere.json"),
    "traffic under all-gather": (["--objective", "traffic", "--semantics", "allgather"], "no placement"),
    "missing start": (["--start", "/nowhere.json"], "/nowhere.json"),
}


@pytest.mark.parametrize("case", BAD_USE)
def test_bad_use_is_one_line_and_writes_nothing(
    case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, a line with what is wrong and how to mend it, no file."""
    options, expected = BAD_USE[case]
    out = tmp_path / "placement.json"
    assert expected in fails(capsys, command(folder, "solve", "-o", str(out), *options), 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("h10:1x4", "h100"),
        ("h100:4", "KIND:NODESxDEVICES"),
        ("h100:0x4", "1 or more"),
        ("nothing.yaml", "nothing.yaml"),
    ],
)
def test_bad_topology(
    topology: str, expected: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown kinds get the nearest suggestion, malformed ones an example."""
    arguments = ["solve", str(folder / "trace.npz"), "-t", topology, "-o", str(tmp_path / "p.json")]
    assert expected in fails(capsys, arguments, 2)


def bad_traces() -> dict[str, tuple[dict[str, object] | bytes, str]]:
    """Return contents of trace files that are no traces, and what must be said of each."""
    ids = np.tile(np.arange(2, dtype=np.uint8), (64, 2, 1))
    return {
        "empty": ({"topk": ids[:0]}, "empty"),
        "wrong shape": ({"topk": ids[:, :, 0]}, "layers"),
        "ids out of range": ({"topk": ids, "num_experts": np.array(1)}, "1"),
        "negative ids": ({"topk": -ids.astype(np.int16) - 1}, "-"),
        "not integers": ({"topk": np.full((64, 2, 2), np.nan)}, "float"),
        "no topk": ({"loads": ids[:, 0]}, "topk"),
        "pickled": ({"topk": np.array([{}, {}], dtype=object)}, "object"),
        "foreign": (b"these are not the bytes of a trace", "trace"),
        "nothing": (b"", "empty"),
    }


@pytest.mark.parametrize("case", bad_traces())
def test_bad_traces(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is no trace is named, with what is wrong; nothing is written."""
    content, expected = bad_traces()[case]
    file = tmp_path / "bad.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.savez(file, **content)  # type: ignore[arg-type]
    message = fails(capsys, ["solve", str(file), "-t", TOPOLOGY, "-o", str(tmp_path / "p.json")], 2)
    assert "bad.npz" in message
    assert expected in message
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


def test_truncated_trace_and_placement(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a file is said to be damaged."""
    content = (folder / "trace.npz").read_bytes()
    half = tmp_path / "half.npz"
    half.write_bytes(content[: len(content) // 2])
    assert "half.npz" in fails(capsys, ["trace", "info", str(half)], 2)
    broken = tmp_path / "broken.json"
    broken.write_text('{"physical_to_logical_map": [[0, 1')
    arguments = ["evaluate", str(broken), str(folder / "trace.npz"), "-t", TOPOLOGY]
    assert "broken.json" in fails(capsys, arguments, 2)


def test_step_time_without_sizes_says_what_to_give(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a model, data-sheet costs are unknown: name one or use a linear calibration."""
    arguments = ["solve", str(folder / "trace.npz"), "-t", TOPOLOGY, "-o", str(tmp_path / "p.json")]
    assert "--model" in fails(capsys, arguments, 2)


def test_fewer_slots_than_experts_is_infeasible(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3 names the constraint and by how much."""
    cluster = tmp_path / "small.yaml"
    cluster.write_text("nodes: [{kind: h100, devices: 4, slots: 3}]")
    message = fails(capsys, command(folder, "solve", "-t", str(cluster)), 3)
    assert "16 experts" in message
    assert "4 are missing" in message
    assert "do not divide" in fails(capsys, command(folder, "solve", "-t", "h100:1x5"), 3)


def test_memory_too_small_says_how_many_gib(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four experts of 2 layers x 201326592 weights in bf16 need 3 GiB; 1 GiB is given, 2 are missing."""
    sizes, cluster = tmp_path / "big.yaml", tmp_path / "small.yaml"
    sizes.write_text(
        "{num_layers: 2, num_experts: 16, top_k: 2, hidden_size: 8192, expert_hidden_size: 8192, name: big}"
    )
    cluster.write_text("nodes: [{kind: h100, devices: 4, memory_gib: 1}]")
    options = ["-t", str(cluster), "--model", str(sizes)]
    assert "2.0 GiB are missing" in fails(capsys, command(folder, "solve", *options), 3)


def test_load_limit_that_cannot_be_kept_is_infeasible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One expert with half of the load cannot share: the limit is named with what is possible."""
    rng = np.random.default_rng(0)
    topk = np.stack([np.zeros(4096, np.uint8), rng.integers(1, 8, 4096).astype(np.uint8)], axis=1)[:, None, :]
    np.savez(tmp_path / "hot.npz", topk=topk)
    linear = tmp_path / "linear.json"
    linear.write_text('{"kind": "linear", "pair_cost": 1, "token_cost": 4}')
    arguments = ["solve", str(tmp_path / "hot.npz"), "-t", TOPOLOGY, "--objective", "traffic"]
    message = fails(capsys, [*arguments, "--window", "256", "--calibration", str(linear)], 3)
    assert "--max-imbalance" in message


def test_unwritable_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An output that cannot be written is named."""
    arguments = command(folder, "solve", "-o", "/proc/nowhere/p.json", "--solver", "greedy")
    assert "/proc/nowhere/p.json" in fails(capsys, arguments, 2)


def test_interrupt_keeps_the_incumbent(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of a solve ends it early, writes the best placement, and exits 0."""
    trace = synthesize(num_tokens=65536, num_layers=24, num_experts=64, top_k=4, seed=1)
    write_npz(trace, tmp_path / "long.npz")
    out = tmp_path / "placement.json"
    calibration = ["--calibration", str(folder / "linear.json")]
    arguments = ["solve", str(tmp_path / "long.npz"), "-t", "h100:1x8", "--time-limit", "600", "-o", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "placement.cli", *arguments, *calibration],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    children = f"/proc/{process.pid}/task/{process.pid}/status"
    for _ in range(600):
        # The handler is in place once the signal is caught rather than left to its default.
        caught = [line for line in Path(children).read_text().splitlines() if line.startswith("SigCgt")]
        threads = len(os.listdir(f"/proc/{process.pid}/task"))
        if int(caught[0].split()[1], 16) & (1 << (signal.SIGINT - 1)) and threads > 1:
            break
        time.sleep(0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "stopping early" in stderr
    assert "stopped" in stdout
    assert read_placement(out).num_layers == 24


def test_no_arguments_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    """The bare command says what there is."""
    assert run([]) == 2
    assert "solve" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The version is one line."""
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("moe-placement 0.")


def test_nothing_but_results_reaches_standard_output() -> None:
    """What C++ libraries print below Python is dropped; what Python prints arrives."""
    code = (
        "import os, sys\n"
        "from placement.cli import app\n"
        "app.run = lambda arguments: os.write(1, b'remark of a solver') and print('result') or 0\n"
        "app.main([])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("result\n", "")
