"""The adapters find every MoE layer of every family, and say what they do not support."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from routing_reference import RULES, randomise_biases, reference_top_k
from torch import nn

import placement.runtime.families as package
from placement.errors import InputError
from placement.runtime.families.registry import family_named, family_of, moe_layers_of, supported_families
from placement.runtime.families.training import FRAMEWORKS
from placement.runtime.families.transformers_v5 import NOT_SUPPORTED
from placement.runtime.tiny import tiny_model

FAMILIES = tuple(sorted(set(supported_families()) - {one.model_type for one in FRAMEWORKS}))
RECORD_ONLY = ("dbrx", "jetmoe", "longcat_flash")
GROUPED = {"n_group": 2, "num_expert_group": 2, "topk_group": 1}
GREEDY_GROUPS = ("deepseek_ocr2_text", "deepseek_v2", "unlimited_ocr_text")


@cache
def _model(model_type: str) -> Any:
    """Two layers of 8 experts in two groups where the family knows groups, with biases that matter."""
    options = GROUPED | ({"topk_method": "group_limited_greedy"} if model_type in GREEDY_GROUPS else {})
    top_k = 2 if model_type == "phimoe" else 3  # Phi-MoE's selection is written for two
    model = tiny_model(model_type, num_layers=2, num_experts=8, top_k=top_k, **options)
    randomise_biases(model)
    return model


def _tokens() -> torch.Tensor:
    return torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(0))


def test_the_registry_finds_files_and_tables() -> None:
    """Every file that defines FAMILY, and every entry of a table FAMILIES, is found under its model type."""
    folder = Path(package.__path__[0])
    defining = {file.stem for file in folder.glob("*.py") if "\nFAMILY = " in file.read_text()}
    tables = {file.stem for file in folder.glob("*.py") if "\nFAMILIES: " in file.read_text()}
    assert (defining, tables) == ({"llama4"}, {"training", "transformers_v5"})
    assert {"llama4_text", "olmoe", "gpt_oss", "megatron"} <= set(supported_families())
    assert not set(supported_families()) & set(NOT_SUPPORTED)


def test_every_family_of_the_installed_transformers_is_known() -> None:
    """Whatever model of the library has routed experts is supported, or refused with its reason."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    known = {model_type_to_module_name(name) for name in (*FAMILIES, *NOT_SUPPORTED)}
    known |= {model_type_to_module_name(name.removesuffix("_text")) for name in (*FAMILIES, *NOT_SUPPORTED)}
    known |= {"step3p7"}  # its language model calls itself step3p5
    folder = Path(transformers.__path__[0]) / "models"
    routed = {
        file.parent.name
        for file in folder.glob("*/modeling_*.py")
        if any(
            word in file.read_text()
            for word in ("use_experts_implementation\n", "TopKRouter(", "self.experts =")
        )
    }
    of_configs = {model_type_to_module_name(name) for name in CONFIG_MAPPING_NAMES}
    assert routed & of_configs - known == set()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_ids_are_what_the_family_selects(model_type: str) -> None:
    """Ids read from the routers' outputs are those of the family's rule, groups and biases included."""
    model = _model(model_type)
    family, layers = family_of(model), moe_layers_of(model)
    actual: list[Any] = []
    expected: list[Any] = []
    hooks = []
    for layer in layers:

        def compare(router: nn.Module, args: Any, kwargs: Any, output: Any, layer: Any = layer) -> None:
            given = (*args, *kwargs.values())
            actual.append(np.sort(family.read_top_k(output, layer).numpy(), axis=1))
            expected.append(reference_top_k(model_type, router, given, layer.top_k))

        hooks.append(layer.router.register_forward_hook(compare, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=_tokens())
    for hook in hooks:
        hook.remove()
    assert len(actual) == len(layers)
    assert np.array_equal(actual, expected)


def test_hash_routing_is_read_from_the_token_table() -> None:
    """DeepSeek-V4's first layers look experts up by token id; recorded ids are the table's rows."""
    model: Any = tiny_model("deepseek_v4", num_layers=2, mlp_layer_types=["hash_moe", "moe"])
    family, layer = family_of(model), moe_layers_of(model)[0]
    layer.router.tid2eid.copy_(torch.stack([torch.randperm(6)[:2] for _ in range(32)]))
    seen: list[torch.Tensor] = []
    layer.router.register_forward_hook(
        lambda router, args, output: seen.append(family.read_top_k(output, layer))
    )
    with torch.no_grad():
        model(input_ids=_tokens())
    assert torch.equal(seen[0], layer.router.tid2eid[_tokens().flatten()])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_layer_is_found_in_order(model_type: str) -> None:
    """Layers have their real shape; LongCat's last experts compute nothing but are chosen like others."""
    layers = moe_layers_of(tiny_model(model_type, num_layers=2, num_experts=5, top_k=3))
    first = 1 if model_type == "nemotron_h" else 0  # its first layer is attention
    assert [layer.decoder_layer for layer in layers] == list(range(first, 2))
    experts = 7 if model_type == "longcat_flash" else 5
    assert {(layer.num_experts, layer.top_k) for layer in layers} == {(experts, 3)}


@pytest.mark.parametrize("model_type", [one for one in FAMILIES if one not in RECORD_ONLY])
def test_the_expert_tensors_are_all_there_are(model_type: str) -> None:
    """The named tensors are all of the experts module's, and run over the experts."""
    for layer in moe_layers_of(_model(model_type)):
        named = dict(layer.experts.named_parameters()) | dict(layer.experts.named_buffers())
        assert set(named) == {*layer.expert_tensors, *layer.common_tensors}
        assert {named[name].shape[0] for name in layer.expert_tensors} == {8}


def test_what_can_only_be_recorded_says_why() -> None:
    """Families without movable experts have a reason, all others have none."""
    assert {name for name in FAMILIES if family_named(name).record_only} == set(RECORD_ONLY)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_bare_decoder_has_the_same_layers(model_type: str) -> None:
    """A model and its decoder without a head give the same modules."""
    model = _model(model_type)
    decoder = family_of(model).decoder(model)
    assert [layer.router for layer in moe_layers_of(model)] == [
        layer.router for layer in moe_layers_of(decoder)
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


def test_leading_dense_layers_are_skipped() -> None:
    """DeepSeek-V3's first layers are dense."""
    layers = moe_layers_of(tiny_model("deepseek_v3", num_layers=3, first_k_dense_replace=2))
    assert [layer.decoder_layer for layer in layers] == [2]


def test_replacing_top_k_leaves_the_rest() -> None:
    """Only the third output changes, and it is the object given."""
    family, layer = family_named("olmoe"), moe_layers_of(_model("olmoe"))[0]
    logits, scores, index = torch.rand(3, 4), torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    replaced = family.replace_top_k((logits, scores, index), index + 1, layer, 4)
    assert replaced[0] is logits
    assert replaced[1] is scores
    assert torch.equal(family.read_top_k(replaced, layer), index + 1)


def test_dense_scores_move_to_slots() -> None:
    """Llama-4's scores go to the slots that serve the token, by hand: expert 1 is in slots 0 and 2."""
    family, model = family_named("llama4_text"), tiny_model("llama4_text", num_experts=2, top_k=1)
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    scores = torch.tensor([[0.0, 0.9], [0.95, 0.0]])
    replaced = family.replace_top_k((scores, logits), torch.tensor([[2], [1]]), moe_layers_of(model)[0], 3)
    assert replaced[0].tolist() == torch.tensor([[0.0, 0.0, 0.9], [0.0, 0.95, 0.0]]).tolist()
    assert replaced[1] is logits


def test_a_language_model_inside_another_is_found() -> None:
    """A model of several parts goes by the type of its language model, however deep it is."""
    assert family_named("llama4", {"text_config": {"model_type": "llama4_text"}}).model_type == "llama4_text"
    omni = {"thinker_config": {"text_config": {"model_type": "qwen3_omni_moe_text"}}}
    assert family_named("qwen3_omni_moe", omni).model_type == "qwen3_omni_moe_text"


def test_two_decoders_are_refused() -> None:
    """A model that speaks with two language models does not say which one to record."""
    pair = nn.ModuleList([tiny_model("olmoe"), tiny_model("olmoe")])
    with pytest.raises(
        InputError, match=r"has 2 decoders with MoE layers \(OlmoeModel, OlmoeModel\); pass one"
    ):
        family_named("olmoe").decoder(pair)


def test_an_unknown_type_names_the_nearest() -> None:
    """The message has the unknown type, the closest one, some others and the way without an adapter."""
    with pytest.raises(
        InputError, match=r"'qwen3_mo'; did you mean 'qwen3_moe'\? \d+ types .*mixtral.*--router"
    ):
        family_named("qwen3_mo")


def test_a_type_that_cannot_be_supported_says_why() -> None:
    """The reason stands in the message."""
    with pytest.raises(
        InputError, match="'switch_transformers' is not supported: it is an encoder and a decoder"
    ):
        family_named("switch_transformers")


def test_a_model_without_configuration_is_refused() -> None:
    """A plain torch module is no transformers model; it can be recorded by its routers' names."""
    with pytest.raises(InputError, match=r"Linear has no config\.model_type; .*GenericFamily"):
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


def test_rules_are_of_families_that_exist() -> None:
    """No rule of the reference is left over."""
    assert set(RULES) <= set(FAMILIES)
