"""Loads of a trace of any size, read within bounds: stretches of consecutive tokens, cut into windows.

Shape letters: W windows, L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.counts import ExpertCounts

if TYPE_CHECKING:
    from traces.source import TraceSource

__all__ = ["Overview", "overview_of"]

FloatArray = npt.NDArray[np.float64]

MOST_PAIRS = 1 << 28
"""Token-expert pairs of all layers that are read; of larger traces evenly spaced stretches."""
MOST_WINDOWS = 64
MOST_CELLS = 1 << 24
"""Windows times layers times experts."""
NUM_STRETCHES = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Overview:
    """What was read of a trace.

    Parameters
    ----------
    load_WLE
        Token-expert pairs of some windows, in time order.
    num_tokens_read
        Tokens that they count.
    num_tokens
        Tokens of the trace.
    """

    load_WLE: FloatArray
    num_tokens_read: int
    num_tokens: int

    @property
    def load_LE(self) -> FloatArray:
        """Mean over windows, ``[layers, experts]``."""
        return np.asarray(self.load_WLE.mean(axis=0))

    @property
    def is_whole(self) -> bool:
        """Whether every token was read."""
        return self.num_tokens_read == self.num_tokens


def overview_of(traffic: TraceSource | ExpertCounts) -> Overview:
    """Return the loads of some windows of a trace, statistics or counts.

    Raises
    ------
    InputError
        If the trace is damaged, holds no token, or is of too many experts.
    """
    from traces.statistics.routing import RoutingStatistics

    if isinstance(traffic, ExpertCounts | RoutingStatistics):
        load_WLE = np.asarray(traffic.load_WLE)
        if not len(load_WLE) and isinstance(traffic, RoutingStatistics):
            load_WLE = np.asarray(traffic.load_LE)[None]
        return _of_windows(load_WLE, int(traffic.num_tokens))
    return _of_tokens(traffic)


def _most_windows(num_layers: int, num_experts: int) -> int:
    cells = num_layers * num_experts
    if cells > MOST_CELLS:
        raise InputError(f"{num_layers} layers of {num_experts} experts are too many to be drawn")
    return min(MOST_WINDOWS, MOST_CELLS // cells)


def _of_windows(load_WLE: npt.NDArray[np.generic], num_tokens: int) -> Overview:
    """Add neighbouring windows up where there are more than are shown."""
    most = _most_windows(*load_WLE.shape[1:])
    starts = np.arange(0, len(load_WLE), -(-len(load_WLE) // most))
    summed_WLE = np.stack(
        [part.sum(axis=0, dtype=np.float64) for part in np.split(load_WLE, starts[1:].tolist())]
    )
    return Overview(load_WLE=summed_WLE, num_tokens_read=num_tokens, num_tokens=num_tokens)


def _of_tokens(source: TraceSource) -> Overview:
    header, num_tokens = source.header, source.num_tokens
    if num_tokens < 1:
        raise InputError("holds no token")
    most_tokens = max(1, MOST_PAIRS // (header.num_layers * header.top_k))
    num_windows = min(_most_windows(header.num_layers, header.num_experts), num_tokens)
    load_WLE = np.zeros((num_windows, header.num_layers, header.num_experts))
    num_read = 0
    # A window of a sampled trace takes what was read of its share of the time.
    for start, stop in _stretches(num_tokens, most_tokens):
        first = start
        for block in source.blocks(start, stop):
            window_T = np.arange(first, first + block.num_tokens) * num_windows // num_tokens
            _count(load_WLE, block.experts_TLK, window_T)
            first += block.num_tokens
        num_read += stop - start
    read_WLE = load_WLE[load_WLE.any(axis=(1, 2))]
    return Overview(load_WLE=read_WLE, num_tokens_read=num_read, num_tokens=num_tokens)


def _stretches(num_tokens: int, most_tokens: int) -> list[tuple[int, int]]:
    """Return the token ranges that are read, ascending."""
    if num_tokens <= most_tokens:
        return [(0, num_tokens)]
    length = max(1, most_tokens // NUM_STRETCHES)
    starts = np.linspace(0, num_tokens - length, NUM_STRETCHES).astype(np.int64)
    return [(int(start), int(start) + length) for start in starts]


def _count(
    load_WLE: FloatArray, experts_TLK: npt.NDArray[np.generic], window_T: npt.NDArray[np.int64]
) -> None:
    """Add the pairs of a block to its windows."""
    num_experts = load_WLE.shape[2]
    for window in np.unique(window_T).tolist():
        some_TLK = experts_TLK[window_T == window]
        for layer in range(load_WLE.shape[1]):
            load_WLE[window, layer] += np.bincount(some_TLK[:, layer].ravel(), minlength=num_experts)
