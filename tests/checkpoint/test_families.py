"""The proof on real code: models of many families compute the same from a permuted checkpoint.

Shape letters: T tokens, V vocabulary, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensor_files import digests
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from placement.checkpoint import permute_checkpoint, restore_checkpoint
from placement.checkpoint.config import read_facts
from placement.checkpoint.shards import find_shards
from placement.checkpoint.survey import survey_checkpoint
from placement.formats.permutation import Permutation
from placement.runtime.verify import RELATIVE_TOLERANCE

E = 8
GROUPS = 2
TOKENS = 32
SHARD_BYTES = 40_000

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model"), 16),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "intermediate_size_mlp"), 24),
    **dict.fromkeys(("expert_ffn_hidden_size", "ffn_hidden_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_heads", "num_layers"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(
        ("first_k_dense_replace", "num_dense_layers", "n_shared_experts", "num_shared_experts"), 1
    ),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "o_lora_rank", "global_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "sliding_window"), 16),
    **dict.fromkeys(("index_n_heads", "linear_num_key_heads", "linear_num_value_heads", "o_groups"), 2),
    **dict.fromkeys(("num_global_key_value_heads", "hc_mult", "interleave_moe_layer_step"), 2),
    **dict.fromkeys(("n_group", "num_expert_group"), GROUPS),
    "topk_group": 1,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "zero_expert_num": 4,
    "index_topk": 4,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""Sizes of tiny models under every family's names; weights wide enough that routers have opinions."""

LISTS = ("layer_types", "mlp_layer_types", "layers_block_type")

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "deepseek_v3": {},
    "deepseek_v4": {},
    "ernie4_5_moe": {},
    "gemma4_text": {},
    "glm4_moe": {},
    "gpt_oss": {},
    "granitemoe": {},
    "hunyuan_v1_moe": {},
    "jamba": {"use_mamba_kernels": False},
    "jetmoe": {},
    "kolibri1": {},
    "laguna": {},
    "llama4_text": {},
    "longcat_flash": {},
    "minimax_m2": {},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
}


LAYERS_WITHOUT_TOP_K = {"deepseek_v4": 2, "phimoe": 4}
"""First layers whose routers call no topk: they look experts up by token, or take the largest twice."""


def tiny(family: str) -> PreTrainedModel:
    """Build a random model; what would start as zeros, such as routers' biases, is random too."""
    kind = CONFIG_MAPPING[family]
    defaults = kind().to_dict()
    sizes = {key: value for key, value in SIZES.items() if key in defaults}
    lists = {
        key: defaults[key][:2] + defaults[key][-2:] for key in LISTS if isinstance(defaults.get(key), list)
    }
    build: Any = AutoModelForCausalLM  # untyped there
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = build.from_config(kind(**(sizes | lists | FAMILIES[family])))
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith("tid2eid"):
                    tensor.copy_(torch.rand(tensor.shape[0], E).argsort(dim=1)[:, : tensor.shape[1]])
                elif tensor.is_floating_point() and ("bias" in name or not tensor.any()):
                    tensor.normal_(0, 0.3)
    return model.eval()


def load(folder: Path) -> PreTrainedModel:
    build: Any = AutoModelForCausalLM
    model: PreTrainedModel = build.from_pretrained(folder)
    return model.eval()


@contextmanager
def recorded_choices() -> Iterator[list[torch.Tensor]]:
    """Collect what `topk` chooses among all experts, whichever way a model calls it."""
    found: list[torch.Tensor] = []
    function, method = torch.topk, torch.Tensor.topk

    def record(original: Any, values: torch.Tensor, k: int, *args: Any, **kwargs: Any) -> Any:
        result = original(values, k, *args, **kwargs)
        if values.shape[-1] in (E, E + 4) and k == 2 and values.dim() == 2:
            found.append(result[1].clone())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "topk", lambda values, k, *a, **o: record(function, values, k, *a, **o))
        patch.setattr(torch.Tensor, "topk", lambda values, k, *a, **o: record(method, values, k, *a, **o))
        yield found


def run(model: PreTrainedModel) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits ``[T, V]`` and the experts that routers chose, ``[T, K]`` each."""
    tokens = torch.randint(3, 64, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), recorded_choices() as choices:
        logits: torch.Tensor = model(tokens, use_cache=False).logits[0]
    return logits, choices


def random_order(folder: Path) -> Permutation:
    """Draw an order of experts that keeps the router's groups whole."""
    facts = read_facts(folder)
    groups = facts.num_groups if facts.limits_groups else 1
    layers = tuple(survey_checkpoint(find_shards(folder)).layers)
    rng, size = np.random.default_rng(7), E // groups
    rows = [
        np.concatenate([group * size + rng.permutation(size) for group in rng.permutation(groups)])
        for _ in layers
    ]
    return Permutation(old_expert_of_new_LE=np.array(rows), moe_layer_ids=layers)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_the_same_from_a_permuted_checkpoint(family: str, tmp_path: Path) -> None:
    """Logits and choices are the same, the way back gives every byte, and a router left alone shows."""
    before = tiny(family)
    before.save_pretrained(tmp_path / "a", max_shard_size=SHARD_BYTES)
    order = random_order(tmp_path / "a")
    report = permute_checkpoint(tmp_path / "a", tmp_path / "b", order)
    assert report.num_files > 1
    after = load(tmp_path / "b")
    expected_TV, chosen = run(before)
    actual_TV, chosen_after = run(after)
    tolerance = RELATIVE_TOLERANCE * float(expected_TV.abs().max())
    assert float((actual_TV - expected_TV).abs().max()) <= tolerance
    if family == "jetmoe":  # its attention has experts of its own, before the others in each layer
        chosen, chosen_after = chosen[1::2], chosen_after[1::2]
    rows = order.old_expert_of_new_LE[LAYERS_WITHOUT_TOP_K.get(family, 0) :]
    for expected_TK, actual_TK, old_E in zip(chosen, chosen_after, rows, strict=True):
        old = torch.from_numpy(np.concatenate([old_E, np.arange(E, E + 4)]))
        assert torch.equal(old[actual_TK].sort().values, expected_TK.sort().values)
    restore_checkpoint(tmp_path / "b", tmp_path / "c")
    assert digests(tmp_path / "c") == digests(tmp_path / "a")
    assert _difference_with_old_routers(after, before, expected_TV) > 10 * tolerance


def _difference_with_old_routers(
    after: PreTrainedModel, before: PreTrainedModel, expected_TV: torch.Tensor
) -> float:
    """Put the routers back in their old order, and only them: now the model must differ."""
    old = dict(before.named_parameters())
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            if (
                parameter.dim() == 2
                and parameter.shape[0] in (E, E + 4)
                and ("gate" in name or "router" in name)
            ):
                parameter.copy_(old[name])
    return float((run(after)[0] - expected_TV).abs().max())
