"""Times the experts of one rank: grouped matrix products over numbers of tokens and of experts that have any.

Shape letters: C experts of this rank, P token-expert pairs, H hidden, I inner width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from placement.runtime.measure.bench import Bench
from placement.runtime.measure.shapes import ExpertShape
from placement.runtime.measure.timing import Samples, Timing, pooled
from placement.runtime.parallel.compute import FusedMath

__all__ = ["LayerLoad", "expert_curves", "loads", "uneven_loads"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoad:
    """Tokens of each expert of a rank.

    Parameters
    ----------
    counts_C
        Tokens of each expert.
    """

    counts_C: tuple[int, ...]

    @property
    def num_pairs(self) -> int:
        """Token-expert pairs."""
        return sum(self.counts_C)

    @property
    def num_active(self) -> int:
        """Experts that have tokens."""
        return sum(count > 0 for count in self.counts_C)


def loads(local_experts: int, *, tokens: Sequence[int], shares: Sequence[float]) -> list[LayerLoad]:
    """Return even loads, those of one share of active experts after those of another, by rising tokens.

    Active experts lie among the idle ones at even distances, as by chance.
    """
    actives = dict.fromkeys(max(1, round(share * local_experts)) for share in shares)
    return [_even(local_experts, active, one) for active in actives for one in sorted(tokens)]


def _even(local_experts: int, active: int, tokens: int) -> LayerLoad:
    counts = [0] * local_experts
    for number in range(active):
        counts[number * local_experts // active] = tokens
    return LayerLoad(counts_C=tuple(counts))


def uneven_loads(
    local_experts: int, *, tokens: Sequence[int], exponents: Sequence[float], seed: int = 0
) -> list[LayerLoad]:
    """Return loads of given means that fall as a power of an expert's popularity, experts in random order."""
    if local_experts < 2:
        return []
    random = np.random.default_rng(seed)
    return [
        _skewed(local_experts, mean * local_experts, exponent, random)
        for exponent in exponents
        for mean in sorted(tokens)
    ]


def _skewed(local_experts: int, total: int, exponent: float, random: np.random.Generator) -> LayerLoad:
    share_C = np.arange(1, local_experts + 1, dtype=np.float64) ** -exponent
    ends_C = np.rint(np.cumsum(share_C) * (total / share_C.sum())).astype(np.int64)
    counts_C = np.diff(ends_C, prepend=0)
    return LayerLoad(counts_C=tuple(int(count) for count in random.permutation(counts_C)))


class _Experts:
    """Weights of a rank's experts and rows for them, random; computed as a model's experts are."""

    def __init__(self, bench: Bench, shape: ExpertShape, *, most_pairs: int) -> None:
        self._module = _gpt_oss(bench, shape) if shape.is_gpt_oss else _usual(bench, shape)
        if shape.is_gpt_oss:
            self._math = FusedMath(biased=True, transposed=True)
        else:
            self._math = FusedMath(up=_up(shape), gated=shape.gated)
        self._x_PH = bench.random(most_pairs, shape.hidden_size)

    def __call__(self, num_pairs: int, counts_C: torch.Tensor) -> torch.Tensor:
        return self._math(self._module, self._x_PH[:num_pairs], counts_C)


def _up(shape: ExpertShape) -> str:
    return "gate_up_proj" if shape.gated else "up_proj"


def _usual(bench: Bench, shape: ExpertShape) -> nn.Module:
    """Weights as checkpoints keep them, [C, out, in], so small that nothing overflows on the way."""
    hidden, inner, num = shape.hidden_size, shape.expert_hidden_size, shape.local_experts
    module = nn.Module()
    module.act_fn = nn.SiLU()
    module.register_buffer(_up(shape), bench.random(num, shape.first_width, hidden, scale=hidden**-0.5))
    module.register_buffer("down_proj", bench.random(num, hidden, inner, scale=inner**-0.5))
    return module


def _gpt_oss(bench: Bench, shape: ExpertShape) -> nn.Module:
    """Weights [C, in, out] with biases, and a gate that clamps interleaved columns: a quarter slower."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    hidden, inner, num = shape.hidden_size, shape.expert_hidden_size, shape.local_experts
    module: Any = nn.Module()
    # What the gate reads; gpt-oss's own numbers.
    module.alpha, module.limit = 1.702, 7.0
    module._apply_gate = partial(GptOssExperts._apply_gate, module)
    module.register_buffer("gate_up_proj", bench.random(num, hidden, 2 * inner, scale=hidden**-0.5))
    module.register_buffer("gate_up_proj_bias", bench.random(num, 2 * inner))
    module.register_buffer("down_proj", bench.random(num, inner, hidden, scale=inner**-0.5))
    module.register_buffer("down_proj_bias", bench.random(num, hidden))
    built: nn.Module = module
    return built


def expert_curves(
    bench: Bench, shape: ExpertShape
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Return the points of a model's curves: even loads, and uneven ones.

    An even point is ``{tokens_per_expert, local_experts, active_experts, ms, spread}``, `tokens_per_expert`
    those of an active one; an uneven one ``{counts, local_experts, ms, spread}``. Times are those of all of
    a rank's experts together.
    """
    sizes, most = bench.sizes, _most_pairs(bench, shape)
    even = loads(shape.local_experts, tokens=sizes.tokens_per_expert, shares=sizes.active_shares)
    uneven = uneven_loads(shape.local_experts, tokens=sizes.uneven_tokens, exponents=sizes.uneven_exponents)
    fitting = [load for load in (*even, *uneven) if load.num_pairs <= most]
    if len(fitting) < len(even) + len(uneven):
        bench.notes.append(f"{shape.label}: loads of more than {most} pairs do not fit and were left out")
    experts = _Experts(bench, shape, most_pairs=max((load.num_pairs for load in fitting), default=0))
    even_points: list[dict[str, object]] = [
        {
            "tokens_per_expert": max(load.counts_C),
            "local_experts": shape.local_experts,
            "active_experts": load.num_active,
            "ms": timing.ms,
            "spread": timing.spread,
        }
        for load, timing in _timed(bench, shape, experts, [load for load in even if load in fitting])
    ]
    uneven_points: list[dict[str, object]] = [
        {
            "counts": list(load.counts_C),
            "local_experts": shape.local_experts,
            "ms": timing.ms,
            "spread": timing.spread,
        }
        for load, timing in _timed(bench, shape, experts, [load for load in uneven if load in fitting])
    ]
    return even_points, uneven_points


def _timed(
    bench: Bench, shape: ExpertShape, experts: _Experts, wanted: Sequence[LayerLoad]
) -> list[tuple[LayerLoad, Timing]]:
    done = bench.sweep(
        wanted,
        what=f"loads of {shape.label}",
        amount=lambda load: load.num_pairs,
        measure=lambda load: _samples(bench, experts, load),
    )
    return bench.over_ranks(done, pooled)


def _samples(bench: Bench, experts: _Experts, load: LayerLoad) -> Samples:
    counts_C = torch.tensor(load.counts_C, device=bench.mesh.device)
    return bench.alone(lambda: experts(load.num_pairs, counts_C))


def _most_pairs(bench: Bench, shape: ExpertShape) -> int:
    """Pairs whose rows fit in memory: in, behind the first projection, activated twice, and out."""
    width = 2 * shape.hidden_size + shape.first_width + 2 * shape.expert_hidden_size
    return bench.sizes.activation_bytes // (width * bench.dtype.itemsize)
