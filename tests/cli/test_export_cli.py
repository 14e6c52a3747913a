"""Exporting as users meet it: a counts file to an engine's file in one command line, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formats import engines
from formats.samples import place
from instances import random_profile

from placement import read_placement
from placement.cli.app import run
from placement.cli.placements import ExportFile, note_fillers, warn_of_moves, write_exports
from placement.cost import CostModel
from placement.formats.files import read_placement_file
from placement.formats.fill import KEY
from placement.formats.layers import ModelLayers
from placement.formats.protocol import FormatOptions
from placement.formats.rules import trivial_row
from placement.io import placement_to_dict, write_json
from placement.model import preset_model
from placement.plan import Placement
from placement.problem import make_problem
from placement.topology import parse_shorthand
from traces.store import write_npz
from traces.synthesize import synthesize

V3 = preset_model("deepseek-v3")
SPARE, DEVICES = 32, 32
SOLVE = ("-t", "h100:4x8", "--objective", "balance", "--spare-slots", str(SPARE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with DeepSeek-V3's counts as SGLang writes them, and a solve exported everywhere."""
    path = tmp_path_factory.mktemp("export")
    rng = np.random.default_rng(7)
    count_LE = np.zeros((61, 256), dtype=np.int64)
    # A mild skew that spare slots even out at once: this is about files, not about solving.
    count_LE[3:] = 1000 + (2000 * rng.random((58, 256)) ** 4).astype(np.int64)
    (path / "counts.json").write_text(json.dumps({"logical_count": count_LE.tolist()}))
    exports = ("sglang=sglang.json", "tensorrt-llm=trt.yaml", "vllm-ascend=ascend.json", "vllm=vllm.json")
    arguments = ["solve", str(path / "counts.json"), *SOLVE, "--solver", "eplb", "-o", str(path / "p.json")]
    for export in exports:
        name, _, file = export.partition("=")
        arguments += ["--export", f"{name}={path / file}"]
    assert run([*arguments, "--model", "deepseek-v3"]) == 0
    return path


@pytest.fixture(scope="module")
def solved(folder: Path) -> Placement:
    """Return the placement of the solve as engines hold it."""
    from placement.formats.fill import full

    return full(read_placement(folder / "p.json"))


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    """Run a command that must fail with one line; return it."""
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if not line.startswith("moe-placement: only")]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("moe-placement: error: ")
    return lines[0]


def held(placement: Placement, layer: int) -> list[list[int]]:
    """Return the experts of each device in one MoE layer, ascending."""
    return [np.nonzero(placement.count_LED[layer, :, device])[0].tolist() for device in range(DEVICES)]


def as_sets(ranks: list[list[int]]) -> list[list[int]]:
    return [sorted(rank) for rank in ranks]


# -------------------------------------------------------------------------------- from counts to engine files


def test_counts_to_sglang(folder: Path, solved: Placement) -> None:
    """SGLang loads the file and finds every MoE layer at its decoder layer."""
    loaded = engines.sglang(
        folder / "sglang.json",
        num_hidden_layers=61,
        num_logical_experts=256,
        ep_num_redundant_experts=SPARE,
        ep_size=DEVICES,
    )
    for layer, decoder_layer in enumerate(V3.moe_layer_ids):
        assert as_sets(loaded.experts_of_rank[decoder_layer]) == held(solved, layer)
    # Dense layers have the layout that SGLang itself begins with.
    assert [row for rank in loaded.experts_of_rank[0] for row in rank] == [*range(256), *range(SPARE)]


def test_counts_to_tensorrt_llm(folder: Path, solved: Placement) -> None:
    """TensorRT-LLM loads the file, for its multi-token-prediction layer too."""
    loaded = engines.tensorrt_llm(
        folder / "trt.yaml", moe_layers=V3.moe_layer_ids, num_experts=256, ep_size=DEVICES, num_mtp_layers=1
    )
    for layer, decoder_layer in enumerate(V3.moe_layer_ids):
        assert as_sets(loaded.experts_of_rank[decoder_layer]) == held(solved, layer)
    assert 61 in loaded.experts_of_rank


def test_counts_to_vllm_ascend(folder: Path, solved: Placement) -> None:
    """vllm-ascend loads the file: its first layer is the model's fourth."""
    loaded = engines.vllm_ascend(
        folder / "ascend.json", first_dense=3, num_moe_layers=58, num_experts=256, ep_size=DEVICES
    )
    for layer, decoder_layer in enumerate(V3.moe_layer_ids):
        assert as_sets(loaded.experts_of_rank[decoder_layer]) == held(solved, layer)


def test_counts_to_vllm(folder: Path, solved: Placement) -> None:
    """A row for each MoE layer."""
    table = engines.vllm_initial_map(
        folder / "vllm.json", num_moe_layers=58, num_experts=256, num_redundant=SPARE
    )
    for layer in range(58):
        assert as_sets(table[layer].reshape(DEVICES, -1).tolist()) == held(solved, layer)


@pytest.mark.parametrize("file", ["sglang.json", "trt.yaml", "ascend.json", "vllm.json"])
def test_every_file_is_the_same_placement(file: str, folder: Path, solved: Placement) -> None:
    """Read back, all of them are what was solved."""
    options = FormatOptions(layers=ModelLayers.of(V3), num_devices=DEVICES)
    back = read_placement_file(folder / file, options)
    np.testing.assert_array_equal(back.count_LED, solved.count_LED)
    assert back.moe_layer_ids == V3.moe_layer_ids


@pytest.mark.parametrize(
    ("to", "file", "expected"),
    [
        ("sglang", "again.json", "sglang.json"),
        ("tensorrt-llm", "again.yaml", "trt.yaml"),
        ("vllm-ascend", "again.json", "ascend.json"),
        ("vllm", "again.json", "vllm.json"),
    ],
)
def test_export_writes_what_solve_does(
    to: str, file: str, expected: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The placement file knows its model, so that no --model is needed later."""
    out = tmp_path / file
    assert run(["export", str(folder / "p.json"), "--to", to, "-o", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert out.read_bytes() == (folder / expected).read_bytes()
    assert (report["format"], report["layers"], report["slots"], report["devices"]) == (to, 58, 288, 32)
    assert report["moe_layer_ids"] == list(V3.moe_layer_ids)
    assert str(out) in json.dumps([report["arguments"], report["settings"]]).replace("\\", "")


def test_what_to_pass_is_printed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine's options, ready to be pasted."""
    out = tmp_path / "location.json"
    assert run(["export", str(folder / "p.json"), "--to", "sglang", "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"--init-expert-location {out} --ep-num-redundant-experts 32 --ep-size 32" in printed


@pytest.mark.parametrize("start", ["sglang.json", "trt.yaml", "ascend.json", "vllm.json"])
def test_from_one_engine_to_another(start: str, folder: Path, tmp_path: Path) -> None:
    """An engine's file is a placement too; the cluster's size and the model complete it."""
    out = tmp_path / "sglang.json"
    arguments = ["export", str(folder / start), "--to", "sglang", "-o", str(out)]
    assert run([*arguments, "--model", "deepseek-v3", "--devices", "32"]) == 0
    assert json.loads(out.read_text()) == json.loads((folder / "sglang.json").read_text())


def test_prediction_layers_may_be_named(folder: Path, tmp_path: Path) -> None:
    """An engine that unrolls the prediction layer needs as many entries."""
    out = tmp_path / "trt.yaml"
    arguments = ["export", str(folder / "p.json"), "--to", "tensorrt-llm", "-o", str(out)]
    assert run([*arguments, "--mtp-layers", "3"]) == 0
    layers = engines.yaml_of(out)["initial_global_assignments"]
    assert sorted(layers) == [*range(3, 64)]


# ------------------------------------------------------------------------------- engine files as placements


def test_evaluate_prices_an_engine_file_as_the_placement(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same placement costs the same, whoever wrote it down."""
    native = tmp_path / "native.json"
    assert (
        run(["export", str(folder / "vllm.json"), "--to", "native", "-o", str(native), "--devices", "32"])
        == 0
    )
    capsys.readouterr()
    values = []
    for file in (native, folder / "sglang.json", folder / "ascend.json"):
        arguments = ["evaluate", str(file), str(folder / "counts.json"), "-t", "h100:4x8", "--json"]
        assert run([*arguments, "--objective", "balance", "--model", "deepseek-v3"]) == 0
        values.append(json.loads(capsys.readouterr().out)["objective"]["value"])
    assert values == [values[0]] * 3


def test_diff_reads_engine_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two files of one placement differ in nothing."""
    arguments = ["diff", str(folder / "sglang.json"), str(folder / "trt.yaml"), "--json"]
    assert run([*arguments, "--model", "deepseek-v3", "-t", "h100:4x8"]) == 0
    assert json.loads(capsys.readouterr().out)["moves"] == []


def test_solve_starts_from_an_engine_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What runs now is counted from, and its model is the trace's."""
    arguments = ["solve", str(folder / "counts.json"), *SOLVE, "-o", str(tmp_path / "p.json"), "--json"]
    arguments += ["--start", str(folder / "sglang.json"), "--max-moves", "0", "--model", "deepseek-v3"]
    assert run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["moves"]["count"] == 0


# -------------------------------------------------------------------------------------------------- refusals


def exported(folder: Path, *more: str) -> list[str]:
    return ["export", str(folder / "p.json"), *more]


def test_what_export_refuses(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, and no file."""
    out = str(tmp_path / "x.json")
    cases: list[tuple[list[str], str]] = [
        (exported(folder, "--to", "sglnag", "-o", out), "did you mean 'sglang'"),
        (exported(folder, "--to", "sglang", "-o", str(tmp_path / "x")), "only loads files that end in .json"),
        (exported(folder, "--to", "megatron", "-o", out), "contiguous shards hold each expert once"),
        (exported(folder, "--to", "sglang", "-o", out, "--model", "kimi-k2"), "kimi-k2 has 384"),
        (exported(folder, "--to", "sglang", "-o", out, "--mtp-layers", "-1"), "--mtp-layers is -1"),
        (exported(folder, "--to", "sglang", "-o", str(tmp_path / "no" / "x.json")), "cannot be written"),
        (
            ["export", str(folder / "vllm.json"), "--to", "sglang", "-o", out, "--devices", "32"],
            "name it with --model",
        ),
        (
            ["export", str(folder / "vllm.json"), "--to", "vllm-ascend", "-o", out],
            "how many devices share them; name the cluster with -t or --devices",
        ),
        (
            ["export", str(folder / "vllm.json"), "--to", "vllm", "-o", out, "--devices", "0"],
            "--devices is 0",
        ),
        (
            ["export", str(folder / "counts.json"), "--to", "sglang", "-o", out],
            "no placement of a known format",
        ),
    ]
    cases.append(
        (exported(folder, "--to", "vllm", "-o", out, "--devices", "16"), "32 devices, --devices says 16")
    )
    for arguments, message in cases:
        assert message in fails(capsys, arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("export", "message"),
    [
        ("sglang", "must be FORMAT=FILE"),
        ("sglang=", "must be FORMAT=FILE"),
        ("nobody=x.json", "unknown placement format 'nobody'"),
        ("tensorrt-llm=x.json", "only loads files that end in .yaml or .yml"),
        ("megatron=x.json", "contiguous shards hold each expert once"),
        ("vllm-ranks=x.json", "one rank for each"),
    ],
)
def test_solve_refuses_exports_before_it_solves(
    export: str,
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What no solution could be written as is told at once; nothing is written."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("placement.optimizer.optimize", never)
    monkeypatch.chdir(tmp_path)
    arguments = ["solve", str(folder / "counts.json"), *SOLVE, "--model", "deepseek-v3", "--export", export]
    assert message in fails(capsys, arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_nobody_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers counted from 0 are no layer map: SGLang's file needs the model, vLLM's does not."""
    trace = synthesize(num_tokens=2048, num_layers=2, num_experts=8, top_k=2, seed=1)
    write_npz(trace, tmp_path / "trace.npz")
    arguments = ["solve", str(tmp_path / "trace.npz"), "-t", "h100:1x2", "--objective", "balance"]
    arguments += ["--window", "128", "-o", str(tmp_path / "p.json")]
    sglang = ["--export", f"sglang={tmp_path / 's.json'}"]
    assert "nothing says how many the model has" in fails(capsys, [*arguments, *sglang])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.npz"]
    vllm = tmp_path / "v.json"
    assert (
        run([*arguments, "--export", f"vllm={vllm}", "--export", f"vllm-ascend={tmp_path / 'a.json'}"]) == 0
    )
    assert len(json.loads(vllm.read_text())) == 2
    capsys.readouterr()
    line = fails(
        capsys, ["export", str(tmp_path / "p.json"), "--to", "sglang", "-o", str(tmp_path / "s.json")]
    )
    assert "name it with --model" in line


def test_slots_that_a_solve_left_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Engines get them filled as the solve noted, with the price of it; ours stay empty."""
    profile = random_profile(np.random.default_rng(3))
    spare = -profile.num_experts % 2 + 2
    problem = make_problem(profile, parse_shorthand("h100:1x2"), objective="balance", spare_slots=spare)
    row = [*trivial_row(problem.num_slots, problem.num_experts)[:-1], -1]
    rows = [row] * problem.num_layers
    solved = note_fillers(place(rows, experts=problem.num_experts), problem, start=None)
    files = (ExportFile(format="vllm", path=tmp_path / "v.json"),)
    objective = write_exports(solved, files, problem, written=tmp_path / "p.json")
    exported = place(json.loads((tmp_path / "v.json").read_text()), experts=problem.num_experts)
    assert objective == CostModel(problem).evaluate(exported).objective
    assert exported.physical_to_logical_map_LS[:, :-1].tolist() == [row[:-1]] * problem.num_layers
    write_json(tmp_path / "p.json", placement_to_dict(solved))
    out = tmp_path / "again.json"
    assert run(["export", str(tmp_path / "p.json"), "--to", "vllm", "-o", str(out), "--json"]) == 0
    assert out.read_bytes() == (tmp_path / "v.json").read_bytes()
    assert json.loads(capsys.readouterr().out)["filled_slots"] == problem.num_layers
    write_json(tmp_path / "p.json", {**placement_to_dict(solved), KEY: []})
    line = fails(capsys, ["export", str(tmp_path / "p.json"), "--to", "vllm", "-o", str(out)])
    assert "vLLM needs equally many on every device" in line


def test_options_without_effect_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only TensorRT-LLM has entries for prediction layers."""
    assert run(exported(folder, "--to", "vllm", "-o", str(tmp_path / "v.json"), "--mtp-layers", "1")) == 0
    assert "--mtp-layers has no effect: vllm has no entry for them" in capsys.readouterr().err


def test_filling_that_moves_too_much_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Slots that were empty before are filled for engines, whatever --max-moves says."""
    start = place([[0, 1, 2, 3, 0, -1]], moe_layer_ids=(0,), extra={KEY: [[0, 5, 1]]})
    warn_of_moves(start, start, 0)
    assert "with those filled, 1 copies move, more than --max-moves 0" in capsys.readouterr().err
    warn_of_moves(start, start, 1)
    assert capsys.readouterr().err == ""


def test_one_replica_each_goes_to_contiguous_shards(tmp_path: Path) -> None:
    """A model without groups: the rearranged checkpoint gives each rank what was solved for it."""
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 100, (32, 8)).tolist()
    (tmp_path / "counts.json").write_text(json.dumps({"logical_count": counts}))
    arguments = ["solve", str(tmp_path / "counts.json"), "-t", "h100:1x4", "--objective", "balance"]
    arguments += ["--model", "mixtral-8x7b", "-o", str(tmp_path / "p.json")]
    assert run([*arguments, "--export", f"megatron={tmp_path / 'order.json'}"]) == 0
    solved = read_placement(tmp_path / "p.json")
    layers = json.loads((tmp_path / "order.json").read_text())["layers"]
    for layer in range(32):
        for device, positions in enumerate(engines.contiguous_shards(8, 4)):
            shard = sorted(layers[str(layer)][position] for position in positions)
            assert shard == np.nonzero(solved.count_LED[layer, :, device])[0].tolist()


def test_the_dump_of_a_running_server_is_a_placement(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SGLang's recorder notes how experts lay last: that is what runs now."""
    rows = json.loads((folder / "sglang.json").read_text())["physical_to_logical_map"]
    dump, out = tmp_path / "dump.pt", tmp_path / "location.json"
    torch.save({"records": [], "last_physical_to_logical_map": torch.tensor(rows)}, dump)
    arguments = ["export", str(dump), "--to", "sglang", "-o", str(out), "--devices", "32"]
    assert run([*arguments, "--model", "deepseek-v3"]) == 0
    assert json.loads(out.read_text())["physical_to_logical_map"] == rows
    capsys.readouterr()
    torch.save({"logical_count": torch.zeros(2)}, dump)
    assert "has no physical_to_logical_map or last_physical" in fails(capsys, arguments)
    torch.save({"physical_to_logical_map": torch.zeros(2, 4)}, dump)
    assert "row 0 holds 0.0 in slot 0" in fails(capsys, arguments)
