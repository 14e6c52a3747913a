"""Where checkpoints keep experts and routers: a table of tensor names, and nothing of any model's code.

A rule looks at what follows the decoder layer in a tensor's name (``mlp.experts.7.up_proj.weight``) and says
how the tensor depends on the order of the experts. The first rule that matches counts. What lies in a MoE
block and matches no rule is refused later on rather than left as it is: a missing rule is an error, never a
wrong model.

To add a layout: one rule for the experts, one for the router, one for what the router may have beside it;
then a line in ``tests/checkpoint/test_layouts.py``, and the family in ``tests/checkpoint/test_families.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

__all__ = ["RULES", "Kind", "Match", "Part", "Rule", "match_tensor", "sounds_like_experts"]


class Kind(StrEnum):
    """How a tensor depends on the order of the experts."""

    NUMBERED = "numbered"
    """All of it belongs to one expert, whose number is in the name (group ``expert`` of the pattern)."""

    ROWS = "rows"
    """Its first axis counts experts."""

    LAST = "last"
    """Its last axis counts experts."""

    CHUNKS = "chunks"
    """Its first axis is as many equal runs as there are experts."""

    FLAT = "flat"
    """Its bytes are as many equal runs as there are experts, whatever its shape says."""

    IDS = "ids"
    """Its values are expert ids."""

    KEPT = "kept"
    """It serves all experts alike."""


class Part(StrEnum):
    """What a tensor is part of."""

    EXPERTS = "experts"
    ROUTER = "router"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One kind of tensor of one layout.

    Parameters
    ----------
    layout
        Who writes it so, for reports.
    part, kind
        What the tensor is part of, and how it depends on the order of the experts.
    pattern
        Matches all that follows the layer's number. Group ``block`` is the MoE block, group ``expert`` the
        expert's number.
    """

    layout: str
    part: Part
    kind: Kind
    pattern: re.Pattern[str]


class Match(NamedTuple):
    """A tensor's name, understood.

    Parameters
    ----------
    stem, layer
        Stack of decoder layers (``model.layers``) and the layer's number.
    block
        The MoE block within the layer (``mlp``); empty where it is the layer itself.
    rule
        The rule that matched; None where the name follows none.
    expert
        Expert of a tensor that is numbered, and where its number stands in the name.
    rest
        What follows the layer's number, with the expert's number taken out: alike for alike tensors.
    """

    stem: str
    layer: int
    block: str
    rule: Rule | None
    rest: str
    expert: int = -1
    number_begin: int = -1
    number_end: int = -1

    def renumbered(self, name: str, expert: int) -> str:
        """Return the name that the tensor has as part of another expert."""
        return f"{name[: self.number_begin]}{expert}{name[self.number_end :]}"


# Blocks are named as a whole, so that an attention's or a Mamba layer's `gate` is never taken for a router.
_BLOCK = r"(?P<block>(?:[\w.]+\.)?(?:mlp|block_sparse_moe|feed_forward|ffn|mixer|moe|deepspeed_moe))\."
_LAYER_IS_BLOCK = r"(?P<block>)"
_N = r"(?P<expert>0|[1-9]\d{0,4})"
_WEIGHTS = "gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3|w13|fc1|fc2"
# Biases, block scales and packed values of quantised weights; all of them have the experts as first axis.
_BESIDE = (
    r"(?:[._](?:weight|bias|biases|blocks|scales?|scale_inv|scale_2|input|packed"
    r"|qweight|qzeros|g_idx))*"
)
_QUANTISED_ROUTER = r"(?:\.weight(?:_scale|_scale_inv|_packed)?|\.scales|\.biases)"

_TABLE: tuple[tuple[str, Part, Kind, str], ...] = (
    # What every expert shares, first: it may be called like a part of an expert.
    ("shared experts", Part.OTHER, Kind.KEPT, _BLOCK + r"(?:shared_experts?|shared_mlp|share_expert)\b.*"),
    (
        "shared experts",
        Part.OTHER,
        Kind.KEPT,
        _BLOCK + r"(?:shared_expert_gate|coefficient|fc[12]_latent_proj)\b.*",
    ),
    (
        "shared experts",
        Part.OTHER,
        Kind.KEPT,
        _LAYER_IS_BLOCK + r"(?:shared_experts?|shared_mlp|share_expert)\b.*",
    ),
    # Jetmoe has experts among the attention heads too, with a router of their own; they are not placed.
    ("jetmoe", Part.OTHER, Kind.KEPT, r"(?P<block>self_attention)\.experts\..*"),
    # One tensor per expert and matrix. Whatever is stored for an expert goes where the expert goes, so every
    # quantised form is right: fp8 with weight_scale_inv, GPTQ, AWQ, NVFP4, bitsandbytes.
    ("megatron", Part.EXPERTS, Kind.NUMBERED, _BLOCK + rf"experts\.local_experts\.{_N}\..+"),
    ("deepspeed", Part.EXPERTS, Kind.NUMBERED, _BLOCK + rf"experts\.deepspeed_experts\.{_N}\..+"),
    ("switch", Part.EXPERTS, Kind.NUMBERED, _BLOCK + rf"experts\.expert_{_N}\..+"),
    ("per expert", Part.EXPERTS, Kind.NUMBERED, _BLOCK + rf"experts\.{_N}\..+"),
    (
        "megatron grouped",
        Part.EXPERTS,
        Kind.NUMBERED,
        _BLOCK + rf"experts\.linear_fc[12]\.(?:weight|bias){_N}",
    ),
    # All experts in one tensor.
    ("dbrx", Part.EXPERTS, Kind.CHUNKS, _BLOCK + r"experts\.mlp\.(?:w1|v1|w2)"),
    ("megatron legacy", Part.EXPERTS, Kind.FLAT, _BLOCK + r"experts\.weight[12]"),
    (
        "megatron stacked",
        Part.EXPERTS,
        Kind.ROWS,
        _BLOCK + r"experts\.experts\.linear_fc[12]\.(?:weight|bias)",
    ),
    ("laguna", Part.ROUTER, Kind.ROWS, _BLOCK + r"experts\.e_score_correction_bias"),
    ("fused", Part.EXPERTS, Kind.ROWS, _BLOCK + rf"experts\.(?:{_WEIGHTS}){_BESIDE}"),
    ("gemma", Part.EXPERTS, Kind.ROWS, _LAYER_IS_BLOCK + rf"experts\.(?:{_WEIGHTS}){_BESIDE}"),
    ("mlx", Part.EXPERTS, Kind.ROWS, _BLOCK + rf"switch_mlp\.(?:{_WEIGHTS}){_BESIDE}"),
    ("granite", Part.EXPERTS, Kind.ROWS, _BLOCK + r"(?:input|output)_linear\.weight"),
    ("jetmoe", Part.OTHER, Kind.KEPT, r"(?P<block>mlp)\.bias"),
    ("step", Part.EXPERTS, Kind.ROWS, rf"(?P<block>moe)\.(?:gate_proj|up_proj|down_proj){_BESIDE}"),
    # Routers: a row for each expert; a bias for each, learned or balancing.
    ("hash router", Part.ROUTER, Kind.IDS, _BLOCK + r"gate\.tid2eid"),
    ("router", Part.ROUTER, Kind.ROWS, _BLOCK + rf"gate{_QUANTISED_ROUTER}"),
    ("router", Part.ROUTER, Kind.ROWS, _BLOCK + rf"gate\.wg{_QUANTISED_ROUTER}"),
    (
        "router",
        Part.ROUTER,
        Kind.ROWS,
        _BLOCK + rf"router(?:\.(?:layer|gate|classifier))?{_QUANTISED_ROUTER}",
    ),
    ("router", Part.ROUTER, Kind.ROWS, _BLOCK + r"(?:gate|router|router\.(?:layer|classifier))\.bias"),
    (
        "router bias",
        Part.ROUTER,
        Kind.ROWS,
        _BLOCK + r"(?:(?:gate|router)\.)?(?:expert_bias|e_score_correction_bias)",
    ),
    ("router bias", Part.ROUTER, Kind.ROWS, r"(?P<block>moe)\.router_bias"),
    ("ernie", Part.ROUTER, Kind.LAST, _BLOCK + r"(?:gate\.)?moe_statics\.e_score_correction_bias"),
    ("megatron", Part.ROUTER, Kind.ROWS, _BLOCK + r"router\.(?:local|global)_tokens_per_expert"),
    ("gemma", Part.ROUTER, Kind.ROWS, _LAYER_IS_BLOCK + r"router\.(?:proj\.weight|per_expert_scale)"),
    ("gemma", Part.OTHER, Kind.KEPT, _LAYER_IS_BLOCK + r"router\.scale"),
)

RULES: tuple[Rule, ...] = tuple(
    Rule(layout=layout, part=part, kind=kind, pattern=re.compile(pattern))
    for layout, part, kind, pattern in _TABLE
)
"""All rules, in the order in which they are tried."""

_LAYER = re.compile(
    r"(?P<stem>(?:[\w.]*?\.)?(?:layers|layer|blocks|block|h|mtp_layers|mtp))\.(?P<number>\d{1,5})\."
)
_ALL_WORDS = re.compile(r"(?:^|\.)(?:experts?|\w+_experts?|routers?|router_\w+|switch_mlp)(?:\.|$)")
_BLOCK_WORDS = re.compile(
    r"(?:experts?|\w+_experts?|routers?|gate|router_\w+|switch_mlp|moe_statics)(?:\.|$)"
)


def match_tensor(name: str) -> Match | None:
    """Understand a tensor's name; None where it is part of no decoder layer."""
    found = _LAYER.match(name)
    if found is None:
        return None
    # Layers repeat each other: what follows their number is looked up, not matched again.
    rest = name[found.end() :]
    rule, block, begin, end = _match_rest(rest)
    stem, layer = found["stem"], int(found["number"])
    if begin < 0:
        return Match(stem, layer, block, rule, rest)
    alike, expert = f"{rest[:begin]}*{rest[end:]}", int(rest[begin:end])
    return Match(stem, layer, block, rule, alike, expert, found.end() + begin, found.end() + end)


@lru_cache(maxsize=8192)
def _match_rest(rest: str) -> tuple[Rule | None, str, int, int]:
    for rule in RULES:
        matched = rule.pattern.fullmatch(rest)
        if matched is not None:
            numbered = rule.kind is Kind.NUMBERED
            return rule, matched["block"], *(matched.span("expert") if numbered else (-1, -1))
    return None, "", -1, -1


def sounds_like_experts(rest: str, *, blocks: Collection[str] = ()) -> bool:
    """Tell whether a name that follows no rule speaks of experts or of their router.

    Parameters
    ----------
    rest
        What follows the layer's number, or the whole name.
    blocks
        The layer's MoE blocks; within them a gate is a router.
    """
    inside = (rest.removeprefix(f"{block}.") for block in blocks if block and rest.startswith(f"{block}."))
    return _ALL_WORDS.search(rest) is not None or any(_BLOCK_WORDS.match(name) for name in inside)
