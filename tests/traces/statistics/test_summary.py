"""Tests of `describe` beyond traces in memory: streams of any blocks, and statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.source import BLOCK_TOKENS, MemorySource
from traces.statistics import collect, describe
from traces.synthesize import synthesize
from traces.trace import Trace


def known_trace(num_tokens: int = 400) -> Trace:
    trace = synthesize(
        num_tokens=num_tokens, num_layers=2, num_experts=16, top_k=4, seed=2, sequence_tokens=30
    )
    return replace(trace, rank_T=np.zeros(num_tokens, int))


class InBlocks(MemorySource):
    """A trace that comes in blocks of a size of its own."""

    def __init__(self, trace: Trace, block_tokens: int) -> None:
        super().__init__(trace)
        self.block_tokens = block_tokens

    def blocks(
        self, start: int = 0, stop: int | None = None, *, max_tokens: int = BLOCK_TOKENS
    ) -> Iterator[Trace]:
        """Yield blocks that are no longer than this source's own."""
        return super().blocks(start, stop, max_tokens=min(max_tokens, self.block_tokens))


@settings(deadline=None, max_examples=25)
@given(num_tokens=st.integers(1, 400), block_tokens=st.integers(1, 400))
def test_streams_are_summed_up_like_traces(num_tokens: int, block_tokens: int) -> None:
    """Wherever blocks end, the summary is that of the trace."""
    trace = known_trace(num_tokens)
    assert describe(InBlocks(trace, block_tokens)) == describe(trace)


def test_sources_are_taken_in_the_order_of_routing() -> None:
    """Ranks that ran side by side do not drift apart in a source; a trace is taken as it lists its tokens."""
    ids = np.array([0, 0, 1, 1], dtype=np.uint8)[:, None, None]
    trace = Trace(experts_TLK=ids, num_experts=2, rank_T=np.array([0, 0, 1, 1]))
    assert describe(trace).layers[0].drift == 1
    assert describe(MemorySource(trace)).layers[0].drift == 0


@pytest.mark.parametrize("options", [{}, {"parts": ()}])
def test_statistics_are_summed_up_like_their_trace(options: dict[str, Any]) -> None:
    """Loads, domains and co-activation, counted or from a sample of all tokens; halves are cut at windows."""
    trace = known_trace(320)
    expected, found = describe(trace), describe(collect(trace, window_tokens=10, **options))
    for name in (
        "num_tokens",
        "num_layers",
        "num_experts",
        "top_k",
        "num_ranks",
        "domain_tokens",
    ):
        assert getattr(found, name) == getattr(expected, name)
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        assert mine.coactivation == pytest.approx(theirs.coactivation)
        assert mine.drift == pytest.approx(theirs.drift)
        assert replace(mine, coactivation=None, drift=0) == replace(theirs, coactivation=None, drift=0)
    assert found.num_sequences is None


def test_statistics_without_pairs_have_no_coactivation() -> None:
    """It is left open, not guessed."""
    counted = collect(known_trace(), window_tokens=10, parts=(), max_sampled_tokens=0)
    assert [layer.coactivation for layer in describe(counted).layers] == [None, None]


def test_drift_over_time_of_a_sudden_change() -> None:
    """Half of the windows use one expert, half the other: each is half away from all traffic."""
    ids = np.repeat(np.array([0, 1], dtype=np.uint8), 32)[:, None, None]
    counted = collect(Trace(experts_TLK=ids, num_experts=2), window_tokens=8)
    assert counted.drift_BL.tolist() == [[0.5]] * 8
    assert counted.drift_L.tolist() == [1.0]
