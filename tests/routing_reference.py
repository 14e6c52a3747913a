"""Which experts a router selects, computed here from its input, its weights and its family's published rule.

Shape letters: T tokens, H hidden, E experts, G groups, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

__all__ = ["RULES", "Rule", "randomise_biases", "reference_top_k", "rule_of"]

Floats = npt.NDArray[np.float64]


def _numpy(tensor: torch.Tensor) -> Floats:
    return tensor.detach().double().numpy()


def _softmax(logits_TE: Floats) -> Floats:
    shifted_TE = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
    return shifted_TE / shifted_TE.sum(axis=1, keepdims=True)


def _sigmoid(logits_TE: Floats) -> Floats:
    return 1 / (1 + np.exp(-logits_TE))


SCORES: dict[str, Callable[[Floats], Floats]] = {
    "logits": lambda logits_TE: logits_TE,
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "sqrtsoftplus": lambda logits_TE: np.sqrt(np.log1p(np.exp(logits_TE))),
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a family selects: scores, plus a bias, the best groups by the sum of their best, then the top-k."""

    score: str = "softmax"
    weight: str = "weight"
    bias: str = ""  # attribute of the router; "argument" for one that the block passes
    logit_bias: bool = False
    group_best: int = 0  # experts whose scores make a group's score; 0 where there are no groups
    outside: float = -np.inf  # score of experts outside of the best groups
    normed: bool = False  # Gemma: the router normalises its input itself


_GROUPED_SIGMOID = Rule(score="sigmoid", bias="e_score_correction_bias", group_best=2)
_SIGMOID = Rule(score="sigmoid", bias="e_score_correction_bias")
_SIGMOID_BIAS_PASSED = Rule(score="sigmoid", bias="argument")
_LOGITS = Rule(score="logits")

RULES: dict[str, Rule] = {
    "afmoe": Rule(score="sigmoid", weight="gate.weight", bias="argument"),
    "aria_text": _LOGITS,
    "axk2": Rule(score="sigmoid", bias="e_score_correction_bias", group_best=2, outside=0.0),
    "cohere2_moe": _LOGITS,
    "dbrx": Rule(weight="layer.weight"),
    "deepseek_ocr2_text": Rule(group_best=1),
    "deepseek_v2": Rule(group_best=1),
    "deepseek_v4": Rule(score="sqrtsoftplus", bias="e_score_correction_bias"),
    "ernie4_5_moe": Rule(bias="moe_statics.e_score_correction_bias"),
    "flint": Rule(score="sigmoid"),
    "gemma4_text": Rule(weight="proj.weight", normed=True),
    "gpt_oss": Rule(score="logits", logit_bias=True),
    "granitemoe": _LOGITS,
    "granitemoe_swa": _LOGITS,
    "granitemoehybrid": _LOGITS,
    "granitemoeshared": _LOGITS,
    "hunyuan_v1_moe": Rule(weight="wg.weight"),
    "hy_v3": _SIGMOID_BIAS_PASSED,
    "inkling2_text": _SIGMOID,
    "inkling_text": _SIGMOID,
    "jetmoe": Rule(score="logits", weight="layer.weight"),
    "kolibri1": Rule(score="logits", bias="e_score_correction_bias"),
    "laguna": _SIGMOID,
    "lfm2_moe": _SIGMOID_BIAS_PASSED,
    "llama4_text": _LOGITS,
    "longcat_flash": Rule(weight="classifier.weight", bias="e_score_correction_bias"),
    "minimax_m2": _SIGMOID_BIAS_PASSED,
    "minimax_m3_vl_text": _SIGMOID,
    "mistral4": Rule(group_best=2),
    "mistral_large4_text": Rule(group_best=2),
    "muse_spark_text": _SIGMOID,
    "openai_privacy_filter": Rule(score="logits", logit_bias=True),
    "phimoe": _LOGITS,
    "step3p5": _SIGMOID,
    "unlimited_ocr_text": Rule(group_best=1),
} | dict.fromkeys(
    (
        "axk1",
        "bailing_hybrid",
        "beam",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "dots3_note_text",
        "exaone_moe",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe_text",
        "glm5_next_text",
        "glm_moe_dsa",
        "hy_v4",
        "kimi_linear",
        "mimo_v2_flash",
        "nemotron_h",
        "solar_open",
    ),
    _GROUPED_SIGMOID,
)
"""Rules that are not the plain one: top-k of the softmax of a linear map."""


def rule_of(model_type: str) -> Rule:
    """Rule of a family."""
    return RULES.get(model_type, Rule())


def randomise_biases(model: nn.Module, seed: int = 0) -> None:
    """Fill the biases that select experts, zero in a new model, so that they matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("e_score_correction_bias", "expert_bias", "router.bias")):
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def reference_top_k(model_type: str, router: Any, args: tuple[Any, ...], top_k: int) -> npt.NDArray[np.int64]:
    """Expert ids in ascending order, ``[tokens, k]``, from what went into a router."""
    rule = rule_of(model_type)
    hidden_TH = _numpy(args[0]).reshape(-1, args[0].shape[-1])
    if rule.normed:
        rms_T1 = np.sqrt((hidden_TH**2).mean(axis=1, keepdims=True) + router.eps)
        hidden_TH = hidden_TH / rms_T1 * _numpy(router.scale) * hidden_TH.shape[1] ** -0.5
    logits_TE = hidden_TH @ _numpy(_attribute(router, rule.weight)).T
    if rule.logit_bias:
        logits_TE = logits_TE + _numpy(router.bias)
    if model_type == "inkling_text":  # the last rows of its router are those of shared experts
        logits_TE = logits_TE[:, : router.num_experts]
    if model_type == "muse_spark_text":
        logits_TE = logits_TE * router.output_multiplier
    scores_TE = SCORES[rule.score](logits_TE)
    if rule.bias:
        given = args[1] if rule.bias == "argument" else _attribute(router, rule.bias)
        scores_TE = scores_TE + _numpy(given).reshape(1, -1)
    if rule.group_best and router.num_group and router.num_group > 1:
        kept_TE = _of_best_groups(scores_TE, router.num_group, router.topk_group, rule.group_best)
        scores_TE = np.where(kept_TE, scores_TE, rule.outside)
    return np.sort(np.argsort(-scores_TE, axis=1)[:, :top_k], axis=1)


def _of_best_groups(scores_TE: Floats, num_groups: int, top_groups: int, best: int) -> npt.NDArray[np.bool_]:
    """Tell which experts belong to the best groups, ``[tokens, experts]``."""
    scores_TGe = scores_TE.reshape(len(scores_TE), num_groups, -1)
    of_group_TG = np.sort(scores_TGe, axis=2)[:, :, -best:].sum(axis=2)
    rank_TG = np.argsort(np.argsort(-of_group_TG, axis=1), axis=1)
    return np.repeat(rank_TG < top_groups, scores_TGe.shape[2], axis=1)


def _attribute(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner
