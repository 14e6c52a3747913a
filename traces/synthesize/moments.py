"""What a fit needs to know of traffic: loads by window, and how often two experts are selected by one token.

Nothing here is about a single token. Shape letters: W windows, L MoE layers, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.counts import ExpertCounts
from traces.source import TraceHeader, TraceSource

if TYPE_CHECKING:
    from traces.statistics import RoutingStatistics

__all__ = ["Moments"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """First and second moments of a trace's routing.

    Parameters
    ----------
    header
        What all tokens have in common.
    window_tokens, num_windows
        Tokens per window, and whole windows that the trace has.
    share_WLE
        Probability that a token of the window selects the expert; sums to top-k. Where windows are many,
        these are every n-th of them.
    pair_LEE
        Probability that a token selects both experts of a layer, symmetric, diagonal 0; `None` if unknown.
    next_LEE
        Probability that a token selects one expert (row) in a layer and one (column) in the next one,
        ``[layers - 1, experts, experts]``; `None` if unknown.
    """

    header: TraceHeader
    window_tokens: int
    num_windows: int
    share_WLE: FloatArray
    pair_LEE: FloatArray | None
    next_LEE: FloatArray | None

    @classmethod
    def of(
        cls, traffic: TraceSource | ExpertCounts | RoutingStatistics, *, window_tokens: int | None = None
    ) -> Moments:
        """Take the moments of counted or of token-by-token traffic.

        Parameters
        ----------
        traffic
            A trace, which is read once, statistics of one, or counts, whose pairs are unknown.
        window_tokens
            Tokens per window of a trace; by default 4096, fewer for short traces.

        Raises
        ------
        InputError
            If a trace is shorter than a window.
        """
        if isinstance(traffic, ExpertCounts):
            return cls._of_counts(traffic)
        from traces.statistics import RoutingStatistics, collect

        if not isinstance(traffic, RoutingStatistics):
            tokens = window_tokens or max(1, min(4096, traffic.num_tokens // 16))
            traffic = collect(traffic, window_tokens=tokens)
        return cls._of_statistics(traffic)

    @classmethod
    def _of_counts(cls, counts: ExpertCounts) -> Moments:
        header = TraceHeader(
            num_layers=counts.num_layers,
            num_experts=counts.num_experts,
            top_k=counts.top_k,
            model_name=counts.model_name,
            moe_layer_ids=counts.moe_layer_ids,
        )
        window_tokens = max(1, round(float(counts.window_tokens_W.mean())))
        share_WLE = _shares(counts.load_WLE, counts.top_k)
        return cls(
            header=header,
            window_tokens=window_tokens,
            num_windows=counts.num_windows,
            share_WLE=share_WLE,
            pair_LEE=None,
            next_LEE=None,
        )

    @classmethod
    def _of_statistics(cls, stats: RoutingStatistics) -> Moments:
        if not stats.num_windows:
            raise InputError(
                f"holds {stats.num_tokens} tokens, less than one window of {stats.window_tokens}"
            )
        header = stats.header
        pairs, transitions = range(header.num_layers), range(header.num_layers - 1)
        knows = stats.sample is not None
        return cls(
            header=header,
            window_tokens=stats.window_tokens,
            num_windows=stats.num_windows,
            share_WLE=_shares(stats.load_WLE, header.top_k),
            pair_LEE=_stacked([stats.coactivation(layer) / stats.num_tokens for layer in pairs])
            if header.top_k > 1 and (knows or stats.coactivation_LEE is not None)
            else None,
            next_LEE=_stacked([stats.transitions(layer) / stats.num_tokens for layer in transitions])
            if knows or stats.transitions_LEE is not None
            else None,
        )


def _stacked(tables: list[FloatArray]) -> FloatArray | None:
    return np.stack(tables) if tables else None


def _shares(load_WLE: npt.NDArray[np.integer[Any]], top_k: int) -> FloatArray:
    pairs_WL1 = load_WLE.sum(axis=2, keepdims=True, dtype=np.float64)
    return np.asarray(load_WLE * (top_k / np.maximum(pairs_WL1, 1)))
