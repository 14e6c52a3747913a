"""Tests of `merge`: parts make the whole, the order of merging is free, samples stay fair."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from traces.statistics import RoutingStatistics, collect, fitted, load, merge, save
from traces.synthesize import synthesize
from traces.trace import Trace

WINDOW = 8
LITTLE = 24_000
"""Bytes of memory that do not hold all windows of a day of 200 tokens."""


def day(seed: int, num_tokens: int = 200, **changed: Any) -> Trace:
    """Return one day's trace, with ranks, sequences and domains of its own."""
    trace = synthesize(
        num_tokens=num_tokens,
        num_layers=3,
        num_experts=32,
        top_k=2,
        num_domains=2,
        sequence_tokens=16,
        seed=seed,
    )
    ranks = np.random.default_rng(seed).integers(seed, seed + 3, num_tokens)
    return replace(trace, rank_T=np.sort(ranks), **changed)


def counted(trace: Trace, **options: Any) -> RoutingStatistics:
    return collect(trace, threads=1, **({"window_tokens": WINDOW} | options))


@settings(deadline=None, max_examples=25)
@given(
    cuts=st.lists(st.integers(0, 25), max_size=4),
    sampled=st.sampled_from([0, 60, None]),
    memory_bytes=st.sampled_from([1 << 30, LITTLE]),
    threads=st.integers(1, 3),
)
def test_parts_make_the_whole(cuts: list[int], sampled: int | None, memory_bytes: int, threads: int) -> None:
    """Cut anywhere between windows, counted apart and merged: to the bit what one pass gives."""
    trace = day(1, 203)
    options: dict[str, Any] = {"max_sampled_tokens": sampled, "memory_bytes": memory_bytes}
    whole = counted(trace, **options)
    ends = [0, *(cut * WINDOW for cut in sorted(cuts)), 203]
    parts = [
        collect(trace, window_tokens=WINDOW, start=start, stop=stop, threads=threads, **options)
        for start, stop in pairwise(ends)
    ]
    assert merge(parts).digest == whole.digest
    assert (memory_bytes == LITTLE) == (whole.window_stride > 1)


SIZES = st.tuples(
    st.integers(1, 120), st.sampled_from([1 << 30, LITTLE]), st.sampled_from([0, 40, None]), st.integers(0, 9)
)


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(SIZES, min_size=3, max_size=3))
def test_the_order_of_merging_is_free(sizes: list[tuple[int, int, int | None, int]]) -> None:
    """Days of any length, thinned and sampled differently: (a + b) + c is a + (b + c) is all at once."""
    days = []
    for number, (windows, memory_bytes, sampled, tail) in enumerate(sizes):
        trace = day(number, windows * WINDOW + tail)
        sampled = None if sampled is not None and 0 < sampled < windows else sampled
        days.append(counted(trace, memory_bytes=memory_bytes, max_sampled_tokens=sampled, seed=number))
    a, b, c = days
    expected = merge(days)
    assert merge([merge([a, b]), c]).digest == expected.digest
    assert merge([a, merge([b, c])]).digest == expected.digest
    assert expected.num_tokens == sum(windows * WINDOW + tail for windows, _, _, tail in sizes)
    assert int(expected.load_LE.sum()) == expected.num_tokens * 3 * 2
    assert int(expected.time_tokens_B.sum()) == expected.num_windows * WINDOW
    if expected.sample is not None:
        assert expected.sample_weight_T.sum() == pytest.approx(expected.num_tokens)
        profile = expected.profile()
        assert profile.num_windows == len(expected.window_index_W)


def test_yesterday_and_today() -> None:
    """Windows follow in time, counts add up, tails come last, every token is there."""
    yesterday, today = day(0, 20), day(1, 19)
    both = merge([counted(yesterday), counted(today)])
    assert [segment.num_windows for segment in both.segments] == [2, 2]
    assert both.window_index_W.tolist() == [0, 1, 0, 1]
    assert (both.num_tokens, both.tail_tokens) == (39, 7)
    assert both.load_WLE[:2].tolist() == counted(yesterday).load_WLE.tolist()
    assert both.load_WLE[2:].tolist() == counted(today).load_WLE.tolist()
    np.testing.assert_array_equal(
        both.transitions(1), counted(yesterday).transitions(1) + counted(today).transitions(1)
    )
    assert both.rank_R is not None
    assert both.rank_tokens_R is not None
    assert both.rank_R.tolist() == [0, 1, 2, 3]
    assert int(both.rank_tokens_R.sum()) == 39
    assert both.sample is not None
    assert both.sample.num_tokens == 39
    assert np.bincount(both.sample.stratum_T).tolist() == [8, 8, 8, 8, 7]
    profile = both.profile()
    assert profile.tail_tokens == 7
    assert profile.experts_TLK is not None
    first, last = yesterday.interleave_ranks().experts_TLK, today.interleave_ranks().experts_TLK
    expected = np.concatenate([first[:16], last[:16], first[16:], last[16:]])
    np.testing.assert_array_equal(profile.experts_TLK, expected)


def test_the_smaller_sample_decides() -> None:
    """All tokens of one day and few of the next: as few of both, so that tokens weigh the same."""
    both = merge([counted(day(0)), counted(day(1), max_sampled_tokens=50)])
    assert both.sample is not None
    assert both.sample.most_per_stratum == 2
    assert np.bincount(both.sample.stratum_T).tolist() == [2] * 50
    np.testing.assert_allclose(both.sample_weight_T, WINDOW / 2)


def test_samples_stay_fair_when_merged() -> None:
    """Over many seeds every token of both days is as likely to be kept as any other."""
    seen = np.zeros((2, 2 * WINDOW))
    rounds = 200
    for seed in range(rounds):
        one = counted(day(0, 2 * WINDOW), max_sampled_tokens=8, seed=seed, parts=())
        other = counted(day(1, 2 * WINDOW), max_sampled_tokens=4, seed=rounds + seed, parts=())
        sample = merge([one, other]).sample
        assert sample is not None
        np.add.at(seen, (sample.stratum_T // 2, sample.token_T), 1)
    # Each token is one of 8 of which 2 are kept: 50 times in 200, deviation 6; four of those either way.
    assert 50 - 25 <= seen.min() <= seen.max() <= 50 + 25


def test_domains_go_by_their_names() -> None:
    """Days with other kinds of traffic, or none, keep each token's kind."""
    prose = counted(replace(day(0), domain_names=("prose", "code")))
    chat = counted(replace(day(1), domain_names=("chat", "prose")))
    silent = counted(replace(day(2), domain_T=None, domain_names=()))
    both = merge([silent, prose, chat])
    assert both.header.domain_names == ("prose", "code", "chat")
    assert both.domain_tokens_C is not None
    assert prose.domain_tokens_C is not None
    assert chat.domain_tokens_C is not None
    mine, theirs = prose.domain_tokens_C.tolist(), chat.domain_tokens_C.tolist()
    assert both.domain_tokens_C.tolist() == [mine[0] + theirs[1], mine[1], theirs[0]]
    assert both.domain_load_CLE is not None
    assert both.domain_load_CLE.sum(axis=(1, 2)).tolist() == [n * 6 for n in both.domain_tokens_C.tolist()]
    assert both.sample is not None
    assert both.sample.domain_T is not None
    assert np.bincount(both.sample.domain_T + 1).tolist() == [200, *both.domain_tokens_C.tolist()]


def test_narrow_counts_do_not_overflow(tmp_path: Path) -> None:
    """Counts that were read back in one byte each add up as wide ones do."""
    parts = [counted(day(seed)) for seed in range(4)]
    for number, part in enumerate(parts):
        save(part, tmp_path / f"{number}.stats")
    read = [load(tmp_path / f"{number}.stats") for number in range(4)]
    assert merge(read).digest == merge(parts).digest
    assert merge(reversed(read)).digest == merge(reversed(parts)).digest


def test_what_one_part_lacks_the_whole_lacks() -> None:
    """Pairs that were not counted of all tokens are not given for some."""
    both = merge([counted(day(0)), counted(day(1), parts=("coactivation",), max_sampled_tokens=0)])
    assert both.transitions_LEE is None
    assert both.home_load_RLE is None
    assert both.sample is None
    assert both.coactivation_LEE is not None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"trace": {"model_name": "other"}}, "of different models do not merge: one has model_name 'other'"),
        ({"window_tokens": 16}, "windows of 8 and of 16 tokens do not merge"),
    ],
)
def test_what_does_not_fit_together_is_refused(other: dict[str, Any], message: str) -> None:
    """With both values."""
    second = counted(day(1, **other.pop("trace", {})), **other)
    with pytest.raises(InputError, match=message):
        merge([counted(day(0)), second])


def test_nothing_does_not_merge() -> None:
    """No parts, no statistics."""
    with pytest.raises(InputError, match="no statistics to merge"):
        merge([])


def test_days_without_end_stay_small() -> None:
    """Fitted into memory after every day, statistics keep totals exact and windows of all days."""
    year = counted(day(0))
    for seed in range(1, 12):
        year = fitted(merge([year, counted(day(seed))]), memory_bytes=100_000)
        assert year.size_bytes <= 100_000
    assert year.num_windows == 12 * 25
    assert int(year.load_LE.sum()) == 12 * 200 * 3 * 2
    assert int(year.transitions(0).sum()) == 12 * 200 * 4
    kept = len(range(0, 25, year.window_stride))
    assert year.window_index_W.tolist() == [*range(0, 25, year.window_stride)] * 12
    assert len(year.load_WLE) == 12 * kept
    assert len(year.time_load_BLE) <= 128
    assert year.sample is not None
    assert year.sample_weight_T.sum() == pytest.approx(12 * 200)
    assert year.profile().num_windows == 12 * kept
