"""Overviews read traces of any size within bounds, and count what they read."""

from __future__ import annotations

import numpy as np
import pytest

from placement.errors import InputError
from traces import overview
from traces.counts import ExpertCounts
from traces.overview import overview_of
from traces.source import MemorySource
from traces.trace import Trace


def source(num_tokens: int) -> MemorySource:
    """Return a trace whose token t selects expert t modulo 4 in both layers."""
    expert_T = np.arange(num_tokens, dtype=np.uint8) % 4
    return MemorySource(Trace(experts_TLK=np.tile(expert_T[:, None, None], (1, 2, 1)), num_experts=4))


def test_every_pair_of_a_small_trace_is_counted() -> None:
    """Windows of equal length, in time order."""
    found = overview_of(source(256))
    assert found.is_whole
    assert found.load_WLE.shape == (64, 2, 4)
    np.testing.assert_array_equal(found.load_WLE, 1)
    np.testing.assert_array_equal(found.load_LE, 1)


def test_of_a_few_tokens_each_is_a_window() -> None:
    """No window is empty."""
    assert overview_of(source(3)).load_WLE.sum(axis=(1, 2)).tolist() == [2, 2, 2]


def test_of_a_large_trace_stretches_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its beginning to its end, as many tokens as are allowed."""
    monkeypatch.setattr(overview, "MOST_PAIRS", 2 * 320)
    found = overview_of(source(10_000))
    assert (found.num_tokens_read, found.num_tokens, found.is_whole) == (320, 10_000, False)
    assert found.load_WLE.sum() == 2 * 320
    assert len(found.load_WLE) >= overview.NUM_STRETCHES


def test_windows_of_counts_are_added_up() -> None:
    """130 windows become 44 of three each, the last of one."""
    found = overview_of(ExpertCounts(load_WLE=np.ones((130, 1, 2), dtype=np.int64), top_k=1))
    assert len(found.load_WLE) == 44
    assert found.load_WLE.sum(axis=(1, 2)).tolist() == [6.0] * 43 + [2.0]


def test_too_many_experts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before memory is taken for them."""
    monkeypatch.setattr(overview, "MOST_CELLS", 7)
    with pytest.raises(InputError, match="2 layers of 4 experts are too many"):
        overview_of(source(8))
