"""A placement in place leaves outputs and gradients as they are, and comes out without a trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_reference import randomise_biases
from torch import nn

from placement.errors import InputError
from placement.plan import EMPTY, Placement
from placement.runtime import hook
from placement.runtime.families.registry import family_named, moe_layers_of, supported_families
from placement.runtime.families.training import FRAMEWORKS
from placement.runtime.hook import SlotMap, SlotRemap, apply_placement
from placement.runtime.tiny import tiny_model

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
DENSE: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"decoder_sparse_step": 2},
}
OTHER_FAMILIES = tuple(
    sorted(
        name
        for name in set(supported_families()) - set(FAMILIES) - {one.model_type for one in FRAMEWORKS}
        if not family_named(name).record_only
    )
)
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
EXPERTS = 6


@cache
def _model(model_type: str, implementation: str = "grouped_mm") -> Any:
    """A model shared by examples: each must leave it as it found it. Some have dense layers."""
    model = tiny_model(model_type, num_layers=4, num_experts=EXPERTS, **DENSE.get(model_type, {}))
    model.set_experts_implementation(implementation)
    return model


def _tokens(rows: int = 3, length: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 32, (rows, length), generator=torch.Generator().manual_seed(seed))


def _num_layers(model: nn.Module) -> int:
    return len(moe_layers_of(model))


@st.composite
def placements(draw: st.DrawFn, num_layers: int, num_experts: int = EXPERTS) -> Placement:
    """Any placement: replicas, empty slots, devices with different numbers of slots, or with none."""
    num_devices = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from([0.0, 0.3, 0.7]))
    held_LED = rng.random((num_layers, num_experts, num_devices)) < share
    home_LE = rng.integers(0, num_devices, (num_layers, num_experts))
    np.put_along_axis(held_LED, home_LE[:, :, None], True, axis=2)
    spare_D = rng.integers(0, 3, num_devices)
    slots_D = held_LED.sum(axis=1).max(axis=0) + spare_D
    device_S = rng.permutation(np.repeat(np.arange(num_devices), slots_D))
    map_LS = np.full((num_layers, device_S.size), EMPTY)
    for layer in range(num_layers):
        for device in range(num_devices):
            experts = rng.permutation(np.nonzero(held_LED[layer, :, device])[0])
            slots = rng.permutation(np.nonzero(device_S == device)[0])[: experts.size]
            map_LS[layer, slots] = experts
    return Placement(
        physical_to_logical_map_LS=map_LS,
        device_of_slot_S=device_S,
        num_experts=num_experts,
        num_devices=num_devices,
    )


def _rotated(model: nn.Module, **changes: Any) -> Placement:
    """One replica each, expert e in slot e + 1 (mod E): every slot holds another expert than before."""
    fields: dict[str, Any] = {
        "physical_to_logical_map_LS": np.tile(np.roll(np.arange(EXPERTS), 1), (_num_layers(model), 1)),
        "device_of_slot_S": np.arange(EXPERTS) // 3,
        "num_experts": EXPERTS,
        "num_devices": 2,
    }
    return Placement(**(fields | changes))


def _doubled(model: nn.Module) -> Placement:
    """Every expert on both devices."""
    return _rotated(
        model,
        physical_to_logical_map_LS=np.tile(np.arange(2 * EXPERTS) % EXPERTS, (_num_layers(model), 1)),
        device_of_slot_S=np.repeat([0, 1], EXPERTS),
    )


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Everything observable of the model is the same after the block, bit for bit."""
    before = _observe(model)
    yield
    after = _observe(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name


def _observe(model: nn.Module) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, tensor in model.named_parameters():
        seen[name] = tensor.detach().clone()
        seen[f"{name}.about"] = (id(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)
    for name, module in model.named_modules():
        seen[f"{name}.hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
        seen[f"{name}.num_experts"] = getattr(module, "num_experts", None)
    seen["state_dict"] = list(model.state_dict())
    seen["outputs"] = _outputs(model, _tokens(seed=99))
    return seen


def _outputs(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head."""
    with torch.no_grad():
        outputs: torch.Tensor = model(input_ids=tokens)[0]
    return outputs


@pytest.mark.parametrize("model_type", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_outputs_equal_under_any_placement(model_type: str, data: st.DataObject) -> None:
    """Logits agree to 1e-5 with every implementation of the experts, and the model is restored."""
    model = _model(model_type, data.draw(st.sampled_from(IMPLEMENTATIONS)))
    placement = data.draw(placements(_num_layers(model)))
    tokens = _tokens(rows=data.draw(st.integers(1, 3)), seed=data.draw(st.integers(0, 99)))
    with unchanged(model), torch.no_grad():
        expected = model(tokens).logits
        with apply_placement(model, placement):
            actual = model(tokens).logits
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", OTHER_FAMILIES)
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_every_family_computes_the_same_under_any_placement(model_type: str, data: st.DataObject) -> None:
    """Outputs agree to float32's rounding, with biases that select, and every bit comes back."""
    model = _biased(model_type)
    placement = data.draw(placements(_num_layers(model)))
    expected = _outputs(model, _tokens())
    with unchanged(model):
        with apply_placement(model, placement):
            actual = _outputs(model, _tokens())
        torch.testing.assert_close(actual, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


@cache
def _biased(model_type: str) -> Any:
    model = tiny_model(model_type, num_layers=2, num_experts=EXPERTS)
    randomise_biases(model)
    return model


@pytest.mark.parametrize("model_type", ["dbrx", "jetmoe", "longcat_flash"])
def test_a_family_that_can_only_be_recorded_is_refused(model_type: str) -> None:
    """The message says why, and the model stays as it was."""
    model = tiny_model(model_type, num_layers=2)
    experts = moe_layers_of(model)[0].num_experts
    placement = Placement(
        physical_to_logical_map_LS=np.tile(np.arange(experts), (2, 1)),
        device_of_slot_S=np.zeros(experts, dtype=np.int64),
        num_experts=experts,
        num_devices=1,
    )
    with unchanged(model), pytest.raises(InputError, match=f"no placement can be applied to a {model_type}"):
        apply_placement(model, placement)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("model_type", FAMILIES)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_gradients_equal_under_any_placement(
    model_type: str, implementation: str, data: st.DataObject
) -> None:
    """Gradients outside the experts agree, and those of an expert's replicas add up to the expert's."""
    model = _model(model_type, implementation)
    placement = data.draw(placements(_num_layers(model)))
    expected = _gradients(model)
    with apply_placement(model, placement):
        actual = _gradients(model)
    for index, layer in enumerate(moe_layers_of(model)):
        expert_S = torch.from_numpy(SlotMap.of_layer(placement, index).expert_S)
        for name in layer.expert_tensors:
            key = f"model.layers.{layer.decoder_layer}.mlp.experts.{name}"
            summed = torch.zeros_like(expected[key])
            actual[key] = summed.index_add_(0, expert_S, actual[key])
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(_tokens()).logits.square().mean().backward()
    gradients = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def test_the_slots_really_are_in_use() -> None:
    """With the rotated placement the experts' tensors are rotated and the router's ids with them."""
    model = _model("olmoe")
    layer: Any = moe_layers_of(model)[0]
    original = layer.experts.down_proj.detach().clone()
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    experts_TK = layer.router(hidden)[2]
    with apply_placement(model, _rotated(model)):
        assert torch.equal(layer.experts.down_proj, original.roll(1, dims=0))
        assert torch.equal(layer.router(hidden)[2], (experts_TK + 1) % EXPERTS)


def test_empty_slots_take_no_memory() -> None:
    """The experts module holds the filled slots of its layer alone, however many each layer fills."""
    model = _model("olmoe")
    map_LS = np.full((4, 9), EMPTY)
    map_LS[:, 3:] = np.arange(EXPERTS)
    map_LS[1, 0] = 5
    placement = _rotated(
        model,
        physical_to_logical_map_LS=map_LS,
        device_of_slot_S=np.array([0, 0, 0, 1, 1, 1, 1, 1, 1]),
    )
    with apply_placement(model, placement):
        experts: list[Any] = [layer.experts for layer in moe_layers_of(model)]
        held = [len(one.gate_up_proj) for one in experts]
        counted = [one.num_experts for one in experts]
    assert held == counted == [6, 7, 6, 6]


def test_the_original_parameters_hold_no_second_copy() -> None:
    """While a placement is applied, the parameter that will come back has no storage."""
    model = tiny_model("olmoe")
    original = dict(moe_layers_of(model)[0].experts.named_parameters())["gate_up_proj"]
    with apply_placement(model, _rotated(model)):
        assert original.untyped_storage().nbytes() == 0
    assert original.shape == (EXPERTS, 16, 16)


def test_slot_map_of_a_layer_by_hand() -> None:
    """Slots [2, -, 0, 1, 2]: the filled ones are 0..3, expert 2 is in slots 0 and 3."""
    placement = Placement(
        physical_to_logical_map_LS=np.array([[2, EMPTY, 0, 1, 2]]),
        device_of_slot_S=np.array([0, 0, 0, 1, 1]),
        num_experts=3,
        num_devices=2,
    )
    slots = SlotMap.of_layer(placement, 0)
    assert slots.num_slots == 4
    assert slots.expert_S.tolist() == [2, 0, 1, 2]
    assert slots.slot_ER.tolist() == [[1, 0], [2, 0], [0, 3]]
    assert slots.replicas_E.tolist() == [1, 1, 2]


def test_replicas_are_split_evenly_by_token() -> None:
    """Tokens take turns over an expert's replicas; experts with one replica always use that."""
    slots = SlotMap(
        expert_S=np.array([0, 1, 0, 0]),
        slot_ER=np.array([[0, 2, 3], [1, 0, 0]]),
        replicas_E=np.array([3, 1]),
    )
    remap = SlotRemap(family_named("olmoe"), moe_layers_of(_model("olmoe"))[0], slots)
    experts_TK = torch.tensor([[0, 1]] * 6)
    assert remap.slots(experts_TK).tolist() == [[0, 1], [2, 1], [3, 1]] * 2


@pytest.mark.parametrize("model_type", FAMILIES)
def test_generation_with_a_cache_is_the_same(model_type: str) -> None:
    """Greedy decoding in a left-padded batch gives the same tokens, replicas in use."""
    model = _model(model_type)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(_tokens(2, 5), use_cache=True, **options)
    with apply_placement(model, _doubled(model)):
        actual = model.generate(_tokens(2, 5), use_cache=True, **options)
    assert actual.tolist() == expected.tolist()


def test_half_precision_is_restored_bit_for_bit() -> None:
    """bfloat16 weights come back exactly, and outputs agree to its rounding."""
    model: Any = tiny_model("qwen2_moe")
    model.to(torch.bfloat16)
    with unchanged(model), torch.no_grad():
        expected = model(_tokens()).logits
        with apply_placement(model, _doubled(model)):
            assert model.dtype == torch.bfloat16
            actual = model(_tokens()).logits
        torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)


def test_frozen_and_trained_parameters_stay_so() -> None:
    """requires_grad carries over to the slots and back."""
    model = tiny_model("olmoe")
    layers: Any = moe_layers_of(model)
    layers[0].experts.down_proj.requires_grad_(False)
    with unchanged(model), apply_placement(model, _doubled(model)):
        assert not layers[0].experts.down_proj.requires_grad
        assert layers[1].experts.down_proj.requires_grad


def test_applied_under_inference_mode_it_still_trains() -> None:
    """Nothing applied inside inference mode is barred from a later backward pass."""
    model = tiny_model("olmoe")
    with torch.inference_mode():
        applied = apply_placement(model, _doubled(model))
    assert _gradients(model)
    with torch.inference_mode():
        applied.detach()
    assert _gradients(model)


def test_detaching_twice_does_nothing() -> None:
    """Only the first detach changes the model; `attached` tells."""
    model = _model("mixtral")
    with unchanged(model):
        applied = apply_placement(model, _rotated(model))
        seen = [applied.attached]
        for _ in range(2):
            applied.detach()
            seen.append(applied.attached)
    assert seen == [True, False, False]


def test_an_error_inside_the_block_detaches() -> None:
    """A failing forward pass leaves the ``with`` block with the model restored."""
    model = _model("mixtral")
    with unchanged(model), pytest.raises(IndexError), apply_placement(model, _rotated(model)):
        model(torch.tensor([[1000]]))


def test_applying_twice_is_refused() -> None:
    """The second placement is refused and the first stays."""
    model = _model("mixtral")
    with apply_placement(model, _rotated(model)) as first:
        with pytest.raises(InputError, match="already runs with a placement; detach it"):
            apply_placement(model, _doubled(model))
        assert first.attached
    apply_placement(model, _doubled(model)).detach()


@pytest.mark.parametrize("fail_at", range(8))
def test_a_failure_midway_leaves_the_model_as_it_was(fail_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the 8 tensors runs out of memory, nothing has changed."""
    model = _model("olmoe")
    real, calls = hook._rows, iter(range(100))

    def failing(tensor: torch.Tensor, index: Any) -> torch.Tensor:
        if next(calls) == fail_at:
            raise MemoryError("no room")
        return real(tensor, index)

    placement = _rotated(model)
    with unchanged(model), monkeypatch.context() as patch:
        patch.setattr(hook, "_rows", failing)
        with pytest.raises(MemoryError, match="no room"):
            apply_placement(model, placement)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"physical_to_logical_map_LS": np.tile(np.arange(6), (3, 1))}, "has 3 MoE layers, the model 4"),
        (
            {"physical_to_logical_map_LS": np.tile(np.arange(6) % 5, (4, 1)), "num_experts": 5},
            "has 5 experts per layer, the model 6",
        ),
        (
            {"moe_layer_ids": (1, 2, 3, 4)},
            r"for decoder layers \[1, 2, 3, 4\], the model's MoE layers are \[0, 1, 2, 3\]",
        ),
    ],
)
def test_a_placement_of_another_model_is_refused(changes: dict[str, Any], message: str) -> None:
    """Layers, experts and decoder layer ids are compared, and the message has both numbers."""
    model = _model("olmoe")
    placement = _rotated(model, **changes)
    with unchanged(model), pytest.raises(InputError, match=message):
        apply_placement(model, placement)


def test_layer_ids_that_match_are_accepted() -> None:
    """A model whose first layer is dense takes a placement that says so."""
    model = _model("qwen2_moe")
    with apply_placement(model, _rotated(model, moe_layer_ids=(1, 2, 3))) as applied:
        assert applied.attached


def _share(model: Any) -> None:
    model.model.layers[2].mlp.experts.down_proj = model.model.layers[0].mlp.experts.down_proj


def _quantise(model: Any) -> None:
    model.model.layers[1].mlp.experts.register_buffer("down_proj_scale", torch.ones(EXPERTS))


def _shard(model: Any) -> None:
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj[:3].detach())


def _offload(model: Any) -> None:
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to("meta"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_share, "down_proj of the experts of decoder layer 0 is shared"),
        (_quantise, "the experts of decoder layer 1 hold down_proj_scale, which a placement cannot move"),
        (_shard, "down_proj of the experts of decoder layer 1 holds 3 of 6 experts"),
        (_offload, "down_proj of the experts of decoder layer 1 is offloaded"),
    ],
)
def test_experts_that_cannot_be_moved_are_refused(spoil: Any, message: str) -> None:
    """Shared, quantised, sharded and offloaded experts are refused before anything changes."""
    model = tiny_model("olmoe")
    spoil(model)
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    with pytest.raises(InputError, match=message):
        apply_placement(model, _rotated(model))
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before


def test_a_model_moved_meanwhile_is_restored_where_it_is() -> None:
    """Converting the model while a placement is applied converts what detach gives back."""
    model = tiny_model("olmoe")
    expected = model.model.layers[0].mlp.experts.down_proj.detach().double()
    applied = apply_placement(model, _rotated(model))
    model.double()
    applied.detach()
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, expected)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float64}
