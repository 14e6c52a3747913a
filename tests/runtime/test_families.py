"""The adapters find every MoE layer of every family, and say what they do not support."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import placement.runtime.families as package
from placement.errors import InputError
from placement.runtime.families.registry import family_named, family_of, moe_layers_of, supported_families
from placement.runtime.tiny import tiny_model

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def test_the_registry_finds_one_family_per_file() -> None:
    """Every file that defines FAMILY is found under its model type, which is the file's name."""
    folder = Path(package.__path__[0])
    defining = {file.stem for file in folder.glob("*.py") if "\nFAMILY = " in file.read_text()}
    assert defining == set(supported_families()) == set(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_layer_is_found_in_order(model_type: str) -> None:
    """A model without dense layers has one MoE layer per decoder layer, with its real shape."""
    layers = moe_layers_of(tiny_model(model_type, num_layers=4, num_experts=5, top_k=3))
    assert [layer.decoder_layer for layer in layers] == [0, 1, 2, 3]
    assert {(layer.num_experts, layer.top_k) for layer in layers} == {(5, 3)}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_expert_tensors_are_all_there_are(model_type: str) -> None:
    """The named tensors are all parameters of the experts module, and run over the experts."""
    for layer in moe_layers_of(tiny_model(model_type)):
        named = dict(layer.experts.named_parameters())
        assert set(named) == set(layer.expert_tensors)
        assert {tensor.shape[0] for tensor in named.values()} == {6}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_bare_decoder_has_the_same_layers(model_type: str) -> None:
    """A model and its decoder without a head give the same modules."""
    model = tiny_model(model_type)
    assert [layer.router for layer in moe_layers_of(model)] == [
        layer.router for layer in moe_layers_of(model.base_model)
    ]


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    ("config", "expected"),
    [({"mlp_only_layers": [0, 2]}, [1, 3]), ({"decoder_sparse_step": 3}, [2])],
)
def test_dense_layers_are_skipped(model_type: str, config: dict[str, Any], expected: list[int]) -> None:
    """Decoder layers that the configuration makes dense do not count."""
    layers = moe_layers_of(tiny_model(model_type, num_layers=4, **config))
    assert [layer.decoder_layer for layer in layers] == expected


@pytest.mark.parametrize("model_type", FAMILIES)
def test_top_k_is_what_the_router_selects(model_type: str) -> None:
    """The ids read from a router's output are the k largest of its logits."""
    model = tiny_model(model_type)
    router: Any = moe_layers_of(model)[0].router
    hidden = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    output = router(hidden)
    expected = (hidden @ router.weight.T).topk(2, dim=1).indices
    assert torch.equal(family_of(model).read_top_k(output), expected)


def test_replacing_top_k_leaves_the_rest() -> None:
    """Only the third output changes, and it is the object given."""
    family = family_named("olmoe")
    logits, scores, index = torch.rand(3, 4), torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    replaced = family.replace_top_k((logits, scores, index), index + 1)
    assert replaced[0] is logits
    assert replaced[1] is scores
    assert torch.equal(family.read_top_k(replaced), index + 1)


def test_an_unknown_type_names_the_nearest() -> None:
    """The message has the unknown type, the closest one and all others."""
    with pytest.raises(InputError, match=r"'qwen3_mo'; did you mean 'qwen3_moe'\? known: mixtral, olmoe, "):
        family_named("qwen3_mo")


def test_a_model_without_configuration_is_refused() -> None:
    """A plain torch module is no transformers model."""
    with pytest.raises(InputError, match=r"Linear has no config\.model_type"):
        family_of(nn.Linear(2, 2))


def test_a_wholly_dense_model_is_refused() -> None:
    """A supported type whose layers are all dense has nothing to place."""
    model = tiny_model("qwen3_moe", mlp_only_layers=[0, 1, 2])
    with pytest.raises(InputError, match="qwen3_moe model has no MoE layers"):
        moe_layers_of(model)


def test_experts_that_are_not_fused_are_refused() -> None:
    """A list of expert modules (transformers 4) is named as what it is."""
    model = tiny_model("olmoe")
    model.model.layers[1].mlp.experts = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(InputError, match=r"decoder layer 1 hold no fused tensors.*transformers 5"):
        moe_layers_of(model)


def test_a_model_without_decoder_layers_is_refused() -> None:
    """A wrapper that hides the layers is refused by name."""
    model = tiny_model("olmoe")
    model.model.layers = nn.Identity()
    with pytest.raises(InputError, match="OlmoeForCausalLM has no decoder layers"):
        moe_layers_of(model)


def test_layers_of_different_shape_are_refused() -> None:
    """A placement has one number of experts for all layers."""
    model = tiny_model("olmoe")
    model.model.layers[2].mlp.gate.num_experts = 4
    with pytest.raises(InputError, match=r"differ in \(experts, top-k\): \[\(4, 2\), \(6, 2\)\]"):
        moe_layers_of(model)
