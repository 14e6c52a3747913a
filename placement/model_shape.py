"""What placement must know of a Mixture-of-Experts model: how many experts, how large, in which layers.

What an expert costs in memory, FLOPs and traffic follows from a few numbers; no weights are needed.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from placement._suggest import did_you_mean
from placement.errors import InputError

__all__ = ["BITS_PER_WEIGHT", "MAX_LAYERS", "ModelShape", "bits_per_weight", "canonical_dtype"]

BITS_PER_WEIGHT: dict[str, float] = {
    "fp32": 32,
    "bf16": 16,
    "fp16": 16,
    "fp8": 8,
    "int8": 8,
    # 4-bit values in blocks of 32 that share an 8-bit scale.
    "mxfp4": 4.25,
}
"""Bits that one weight takes, scales of blocks included where they matter (mxfp4).

The scales of 8-bit formats are left out: at most 0.2 % of the weights.
"""

MAX_LAYERS = 10_000
"""Most decoder layers that are accepted; more is a slip of the pen."""

_DTYPE_ALIASES = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float8": "fp8",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
}


def canonical_dtype(dtype: str) -> str:
    """Return the short name of a weight type (``torch.bfloat16`` is ``bf16``).

    Raises
    ------
    InputError
        If the type is not known.
    """
    key = dtype.strip().lower().removeprefix("torch.")
    key = _DTYPE_ALIASES.get(key, key)
    if key not in BITS_PER_WEIGHT:
        raise InputError(f"unknown weight type {dtype!r}; {did_you_mean(key, BITS_PER_WEIGHT)}")
    return key


def bits_per_weight(dtype: str) -> float:
    """Return the bits that one weight takes.

    Raises
    ------
    InputError
        If the type is not known.
    """
    return BITS_PER_WEIGHT[canonical_dtype(dtype)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What placement must know of a Mixture-of-Experts model.

    Parameters
    ----------
    name
        What reports call it.
    num_layers
        MoE layers.
    num_experts
        Routed experts per MoE layer.
    top_k
        Routed experts that each token selects per MoE layer.
    hidden_size
        Width of a token.
    expert_hidden_size
        Inner width of one routed expert.
    num_shared_experts
        Experts that every token visits; they live on every device and are not placed.
    matrices_per_expert
        3 for gated experts (gate, up, down), 2 for plain ones.
    weight_dtype
        Type of the experts' weights as published; a key of `BITS_PER_WEIGHT`.
    num_decoder_layers
        Decoder layers, dense ones included; 0 (default) means `num_layers`.
    moe_layer_ids
        Decoder layer of each MoE layer, ascending; empty (default) where every decoder layer is one.
    num_mtp_layers
        Multi-token-prediction layers with routed experts, which follow the decoder layers (decoder layer
        `num_decoder_layers` and up) and which no placement here covers.
    num_expert_groups, top_groups
        Group-limited routing: the experts form this many equal groups of consecutive ids, and a token's
        experts lie in `top_groups` of them; 0 (default) means all.

    Raises
    ------
    InputError
        If a number is not positive or the numbers contradict each other.
    """

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    expert_hidden_size: int
    num_shared_experts: int = 0
    matrices_per_expert: int = 3
    weight_dtype: str = "bf16"
    num_decoder_layers: int = 0
    moe_layer_ids: tuple[int, ...] = ()
    num_expert_groups: int = 1
    top_groups: int = 0
    num_mtp_layers: int = 0

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "weight_dtype", canonical_dtype(self.weight_dtype))
        set_(self, "num_decoder_layers", self.num_decoder_layers or self.num_layers)
        set_(self, "top_groups", self.top_groups or self.num_expert_groups)
        self._check_counts()
        self._check_groups()
        if not self.moe_layer_ids and self.num_decoder_layers == self.num_layers:
            set_(self, "moe_layer_ids", tuple(range(self.num_layers)))
        set_(self, "moe_layer_ids", tuple(self.moe_layer_ids))
        self._check_layers()

    def _check_counts(self) -> None:
        positive = ("num_layers", "num_experts", "top_k", "hidden_size", "expert_hidden_size")
        for name in (*positive, "matrices_per_expert", "num_expert_groups"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"model {self.name!r}: {name} is {getattr(self, name)}; it must be 1 or more"
                )
        if self.num_decoder_layers > MAX_LAYERS:
            raise InputError(
                f"model {self.name!r}: {self.num_decoder_layers} layers; at most {MAX_LAYERS} are accepted"
            )
        for name in ("num_shared_experts", "num_mtp_layers"):
            if getattr(self, name) < 0:
                raise InputError(f"model {self.name!r}: {name} is {getattr(self, name)}")
        if self.num_mtp_layers > MAX_LAYERS:
            raise InputError(
                f"model {self.name!r}: {self.num_mtp_layers} multi-token-prediction layers; at most "
                f"{MAX_LAYERS} are accepted"
            )
        if self.top_k > self.num_experts:
            raise InputError(
                f"model {self.name!r}: top-{self.top_k} of {self.num_experts} experts is impossible"
            )

    def _check_groups(self) -> None:
        groups, top = self.num_expert_groups, self.top_groups
        if self.num_experts % groups:
            raise InputError(
                f"model {self.name!r}: {self.num_experts} experts do not form {groups} equal groups"
            )
        if not 1 <= top <= groups:
            raise InputError(f"model {self.name!r}: top_groups is {top} of {groups} groups")
        reachable = top * (self.num_experts // groups)
        if self.top_k > reachable:
            raise InputError(
                f"model {self.name!r}: {top} of {groups} groups hold {reachable} experts, fewer than "
                f"top-{self.top_k} needs"
            )

    def _check_layers(self) -> None:
        ids = self.moe_layer_ids
        if len(ids) != self.num_layers:
            raise InputError(
                f"model {self.name!r}: moe_layer_ids names {len(ids)} layers, num_layers is {self.num_layers}"
            )
        if any(b <= a for a, b in itertools.pairwise((-1, *ids))):
            raise InputError(f"model {self.name!r}: moe_layer_ids must be ascending and 0 or more")
        if ids[-1] >= self.num_decoder_layers:
            raise InputError(
                f"model {self.name!r}: MoE layer {ids[-1]} is outside its {self.num_decoder_layers} "
                "decoder layers"
            )

    @property
    def params_per_expert(self) -> int:
        """Weights of one routed expert."""
        return self.matrices_per_expert * self.hidden_size * self.expert_hidden_size

    @property
    def flops_per_pair(self) -> int:
        """Floating-point operations of one token in one expert: a multiply and an add per weight."""
        return 2 * self.params_per_expert

    def bytes_per_expert(self, dtype: str | None = None) -> int:
        """Return the bytes of one routed expert's weights, in `dtype` or as published.

        Raises
        ------
        InputError
            If the type is not known.
        """
        return math.ceil(self.params_per_expert * bits_per_weight(dtype or self.weight_dtype) / 8)

    def token_bytes(self, dtype: str = "bf16") -> int:
        """Return the bytes of one token's activations as they travel between devices.

        Raises
        ------
        InputError
            If the type is not known.
        """
        return math.ceil(self.hidden_size * bits_per_weight(dtype) / 8)
