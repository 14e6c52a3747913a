"""Tests of model shapes: presets, Hugging Face configurations, YAML files, sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from placement.errors import InputError
from placement.model import (
    MODELS,
    ModelShape,
    bits_per_weight,
    match_model,
    model_from_config,
    preset_model,
    resolve_model,
)
from placement.model_presets import ALIASES

TINY = ModelShape(name="tiny", num_layers=2, num_experts=4, top_k=2, hidden_size=8, expert_hidden_size=16)

MIXTRAL = {
    "model_type": "mixtral",
    "num_hidden_layers": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "torch_dtype": "bfloat16",
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "moe_layer_freq": 1,
    "n_group": 8,
    "topk_group": 4,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def write_json(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [
        ("mixtral-8x7b", 352.3),
        ("mixtral-8x22b", 604.0),
        ("olmoe-1b-7b", 12.6),
        ("qwen2-57b-a14b", 55.1),
        ("qwen3-30b-a3b", 9.4),
        ("qwen3-235b-a22b", 37.7),
        ("deepseek-v2-lite", 17.3),
        ("deepseek-v2", 47.2),
        ("deepseek-v3", 88.1),
        ("kimi-k2", 88.1),
        ("gpt-oss-20b", 49.8),
        ("gpt-oss-120b", 49.8),
        ("llama-4-maverick", 251.7),
        ("llama-4-scout", 251.7),
        ("glm-4.5", 47.2),
        ("glm-4.5-air", 34.6),
        ("minimax-m2", 28.3),
    ],
)
def test_expert_size_in_bf16(name: str, megabytes: float) -> None:
    """An expert of three matrices takes 6 x hidden x inner width bytes in bf16 (published figures)."""
    assert MODELS[name].bytes_per_expert("bf16") / 1e6 == pytest.approx(megabytes, abs=0.05)


def test_expert_size_as_published() -> None:
    """DeepSeek-V3 is published in fp8 (44.0 MB an expert), gpt-oss in mxfp4 (4.25 bits: 13.2 MB)."""
    assert MODELS["deepseek-v3"].bytes_per_expert() == 3 * 7168 * 2048
    assert MODELS["deepseek-v3"].bytes_per_expert() / 1e6 == pytest.approx(44.0, abs=0.05)
    assert MODELS["gpt-oss-120b"].bytes_per_expert() == 3 * 2880 * 2880 * 17 // 32
    assert MODELS["gpt-oss-120b"].bytes_per_expert() / 1e6 == pytest.approx(13.2, abs=0.05)


def test_sizes_of_a_tiny_expert() -> None:
    """3 matrices of 8 x 16: 384 weights, 768 FLOPs a token; a bf16 token of width 8 is 16 bytes."""
    assert (TINY.params_per_expert, TINY.flops_per_pair) == (384, 768)
    assert (TINY.token_bytes(), TINY.token_bytes("fp8")) == (16, 8)
    sizes = {
        dtype: TINY.bytes_per_expert(dtype) for dtype in ("fp32", "bf16", "fp16", "fp8", "int8", "mxfp4")
    }
    assert sizes == {"fp32": 1536, "bf16": 768, "fp16": 768, "fp8": 384, "int8": 384, "mxfp4": 204}
    assert replace(TINY, matrices_per_expert=2).params_per_expert == 256


def test_dtype_names_of_torch_are_known() -> None:
    """Weight types go by torch's names too."""
    assert bits_per_weight("torch.bfloat16") == bits_per_weight("bf16") == 16
    assert replace(TINY, weight_dtype="float8_e4m3fn").weight_dtype == "fp8"


def test_unknown_dtype_names_the_nearest() -> None:
    """A misspelt weight type gets a suggestion."""
    with pytest.raises(InputError, match=r"unknown weight type 'bf15'; did you mean 'bf16'\?"):
        TINY.bytes_per_expert("bf15")


# -------------------------------------------------------------------------------------------- the shape


def test_defaults_are_filled_in() -> None:
    """Without dense layers or groups, every decoder layer is a MoE layer and one group holds all."""
    assert (TINY.num_decoder_layers, TINY.moe_layer_ids) == (2, (0, 1))
    assert (TINY.num_expert_groups, TINY.top_groups) == (1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "model 'tiny': num_layers is 0; it must be 1 or more"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"num_shared_experts": -1}, "num_shared_experts is -1"),
        ({"top_k": 5}, "top-5 of 4 experts is impossible"),
        ({"num_expert_groups": 3, "top_groups": 1}, "4 experts do not form 3 equal groups"),
        ({"num_expert_groups": 2, "top_groups": 3}, "top_groups is 3 of 2 groups"),
        ({"num_expert_groups": 4, "top_groups": 1}, "1 of 4 groups hold 1 experts, fewer than top-2 needs"),
        ({"moe_layer_ids": (0,)}, "moe_layer_ids names 1 layers, num_layers is 2"),
        ({"moe_layer_ids": (1, 0)}, "must be ascending and 0 or more"),
        ({"moe_layer_ids": (-1, 0)}, "must be ascending and 0 or more"),
        ({"moe_layer_ids": (1, 2)}, "MoE layer 2 is outside its 2 decoder layers"),
        ({"num_decoder_layers": 3, "moe_layer_ids": ()}, "moe_layer_ids names 0 layers"),
        ({"num_decoder_layers": 10**9}, "at most 10000 are accepted"),
    ],
)
def test_shape_rejects_contradictions(change: dict[str, Any], message: str) -> None:
    """Numbers that contradict each other are refused, naming the model."""
    with pytest.raises(InputError, match=message):
        replace(TINY, **change)


# ---------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("name", "moe", "decoder", "first", "experts", "top_k", "shared"),
    [
        ("mixtral-8x7b", 32, 32, 0, 8, 2, 0),
        ("deepseek-v2-lite", 26, 27, 1, 64, 6, 2),
        ("deepseek-v2", 59, 60, 1, 160, 6, 2),
        ("deepseek-v3", 58, 61, 3, 256, 8, 1),
        ("kimi-k2", 60, 61, 1, 384, 8, 1),
        ("gpt-oss-20b", 24, 24, 0, 32, 4, 0),
        ("gpt-oss-120b", 36, 36, 0, 128, 4, 0),
        ("llama-4-maverick", 24, 48, 1, 128, 1, 1),
        ("glm-4.5", 89, 92, 3, 160, 8, 1),
        ("glm-4.5-air", 45, 46, 1, 128, 8, 1),
        ("minimax-m2", 62, 62, 0, 256, 8, 0),
    ],
)
def test_preset_layers(
    name: str, moe: int, decoder: int, first: int, experts: int, top_k: int, shared: int
) -> None:
    """Presets have the published layer maps: dense first layers, every second layer of Maverick."""
    model = MODELS[name]
    assert (model.num_layers, model.num_decoder_layers, model.moe_layer_ids[0]) == (moe, decoder, first)
    assert (model.num_experts, model.top_k, model.num_shared_experts) == (experts, top_k, shared)


def test_maverick_interleaves() -> None:
    """Odd decoder layers of Llama-4-Maverick hold experts."""
    assert MODELS["llama-4-maverick"].moe_layer_ids == tuple(range(1, 48, 2))


def test_group_limited_presets() -> None:
    """DeepSeek-V2 routes within 3 of 8 groups, V3 within 4 of 8; V2-Lite and Kimi-K2 have one group."""
    groups = {name: (m.num_expert_groups, m.top_groups) for name, m in MODELS.items()}
    assert {name: pair for name, pair in groups.items() if pair != (1, 1)} == {
        "deepseek-v2": (8, 3),
        "deepseek-v3": (8, 4),
    }


@pytest.mark.parametrize(
    "name", ["DeepSeek-R1", "dsv3", "deepseek_v3", "deepseek-ai/DeepSeek-V3-0324", "Deepseek V3"]
)
def test_preset_by_other_names(name: str) -> None:
    """Case, underscores, organisations and aliases lead to the preset."""
    assert preset_model(name) is resolve_model(name) is MODELS["deepseek-v3"]


def test_aliases_point_to_presets() -> None:
    """No alias is dead or hides a preset."""
    assert set(ALIASES.values()) <= set(MODELS)
    assert not set(ALIASES) & set(MODELS)


def test_unknown_model_names_the_nearest() -> None:
    """A misspelt model gets a suggestion, and how to describe one's own."""
    with pytest.raises(
        InputError, match=r"unknown model 'mixtrl-8x7b'; did you mean 'mixtral-8x7b'\?.*\.yaml"
    ):
        resolve_model("mixtrl-8x7b")


def test_match_model_by_moe_layers() -> None:
    """A trace of 58 layers x 256 experts, top-8 is DeepSeek-V3's."""
    assert match_model(58, 256, 8) is MODELS["deepseek-v3"]
    assert match_model(24, 32) is MODELS["gpt-oss-20b"]


def test_match_model_by_all_layers() -> None:
    """A trace that counts dense layers too is matched by decoder layers, after MoE layers."""
    assert match_model(61, 256, 8) is MODELS["deepseek-v3"]
    assert match_model(62, 256, 8) is MODELS["minimax-m2"]


def test_match_model_admits_ignorance() -> None:
    """Without a preset of that shape, nothing is guessed."""
    assert match_model(58, 256, 4) is None
    assert match_model(3, 7, 2) is None


def test_match_model_refuses_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two presets of one shape are ambiguous."""
    monkeypatch.setitem(MODELS, "twin", replace(MODELS["mixtral-8x7b"], name="twin", hidden_size=2048))
    assert match_model(32, 8, 2) is None


# --------------------------------------------------------------------------------------- configurations


def same_but_name(a: ModelShape, b: ModelShape) -> bool:
    return replace(a, name=b.name) == b


def test_config_of_mixtral() -> None:
    """Mixtral's configuration gives the preset."""
    model = model_from_config(MIXTRAL)
    assert model.name == "mixtral"
    assert same_but_name(model, MODELS["mixtral-8x7b"])


def test_config_of_deepseek_v3() -> None:
    """DeepSeek-V3's configuration gives dense layers, groups, shared expert and fp8."""
    assert same_but_name(model_from_config(DEEPSEEK_V3, name="x"), MODELS["deepseek-v3"])


def test_config_of_deepseek_v2_lite() -> None:
    """Greedy routing ignores groups; null values are as good as absent."""
    config = {
        **DEEPSEEK_V3,
        "num_hidden_layers": 27,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "hidden_size": 2048,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": None,
        "topk_method": "greedy",
        "topk_group": None,
        "quantization_config": None,
    }
    assert same_but_name(model_from_config(config), MODELS["deepseek-v2-lite"])


def test_config_of_qwen2_moe() -> None:
    """A shared expert may be told by its width alone."""
    config = {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 28,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "moe_intermediate_size": 2560,
        "shared_expert_intermediate_size": 20480,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "dtype": "bfloat16",
    }
    assert same_but_name(model_from_config(config), MODELS["qwen2-57b-a14b"])


def test_config_of_gpt_oss() -> None:
    """gpt-oss is mxfp4 by its quantisation."""
    config = {
        "num_hidden_layers": 36,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    assert same_but_name(model_from_config(config), MODELS["gpt-oss-120b"])


@pytest.mark.parametrize("layers", [{"interleave_moe_layer_step": 2}, {"moe_layers": list(range(1, 48, 2))}])
def test_config_of_llama_4(layers: dict[str, Any]) -> None:
    """The language model may be nested; Llama-4's shared expert is part of its architecture."""
    text = {
        "model_type": "llama4_text",
        "num_hidden_layers": 48,
        "num_local_experts": 128,
        "num_experts_per_tok": 1,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        **layers,
    }
    config = {"model_type": "llama4", "text_config": text, "torch_dtype": "bfloat16", "hidden_size": 1}
    model = model_from_config(config)
    assert model.name == "llama4"
    assert same_but_name(model, MODELS["llama-4-maverick"])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"first_k_dense_replace": 2}, (2, 3, 4, 5)),
        ({"num_dense_layers": 4}, (4, 5)),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4)),
        ({"moe_layer_freq": [0, 1, 1, 0, 0, 1]}, (1, 2, 5)),
        ({"decoder_sparse_step": 3}, (2, 5)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 5)),
        ({"interleave_moe_layer_step": 2}, (1, 3, 5)),
        ({"moe_layers": [4, 0]}, (0, 4)),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, (1, 3, 5)),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 4, "moe_layer_interval": 1}, (1, 2, 3, 4)),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 2}, (1, 3, 5)),
        ({"mlp_layer_types": ["dense", *["sparse"] * 5]}, (1, 2, 3, 4, 5)),
        ({"layers_block_type": ["mamba", "moe", "attention", "moe", "mamba", "moe"]}, (1, 3, 5)),
        ({"hybrid_override_pattern": "MEM*-E"}, (1, 5)),
    ],
)
def test_layer_rules(rule: dict[str, Any], expected: tuple[int, ...]) -> None:
    """Each family's way to say which layers hold experts is understood."""
    model = model_from_config({**MIXTRAL, "num_hidden_layers": 6, **rule})
    assert (model.moe_layer_ids, model.num_layers, model.num_decoder_layers) == (expected, len(expected), 6)


def test_experts_without_a_gate() -> None:
    """Experts with a squared ReLU have two matrices."""
    assert model_from_config({**MIXTRAL, "mlp_hidden_act": "relu2"}).matrices_per_expert == 2


def test_config_of_dbrx() -> None:
    """DBRX keeps the experts in ffn_config and has its own names for widths and layers."""
    ffn = {"moe_num_experts": 16, "moe_top_k": 4, "ffn_hidden_size": 10752}
    model = model_from_config({"model_type": "dbrx", "d_model": 6144, "n_layers": 40, "ffn_config": ffn})
    assert (model.num_layers, model.num_experts, model.top_k) == (40, 16, 4)
    assert (model.hidden_size, model.expert_hidden_size) == (6144, 10752)


@pytest.mark.parametrize(("num_bits", "kind", "expected"), [(8, "float", "fp8"), (8, "int", "int8")])
def test_compressed_tensors(num_bits: int, kind: str, expected: str) -> None:
    """Eight-bit compressed tensors are understood."""
    group = {"weights": {"num_bits": num_bits, "type": kind}}
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    assert model_from_config({**MIXTRAL, "quantization_config": quantization}).weight_dtype == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_local_experts": None},
            "describes no Mixture-of-Experts model: none of num_experts, num_local_ex",
        ),
        ({"num_local_experts": 0}, "describes no Mixture-of-Experts model"),
        ({"num_experts_per_tok": None}, "does not give the experts per token: none of num_experts_per_tok, "),
        ({"hidden_size": None}, "does not give the hidden size: none of hidden_size, d_model"),
        (
            {"intermediate_size": None},
            "does not give the inner width of an expert: none of moe_intermediate_size",
        ),
        ({"num_hidden_layers": None}, "does not give the number of layers: none of num_hidden_layers"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers must be an integer of 0 or more, not '32'"),
        ({"num_hidden_layers": 10**12}, "1000000000000 layers; at most 10000 are accepted"),
        ({"hidden_size": True}, "hidden_size must be an integer of 0 or more, not True"),
        ({"first_k_dense_replace": 99}, "none of the 32 layers is a MoE layer"),
        ({"moe_layers": [40]}, "moe_layers names layer 40 of 32"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers must be a list of integers, not 'all'"),
        ({"moe_layer_end_index": "x"}, "moe_layer_end_index must be an integer"),
        ({"moe_latent_size": 128}, r"experts of a latent width \(moe_latent_size\) are not supported"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            r"quant_method 'awq'\) is not known; give the model",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"g": {"weights": []}},
                }
            },
            "quant_method 'compressed-tensors'",
        ),
        ({"torch_dtype": "bfloat17"}, "unknown weight type 'bfloat17'"),
        ({"num_experts_per_tok": 9}, "top-9 of 8 experts is impossible"),
    ],
)
def test_wrong_config_is_explained(change: dict[str, Any], message: str) -> None:
    """A missing or wrong fact is one line that names the keys."""
    with pytest.raises(InputError, match=message) as caught:
        model_from_config({**MIXTRAL, **change})
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ files


def test_directory_with_config(tmp_path: Path) -> None:
    """A checkpoint directory gives its configuration's shape and its own name."""
    folder = tmp_path / "My-Mixtral"
    folder.mkdir()
    write_json(folder / "config.json", MIXTRAL)
    assert resolve_model(folder).name == resolve_model(str(folder / "config.json")).name == "My-Mixtral"
    assert same_but_name(resolve_model(folder), MODELS["mixtral-8x7b"])


def test_json_file_is_a_config(tmp_path: Path) -> None:
    """A configuration under another file name is named after the file."""
    assert resolve_model(write_json(tmp_path / "v3.json", DEEPSEEK_V3)).name == "v3"


def test_directory_without_config(tmp_path: Path) -> None:
    """A directory that holds no configuration is said to."""
    with pytest.raises(InputError, match=r"model directory '.*' has no config\.json"):
        resolve_model(tmp_path)


def test_empty_directory_does_not_hide_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A results folder that is called like a preset changes nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dsv3").mkdir()
    assert resolve_model("dsv3") is MODELS["deepseek-v3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"is not valid JSON: Expecting property name .* line 1 column 2"),
        ("[" * 100_000, "is not valid JSON: nested too deeply"),
        ("1" * 5000, "is not valid JSON: Exceeds the limit"),
        ("[]", r"must hold a mapping, not \[\]"),
    ],
)
def test_wrong_json_is_explained(tmp_path: Path, text: str, message: str) -> None:
    """A broken configuration file is one line with the file."""
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        resolve_model(path)
    assert str(path) in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    """A path that ends like a file is never taken for a preset."""
    with pytest.raises(InputError, match=r"model configuration '.*none\.json' cannot be read"):
        resolve_model(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"model file '.*none\.yaml' cannot be read"):
        resolve_model(tmp_path / "none.yaml")


def test_yaml_file_has_the_fields_of_the_shape(tmp_path: Path) -> None:
    """A model of one's own is a few lines of YAML."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "{num_layers: 2, num_experts: 8, top_k: 2, hidden_size: 64, expert_hidden_size: 32,"
        " weight_dtype: fp8, num_decoder_layers: 4, moe_layer_ids: [1, 3],"
        " num_expert_groups: 4, top_groups: 2}",
        encoding="utf-8",
    )
    assert resolve_model(path) == ModelShape(
        name="mine",
        num_layers=2,
        num_experts=8,
        top_k=2,
        hidden_size=64,
        expert_hidden_size=32,
        weight_dtype="fp8",
        num_decoder_layers=4,
        moe_layer_ids=(1, 3),
        num_expert_groups=4,
        top_groups=2,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{num_layer: 2}", r"has the unknown key 'num_layer'; did you mean 'num_layers'\?"),
        ("{num_layers: 2}", "num_experts is missing"),
        (
            "{num_layers: x, num_experts: 8, top_k: 2, hidden_size: 64, expert_hidden_size: 32}",
            "num_layers must be an integer from 0 to .*, not 'x'",
        ),
    ],
)
def test_wrong_yaml_is_explained(tmp_path: Path, text: str, message: str) -> None:
    """A wrong model file is one line with the key."""
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        resolve_model(path)
