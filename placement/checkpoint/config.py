"""The few facts of a ``config.json`` that decide whether a permutation is exact.

The file is copied unchanged, so nothing in it may depend on the order of the experts; what could is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placement._fields import brief
from placement.checkpoint.header import quoted
from placement.checkpoint.json_text import read_json
from placement.errors import InputError

__all__ = ["ModelFacts", "read_facts"]

_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
_GROUPS = ("n_group", "num_expert_group", "num_expert_groups", "moe_router_num_groups")
_TOP_GROUPS = ("topk_group", "moe_router_group_topk")
_MAYBE_GROUPS = re.compile(r"(?:expert|moe|router|gate|topk).*group|group.*(?:expert|moe|router|gate|topk)")
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_ONE_EXPERT = re.compile(
    r"(?<![\w*\[\\])(?:experts|local_experts)\\?\.(?:expert_)?(?P<expert>\d{1,5})(?![\w*\]])"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the configuration says of routing.

    Parameters
    ----------
    unclear
        Why it is not known whether routing is limited to groups; None where it is known.
    num_experts
        Routed experts per layer; None where it does not say.
    num_decoder_layers
        Decoder layers, layers for speculative decoding left out; None where it does not say.
    num_groups, top_groups
        Groups of consecutive experts that routing is limited to, and how many of them a token uses; 1 and 1
        where routing is not limited.
    num_zero_experts
        Experts without weights that the router may choose as well; they follow the others (LongCat).
    """

    unclear: str | None = None
    num_experts: int | None = None
    num_decoder_layers: int | None = None
    num_groups: int = 1
    top_groups: int = 1
    num_zero_experts: int = 0

    @property
    def limits_groups(self) -> bool:
        """Whether a token's experts come from fewer groups than there are."""
        return 1 <= self.top_groups < self.num_groups


def read_facts(folder: Path) -> ModelFacts:
    """Read what a checkpoint's configuration says of routing.

    Raises
    ------
    InputError
        If ``config.json`` is malformed, or it or another file treats single experts differently by number.
    """
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds {brief(config)}, not an object")
    text = _language_model(config)
    num_experts = _integer(text, _EXPERTS, path)
    _refuse_numbered_experts(config, num_experts, path)
    for name in _QUANTISATION_FILES:
        if (folder / name).is_file():
            _refuse_numbered_experts(read_json(folder / name), num_experts, folder / name)
    if not path.is_file():
        return ModelFacts(unclear="has no config.json")
    groups = _integer(text, _GROUPS, path) or 1
    limited = (
        groups > 1 and text.get("topk_method") != "greedy"
    )  # DeepSeek-V2-Lite has groups and ignores them
    return ModelFacts(
        unclear=_unknown_groups(text),
        num_experts=num_experts,
        num_decoder_layers=_integer(text, ("num_hidden_layers", "num_layers", "n_layers"), path),
        num_groups=groups if limited else 1,
        top_groups=(_integer(text, _TOP_GROUPS, path) or 1) if limited else 1,
        num_zero_experts=_integer(text, ("zero_expert_num",), path) or 0,
    )


def _language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config
    for _ in range(4):  # Qwen3-Omni: thinker_config, then text_config
        nested = [text[key] for key in _NESTED if isinstance(text.get(key), dict)]
        if not nested:
            break
        text = nested[0]
    return text


def _unknown_groups(text: Mapping[str, Any]) -> str | None:
    """Find an entry that may be some model's own way to limit routing to groups."""
    for key, value in text.items():
        if (
            key not in (*_GROUPS, *_TOP_GROUPS)
            and _MAYBE_GROUPS.search(key)
            and type(value) is int
            and value > 1
        ):
            return f"config.json has {key} = {value}, which no known model has"
    return None


def _integer(values: Mapping[str, Any], keys: tuple[str, ...], path: Path) -> int | None:
    for key in keys:
        value = values.get(key)
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < 2**31:
            raise InputError(f"{path}: {key} is {brief(value)}, not an integer of 0 or more")
        return value
    return None


def _refuse_numbered_experts(values: object, num_experts: int | None, path: Path) -> None:
    """Refuse a configuration that treats an expert otherwise than the others of its layer.

    Quantisation may list modules one by one; where it lists all experts alike, their order does not matter.
    """
    left = [values]
    while left:  # no recursion: the file comes from outside
        value = left.pop()
        if isinstance(value, dict):
            _check_alike(value, num_experts, path)
            left += value.values()
        elif isinstance(value, list):
            _check_alike({text: None for text in value if isinstance(text, str)}, num_experts, path)
            left += [entry for entry in value if not isinstance(entry, str)]
        elif isinstance(value, str):
            _check_alike({value: None}, num_experts, path)


def _check_alike(values: Mapping[str, Any], num_experts: int | None, path: Path) -> None:
    told: dict[str, dict[int, Any]] = {}
    for text, value in values.items():
        found = _ONE_EXPERT.search(text)
        if found is not None:
            begin, end = found.span("expert")
            told.setdefault(f"{text[:begin]}*{text[end:]}", {})[int(found["expert"])] = value
    for name, by_expert in told.items():
        everyone = num_experts is not None and set(by_expert) == set(range(num_experts))
        first = next(iter(by_expert))
        example = quoted(name.replace("*", str(first)))
        if not everyone or any(value != by_expert[first] for value in by_expert.values()):
            raise InputError(
                f"{path}: treats experts differently by their number ({example}), and the "
                "permutation gives that number to another expert; treat all experts of a layer alike"
            )
