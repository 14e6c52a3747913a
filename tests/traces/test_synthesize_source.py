"""Tests of `SyntheticSource`: the router of `synthesize`, drawn block by block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from traces.source import TraceHeader, read_all
from traces.statistics import describe
from traces.synthesize import SyntheticSource, synthesize
from traces.synthesize import source as source_module


def make(**changes: Any) -> SyntheticSource:
    """Return a small source."""
    knobs = {"num_tokens": 1000, "num_layers": 2, "num_experts": 16, "top_k": 4, "sequence_tokens": 64}
    return SyntheticSource(**{**knobs, "seed": 5, **changes})


@settings(max_examples=12, deadline=None)
@given(start=st.integers(0, 1000), length=st.integers(0, 1000), max_tokens=st.integers(1, 400))
def test_any_range_is_the_same_part(start: int, length: int, max_tokens: int) -> None:
    """Drawn in blocks of 131 tokens, read from anywhere in blocks of any size."""
    stop = min(start + length, 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_module, "_DRAWN_AT_ONCE", 131 * 16)
        whole = read_all(make())
        blocks = list(make().blocks(start, stop, max_tokens=max_tokens))
    assert sum(block.num_tokens for block in blocks) == stop - start
    for name in ("experts_TLK", "sequence_T", "position_T", "domain_T"):
        parts = [getattr(block, name) for block in blocks]
        expected = getattr(whole, name)[start:stop]
        np.testing.assert_array_equal(np.concatenate([expected[:0], *parts]), expected)


def test_it_is_a_trace_like_that_of_synthesize() -> None:
    """The same header and the same traits, from the same knobs."""
    knobs = {"num_tokens": 20_000, "num_layers": 2, "num_experts": 16, "top_k": 4, "seed": 3}
    source, trace = SyntheticSource(**knobs), synthesize(**knobs)
    drawn = read_all(source)
    assert TraceHeader.of(trace) == source.header
    np.testing.assert_array_equal(drawn.sequence_T, trace.sequence_T)
    mine, theirs = describe(drawn).layers[0], describe(trace).layers[0]
    assert mine.coefficient_of_variation == pytest.approx(theirs.coefficient_of_variation, abs=0.35)
    assert mine.coactivation == pytest.approx(theirs.coactivation, abs=0.1)


def test_the_seed_decides() -> None:
    """The same arguments give the same trace, another seed another one."""
    assert make().digest == make().digest == read_all(make()).digest
    assert make(seed=6).digest != make().digest


def test_a_long_trace_costs_nothing_until_it_is_read() -> None:
    """The last tokens of a billion are drawn without the others."""
    source = make(num_tokens=10**9, sequence_tokens=4096)
    last = next(source.blocks(10**9 - 10))
    assert last.num_tokens == 10
    assert last.sequence_T is not None
    assert int(last.sequence_T[-1]) == (10**9 - 1) // 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"top_k": 17}, "top_k is 17 of 16"),
        ({"skew": -1}, "skew is -1"),
    ],
)
def test_numbers_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    """As `synthesize` does."""
    with pytest.raises(InputError, match=message):
        make(**changes)
