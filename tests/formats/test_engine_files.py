"""Tests of each engine's file: loaded the way the engine loads it, and every rule that it has broken once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from formats import engines
from formats.samples import HYBRID, model_of, options_of, place, placements
from hypothesis import given, settings

from placement.errors import InputError
from placement.formats import (
    deepspeed,
    megatron,
    native,
    sglang,
    tensorrt_llm,
    vllm,
    vllm_ascend,
    vllm_ranks,
)
from placement.formats.files import write_as
from placement.formats.layers import ModelLayers
from placement.formats.protocol import FormatOptions, PlacementFormat
from placement.formats.rules import by_device
from placement.plan import Placement

# Two MoE layers (decoder layers 1 and 2 of 4) of four experts, six slots on two devices.
ROWS = [[0, 3, 1, 2, 0, 1], [2, 0, 1, 3, 1, 2]]
PLACEMENT = place(ROWS, moe_layer_ids=(1, 2), model_name="hybrid")
OPTIONS = FormatOptions(layers=ModelLayers.of(HYBRID), num_devices=2)
UNKNOWN = FormatOptions(num_devices=2)

# Every row the same and no replica: what permutations and maps of ranks can say.
SINGLE = place([[0, 3, 1, 2]] * 2, moe_layer_ids=(1, 2), model_name="hybrid")


def held(placement: Placement, layer: int) -> list[list[int]]:
    """Return the experts of each device in one MoE layer, slot by slot."""
    rows = by_device(placement, target="x")[layer].reshape(placement.num_devices, -1)
    return [list(map(int, row)) for row in rows]


# ----------------------------------------------------------------------------------------------------- SGLang


def test_sglang_by_hand(tmp_path: Path) -> None:
    """All hidden layers have rows; dense ones have the layout that SGLang begins with."""
    path = tmp_path / "location.json"
    write_as(PLACEMENT, path, "sglang", OPTIONS)
    trivial = [0, 1, 2, 3, 0, 1]
    assert json.loads(path.read_text()) == {"physical_to_logical_map": [trivial, *ROWS, trivial]}
    usage = sglang.usage(PLACEMENT, OPTIONS, path)
    assert usage.arguments == (
        *("--init-expert-location", str(path)),
        *("--ep-num-redundant-experts", "2"),
        *("--ep-size", "2"),
    )


@settings(max_examples=25)
@given(placement=placements())
def test_sglang_loads_it(placement: Placement, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each decoder layer of the engine holds what its MoE layer of the placement does."""
    model = model_of(placement)
    path = tmp_path_factory.getbasetemp() / "location.json"
    write_as(placement, path, "sglang", options_of(placement))
    loaded = engines.sglang(
        path,
        num_hidden_layers=model.num_decoder_layers,
        num_logical_experts=model.num_experts,
        ep_num_redundant_experts=placement.num_slots - placement.num_experts,
        ep_size=placement.num_devices,
    )
    for layer, decoder_layer in enumerate(model.moe_layer_ids):
        assert loaded.experts_of_rank[decoder_layer] == held(placement, layer)
        replicas = [len(slots) for slots in loaded.logical_to_physical[decoder_layer]]
        assert replicas == placement.replicas_LE[layer].tolist()


def test_sglang_refuses_another_key(tmp_path: Path) -> None:
    """Both the engine and we do: the keys are its constructor's arguments."""
    path = tmp_path / "location.json"
    document = {"physical_to_logical_map": [[0, 1]], "model": "m"}
    path.write_text(json.dumps(document))
    with pytest.raises(TypeError):
        engines.sglang(
            path, num_hidden_layers=1, num_logical_experts=2, ep_num_redundant_experts=0, ep_size=1
        )
    with pytest.raises(InputError, match="has the key 'model', which the engine does not take"):
        sglang.decode(document, OPTIONS)


MAP = json.loads(sglang.encode(PLACEMENT, OPTIONS))["physical_to_logical_map"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (MAP[1:3], "lists 2 layers, and hybrid has 4 hidden layers.*; that many are its MoE layers alone"),
        ([*MAP, MAP[0]], "lists 5 layers, and hybrid has 4 hidden layers"),
        ([MAP[0], MAP[1], MAP[2], MAP[3][:5]], "is ragged: row 3 has 5 entries, row 0 has 6"),
        ([MAP[0], [0, 3, 1, 2, 0, -1], *MAP[2:]], "row 1 holds -1 in slot 5; no slot may be empty"),
        ([MAP[0], [0, 3, 1, 2, 0, 4], *MAP[2:]], "names expert 4; the model has 4"),
        ([MAP[0], [0, 3, 1, 2, 0, 2], *MAP[2:]], "layer 0 puts expert 2 twice on device 1"),
        ([MAP[0], [0, 3, 1, 0, 3, 1], *MAP[2:]], "layer 0 gives expert 2 no slot"),
        ([MAP[0], [0, 3, 1, 2, 0, 1.0], *MAP[2:]], r"row 1 holds 1\.0 in slot 5"),
        ([MAP[0], [0, 3, 1, 2, 0, True], *MAP[2:]], "row 1 holds True in slot 5"),
        ([MAP[0], [0, 3, 1, 2, 0, 2**64], *MAP[2:]], "row 1 holds 18446744073709551616 in slot 5"),
        ([MAP[0], [0, 3, 1, 2, 0, "1"], *MAP[2:]], "row 1 holds '1' in slot 5"),
        ([], "must be a table"),
        ([[]], "must be a table"),
        ([0, 1, 2], "must be a table"),
        (None, "must be a table"),
    ],
)
def test_sglang_rules(rows: object, message: str) -> None:
    """What SGLang would load wrongly or not at all is refused with the numbers."""
    with pytest.raises(InputError, match=message):
        sglang.decode({"physical_to_logical_map": rows}, OPTIONS)


def test_sglang_needs_the_layers() -> None:
    """Without the number of hidden layers there is no file, and none is read."""
    for options in (
        UNKNOWN,
        FormatOptions(layers=ModelLayers(moe_layer_ids=(1, 2)), num_devices=2),
    ):
        with pytest.raises(InputError, match="name it with --model"):
            sglang.check(PLACEMENT, options)
        with pytest.raises(InputError, match="name it with --model"):
            sglang.decode({"physical_to_logical_map": MAP}, options)


# ----------------------------------------------------------------------------------------------- TensorRT-LLM


def test_tensorrt_llm_by_hand(tmp_path: Path) -> None:
    """Decoder layers are named; the prediction layer has the layout that the engine begins with."""
    path = tmp_path / "balancer.yaml"
    write_as(PLACEMENT, path, "tensorrt-llm", OPTIONS)
    assert yaml.safe_load(path.read_text()) == {
        "num_slots": 6,
        "layer_updates_per_iter": 0,
        # Rank 0 begins with expert 0, rank 1 with expert 2.
        "initial_global_assignments": {1: ROWS[0], 2: ROWS[1], 4: [0, 1, 2, 2, 3, 0]},
    }
    usage = tensorrt_llm.usage(PLACEMENT, OPTIONS, path)
    assert dict(usage.settings)["moe_config.load_balancer"] == str(path)
    assert "layers 4 (multi-token prediction) have the engine's own layout" in usage.notes[0]


@settings(max_examples=25)
@given(placement=placements())
def test_tensorrt_llm_loads_it(placement: Placement, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every layer with experts finds its assignments, that of multi-token prediction too."""
    model = model_of(placement, first_dense=2)
    layers = ModelLayers.of(model)
    path = tmp_path_factory.getbasetemp() / "balancer.yaml"
    write_as(placement, path, "tensorrt-llm", FormatOptions(layers=layers))
    config = engines.MoeLoadBalancerConfig(**yaml.safe_load(path.read_text()))
    config.setup(placement.num_devices)
    for layer, decoder_layer in enumerate(model.moe_layer_ids):
        assert config.layer(decoder_layer) == by_device(placement, target="x")[layer].tolist()
    assert set(config.layer(model.num_decoder_layers)) == set(range(placement.num_experts))


@settings(max_examples=25)
@given(placement=placements())
def test_the_engines_own_layout_is_a_placement(placement: Placement) -> None:
    """What prediction layers get has every expert, and none twice on a device."""
    sizes = (placement.num_slots, placement.num_experts, placement.num_devices)
    row = tensorrt_llm.own_row(*sizes).tolist()
    place([row], devices=placement.num_devices, experts=placement.num_experts)


def test_a_missing_prediction_layer_stops_the_engine(tmp_path: Path) -> None:
    """Without the model's prediction layers the engine raises a KeyError; the note says so."""
    path = tmp_path / "balancer.yaml"
    layers = ModelLayers(moe_layer_ids=(1, 2))
    write_as(PLACEMENT, path, "tensorrt-llm", FormatOptions(layers=layers))
    with pytest.raises(KeyError, match="layer_idx 3 not found"):
        engines.tensorrt_llm(path, moe_layers=(1, 2), num_experts=4, ep_size=2, num_mtp_layers=1)
    usage = tensorrt_llm.usage(PLACEMENT, FormatOptions(layers=layers), path)
    assert "stops with a KeyError: name the model with --model" in usage.notes[0]
    none = ModelLayers.of(HYBRID, num_mtp_layers=0)
    assert tensorrt_llm.usage(PLACEMENT, FormatOptions(layers=none), path).notes == ()


def test_tensorrt_llm_refuses_another_key(tmp_path: Path) -> None:
    """Both the engine and we do: its model forbids extra entries."""
    document = {"num_slots": 2, "initial_global_assignments": {0: [0, 1]}, "ep_size": 1}
    with pytest.raises(engines.ExtraForbiddenError):
        engines.MoeLoadBalancerConfig(**document)
    with pytest.raises(InputError, match="has the key 'ep_size', which the engine does not take"):
        tensorrt_llm.decode(document, OPTIONS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_slots": 5}, "num_slots is 5, the assignments have 6"),
        ({"num_slots": None}, "num_slots is None"),
        ({"num_slots": True}, "num_slots is True"),
        ({"layer_updates_per_iter": -1}, "layer_updates_per_iter is -1"),
        ({"initial_global_assignments": None}, "must map layers to slots, not None"),
        ({"initial_global_assignments": {1: ROWS[0]}}, "lacks layer 2 of 2 MoE layers 1, 2"),
        (
            {"initial_global_assignments": {0: ROWS[0], 1: ROWS[0], 2: ROWS[1]}},
            "names layer 0, which is dense",
        ),
        ({"initial_global_assignments": {1: ROWS[0], 2: ROWS[1][:5]}}, "is ragged"),
        ({"initial_global_assignments": {1: ROWS[0], "1": ROWS[0], 2: ROWS[1]}}, "gives a layer twice"),
        ({"initial_global_assignments": {1: ROWS[0], "two": ROWS[1]}}, "a layer of .* is 'two'"),
        ({"initial_global_assignments": {1: ROWS[0], -2: ROWS[1]}}, "a layer of .* is -2"),
        (
            {"initial_global_assignments": {1: [0, 3, 0, 2, 0, 1], 2: ROWS[1]}},
            "puts expert 0 twice on device 0",
        ),
    ],
)
def test_tensorrt_llm_rules(changes: dict[str, Any], message: str) -> None:
    """What TensorRT-LLM would stop at is refused with the numbers."""
    good = yaml.safe_load(tensorrt_llm.encode(PLACEMENT, OPTIONS))
    with pytest.raises(InputError, match=message):
        tensorrt_llm.decode({**good, **changes}, OPTIONS)


def test_a_whole_configuration_is_read_too() -> None:
    """The load balancer may stand in the engine's full configuration, and be one that goes on balancing."""
    balancer = yaml.safe_load(tensorrt_llm.encode(PLACEMENT, OPTIONS))
    balancer["layer_updates_per_iter"] = 2
    document = {"kv_cache_config": {}, "moe_config": {"backend": "WIDEEP", "load_balancer": balancer}}
    assert tensorrt_llm.recognise(document)
    read = tensorrt_llm.decode(document, OPTIONS)
    assert read.physical_to_logical_map_LS.tolist() == ROWS


def test_tensorrt_llm_names_its_layers_itself() -> None:
    """Reading needs no model; writing needs to know the layers."""
    document = yaml.safe_load(tensorrt_llm.encode(PLACEMENT, OPTIONS))
    del document["initial_global_assignments"][4]
    assert tensorrt_llm.decode(document, UNKNOWN).moe_layer_ids == (1, 2)
    with pytest.raises(InputError, match="with --model"):
        tensorrt_llm.check(PLACEMENT, UNKNOWN)


# ------------------------------------------------------------------------------------------------ vllm-ascend


def test_vllm_ascend_by_hand(tmp_path: Path) -> None:
    """MoE layers and devices count from 0; no other layer is there."""
    path = tmp_path / "map.json"
    write_as(PLACEMENT, path, "vllm-ascend", UNKNOWN)
    document = json.loads(path.read_text())
    assert document["moe_layer_count"] == 2
    assert document["layer_list"][1] == {
        "layer_id": 1,
        "device_count": 2,
        "device_list": [
            {"device_id": 0, "device_expert": [2, 0, 1]},
            {"device_id": 1, "device_expert": [3, 1, 2]},
        ],
    }
    arguments = vllm_ascend.usage(PLACEMENT, UNKNOWN, path).arguments
    assert json.loads(arguments[-1]) == {"eplb_config": {"expert_map_path": str(path)}}


@settings(max_examples=25)
@given(placement=placements())
def test_vllm_ascend_loads_it(placement: Placement, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The MoE layer after the dense ones is the first of the file."""
    path = tmp_path_factory.getbasetemp() / "map.json"
    write_as(placement, path, "vllm-ascend", UNKNOWN)
    loaded = engines.vllm_ascend(
        path,
        first_dense=3,
        num_moe_layers=placement.num_layers,
        num_experts=placement.num_experts,
        ep_size=placement.num_devices,
    )
    for layer in range(placement.num_layers):
        assert loaded.experts_of_rank[3 + layer] == held(placement, layer)


def _ascend(first: dict[str, Any] | None = None, **entries: Any) -> dict[str, Any]:
    """Return a good document with entries of the first layer, or of the top, replaced."""
    document: dict[str, Any] = json.loads(vllm_ascend.encode(PLACEMENT, OPTIONS))
    document["layer_list"][0].update(first or {})
    return {**document, **entries}


def _device(device_id: object, *experts: object) -> dict[str, Any]:
    return {"device_id": device_id, "device_expert": list(experts)}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (_ascend(moe_layer_count=3), "moe_layer_count is 3, layer_list has 2 layers"),
        (_ascend(moe_layer_count="2"), "moe_layer_count is '2'"),
        (_ascend(note=1), "has the key 'note'"),
        (_ascend({"layer_id": 1}), r"layer_list\[0\] has layer_id 1; .* so it must be 0"),
        (_ascend({"device_count": 3}), "device_count is 3, and device_list disagrees"),
        (_ascend({"device_list": None}), "device_list disagrees"),
        (_ascend({"pool_size": 1}), r"layer_list\[0\]: has the key 'pool_size'"),
        (
            _ascend({"device_list": [_device(0, 0, 3, 1), _device(0, 2, 0, 1)]}),
            r"device_list\[1\] has device_id 0; it must be 1",
        ),
        (
            _ascend({"device_list": [_device(0, 0, 3, 1), _device(1, 2, 0)]}),
            "is ragged: row 1 has 2 entries",
        ),
        (
            _ascend({"device_list": [_device(0, 0, 3, 0), _device(1, 2, 0, 1)]}),
            "puts expert 0 twice on device 0",
        ),
        (_ascend({"device_list": [_device(0, 0, 3, -1), _device(1, 2, 0, 1)]}), "no slot may be empty"),
        (
            _ascend({"device_count": 1, "device_list": [_device(0, 0, 3, 1)]}),
            "layer 1 has 2 devices, layer 0 has 1",
        ),
        (
            _ascend(moe_layer_count=1, layer_list=_ascend()["layer_list"][:1]),
            "lists 1 MoE layers, hybrid has 2",
        ),
    ],
)
def test_vllm_ascend_rules(document: dict[str, Any], message: str) -> None:
    """Numbers that the engine does not look at must agree with the places that it does."""
    with pytest.raises(InputError, match=message):
        vllm_ascend.decode(document, OPTIONS)


# ------------------------------------------------------------------------------------------------------- vLLM


def test_vllm_loads_it(tmp_path: Path) -> None:
    """A row for every MoE layer, and no name around it."""
    path = tmp_path / "map.json"
    write_as(PLACEMENT, path, "vllm", UNKNOWN)
    assert json.loads(path.read_text()) == ROWS
    table = engines.vllm_initial_map(path, num_moe_layers=2, num_experts=4, num_redundant=2)
    assert torch.equal(table, torch.tensor(ROWS))
    usage = vllm.usage(PLACEMENT, UNKNOWN, path)
    assert json.loads(usage.arguments[-1]) == {"num_redundant_experts": 2}
    assert dict(usage.settings) == {"environment MOE_PLACEMENT_VLLM_PLACEMENT": str(path)}


def test_one_row_for_all_layers() -> None:
    """The proposal's short form is read for as many layers as the model has."""
    read = vllm.decode(ROWS[0], OPTIONS)
    assert read.physical_to_logical_map_LS.tolist() == [ROWS[0]] * 2
    with pytest.raises(InputError, match="is one row for all MoE layers"):
        vllm.decode(ROWS[0], UNKNOWN)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([ROWS[0]], "lists 1 MoE layers, hybrid has 2 MoE layers 1, 2"),
        ([], "must be a table"),
        ([ROWS[0], 5], "must be a table"),
        ([0, 1, 2, None], "holds None in slot 3"),
    ],
)
def test_vllm_rules(document: object, message: str) -> None:
    """A table that fits no model is refused."""
    with pytest.raises(InputError, match=message):
        vllm.decode(document, OPTIONS)


def test_more_slots_than_vllm_keeps_track_of() -> None:
    """The engine counts redundant experts up to 1023."""
    with pytest.raises(InputError, match="has 1024 redundant slots per layer; vLLM takes at most 1023"):
        vllm.check(place([[0] * 1025], devices=1025, experts=1), UNKNOWN)


def test_ranks_of_experts(tmp_path: Path) -> None:
    """One rank for each expert, the same in every layer."""
    path = tmp_path / "ranks.json"
    write_as(SINGLE, path, "vllm-ranks", OPTIONS)
    assert json.loads(path.read_text()) == {"expert_to_ep_rank": [0, 1, 1, 0]}
    assert engines.vllm_expert_ranks(path, num_experts=4, ep_size=2) == [[0, 3], [1, 2]]
    assert vllm_ranks.usage(SINGLE, OPTIONS, path).arguments[1:] == ("--expert-placement-file", str(path))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS, "expert 0 of layer 0 has 2 replicas"),
        ([[0, 1, 2, 3], [0, 2, 1, 3]], "expert 1 is on device 0 in layer 0 and 1 in layer 1"),
    ],
)
def test_what_ranks_cannot_say(rows: list[list[int]], message: str) -> None:
    """Replicas and layers that differ need another format."""
    with pytest.raises(InputError, match=message):
        vllm_ranks.check(place(rows), OPTIONS)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([0, 1, 1, 1], OPTIONS, "puts 1 experts on rank 0 and 3 on rank 1"),
        ([0, 1, 2, 0], OPTIONS, "names rank 2 of 2 devices"),
        ([0, 1], OPTIONS, "places 2 experts, hybrid has 4"),
        ([0, 1, 1, -1], OPTIONS, r"expert_to_ep_rank\[3\] is -1"),
        ("0110", OPTIONS, "must be a list of ranks"),
        ([], OPTIONS, "must be a list of ranks"),
        ([0, 1, 1, 0], UNKNOWN, "name the model with --model"),
    ],
)
def test_vllm_ranks_rules(values: object, options: FormatOptions, message: str) -> None:
    """Ranks hold equally many experts, and every layer of the model is meant."""
    with pytest.raises(InputError, match=message):
        vllm_ranks.decode({"expert_to_ep_rank": values}, options)


# ------------------------------------------------------------------------------------------ contiguous shards


@pytest.mark.parametrize("engine", [megatron, deepspeed])
def test_permutations_name_decoder_layers(engine: PlacementFormat) -> None:
    """The rearranged checkpoint gives every rank what the placement wants there."""
    document = json.loads(engine.encode(SINGLE, OPTIONS))
    # Device 0 holds experts 0 and 3, device 1 holds 1 and 2; in ascending order on each.
    assert document["layers"] == {"1": [0, 3, 1, 2], "2": [0, 3, 1, 2]}
    assert document["inverse"] == {"1": [0, 2, 3, 1], "2": [0, 2, 3, 1]}
    assert engine.decode(document, OPTIONS).moe_layer_ids == (1, 2)
    assert "rearrange the checkpoint" in engine.usage(SINGLE, OPTIONS, Path("x.json")).notes[0]


def test_what_a_permutation_cannot_say() -> None:
    """Replicas, unknown layers, another model's layers, and a split group of the router."""
    with pytest.raises(InputError, match="expert 0 of layer 0 has 2 replicas"):
        megatron.check(PLACEMENT, OPTIONS)
    with pytest.raises(InputError, match="for Megatron-LM is rearranged by decoder layer"):
        megatron.check(SINGLE, UNKNOWN)
    document = json.loads(megatron.encode(SINGLE, OPTIONS))
    other = FormatOptions(layers=ModelLayers(moe_layer_ids=(0, 1)))
    with pytest.raises(InputError, match="permutes 2 layers from 1, the model has 2 MoE layers 0, 1"):
        megatron.decode(document, other)
    grouped = FormatOptions(layers=ModelLayers(moe_layer_ids=(1, 2), num_expert_groups=2))
    with pytest.raises(InputError, match=r"routes by 2 groups .* splits one in layer 1"):
        megatron.check(SINGLE, grouped)


def test_our_own_file_says_nothing_to_engines() -> None:
    """Our format needs no words on how to load it, and keeps what other tools added."""
    kept = place(ROWS, moe_layer_ids=(1, 2), extra={"note": 7})
    assert native.usage(kept, OPTIONS, Path("p.json")).arguments == ()
    read = native.decode(json.loads(native.encode(kept, OPTIONS)), UNKNOWN)
    assert read.extra == {"note": 7}
