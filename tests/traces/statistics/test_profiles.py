"""Tests of profiles of traces too long to keep, and of parts of traces."""

from __future__ import annotations

import numpy as np
import pytest

from placement.errors import InputError
from traces.source import MemorySource
from traces.statistics import build_profile, collect, merge
from traces.synthesize import synthesize
from traces.trace import Trace


def long_trace(num_tokens: int = 1000) -> Trace:
    return synthesize(num_tokens=num_tokens, num_layers=3, num_experts=16, top_k=4, seed=3)


def test_little_memory_keeps_fewer_windows_and_tokens() -> None:
    """Windows are evenly spaced and exact; the sample is of equal size in each and fits."""
    trace = long_trace()
    whole = build_profile(trace, window_tokens=10)
    profile = build_profile(MemorySource(trace), window_tokens=10, memory_bytes=40_000)
    stride = -(-100 // profile.num_windows)
    assert stride in (2, 4, 8)
    np.testing.assert_array_equal(profile.load_WLE, whole.load_WLE[::stride])
    assert profile.window_of_token_T is not None
    assert profile.experts_TLK is not None
    sampled_W = np.bincount(profile.window_of_token_T)
    assert len(sampled_W) == profile.num_windows
    assert len(set(sampled_W.tolist())) == 1
    assert profile.load_WLE.nbytes + profile.experts_TLK.nbytes < 40_000
    assert profile.num_sampled_tokens < 1000


def test_a_sample_that_is_asked_for_is_taken() -> None:
    """Memory bounds what nobody asked for."""
    profile = build_profile(long_trace(), window_tokens=10, memory_bytes=40_000, max_sampled_tokens=1000)
    assert profile.num_sampled_tokens > 900


def test_statistics_are_profiles_already() -> None:
    """Whoever builds a profile of statistics gets theirs."""
    counted = collect(long_trace(), window_tokens=50)
    mine, theirs = build_profile(counted, window_tokens=10), counted.profile()
    np.testing.assert_array_equal(mine.load_WLE, theirs.load_WLE)
    assert mine.num_windows == 20


def test_parts_of_a_thinned_trace_have_profiles() -> None:
    """A part that begins between two windows kept has its tokens in the windows it has, or none."""
    trace = long_trace(4000)
    options = {"window_tokens": 10, "memory_bytes": 30_000}
    whole = collect(trace, **options)  # type: ignore[arg-type]
    stride = whole.window_stride
    assert stride > 2
    between = collect(trace, start=10, stop=20, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="none of these 1 windows was kept; merge them"):
        between.profile()
    late = collect(trace, start=10, **options)  # type: ignore[arg-type]
    profile = late.profile()
    assert profile.num_windows == whole.profile().num_windows - 1
    assert profile.window_of_token_T is not None
    assert profile.window_of_token_T[0] == 0
    first = collect(trace, stop=10, **options)  # type: ignore[arg-type]
    assert merge([first, late]).digest == whole.digest
