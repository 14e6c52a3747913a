"""`moe-placement export --checkpoint`: a checkpoint with its experts in the order of a placement."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tensor_files import digests, read_tensors, write_checkpoint

from placement.checkpoint import restore_checkpoint
from placement.cli.app import run
from placement.io import placement_to_dict, write_json
from placement.plan import Placement, equal_slots

E = 4
OLD = [2, 0, 3, 1]
LOAD = {
    "megatron": "--expert-model-parallel-size 2",
    "deepspeed": "deepspeed.moe.layer.MoE(ep_size=2)",
    "vllm": "--enable-expert-parallel --expert-placement-strategy linear on 2 devices",
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Write a checkpoint with one MoE layer, number 1."""
    experts = {
        f"model.layers.1.mlp.experts.{e}.up_proj.weight": np.full((2, 2), e, np.float32) for e in range(E)
    }
    router = {"model.layers.1.mlp.gate.weight": np.arange(E * 2, dtype=np.float32).reshape(E, 2)}
    return write_checkpoint(tmp_path / "model", [{**experts, **router}], config={"num_experts": E})


@pytest.fixture
def placement(tmp_path: Path) -> Path:
    """Write the placement of two devices."""
    path = tmp_path / "placement.json"
    write_json(
        path,
        placement_to_dict(
            Placement(
                physical_to_logical_map_LS=[OLD],
                device_of_slot_S=equal_slots(E, 2),
                num_experts=E,
                num_devices=2,
                moe_layer_ids=(1,),
            )
        ),
    )
    return path


def export(placement: Path, checkpoint: Path, out: Path, *more: str, to: str = "megatron") -> int:
    """Run the command."""
    return run(["export", str(placement), "--to", to, "--checkpoint", str(checkpoint), "-o", str(out), *more])


@pytest.mark.parametrize("to", LOAD)
def test_a_checkpoint_is_written(
    tmp_path: Path, checkpoint: Path, placement: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each device's contiguous shard holds the experts of the placement."""
    assert export(placement, checkpoint, tmp_path / "out", to=to) == 0
    said = capsys.readouterr()
    assert "1 MoE layers; " in said.out
    assert "tensors renamed, 1 reordered" in said.out
    assert f"load with {LOAD[to]}" in said.out
    assert said.err == ""
    tensors = read_tensors(tmp_path / "out")
    held = [tensors[f"model.layers.1.mlp.experts.{e}.up_proj.weight"][0, 0] for e in range(E)]
    assert [set(held[:2]), set(held[2:])] == [{0, 2}, {1, 3}]
    restore_checkpoint(tmp_path / "out", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(checkpoint)


def test_json_says_what_was_done(
    tmp_path: Path, checkpoint: Path, placement: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One object, with the files that stayed behind."""
    (checkpoint / "consolidated.safetensors").write_bytes(b"")
    assert export(placement, checkpoint, tmp_path / "out", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report.pop("renamed") >= 2
    assert report == {
        "folder": str(tmp_path / "out"),
        "format": "megatron",
        "files": 1,
        "bytes": 96,
        "tensors": 5,
        "reordered": 1,
        "moe_layer_ids": [1],
        "layouts": ["per expert", "router"],
        "untouched": [],
        "left_out": ["consolidated.safetensors"],
        "was_permuted": False,
        "load_with": LOAD["megatron"],
    }


def test_a_second_permutation_is_pointed_out(
    tmp_path: Path, checkpoint: Path, placement: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers of experts mean the checkpoint as it is; a placement of the original would be a mistake."""
    assert export(placement, checkpoint, tmp_path / "b") == 0
    assert export(placement, tmp_path / "b", tmp_path / "c") == 0
    assert "had been permuted before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "to", "message"),
    [
        ((), "sglang", "--checkpoint goes with --to megatron, deepspeed, vllm"),
        (("--expert-groups", "0"), "vllm", "0 groups of experts"),
        (("--stack", "decoder.layers"), "vllm", "stacks with experts: model.layers"),
        (("--devices", "0"), "vllm", "--devices is 0"),
    ],
)
def test_wrong_options_end_in_one_line(
    tmp_path: Path,
    checkpoint: Path,
    placement: Path,
    more: tuple[str, ...],
    to: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, one line, nothing written."""
    if more[:1] == ("--devices",):
        placement.write_text(json.dumps({"physical_to_logical_map": [[0, 1, 2, 3]]}))
    assert export(placement, checkpoint, tmp_path / "out", *more, to=to) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_options_of_a_checkpoint_need_one(
    tmp_path: Path, placement: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What would be ignored is refused."""
    assert (
        run(["export", str(placement), "--to", "megatron", "-o", str(tmp_path / "p.json"), "--overwrite"])
        == 2
    )
    assert "go with --checkpoint" in capsys.readouterr().err


def test_replicas_cannot_be_contiguous_shards(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An expert on two devices has no place in a checkpoint that holds each once."""
    path = tmp_path / "replicas.json"
    path.write_text(
        json.dumps({"physical_to_logical_map": [[0, 1, 2, 3, 0, 1]], "device_of_slot": [0, 0, 0, 1, 1, 1]})
    )
    assert export(path, checkpoint, tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
    capsys.readouterr()


def test_layers_come_from_the_model_where_the_placement_is_silent(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A placement without layer numbers is refused until the model is named."""
    path = tmp_path / "bare.json"
    path.write_text(json.dumps({"physical_to_logical_map": [OLD], "device_of_slot": [0, 0, 1, 1]}))
    assert export(path, checkpoint, tmp_path / "out") == 2
    assert "name the model with --model" in capsys.readouterr().err
    sizes = tmp_path / "model.yaml"
    sizes.write_text(
        "name: small\nnum_layers: 1\nnum_decoder_layers: 2\nmoe_layer_ids: [1]\nnum_experts: 4\ntop_k: 1\n"
        "hidden_size: 2\nexpert_hidden_size: 2\n"
    )
    assert export(path, checkpoint, tmp_path / "out", "--model", str(sizes)) == 0
