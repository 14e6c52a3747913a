"""What a pass over a trace keeps in the memory it is given: exact, thinned, or estimated.

The plan follows from the shape and length of the whole trace alone, so that every part of it is counted
alike.

A quarter of the memory is for reading: blocks, and each thread's table of pairs. Of the rest at most

- half takes the pair counts, exact or not at all: transitions, co-activation, first transitions, in this
  order; what does not fit is estimated from the sample;
- an eighth each takes loads by rank (dropped if more ranks turn up), by domain (dropped if too many) and
  over time (fewer, longer stretches);
- half of what is then left takes the loads of windows: of all, or of every second, fourth, ... window;
- what is left takes the sample: as many tokens of every window, or of every group of so many windows.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from placement.errors import InputError
from traces.source import TraceHeader

__all__ = ["DEFAULT_MEMORY_BYTES", "DEFAULT_SAMPLED_TOKENS", "PARTS", "MemoryPlan", "plan_memory"]

DEFAULT_MEMORY_BYTES = 1 << 30
"""Memory that statistics take unless told otherwise."""

DEFAULT_SAMPLED_TOKENS = 1 << 16
"""Tokens that are sampled unless told otherwise; one of every window if there are more windows."""

PARTS = ("transitions", "coactivation", "first-transitions", "homes", "domains")
"""What may be counted beside loads."""

_PAIR_PARTS = ("transitions", "coactivation", "first-transitions")
_MOST_STRETCHES = 64
_MOST_RANKS = 1 << 16
_MOST_BLOCK_TOKENS = (1 << 16) - 1
_LEAST_BLOCK_TOKENS = 16
_BLOCKS_AT_ONCE = 3
_FIELD_BYTES = 56
_TABLE_CELL_BYTES = 2
_EXACT_IN_FOUR_BYTES = 1 << 32


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How much of everything is kept.

    Parameters
    ----------
    block_tokens
        Tokens that are read at a time.
    most_threads
        Threads that the tables of pairs leave room for.
    parts
        Parts of `PARTS` that are counted.
    most_ranks
        Ranks of origin up to which loads by rank are counted.
    window_stride
        Loads of every so-many-th window are kept; a power of two.
    time_windows
        Windows of a stretch of time; a power of two.
    most_per_stratum
        Tokens sampled of every `window_stride` windows; 0 for no sample.
    count_dtype, window_dtype
        Types of counts over all tokens, and over the tokens of a window.
    """

    block_tokens: int
    most_threads: int
    parts: frozenset[str]
    most_ranks: int
    window_stride: int
    time_windows: int
    most_per_stratum: int
    count_dtype: np.dtype[Any]
    window_dtype: np.dtype[Any]

    def with_sample(self, *, window_stride: int, most_per_stratum: int) -> MemoryPlan:
        """Return the plan with other windows and another sample."""
        return replace(self, window_stride=window_stride, most_per_stratum=most_per_stratum)


def plan_memory(
    header: TraceHeader,
    *,
    num_tokens: int,
    window_tokens: int,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    max_sampled_tokens: int | None = None,
    parts: Collection[str] = PARTS,
) -> MemoryPlan:
    """Share out memory for the statistics of a trace.

    Parameters
    ----------
    header, num_tokens
        Shape and length of the whole trace.
    window_tokens
        Consecutive tokens per window.
    memory_bytes
        Memory for all that a pass keeps and reads at a time, in bytes.
    max_sampled_tokens
        Tokens to sample at most, 0 for none; by default `DEFAULT_SAMPLED_TOKENS`, or one of every window.
    parts
        What to count beside loads, of `PARTS`.

    Raises
    ------
    InputError
        If a number or part is impossible, or the memory does not even hold the loads.
    """
    _check(window_tokens, memory_bytes, max_sampled_tokens, parts)
    count_dtype = np.dtype(np.uint32 if num_tokens < _EXACT_IN_FOUR_BYTES else np.uint64)
    window_dtype = np.dtype(np.uint16 if window_tokens < 1 << 16 else np.uint32)
    loads = header.num_layers * header.num_experts
    table_bytes = loads * count_dtype.itemsize
    record_bytes = header.num_layers * header.top_k * header.dtype.itemsize
    num_windows = num_tokens // window_tokens

    reading = memory_bytes // 4
    block_tokens = reading // 2 // (_BLOCKS_AT_ONCE * (record_bytes + _FIELD_BYTES))
    block_tokens = min(block_tokens, _MOST_BLOCK_TOKENS)
    most_threads = max(1, reading // 2 // (header.num_experts**2 * _TABLE_CELL_BYTES))

    keeping = memory_bytes - reading
    kept, pair_bytes = _pairs_that_fit(header, count_dtype.itemsize, keeping // 2, parts)
    left = keeping - pair_bytes - loads * 8
    most_ranks = min(_MOST_RANKS, keeping // 16 // table_bytes) if "homes" in parts else 0
    if most_ranks:
        kept.append("homes")
        left -= 2 * most_ranks * table_bytes
    domain_bytes = len(header.domain_names) * table_bytes
    if "domains" in parts and 0 < domain_bytes <= keeping // 8:
        kept.append("domains")
        left -= domain_bytes
    stretches = max(1, min(_MOST_STRETCHES, keeping // 8 // table_bytes))
    time_windows = _stride(num_windows, stretches)
    left -= -(-num_windows // time_windows) * table_bytes

    window_bytes = loads * window_dtype.itemsize
    if left < window_bytes or block_tokens < min(_LEAST_BLOCK_TOKENS, max(1, num_tokens)):
        raise InputError(
            f"{memory_bytes} bytes of memory are too few to count {header.num_layers} layers of "
            f"{header.num_experts} experts; give more"
        )
    if block_tokens > window_tokens:
        block_tokens -= block_tokens % window_tokens
    stride = _stride(num_windows, left // 2 // window_bytes)
    left -= -(-num_windows // stride) * window_bytes
    stride, most = _sample_size(
        num_windows, window_tokens, stride, left // (record_bytes + _FIELD_BYTES), max_sampled_tokens
    )
    return MemoryPlan(
        block_tokens=block_tokens,
        most_threads=most_threads,
        parts=frozenset(kept),
        most_ranks=most_ranks,
        window_stride=stride,
        time_windows=time_windows,
        most_per_stratum=most,
        count_dtype=count_dtype,
        window_dtype=window_dtype,
    )


def _check(
    window_tokens: int, memory_bytes: int, max_sampled_tokens: int | None, parts: Collection[str]
) -> None:
    if window_tokens < 1:
        raise InputError(f"a window of {window_tokens} tokens is impossible; use at least 1")
    if memory_bytes < 1:
        raise InputError(f"{memory_bytes} bytes of memory are impossible; give more")
    if max_sampled_tokens is not None and max_sampled_tokens < 0:
        raise InputError(f"a sample of {max_sampled_tokens} tokens is impossible; use 0 for none")
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise InputError(f"statistics have no part {min(unknown)!r}; their parts are {', '.join(PARTS)}")


def _pairs_that_fit(
    header: TraceHeader, cell_bytes: int, budget: int, parts: Collection[str]
) -> tuple[list[str], int]:
    """Return the pair counts that are kept, and their size."""
    kept, used = [], 0
    for name in _PAIR_PARTS:
        matrices = header.num_layers - (name != "coactivation")
        size = matrices * header.num_experts**2 * cell_bytes
        if name in parts and used + size <= budget:
            kept.append(name)
            used += size
    return kept, used


def _stride(num_windows: int, most: int) -> int:
    """Return the smallest power of two that cuts windows into at most so many groups."""
    stride = 1
    while -(-num_windows // stride) > max(1, most):
        stride *= 2
    return stride


def _sample_size(
    num_windows: int, window_tokens: int, stride: int, room: int, wanted: int | None
) -> tuple[int, int]:
    """Return windows and sampled tokens of a stratum."""
    if wanted == 0 or not num_windows:
        return stride, 0
    strata = -(-num_windows // stride)
    if wanted is not None and wanted < strata:
        raise InputError(few_tokens(wanted, strata))
    most = min(room, max(DEFAULT_SAMPLED_TOKENS, strata) if wanted is None else wanted)
    stride = max(stride, _stride(num_windows, most))
    strata = -(-num_windows // stride)
    return stride, min(most // strata, stride * window_tokens)


def few_tokens(sampled: int, strata: int) -> str:
    """Say that a sample is too small."""
    return (
        f"a sample of {sampled} tokens leaves some of {strata} windows empty; "
        f"sample at least {strata} tokens or use a larger window"
    )
