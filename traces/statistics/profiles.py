"""What a trace says to the optimizer: load windows, sampled tokens, homes.

Shape letters: W windows, L MoE layers, E experts, T tokens, S strata.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from placement.profile import RoutingProfile
from traces.source import MemorySource, TraceHeader, TraceSource
from traces.statistics.collector import collect_planned
from traces.statistics.plan import MemoryPlan, few_tokens, plan_memory
from traces.statistics.routing import RoutingStatistics
from traces.statistics.segment import Segment
from traces.trace import IntArray, Trace

__all__ = ["PROFILE_MEMORY_BYTES", "build_profile", "load_only_profile", "profile_of"]

PROFILE_MEMORY_BYTES = 2 << 30
"""Memory that a profile takes unless told otherwise."""

_LOAD_BYTES = 8
_FIELD_BYTES = 56


def build_profile(
    trace: Trace | TraceSource,
    *,
    window_tokens: int,
    max_sampled_tokens: int | None = None,
    seed: int = 0,
    num_devices: int | None = None,
    memory_bytes: int = PROFILE_MEMORY_BYTES,
) -> RoutingProfile:
    """Cut a trace into windows and count, in one pass.

    Loads are exact. Windows follow the order in which tokens were routed (`Trace.interleave_ranks`). The
    tail, which fills no window, counts in per-token figures alone. Of a trace whose windows take more than
    half of the memory, every second, fourth, ... window is kept.

    Parameters
    ----------
    trace
        The trace, or statistics of it; these have windows and a sample of their own already, which are taken
        as they are.
    window_tokens
        Consecutive tokens per window.
    max_sampled_tokens
        Tokens whose expert sets the profile keeps: a uniform sample without replacement, of equal size in
        every window, in recorded order. `None` keeps all, or as many as the memory holds.
    seed
        Seed of the sample.
    num_devices
        Devices of the topology. If as many ranks, and more than one, recorded the trace, the i-th rank's
        tokens live on device i; otherwise homes are unknown.
    memory_bytes
        Memory that the profile may take, in bytes; a sample that was asked for comes on top.

    Returns
    -------
    RoutingProfile
        With loads in token-expert pairs per window.

    Raises
    ------
    InputError
        If the trace holds no whole window, or the sample less than one token per window.
    """
    if isinstance(trace, RoutingStatistics):
        return trace.profile(num_devices)
    source = MemorySource(trace) if isinstance(trace, Trace) else trace
    plan = _plan(source.header, source.num_tokens, window_tokens, max_sampled_tokens, memory_bytes)
    statistics = collect_planned(source, plan, window_tokens=window_tokens, seed=seed, digest="")
    return statistics.profile(num_devices)


def _plan(
    header: TraceHeader, num_tokens: int, window_tokens: int, wanted: int | None, memory_bytes: int
) -> MemoryPlan:
    """Share the memory out between the windows' loads and the sample, and count nothing else."""
    num_windows = _count_windows(num_tokens, window_tokens)
    loads = header.num_layers * header.num_experts
    plan = plan_memory(
        header, num_tokens=num_tokens, window_tokens=window_tokens, max_sampled_tokens=0, parts=()
    )
    window_bytes = loads * (_LOAD_BYTES + plan.window_dtype.itemsize)
    stride = 1
    while -(-num_windows // stride) * window_bytes > memory_bytes // 2 and stride < num_windows:
        stride *= 2
    strata = -(-num_windows // stride)
    token_bytes = header.num_layers * header.top_k * header.dtype.itemsize + _FIELD_BYTES
    most = (memory_bytes - strata * window_bytes) // token_bytes if wanted is None else wanted
    if wanted is not None and wanted < strata:
        raise InputError(few_tokens(wanted, strata))
    per_stratum = min(max(1, most // strata), stride * window_tokens)
    return plan.with_sample(window_stride=stride, most_per_stratum=per_stratum)


def _count_windows(num_tokens: int, window_tokens: int) -> int:
    if window_tokens < 1:
        raise InputError(f"a window of {window_tokens} tokens is impossible; use at least 1")
    if num_tokens < window_tokens:
        raise InputError(
            f"the trace has {num_tokens} tokens, less than one window of {window_tokens}; "
            f"use a longer trace or a window of at most {num_tokens} tokens"
        )
    return num_tokens // window_tokens


def profile_of(statistics: RoutingStatistics, num_devices: int | None = None) -> RoutingProfile:
    """Return the profile that statistics hold; see `RoutingStatistics.profile`."""
    if not len(statistics.load_WLE):
        _count_windows(statistics.num_tokens, statistics.window_tokens)
        raise InputError(
            f"none of these {statistics.num_windows} windows was kept; merge them with the windows before"
        )
    sample = statistics.sample
    load_WLE = statistics.load_WLE.astype(np.float64)
    window_tokens_W = np.full(len(load_WLE), float(statistics.window_tokens))
    if sample is None or not sample.num_tokens:
        return RoutingProfile(
            load_WLE=load_WLE, window_tokens_W=window_tokens_W, top_k=statistics.header.top_k
        )
    window_S = np.append(_window_of_stratum(statistics), len(load_WLE))
    tail_is_sampled = int(sample.stratum_T[-1]) == statistics.num_strata
    return RoutingProfile(
        load_WLE=load_WLE,
        window_tokens_W=window_tokens_W,
        top_k=statistics.header.top_k,
        experts_TLK=sample.experts_TLK,
        window_of_token_T=window_S[sample.stratum_T],
        home_T=_homes(statistics, num_devices),
        tail_tokens=statistics.tail_tokens if tail_is_sampled else 0,
    )


def _window_of_stratum(statistics: RoutingStatistics) -> IntArray:
    """Kept window of each stratum: its first; a stratum cut off from that belongs to the one before."""
    rows, windows = [], 0
    for segment in statistics.segments:
        rows.append(_rows(segment, statistics.window_stride) + windows)
        windows += len(segment.multiples(statistics.window_stride))
    return np.maximum(np.concatenate(rows), 0)


def _rows(segment: Segment, stride: int) -> IntArray:
    groups, kept = len(segment.groups(stride)), len(segment.multiples(stride))
    return np.arange(groups) - (groups - kept)


def _homes(statistics: RoutingStatistics, num_devices: int | None) -> IntArray | None:
    sample, rank_R = statistics.sample, statistics.rank_R
    if sample is None or sample.rank_T is None or rank_R is None or num_devices is None:
        return None
    if len(rank_R) < 2 or len(rank_R) != num_devices:
        return None
    return np.searchsorted(rank_R, sample.rank_T)


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
