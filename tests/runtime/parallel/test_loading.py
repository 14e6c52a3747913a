"""Every rank reads its own experts and no others, and all ranks together have the model as it was saved."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loading_checks as checks
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_checks import random_placement
from ranks import Ranks
from safetensors.torch import load_file, save_file

from placement.errors import InputError
from placement.plan import EMPTY, Placement
from placement.runtime.families.generic import GenericFamily
from placement.runtime.families.registry import family_named, moe_layers_of, supported_families
from placement.runtime.parallel.loading import load_local_rows
from placement.runtime.parallel.slots import rows_of_rank
from placement.runtime.samples import resolve_model
from placement.runtime.tiny import tiny_model

UNKNOWN_LAYOUT = "mistral_large4_text"
FAMILIES = [
    name
    for name in supported_families()
    if not isinstance(family_named(name), GenericFamily) and not family_named(name).record_only
]
RECORDED_ONLY = [
    name
    for name in supported_families()
    if not isinstance(family_named(name), GenericFamily) and family_named(name).record_only
]
RANKS = range(3)
_SETTINGS = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != UNKNOWN_LAYOUT])
def test_every_family_loads_rank_by_rank(family: str, tmp_path: Path) -> None:
    """Rows in slot order, zeros for empty slots, all else whole; nothing of other experts is read."""
    model = checks.saved(family, tmp_path)
    placement = checks.uneven(len(moe_layers_of(model)))
    names = checks.expert_names(model)
    stored = {name: tensor.nbytes for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    parts = {}
    for rank in RANKS:
        with checks.counted_reading() as read:
            parts[rank] = load_local_rows(tmp_path, placement, rank)
        expected = checks.expected_state(model, placement, rank)
        actual = parts[rank].state_dict()
        assert list(actual) == list(expected)
        assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
        unread = {
            name: model.get_parameter(name).nbytes // checks.EXPERTS * _absent(placement, rank, layer)
            for name, layer in names.items()
        }
        assert read.total() == sum(stored.values()) - sum(unread.values())
        assert type(parts[rank]) is type(model)
        assert not parts[rank].training
    whole = checks.assembled(model, placement, parts)
    expected_outputs = checks.run(model)
    other = tiny_model(family, num_layers=2, num_experts=checks.EXPERTS, seed=1)
    other.load_state_dict(whole)
    assert torch.equal(checks.run(other), expected_outputs)


def _absent(placement: Placement, rank: int, layer: int) -> int:
    """Experts of a layer that a rank does not hold."""
    held = placement.physical_to_logical_map_LS[layer, rows_of_rank(placement, rank)]
    return placement.num_experts - len(set(held.tolist()) - {EMPTY})


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint, and the model that was saved: experts one by one, and all in one tensor."""
    folder = tmp_path_factory.mktemp("stored")
    return folder, checks.saved(request.param, folder)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_any_placement_is_loaded(stored: tuple[Path, Any], seed: int) -> None:
    """Replicas, empty slots, uneven and idle devices: together the ranks have what was saved."""
    folder, model = stored
    placement = random_placement(seed, num_layers=2, num_devices=3)
    parts = {}
    for rank in RANKS:
        parts[rank] = load_local_rows(folder, placement, rank)
        expected, actual = checks.expected_state(model, placement, rank), parts[rank].state_dict()
        assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    whole = checks.assembled(model, placement, parts)
    assert [name for name, one in model.state_dict().items() if not torch.equal(whole[name], one)] == []


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_ranks_without_replicas_read_the_checkpoint_once(family: str, tmp_path: Path) -> None:
    """What ranks read of experts adds up to what is stored, each tensor in full."""
    model = checks.saved(family, tmp_path)
    placement = checks.reversed_halves(2)
    stored = {name: one.nbytes for name, one in load_file(tmp_path / "model.safetensors").items()}
    with checks.counted_reading() as read:
        for rank in range(2):
            load_local_rows(tmp_path, placement, rank)
    twice = [name for name, num_bytes in read.items() if num_bytes != stored[name]]
    assert {name: num_bytes for name, num_bytes in read.items() if ".experts." in name} == {
        name: num_bytes for name, num_bytes in stored.items() if ".experts." in name
    }
    assert all(read[name] == 2 * stored[name] and ".experts." not in name for name in twice)
    assert checks.expert_names(model)


def test_a_layout_without_rules_is_refused(tmp_path: Path) -> None:
    """One line, before anything is read."""
    checks.saved(UNKNOWN_LAYOUT, tmp_path)
    with pytest.raises(InputError, match="no experts of a known layout found"):
        load_local_rows(tmp_path, checks.uneven(2), 0)


@pytest.mark.parametrize("family", RECORDED_ONLY)
def test_a_family_for_recording_only_is_refused(family: str, tmp_path: Path) -> None:
    """Its experts cannot be placed."""
    checks.saved(family, tmp_path)
    with pytest.raises(InputError, match="no placement can be applied"):
        load_local_rows(tmp_path, checks.uneven(2), 0)


def test_byte16_loads_in_parts() -> None:
    """The bundled model, two layers' halves swapped: every rank's rows are those of the whole model."""
    from placement.runtime.checkpoint import load_checkpoint

    folder = resolve_model("byte16")
    whole = load_checkpoint(folder)
    rng = np.random.default_rng(0)
    placement = Placement(
        physical_to_logical_map_LS=np.array([rng.permutation(16) for _ in moe_layers_of(whole)]),
        device_of_slot_S=np.repeat(np.arange(4), 4),
        num_experts=16,
        num_devices=4,
    )
    for rank in (0, 3):
        actual = load_local_rows(folder, placement, rank).state_dict()
        expected = checks.expected_state(whole, placement, rank)
        assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def test_several_files_are_read_as_one(tmp_path: Path) -> None:
    """Experts of one layer lie in many files with an index."""
    model = tiny_model("qwen3_moe", num_layers=2, num_experts=checks.EXPERTS)
    model.save_pretrained(tmp_path, max_shard_size=8000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    placement = checks.uneven(2)
    actual = load_local_rows(str(tmp_path), placement, 2).state_dict()
    expected = checks.expected_state(model, placement, 2)
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def test_the_stored_type_is_kept_unless_asked_otherwise(tmp_path: Path) -> None:
    """Bfloat16 stays, or becomes the type given; also where config.json names none."""
    model: Any = tiny_model("olmoe", num_layers=2, num_experts=checks.EXPERTS)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert {one.dtype for one in load_local_rows(tmp_path, checks.uneven(2), 0).parameters()} == {
        torch.bfloat16
    }
    loaded = load_local_rows(tmp_path, checks.uneven(2), 0, dtype=torch.float32)
    assert {one.dtype for one in loaded.parameters()} == {torch.float32}
    _edit_config(tmp_path, dtype=None)
    assert {one.dtype for one in load_local_rows(tmp_path, checks.uneven(2), 0).parameters()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_quantised_experts_become_plain_weights(method: str, tmp_path: Path) -> None:
    """As the language models' makers publish them; the rank's share is read as it is stored."""
    checks.saved_quantised(method, tmp_path)
    build: Any = transformers.AutoModelForCausalLM
    settings = getattr(transformers, _SETTINGS[method])(dequantize=True)
    whole = build.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.bfloat16)
    total = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    for rank in RANKS:
        with checks.counted_reading() as read:
            part: Any = load_local_rows(tmp_path, checks.uneven(2), rank)
        expected, actual = checks.expected_state(whole, checks.uneven(2), rank), part.state_dict()
        assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
        assert read.total() < total
        assert getattr(part.config, "quantization_config", None) is None


def test_generation_settings_come_along(tmp_path: Path) -> None:
    """As `from_pretrained` has it: from their own file."""
    model = checks.saved("mixtral", tmp_path)
    model.generation_config.max_new_tokens = 7
    model.generation_config.save_pretrained(tmp_path)
    loaded: Any = load_local_rows(tmp_path, checks.uneven(2), 0)
    assert loaded.generation_config.max_new_tokens == 7
    assert loaded.name_or_path == str(tmp_path)
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(InputError, match=r"generation_config\.json cannot be read"):
        load_local_rows(tmp_path, checks.uneven(2), 0)


def test_memory_follows_the_share(tmp_path: Path) -> None:
    """Of 96 MiB of experts a rank with an eighth of them takes much less than all at any time."""
    if not _reset_peak():
        pytest.skip("this kernel does not tell the peak of resident memory")
    model = tiny_model(
        "qwen3_moe",
        num_layers=2,
        num_experts=32,
        hidden_size=256,
        moe_intermediate_size=512,
        num_attention_heads=2,
        head_dim=8,
    )
    model.save_pretrained(tmp_path, max_shard_size="16MB")
    total = sum(one.numel() * 4 for name, one in model.named_parameters() if "experts" in name)
    del model
    placement = Placement(
        physical_to_logical_map_LS=np.tile(np.arange(32), (2, 1)),
        device_of_slot_S=np.repeat(np.arange(8), 4),
        num_experts=32,
        num_devices=8,
    )
    load_local_rows(tmp_path, placement, 7)  # imports
    gc.collect()
    assert _reset_peak()
    before = _resident("VmRSS")
    part = load_local_rows(tmp_path, placement, 0)
    peak = _resident("VmHWM") - before
    assert sum(one.nbytes for name, one in part.named_parameters() if "experts" in name) == total // 8
    assert total > 90 * 2**20
    assert peak < total / 2, f"{peak} of {total} bytes"


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


# ------------------------------------------------------------------------------------------ what is refused


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    """A checkpoint with one tensor per expert."""
    checks.saved("mixtral", tmp_path)
    return tmp_path


@pytest.fixture
def gpt_oss(tmp_path: Path) -> Path:
    """A checkpoint with one tensor for all experts."""
    checks.saved("gpt_oss", tmp_path)
    return tmp_path


def _edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: one.clone() for name, one in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _refused(folder: Path, message: str, *, rank: int = 0) -> None:
    with pytest.raises(InputError, match=message):
        load_local_rows(folder, checks.uneven(2), rank)


W1 = "model.layers.1.block_sparse_moe.experts.4.w1.weight"
DOWN = "model.layers.0.mlp.experts.down_proj"


def test_a_missing_expert_is_refused_on_every_rank(mixtral: Path) -> None:
    """Also where the rank would not have read it."""
    _edit_tensors(mixtral, lambda tensors: tensors.pop(W1))
    for rank in RANKS:
        _refused(mixtral, r"experts\.\*\.w1\.weight: the checkpoint has 5 experts up to number 5", rank=rank)


def test_one_expert_too_many_is_refused(mixtral: Path) -> None:
    """Configuration and experts must agree."""
    _edit_config(mixtral, num_local_experts=5)
    with pytest.raises(InputError, match="the placement has 6 experts per layer, the model 5"):
        load_local_rows(mixtral, checks.uneven(2), 0)


def test_fused_experts_of_another_number_are_refused(gpt_oss: Path) -> None:
    """The first axis counts the experts."""
    _edit_tensors(gpt_oss, lambda tensors: tensors.update({DOWN: tensors[DOWN][:5].clone()}))
    _refused(gpt_oss, r"down_proj' has the shape \[5, .*config\.json says 6 experts")


def test_a_missing_tensor_is_refused(gpt_oss: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of experts or not: nothing is made up."""
    _edit_tensors(gpt_oss, lambda tensors: tensors.pop(f"{DOWN}_bias"))
    _refused(gpt_oss, "lacks 1 of the model's tensors, model.layers.0.mlp.experts.down_proj_bias")
    folder = tmp_path_factory.mktemp("other")
    checks.saved("gpt_oss", folder)
    _edit_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
    _refused(folder, "lacks 1 of the model's tensors, model.norm.weight")


def test_a_layer_without_experts_is_refused(mixtral: Path) -> None:
    """The model has two MoE layers, the file one."""
    _edit_tensors(
        mixtral, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." in name]
    )
    _refused(mixtral, "has no experts in decoder layer 1")


def test_a_tensor_too_many_is_refused(mixtral: Path) -> None:
    """What the model does not know may be half of another model."""
    _edit_tensors(mixtral, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.zeros(2)}))
    _refused(mixtral, r"has 1 tensors that are none of the model's, 'model.layers.0.extra.weight'")


def test_layers_for_speculative_decoding_are_not_read(mixtral: Path) -> None:
    """They follow the decoder's layers, whatever they hold; transformers leaves them out, too."""
    extra = {
        "model.layers.2.block_sparse_moe.experts.0.w1.weight": torch.zeros(8, 16),
        "model.layers.2.eh_proj.weight": torch.zeros(3),
    }
    _edit_tensors(mixtral, lambda tensors: tensors.update(extra))
    with checks.counted_reading() as read:
        load_local_rows(mixtral, checks.uneven(2), 0)
    assert not any("layers.2." in name for name in read)


def test_tensors_of_another_shape_are_refused(mixtral: Path) -> None:
    """Whether it is one expert's or not."""
    _edit_tensors(mixtral, lambda tensors: tensors.update({W1: torch.zeros(7, 16)}))
    _refused(mixtral, "cannot load the weights", rank=0)
    _edit_tensors(mixtral, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
    _refused(mixtral, "cannot load the weights", rank=1)


def test_a_truncated_file_is_refused(mixtral: Path) -> None:
    """Nothing is loaded of a file cut short."""
    file = mixtral / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    _refused(mixtral, r"model\.safetensors: is truncated")


def test_pickled_weights_are_refused(mixtral: Path) -> None:
    """Only safetensors are read."""
    (mixtral / "model.safetensors").rename(mixtral / "pytorch_model.bin")
    _refused(mixtral, "holds no safetensors file")


def test_weights_quantised_in_other_ways_are_refused(mixtral: Path) -> None:
    """Their rows cannot be told apart, or not be turned into weights."""
    _edit_config(mixtral, quantization_config={"quant_method": "gptq"})
    _refused(mixtral, r"its weights are quantised \(gptq\); of those only fp8 and mxfp4 can be spread")


def test_a_rank_outside_the_placement_is_refused(mixtral: Path) -> None:
    """Three devices are ranks 0 to 2."""
    for rank in (-1, 3):
        _refused(mixtral, f"rank {rank} is none of the placement's 3 devices", rank=rank)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(mixtral: Path, device: str) -> None:
    """Unknown and absent devices are input errors."""
    with pytest.raises(InputError, match=f"device '{device}' cannot be used"):
        load_local_rows(mixtral, checks.uneven(2), 0, device=device)


# ------------------------------------------------------------------------------------------ over ranks


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_ranks_load_and_run(family: str, tmp_path: Path, group_of: Callable[[int], Ranks]) -> None:
    """Loaded part by part, the ranks compute what the whole model computes; the second has no experts."""
    model = checks.saved(family, tmp_path)
    placement = checks.uneven(len(moe_layers_of(model)))
    for difference, scale, _ in (found := group_of(3).run(checks.load_and_run, tmp_path, placement)):
        assert difference <= 1e-5 * max(scale, 1.0)
    assert [rows for *_, rows in found] == [{5}, {0}, {3}]


def test_one_rank_that_cannot_load_stops_all(mixtral: Path, group_of: Callable[[int], Ranks]) -> None:
    """Every rank says which, and none waits for it."""
    broken = mixtral.parent / "broken"
    shutil.copytree(mixtral, broken)
    (broken / "config.json").unlink()
    folders = [mixtral, broken]
    first, second = group_of(2).outcomes(checks.load_own_folder, folders, checks.reversed_halves(2))
    assert isinstance(first, InputError)
    assert str(first).startswith("rank 1: ")
    assert isinstance(second, InputError)
    assert "is not a checkpoint" in str(first)
    assert "is not a checkpoint" in str(second)


def test_a_wrong_world_size_is_refused_by_every_rank(mixtral: Path, group_of: Callable[[int], Ranks]) -> None:
    """Before anything is read."""
    outcomes = group_of(2).outcomes(checks.load_own_folder, [mixtral, mixtral], checks.uneven(2))
    assert all(isinstance(one, InputError) for one in outcomes)
    assert {str(one).split(";")[0] for one in outcomes} == {
        "the placement is for 3 devices, the process group has 2 ranks"
    }
