"""The command on dumps of engines: counts and tokens solve end to end, bad ones end in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from placement.cli.app import run
from tests.traces.importers.samples import SAMPLES, Sample, SglangRecording, write_sglang_ranks
from traces.counts import ExpertCounts

MODEL = """
name: small
num_layers: 3
num_experts: 6
top_k: 2
hidden_size: 8
expert_hidden_size: 8
num_decoder_layers: 4
moe_layer_ids: [1, 2, 3]
"""


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Return the options that name the model, the topology and the costs."""
    (tmp_path / "small.yaml").write_text(MODEL)
    (tmp_path / "linear.json").write_text('{"kind": "linear", "pair_cost": 1, "token_cost": 4}')
    calibration = ["--calibration", str(tmp_path / "linear.json")]
    return ["-t", "h100:1x2", "--model", str(tmp_path / "small.yaml"), *calibration]


def written(name: str, folder: Path) -> Sample:
    folder.mkdir()
    return SAMPLES[name](folder)


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command that must fail with exit code 2 and one line; return the line."""
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moe-placement: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("name", ["sglang-per-pass", "sglang-stat", "sglang-counts"])
def test_counts_are_solved_for_balance(
    name: str, inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every format of counts becomes a placement of the MoE layers, which evaluates to what it states."""
    sample = written(name, tmp_path / "sample")
    assert isinstance(sample.expected, ExpertCounts)
    out = tmp_path / "placement.json"
    options = [*inputs, "--objective", "balance", "--json"]
    assert run(["solve", str(sample.path), *options, "-o", str(out)]) == 0
    solved = json.loads(capsys.readouterr().out)
    values = json.loads(out.read_text())
    assert (values["model"]["name"], values["model"]["moe_layer_ids"]) == ("small", [1, 2, 3])
    assert values["provenance"]["trace"] == sample.expected.digest
    assert 1 <= values["objective"]["lower_bound"] <= values["objective"]["value"] <= 2
    assert run(["evaluate", str(out), str(sample.path), *options]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["objective"]["value"] == solved["objective"]["value"] == values["objective"]["value"]


@pytest.mark.parametrize("name", ["sglang-per-pass", "sglang-stat", "sglang-counts"])
def test_counts_cannot_serve_what_asks_for_sets_of_experts(
    name: str, inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line says what counts cannot serve and what to ask instead; nothing is written."""
    sample = written(name, tmp_path / "sample")
    out = tmp_path / "placement.json"
    options = [*inputs, "--objective", "traffic", "-o", str(out)]
    message = refusal(capsys, ["solve", str(sample.path), *options])
    assert "expert counts only" in message
    assert "--objective balance" in message
    assert not out.exists()


@pytest.mark.parametrize(
    "name", ["sglang-per-token", "sglang-response", "sglang-openai-response", "vllm-arrays", "vllm-responses"]
)
def test_tokens_are_solved_for_any_objective(
    name: str, inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Traces token by token serve dispatch traffic, and name the layers."""
    sample = written(name, tmp_path / "sample")
    out = tmp_path / "placement.json"
    options = [*inputs, "--window", "4", "--objective", "traffic", "--max-imbalance", "2", "--json"]
    assert run(["solve", str(sample.path), *options, "-o", str(out)]) == 0
    about = json.loads(out.read_text())["model"]
    assert (about["name"], about["moe_layer_ids"]) == ("small", [1, 2, 3])
    assert json.loads(capsys.readouterr().out)["objective"]["value"] > 0


def test_counts_of_an_unknown_model_ask_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Top-k is nowhere in the file."""
    sample = written("sglang-counts", tmp_path / "sample")
    out = ["-o", str(tmp_path / "p.json")]
    message = refusal(capsys, ["solve", str(sample.path), "-t", "h100:1x2", "--objective", "balance", *out])
    assert "name the model with --model" in message


def test_a_format_insisted_on_is_the_one_read(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The complaint is that format's."""
    sample = written("vllm-array", tmp_path / "sample")
    options = [*inputs, "-o", str(tmp_path / "p.json"), "--from", "sglang-stat"]
    assert "no PyTorch file" in refusal(capsys, ["solve", str(sample.path), *options])


def test_a_missing_rank_and_a_malicious_file_end_in_one_line(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is run, nothing is written."""

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'mark'}",)

    dump = write_sglang_ranks(SglangRecording(num_ranks=3), tmp_path / "dump")
    ranks = sorted(dump.glob("*.pt"))
    ranks[1].unlink()
    options = [*inputs, "-o", str(tmp_path / "p.json")]
    assert "but none of rank 1" in refusal(capsys, ["solve", str(dump), *options])
    torch.save({"records": [Malicious()]}, ranks[1])
    assert "holds code or objects that are not tensors" in refusal(capsys, ["solve", str(dump), *options])
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "p.json").exists()
