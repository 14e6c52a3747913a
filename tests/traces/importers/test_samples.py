"""Tests of every reader on every sample: one reader claims it, and reads what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from placement.errors import InputError
from tests.traces.importers.samples import SAMPLES, Sample, truncated_npz
from traces.counts import ExpertCounts
from traces.readers import READERS, open_trace
from traces.source import TraceHeader, TraceSource, read_all
from traces.trace import Trace


def opened(sample: Sample) -> TraceSource:
    """Open a sample that holds tokens."""
    source = open_trace(sample.path, options=sample.options)
    assert not isinstance(source, ExpertCounts)
    return source


def same(trace: Trace, expected: Trace) -> None:
    """Two traces agree in everything."""
    assert TraceHeader.of(trace) == TraceHeader.of(expected)
    for name in ("experts_TLK", "sequence_T", "position_T", "rank_T", "domain_T"):
        mine, theirs = getattr(trace, name), getattr(expected, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
    assert trace.digest == expected.digest


@pytest.mark.parametrize("name", SAMPLES)
def test_one_reader_claims_each_sample(tmp_path: Path, name: str) -> None:
    """No format is taken for another."""
    sample = SAMPLES[name](tmp_path)
    assert [reader for reader in READERS if READERS[reader].sniff(sample.path)] == [sample.format]


def test_a_cut_archive_is_known_for_what_it_was(tmp_path: Path) -> None:
    """Its own reader says then what is wrong with it."""
    sample = truncated_npz(tmp_path)
    assert [reader for reader in READERS if READERS[reader].sniff(sample.path)] == ["npz"]
    with pytest.raises(InputError, match="is damaged or incomplete"):
        open_trace(sample.path)


@pytest.mark.parametrize("name", SAMPLES)
def test_each_sample_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    """Tokens, homes, positions, order and header, or counts, come back as they were."""
    sample = SAMPLES[name](tmp_path)
    if isinstance(sample.expected, ExpertCounts):
        counts = open_trace(sample.path, options=sample.options)
        assert isinstance(counts, ExpertCounts)
        np.testing.assert_array_equal(counts.load_WLE, sample.expected.load_WLE)
        assert counts.digest == sample.expected.digest
        return
    source = opened(sample)
    assert source.header == TraceHeader.of(sample.expected)
    assert source.num_tokens == sample.expected.num_tokens
    if name != "dataset":
        assert source.digest == sample.expected.digest
    same(read_all(source), sample.expected.interleave_ranks() if name == "dataset" else sample.expected)


COUNTED = {"sglang-per-pass", "sglang-stat", "sglang-counts", "tensorrt-llm-counts", "vllm-ascend"}
TOKEN_SAMPLES = [name for name in SAMPLES if name not in COUNTED]


@pytest.mark.parametrize("name", TOKEN_SAMPLES)
@pytest.mark.parametrize("max_tokens", [1, 5, 1000])
def test_any_range_is_the_same_part(tmp_path: Path, name: str, max_tokens: int) -> None:
    """Blocks are as long as asked for, and a range reads as that part of the whole, again and again."""
    sample = SAMPLES[name](tmp_path)
    source = opened(sample)
    whole = read_all(source)
    for start, stop in ((0, 1), (2, 7), (whole.num_tokens - 3, whole.num_tokens), (4, 4)):
        blocks = list(source.blocks(start, stop, max_tokens=max_tokens))
        assert [b.num_tokens for b in blocks] == [
            min(max_tokens, stop - first) for first in range(start, stop, max_tokens)
        ]
        ids = [b.experts_TLK for b in blocks]
        assert (
            np.concatenate([whole.experts_TLK[:0], *ids]).tolist() == whole.experts_TLK[start:stop].tolist()
        )


@pytest.mark.parametrize("name", TOKEN_SAMPLES)
def test_ranges_outside_are_refused(tmp_path: Path, name: str) -> None:
    """No token beyond the last."""
    sample = SAMPLES[name](tmp_path)
    source = opened(sample)
    with pytest.raises(InputError, match="are asked for of a trace"):
        list(source.blocks(0, source.num_tokens + 1))
