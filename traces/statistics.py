"""What a trace says about traffic: the optimizer's profile, and a summary for people.

Shape letters: W windows, L MoE layers, E experts, T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from placement.profile import RoutingProfile
from traces.source import TraceSource, read_all
from traces.trace import UNKNOWN_DOMAIN, ExpertArray, IntArray, Trace

__all__ = ["LayerSummary", "TraceSummary", "build_profile", "describe", "load_only_profile"]

FloatArray = npt.NDArray[np.float64]

_COUNTED_AT_ONCE = 1 << 19
_COACTIVATION_TOKENS = 1 << 16
_FIT_ROUNDS = 100


def build_profile(
    trace: Trace | TraceSource,
    *,
    window_tokens: int,
    max_sampled_tokens: int | None = None,
    seed: int = 0,
    num_devices: int | None = None,
) -> RoutingProfile:
    """Cut a trace into windows and count.

    Loads are exact. Windows follow the order in which tokens were routed (`Trace.interleave_ranks`). The
    tail, which fills no window, counts in per-token figures alone.

    Parameters
    ----------
    trace
        The trace.
    window_tokens
        Consecutive tokens per window.
    max_sampled_tokens
        Tokens whose expert sets the profile keeps: a uniform sample without replacement, of equal size in
        every window, in recorded order. `None` keeps all.
    seed
        Seed of the sample.
    num_devices
        Devices of the topology. If as many ranks, and more than one, recorded the trace, the i-th rank's
        tokens live on device i; otherwise homes are unknown.

    Returns
    -------
    RoutingProfile
        With loads in token-expert pairs per window.

    Raises
    ------
    InputError
        If the trace holds no whole window, or the sample less than one token per window.
    """
    trace = trace.interleave_ranks() if isinstance(trace, Trace) else read_all(trace)
    num_windows = trace.count_windows(window_tokens)
    token_T = _sample(num_windows, window_tokens, max_sampled_tokens, seed)
    whole = num_windows * window_tokens
    tail_tokens = trace.num_tokens - whole
    if len(token_T) == whole:
        token_T = np.arange(trace.num_tokens)
    else:
        tail_tokens = 0
    home_T = _homes(trace, num_devices)
    return RoutingProfile(
        load_WLE=_load_WLE(trace.experts_TLK[:whole], window_tokens, trace.num_experts),
        window_tokens_W=np.full(num_windows, float(window_tokens)),
        top_k=trace.top_k,
        experts_TLK=trace.experts_TLK if len(token_T) == trace.num_tokens else trace.experts_TLK[token_T],
        window_of_token_T=token_T // window_tokens,
        home_T=None if home_T is None else home_T[token_T],
        tail_tokens=tail_tokens,
    )


def load_only_profile(load_WLE: npt.ArrayLike, *, top_k: int, window_tokens: npt.ArrayLike) -> RoutingProfile:
    """Make the profile of a source that counts experts but does not know tokens.

    Parameters
    ----------
    load_WLE
        Token-expert pairs, ``[windows, layers, experts]``, or ``[layers, experts]`` for one window.
    top_k
        Experts that each token selects in each layer.
    window_tokens
        Tokens per window: one number or ``[windows]``.

    Raises
    ------
    InputError
        If the loads are no valid profile; a dense layer, all zero, has to be dropped before.
    """
    load = np.asarray(load_WLE, dtype=np.float64)
    load = load[np.newaxis] if load.ndim == 2 else load
    tokens_W = np.asarray(window_tokens, dtype=np.float64)
    if tokens_W.ndim == 0:
        tokens_W = np.full(len(load), float(tokens_W))
    return RoutingProfile(load_WLE=load, window_tokens_W=tokens_W, top_k=top_k)


def _load_WLE(experts_TLK: ExpertArray, window_tokens: int, num_experts: int) -> FloatArray:
    """Count token-expert pairs per window, some windows at a time to stay in the cache."""
    num_tokens, num_layers, top_k = experts_TLK.shape
    num_windows = num_tokens // window_tokens
    ids_WTLK = experts_TLK.reshape(num_windows, window_tokens, num_layers, top_k)
    bins = num_layers * num_experts
    at_once = max(1, _COUNTED_AT_ONCE // (window_tokens * num_layers * top_k))
    layer_bin = np.arange(num_layers)[:, None] * num_experts
    window_bin = np.arange(at_once)[:, None, None, None] * bins
    load = np.empty((num_windows, bins))
    for start in range(0, num_windows, at_once):
        ids = ids_WTLK[start : start + at_once]
        count = np.bincount((ids + layer_bin + window_bin[: len(ids)]).ravel(), minlength=len(ids) * bins)
        load[start : start + at_once] = count.reshape(len(ids), bins)
    return load.reshape(num_windows, num_layers, num_experts)


def _sample(num_windows: int, window_tokens: int, max_sampled_tokens: int | None, seed: int) -> IntArray:
    """Draw as many tokens in every window; token numbers, ascending."""
    num_tokens = num_windows * window_tokens
    if max_sampled_tokens is None or max_sampled_tokens >= num_tokens:
        return np.arange(num_tokens)
    per_window = max_sampled_tokens // num_windows
    if per_window < 1:
        raise InputError(
            f"a sample of {max_sampled_tokens} tokens leaves some of {num_windows} windows empty; "
            f"sample at least {num_windows} tokens or use a larger window"
        )
    draw = np.random.default_rng(seed).random((num_windows, window_tokens))
    chosen = np.sort(np.argpartition(draw, per_window - 1, axis=1)[:, :per_window], axis=1)
    return (chosen + np.arange(num_windows)[:, None] * window_tokens).ravel()


def _homes(trace: Trace, num_devices: int | None) -> IntArray | None:
    if trace.rank_T is None or num_devices is None:
        return None
    ranks, index_T = np.unique(trace.rank_T, return_inverse=True)
    if len(ranks) < 2 or len(ranks) != num_devices:
        return None
    return index_T.astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSummary:
    """How one MoE layer's routing looks.

    Parameters
    ----------
    layer
        Index of the MoE layer.
    busiest_over_mean
        Load of the busiest expert over the mean load of all experts; 1 is even.
    coefficient_of_variation
        Standard deviation of the experts' loads over their mean; 0 is even.
    active_experts
        Experts that were selected at all.
    drift
        Total variation distance between the expert shares of the first and of the last half of the
        tokens, ``0.5 * sum |p - q|``; 0 is the same traffic, 1 disjoint.
    coactivation
        Total variation distance between the pairs of experts that tokens select together and the pairs
        that the experts' popularity alone would make; 0 means partners are chosen by popularity, 1 that
        only few of the possible pairs occur. What placement can save in traffic grows with it. `None`
        for top-1. A short trace shows some by chance.
    """

    layer: int
    busiest_over_mean: float
    coefficient_of_variation: float
    active_experts: int
    drift: float
    coactivation: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSummary:
    """What a trace holds, in numbers; `None` where it does not say.

    Parameters
    ----------
    num_tokens, num_sequences, num_layers, num_experts, top_k, num_ranks
        Sizes; sequences are counted per rank.
    domain_tokens
        Tokens of every named domain.
    model_name, moe_layer_ids
        As in `Trace`.
    size_bytes
        Memory that the trace takes, in bytes.
    digest
        Digest of the content.
    layers
        One summary per MoE layer.
    """

    num_tokens: int
    num_sequences: int | None
    num_layers: int
    num_experts: int
    top_k: int
    num_ranks: int | None
    domain_tokens: Mapping[str, int]
    model_name: str | None
    moe_layer_ids: tuple[int, ...] | None
    size_bytes: int
    digest: str
    layers: tuple[LayerSummary, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `json.dumps` accepts."""
        return asdict(self)


def describe(trace: Trace) -> TraceSummary:
    """Summarise a trace.

    Loads and drift count every token; co-activation counts up to 65,536 tokens, evenly spaced.
    """
    half = trace.num_tokens // 2
    first_LE = _count_LE(trace.experts_TLK[:half], trace.num_experts)
    middle_LE = _count_LE(trace.experts_TLK[half : trace.num_tokens - half], trace.num_experts)
    last_LE = _count_LE(trace.experts_TLK[trace.num_tokens - half :], trace.num_experts)
    load_LE = first_LE + middle_LE + last_LE
    mean_L = load_LE.mean(axis=1)
    drift_L = _total_variation(first_LE, last_LE)
    layers = tuple(
        LayerSummary(
            layer=layer,
            busiest_over_mean=float(load_LE[layer].max() / mean_L[layer]),
            coefficient_of_variation=float(load_LE[layer].std() / mean_L[layer]),
            active_experts=int(np.count_nonzero(load_LE[layer])),
            drift=float(drift_L[layer]),
            coactivation=_coactivation(trace, layer),
        )
        for layer in range(trace.num_layers)
    )
    return TraceSummary(
        num_tokens=trace.num_tokens,
        num_sequences=_num_sequences(trace),
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        num_ranks=None if trace.rank_T is None else len(np.unique(trace.rank_T)),
        domain_tokens=_domain_tokens(trace),
        model_name=trace.model_name,
        moe_layer_ids=trace.moe_layer_ids,
        size_bytes=trace.size_bytes,
        digest=trace.digest,
        layers=layers,
    )


def _count_LE(experts_TLK: ExpertArray, num_experts: int) -> FloatArray:
    num_tokens, num_layers, _ = experts_TLK.shape
    if not num_tokens:
        return np.zeros((num_layers, num_experts))
    # Blocks count fast; what fills no block is one more window of its own.
    block = min(num_tokens, 1 + _COUNTED_AT_ONCE // experts_TLK[0].size)
    whole = num_tokens // block * block
    load_LE: FloatArray = _load_WLE(experts_TLK[:whole], block, num_experts).sum(axis=0)
    return load_LE + _count_LE(experts_TLK[whole:], num_experts)


def _total_variation(p_LE: FloatArray, q_LE: FloatArray) -> FloatArray:
    """Half the L1 distance of two count vectors' shares, per layer; 0 where one counts nothing."""
    if not p_LE.any() or not q_LE.any():
        return np.zeros(len(p_LE))
    p_share, q_share = (count / count.sum(axis=1, keepdims=True) for count in (p_LE, q_LE))
    distance_L: FloatArray = 0.5 * np.abs(p_share - q_share).sum(axis=1)
    return distance_L


def _coactivation(trace: Trace, layer: int) -> float | None:
    if trace.top_k < 2:
        return None
    kept = min(trace.num_tokens, _COACTIVATION_TOKENS)
    token_T = np.arange(kept) * trace.num_tokens // kept
    pairs_EE = _pairs_EE(trace.experts_TLK[token_T, layer].astype(np.int64), trace.num_experts)
    chance_EE = _chance_pairs_EE(pairs_EE.sum(axis=1))
    return float(0.5 * np.abs(pairs_EE - chance_EE).sum() / pairs_EE.sum())


def _pairs_EE(experts_TK: IntArray, num_experts: int) -> FloatArray:
    """Count the tokens that select each ordered pair of different experts, ``[experts, experts]``."""
    count: FloatArray = np.zeros(num_experts * num_experts)
    for k in range(1, experts_TK.shape[1]):
        pair = experts_TK[:, :k] * num_experts + experts_TK[:, k : k + 1]
        count += np.bincount(pair.ravel(), minlength=count.size)
    half = count.reshape(num_experts, num_experts)
    return half + half.T


def _chance_pairs_EE(pairs_E: FloatArray) -> FloatArray:
    """Pairs of different experts that popularity alone makes, ``x_e * x_f``, with the given row sums.

    Fitted by Sinkhorn's iteration in its symmetric form, damped by a square root.
    """
    x_E = pairs_E / np.sqrt(max(pairs_E.sum(), 1))
    for _ in range(_FIT_ROUNDS):
        others_E = x_E.sum() - x_E
        x_E = np.sqrt(x_E * np.divide(pairs_E, others_E, out=np.zeros_like(x_E), where=others_E > 0))
    chance = np.outer(x_E, x_E)
    np.fill_diagonal(chance, 0)
    return chance


def _num_sequences(trace: Trace) -> int | None:
    if trace.sequence_T is None:
        return None
    if trace.rank_T is None:
        return len(np.unique(trace.sequence_T))
    by_rank = (trace.sequence_T[trace.rank_T == rank] for rank in np.unique(trace.rank_T))
    return sum(len(np.unique(sequence_T)) for sequence_T in by_rank)


def _domain_tokens(trace: Trace) -> dict[str, int]:
    if trace.domain_T is None:
        return {}
    known = trace.domain_T[trace.domain_T != UNKNOWN_DOMAIN]
    count = np.bincount(known, minlength=len(trace.domain_names))
    return dict(zip(trace.domain_names, count.tolist(), strict=True))
