"""Tests of `collect`: equal to plain loops, whatever the blocks and threads, in bounded memory."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from traces.source import BLOCK_TOKENS, MemorySource
from traces.statistics import RoutingStatistics, build_profile, collect, plan
from traces.store import ColumnBlock, columns_of
from traces.synthesize import synthesize
from traces.trace import Trace

SHAPE = {"num_layers": 3, "num_experts": 16, "top_k": 4}


def known_trace(num_tokens: int = 500, *, ranks: int = 3, seed: int = 1) -> Trace:
    """Return a trace that knows everything of its tokens."""
    trace = synthesize(num_tokens=num_tokens, **SHAPE, sequence_tokens=40, seed=seed)
    return Trace(
        experts_TLK=trace.experts_TLK,
        num_experts=16,
        sequence_T=trace.sequence_T,
        position_T=trace.position_T,
        rank_T=np.random.default_rng(seed).integers(0, ranks, num_tokens) * 5,
        domain_T=trace.domain_T,
        domain_names=trace.domain_names,
        model_name="tiny",
    )


class InBlocks(MemorySource):
    """A trace that comes in blocks of a size of its own, told once its whole length and then another."""

    def __init__(self, trace: Trace, block_tokens: int, *, lost_tokens: int = 0) -> None:
        super().__init__(trace)
        self.block_tokens = block_tokens
        self.num_tokens += lost_tokens

    def blocks(
        self, start: int = 0, stop: int | None = None, *, max_tokens: int = BLOCK_TOKENS
    ) -> Iterator[Trace]:
        """Yield blocks that are no longer than this source's own."""
        stop = min(self.num_tokens if stop is None else stop, self.trace.num_tokens)
        order = self.trace.interleave_ranks()
        for first in range(start, stop, self.block_tokens):
            yield order.select_tokens(slice(first, min(first + self.block_tokens, stop)))


class InColumns(InBlocks):
    """The same, column by column."""

    def columns(
        self, start: int = 0, stop: int | None = None, *, max_tokens: int = BLOCK_TOKENS
    ) -> Iterator[ColumnBlock]:
        """Yield the blocks turned round."""
        plain = InBlocks(self.trace, self.block_tokens)
        return columns_of(plain, start, stop)


def plain_pairs(from_TK: Any, to_TK: Any, num_experts: int = 16) -> npt.NDArray[np.int64]:
    """Count pairs in a loop."""
    count = np.zeros((num_experts, num_experts), dtype=np.int64)
    for row_K, column_K in zip(from_TK.tolist(), to_TK.tolist(), strict=True):
        for row in row_K:
            for column in column_K:
                count[row, column] += 1
    return count


def plain_loads(ids_TLK: Any, num_experts: int = 16) -> list[list[int]]:
    """Count loads layer by layer."""
    return [
        np.bincount(ids_TLK[:, layer].ravel(), minlength=num_experts).tolist()
        for layer in range(ids_TLK.shape[1])
    ]


def test_counts_equal_plain_loops() -> None:
    """Every count of a trace with ranks, domains and a tail, against loops over its tokens."""
    trace = known_trace(150).interleave_ranks()
    counted = collect(trace, window_tokens=32)
    ids = trace.experts_TLK
    assert counted.load_LE.tolist() == plain_loads(ids)
    assert (counted.num_windows, counted.tail_tokens, counted.num_tokens) == (4, 22, 150)
    for window in range(4):
        assert counted.load_WLE[window].tolist() == plain_loads(ids[window * 32 : window * 32 + 32])
    assert counted.time_load_BLE.tolist() == counted.load_WLE.tolist()
    for layer in range(3):
        pairs = plain_pairs(ids[:, layer], ids[:, layer])
        np.fill_diagonal(pairs, 0)
        np.testing.assert_array_equal(counted.coactivation(layer), pairs)
    for layer in range(2):
        expected = plain_pairs(ids[:, layer], ids[:, layer + 1])
        np.testing.assert_array_equal(counted.transitions(layer), expected)
        first = plain_pairs(ids[:, layer, :1], ids[:, layer + 1, :1])
        np.testing.assert_array_equal(counted.first_transitions(layer), first)
    assert trace.rank_T is not None
    assert trace.domain_T is not None
    assert counted.rank_R is not None
    assert counted.home_load_RLE is not None
    assert counted.domain_load_CLE is not None
    assert counted.rank_R.tolist() == [0, 5, 10]
    for row, rank in enumerate((0, 5, 10)):
        assert counted.home_load_RLE[row].tolist() == plain_loads(ids[trace.rank_T == rank])
    for domain in range(len(trace.domain_names)):
        assert counted.domain_load_CLE[domain].tolist() == plain_loads(ids[trace.domain_T == domain])
    assert counted.errors == {}
    assert counted.window_share == 1


def test_ids_of_two_bytes_are_counted() -> None:
    """Above 256 experts, with a top-k that fills no machine word."""
    trace = synthesize(num_tokens=60, num_layers=2, num_experts=300, top_k=5, seed=0)
    counted = collect(trace, window_tokens=20, threads=1)
    ids = trace.experts_TLK
    assert counted.load_LE.tolist() == plain_loads(ids, 300)
    np.testing.assert_array_equal(counted.transitions(0), plain_pairs(ids[:, 0], ids[:, 1], 300))
    assert int(counted.coactivation(1).sum()) == 60 * 5 * 4


def test_counts_beyond_two_bytes_are_exact() -> None:
    """A pair that occurs more often than a small table's cell can say is counted all the same."""
    ids = np.broadcast_to(np.array([0, 3], dtype=np.uint8), (70_000, 2, 2))
    counted = collect(InBlocks(Trace(experts_TLK=ids, num_experts=4), 70_000), window_tokens=70_000)
    assert counted.transitions(0)[0].tolist() == [70_000, 0, 0, 70_000]
    assert counted.coactivation(1)[3].tolist() == [70_000, 0, 0, 0]
    assert counted.load_WLE[0, 0].tolist() == [70_000, 0, 0, 70_000]


def test_counts_of_eight_bytes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace of more tokens than four bytes count is counted in eight; nothing else changes."""
    trace = known_trace(150)
    expected = collect(trace, window_tokens=32)
    monkeypatch.setattr(plan, "_EXACT_IN_FOUR_BYTES", 100)
    wide = collect(trace, window_tokens=32)
    assert wide.transitions_LEE is not None
    assert wide.transitions_LEE.dtype == np.uint64
    assert wide.digest == expected.digest


@settings(deadline=None, max_examples=20)
@given(
    block_tokens=st.integers(1, 600),
    threads=st.integers(1, 4),
    window_tokens=st.sampled_from([1, 7, 64, 500]),
    as_columns=st.booleans(),
    sampled=st.sampled_from([0, 500, None]),
)
def test_blocks_and_threads_change_nothing(
    block_tokens: int, threads: int, window_tokens: int, as_columns: bool, sampled: int | None
) -> None:
    """The result is the same to the bit, however tokens come and whoever counts them."""
    trace = known_trace()
    options: dict[str, Any] = {"window_tokens": window_tokens, "max_sampled_tokens": sampled}
    expected = collect(trace, threads=1, **options)
    source = (InColumns if as_columns else InBlocks)(trace, block_tokens)
    assert collect(source, threads=threads, **options).digest == expected.digest


@pytest.mark.parametrize("sampled", [None, 40, 400])
@pytest.mark.parametrize("num_devices", [None, 3])
def test_statistics_give_the_profile_of_the_trace(sampled: int | None, num_devices: int | None) -> None:
    """The same windows, the same tokens, the same homes as counting the trace for the optimizer."""
    trace = known_trace(330)
    expected = build_profile(
        trace, window_tokens=32, max_sampled_tokens=sampled, seed=7, num_devices=num_devices
    )
    found = collect(trace, window_tokens=32, max_sampled_tokens=sampled, seed=7).profile(num_devices)
    assert found.tail_tokens == expected.tail_tokens
    for name in ("load_WLE", "window_tokens_W", "experts_TLK", "window_of_token_T", "home_T"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_array_equal(mine, theirs)


def small(trace: Trace, **options: Any) -> RoutingStatistics:
    """Count with hardly any memory."""
    return collect(trace, window_tokens=4, memory_bytes=60_000, **options)


def test_little_memory_thins_what_does_not_fit() -> None:
    """Windows kept are evenly spaced and exact, totals stay exact, the sample is of all times."""
    trace = known_trace(2000, ranks=1)
    counted = small(trace)
    stride = counted.window_stride
    assert stride > 1
    assert counted.window_index_W.tolist() == list(range(0, 500, stride))
    assert counted.window_share == len(range(0, 500, stride)) / 500
    assert counted.load_LE.tolist() == plain_loads(trace.experts_TLK)
    for row, window in enumerate(counted.window_index_W.tolist()):
        assert counted.load_WLE[row].tolist() == plain_loads(trace.experts_TLK[window * 4 : window * 4 + 4])
    assert len(counted.time_load_BLE) <= 64
    assert counted.time_load_BLE.sum(axis=0).tolist() == plain_loads(trace.experts_TLK)
    assert counted.sample is not None
    sampled_S = np.bincount(counted.sample.stratum_T)
    assert set(sampled_S.tolist()) == {counted.sample.most_per_stratum}
    assert len(set((counted.sample.token_T // 4 % stride).tolist())) == stride
    assert counted.sample_weight_T.sum() == pytest.approx(2000)
    profile = counted.profile()
    assert profile.num_windows == len(counted.load_WLE)
    assert profile.num_sampled_tokens == counted.sample.num_tokens


def test_estimated_pairs_are_within_the_bound() -> None:
    """Of the pairs estimated from the sample, at least 95 % are as near the exact counts as is said."""
    trace = known_trace(4000, ranks=1)
    exact = collect(trace, window_tokens=50)
    for seed in range(3):
        estimated = collect(
            trace, window_tokens=50, max_sampled_tokens=800, parts=("homes", "domains"), seed=seed
        )
        assert set(estimated.errors) == {"transitions", "first_transitions", "coactivation"}
        for name, layers in (("transitions", 2), ("first_transitions", 2), ("coactivation", 3)):
            for layer in range(layers):
                truth = getattr(exact, name)(layer)
                off = np.abs(getattr(estimated, name)(layer) - truth) / 4000
                assert off.max() > 0
                assert off.max() <= 1.5 * estimated.errors[name]
                own = np.vectorize(estimated.error)(truth / 4000)
                assert (off <= own + 1e-12).mean() >= 0.93


def test_estimates_come_near_without_bias() -> None:
    """Averaged over many samples, an estimated count is the exact one."""
    trace = known_trace(400, ranks=1)
    exact = collect(trace, window_tokens=40).transitions(0)
    options: dict[str, Any] = {"window_tokens": 40, "max_sampled_tokens": 40, "parts": ()}
    total = sum(collect(trace, seed=seed, threads=1, **options).transitions(0) for seed in range(150))
    # The mean of 150 samples of 40: three standard errors of the largest count are 12 tokens.
    assert np.abs(total / 150 - exact).max() < 15


def test_pairs_need_counts_or_a_sample() -> None:
    """Without either, the message says what to do."""
    counted = collect(known_trace(), window_tokens=50, parts=(), max_sampled_tokens=0)
    with pytest.raises(InputError, match=r"neither transitions nor sampled tokens; collect them again"):
        counted.transitions(0)
    assert counted.errors == {}
    assert counted.profile().num_sampled_tokens == 0


def test_more_ranks_than_fit_leave_loads_by_rank_out() -> None:
    """Ranks and their tokens stay known, so that homes are."""
    counted = small(known_trace(400, ranks=50))
    assert counted.rank_R is not None
    assert counted.rank_tokens_R is not None
    assert len(counted.rank_R) == 50
    assert int(counted.rank_tokens_R.sum()) == 400
    assert counted.home_load_RLE is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_tokens": 0}, "window of 0 tokens is impossible"),
        ({"start": 10}, "token 10 begins no window of 32"),
        ({"start": 0, "stop": 501}, "tokens 0 to 501 are asked for of a trace of 500"),
        ({"threads": 0}, "0 threads are impossible"),
        ({"parts": ("loads",)}, "no part 'loads'; their parts are transitions, "),
        ({"memory_bytes": 1000}, "1000 bytes of memory are too few to count 3 layers of 16 experts"),
        ({"memory_bytes": 0}, "0 bytes of memory are impossible"),
        ({"max_sampled_tokens": -1}, "sample of -1 tokens is impossible"),
        ({"max_sampled_tokens": 3}, "sample of 3 tokens leaves some of 15 windows empty"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    """Each with its number."""
    with pytest.raises(InputError, match=message):
        collect(known_trace(), **({"window_tokens": 32} | options))


def test_a_trace_that_ends_early_is_refused() -> None:
    """A source that promises more tokens than it has is damaged; nothing is made of the rest."""
    with pytest.raises(InputError, match="ends after 500 tokens of 520"):
        collect(InBlocks(known_trace(), 100, lost_tokens=20), window_tokens=32)


def test_ranks_beyond_belief_are_refused() -> None:
    """A rank is looked up in a table, so it has to be a rank."""
    trace = Trace(experts_TLK=np.zeros((2, 1, 1), int), num_experts=2, rank_T=np.array([0, 1 << 40]))
    with pytest.raises(InputError, match="rank 1099511627776"):
        collect(trace, window_tokens=1)


class Wild(MemorySource):
    """A source that is believed to check what it hands out, and does not."""

    def __init__(self, trace: Trace, **changed: Any) -> None:
        super().__init__(trace)
        self.changed = changed

    def columns(
        self, start: int = 0, stop: int | None = None, *, max_tokens: int = BLOCK_TOKENS
    ) -> Iterator[ColumnBlock]:
        """Yield one block with wrong content."""
        (block,) = columns_of(MemorySource(self.trace), start, stop)
        yield replace(block, **self.changed)


def test_wild_ids_are_never_counted() -> None:
    """Whatever a damaged data set hands out, nothing is written beside the tables."""
    trace = known_trace(64)
    ids = np.full((64, 4), 16, dtype=np.uint8)
    good = next(columns_of(MemorySource(trace))).ids_LTK
    with pytest.raises(InputError, match=r"layer 1 names expert 16, outside 0\.\.15"):
        collect(Wild(trace, ids_LTK=(good[0], ids, good[2])), window_tokens=8)
    with pytest.raises(InputError, match="a token belongs to group 9 of 4"):
        collect(Wild(trace, domain_T=np.full(64, 9)), window_tokens=8)


def test_progress_is_told() -> None:
    """Block by block, up to the last token."""
    seen: list[int] = []
    collect(InBlocks(known_trace(), 200), window_tokens=32, progress=seen.append)
    assert seen == [200, 400, 500]


def test_statistics_are_no_tokens() -> None:
    """Named where a trace is needed, they say so."""
    with pytest.raises(InputError, match="holds statistics of a trace, not the experts of every token"):
        collect(collect(known_trace(), window_tokens=32), window_tokens=32)


def test_statistics_travel_between_processes() -> None:
    """What a worker counted can be sent, also after its figures were looked at."""
    counted = collect(known_trace(), window_tokens=32, parts=())
    assert counted.errors
    assert counted.drift_L.shape == (3,)
    sent = pickle.loads(pickle.dumps(counted))  # noqa: S301
    assert sent.digest == counted.digest
    assert sent.errors == counted.errors


def test_an_empty_range_is_counted() -> None:
    """It has no tokens, and no figure that would need one."""
    nothing = collect(known_trace(), window_tokens=32, start=64, stop=64)
    assert nothing.num_tokens == 0
    assert nothing.load_LE.sum() == 0
    assert nothing.drift_L.tolist() == [0, 0, 0]
