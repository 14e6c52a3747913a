"""Tests of `traces.statistics`: exact loads, stratified samples, homes, and figures checked by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from traces.source import BLOCK_TOKENS, MemorySource
from traces.statistics import build_profile, describe, load_only_profile
from traces.synthesize import synthesize
from traces.trace import Trace


def make_trace(experts_TLK: Any, num_experts: int = 4, **fields: Any) -> Trace:
    return Trace(experts_TLK=np.array(experts_TLK), num_experts=num_experts, **fields)


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


def long_trace(num_tokens: int = 1000, **fields: Any) -> Trace:
    trace = synthesize(num_tokens=num_tokens, num_layers=3, num_experts=16, top_k=4, seed=3)
    return Trace(experts_TLK=trace.experts_TLK, num_experts=16, **fields)


def test_loads_of_a_hand_checked_trace() -> None:
    """Two windows of two tokens; the fifth token fills no window and is kept as the tail."""
    trace = make_trace([[[0, 1]], [[0, 2]], [[3, 2]], [[2, 0]], [[1, 0]]])
    profile = build_profile(trace, window_tokens=2)
    assert profile.load_WLE.tolist() == [[[2, 1, 1, 0]], [[1, 0, 2, 1]]]
    assert profile.window_tokens_W.tolist() == [2, 2]
    assert profile.top_k == 2
    assert profile.experts_TLK is not None
    assert profile.window_of_token_T is not None
    assert profile.experts_TLK.tolist() == trace.experts_TLK.tolist()
    assert profile.window_of_token_T.tolist() == [0, 0, 1, 1, 2]
    assert profile.tail_tokens == 1
    assert profile.home_T is None


@settings(deadline=None, max_examples=30)
@given(window_tokens=st.integers(1, 400), at_once=st.sampled_from([7, 100, 5000]))
def test_loads_equal_a_plain_count(window_tokens: int, at_once: int) -> None:
    """Counting block by block counts what a loop over windows and layers counts, wherever blocks end."""
    trace = long_trace(400)
    load_WLE = build_profile(InBlocks(trace, at_once), window_tokens=window_tokens).load_WLE
    for window, load_LE in enumerate(load_WLE):
        ids_TLK = trace.experts_TLK[window * window_tokens : (window + 1) * window_tokens]
        for layer in range(trace.num_layers):
            expected = np.bincount(ids_TLK[:, layer].ravel(), minlength=trace.num_experts)
            np.testing.assert_array_equal(load_LE[layer], expected)
    assert len(load_WLE) == 400 // window_tokens


@settings(deadline=None, max_examples=40)
@given(max_sampled_tokens=st.integers(10, 1100), seed=st.integers(0, 5))
def test_samples_are_stratified_and_in_order(max_sampled_tokens: int, seed: int) -> None:
    """Every window gives the same number of different tokens, in recorded order, never more than asked."""
    number_T = np.arange(1000)
    trace = long_trace(position_T=number_T, rank_T=number_T)
    profile = build_profile(
        trace, window_tokens=100, max_sampled_tokens=max_sampled_tokens, seed=seed, num_devices=1000
    )
    assert profile.home_T is not None  # with one rank per token, homes are the tokens' numbers
    assert profile.window_of_token_T is not None
    assert profile.experts_TLK is not None
    per_window = min(max_sampled_tokens // 10, 100)
    assert np.bincount(profile.window_of_token_T).tolist() == [per_window] * 10
    assert (np.diff(profile.home_T) > 0).all()
    np.testing.assert_array_equal(profile.home_T // 100, profile.window_of_token_T)
    np.testing.assert_array_equal(profile.experts_TLK, trace.experts_TLK[profile.home_T])
    assert profile.load_WLE.sum() == 1000 * 3 * 4


def test_samples_follow_the_seed() -> None:
    """The same seed draws the same tokens, another seed others."""

    def sampled(seed: int) -> Any:
        profile = build_profile(long_trace(), window_tokens=100, max_sampled_tokens=200, seed=seed)
        assert profile.experts_TLK is not None
        return profile.experts_TLK.tolist()

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_a_sample_needs_a_token_per_window() -> None:
    """Fewer tokens than windows cannot represent all of them."""
    with pytest.raises(InputError, match=r"sample of 9 tokens .* at least 10"):
        build_profile(long_trace(), window_tokens=100, max_sampled_tokens=9)


def test_a_trace_shorter_than_a_window_says_what_would_do() -> None:
    """Both numbers are in the message."""
    with pytest.raises(InputError, match=r"1000 tokens, less than one window of 4096; .* at most 1000"):
        build_profile(long_trace(), window_tokens=4096)


@pytest.mark.parametrize(
    ("ranks", "num_devices", "expected"),
    [
        ([0, 0, 1, 1], 2, [0, 1, 0, 1]),
        ([7, 3, 7, 3], 2, [0, 1, 0, 1]),
        ([0, 0, 1, 1], None, None),
        ([0, 0, 1, 1], 4, None),
        ([0, 0, 0, 0], 1, None),
        (None, 2, None),
    ],
)
def test_homes_are_known_where_ranks_are_devices(
    ranks: list[int] | None, num_devices: int | None, expected: list[int] | None
) -> None:
    """The i-th rank is device i, if as many ranks as devices recorded; ranks run side by side."""
    rank_T = None if ranks is None else np.array(ranks)
    trace = make_trace([[[0]], [[1]], [[2]], [[3]]], rank_T=rank_T)
    home_T = build_profile(trace, window_tokens=2, num_devices=num_devices).home_T
    assert (None if home_T is None else home_T.tolist()) == expected


def test_counts_alone_make_a_profile() -> None:
    """One window of counts, or several with their own sizes, without tokens."""
    one = load_only_profile([[4, 0], [2, 2]], top_k=1, window_tokens=4)
    two = load_only_profile([[[4, 0]], [[1, 1]]], top_k=1, window_tokens=[4, 2])
    assert one.load_WLE.tolist() == [[[4, 0], [2, 2]]]
    assert one.window_tokens_W.tolist() == [4]
    assert two.window_tokens_W.tolist() == [4, 2]
    assert two.num_sampled_tokens == 0


def test_counts_of_dense_layers_are_refused() -> None:
    """A layer without any load is no MoE layer."""
    with pytest.raises(InputError, match="layer 1 routed no token"):
        load_only_profile([[4, 0], [0, 0]], top_k=1, window_tokens=4)


def test_summary_of_a_hand_checked_trace() -> None:
    """Loads 4, 2, 2, 0: the busiest has twice the mean of 2, the deviation is sqrt(2)."""
    trace = make_trace(
        [[[0, 1]], [[0, 1]], [[0, 2]], [[0, 2]]],
        sequence_T=np.array([0, 0, 0, 1]),
        rank_T=np.array([0, 0, 1, 1]),
        domain_T=np.array([1, -1, 1, 0]),
        domain_names=("code", "prose", "maths"),
        model_name="tiny",
        moe_layer_ids=(3,),
    )
    summary = describe(trace)
    (layer,) = summary.layers
    assert (summary.num_tokens, summary.num_sequences, summary.num_ranks) == (4, 3, 2)
    assert summary.domain_tokens == {"code": 1, "prose": 2, "maths": 0}
    assert summary.digest == trace.digest
    assert layer.busiest_over_mean == 2
    assert layer.coefficient_of_variation == pytest.approx(np.sqrt(2) / 2)
    assert layer.active_experts == 3
    assert layer.drift == pytest.approx(0.5)  # half of the choices went from expert 1 to expert 2
    # Partners follow from popularity here: expert 0 is in every pair, 1 and 2 share the rest.
    assert layer.coactivation == pytest.approx(0, abs=0.02)
    assert json.loads(json.dumps(summary.to_json()))["layers"][0]["active_experts"] == 3


def test_coactivation_of_fixed_partners() -> None:
    """Pairs (0,1) and (2,3) alone: chance spreads the same popularity over 6 pairs, 2/3 of it elsewhere."""
    (layer,) = describe(make_trace([[[0, 1]], [[3, 2]]] * 50)).layers
    assert layer.coactivation == pytest.approx(2 / 3)
    assert layer.drift == 0


def test_coactivation_vanishes_when_experts_are_chosen_alone() -> None:
    """However skewed popularity is, partners by popularity count as chance; real groups do not."""
    common = {"num_tokens": 20_000, "num_layers": 1, "num_experts": 16, "top_k": 4, "num_domains": 1}
    chance = synthesize(**common, coactivation=0, drift=0, skew=0.8, seed=0)
    groups = synthesize(**common, coactivation=3, drift=0, skew=0.8, seed=0)
    assert describe(chance).layers[0].coactivation == pytest.approx(0, abs=0.03)
    assert describe(groups).layers[0].coactivation > 0.2  # type: ignore[operator]


def test_drift_of_disjoint_halves_is_one() -> None:
    """No expert of the first half is used in the last; the middle token of five is in neither."""
    (layer,) = describe(make_trace([[[0]], [[1]], [[2]], [[2]], [[3]]])).layers
    assert layer.drift == 1
    assert layer.active_experts == 4
    assert layer.coactivation is None


def test_one_token_can_be_described() -> None:
    """The smallest trace has no halves to compare, and what it does not say is absent."""
    summary = describe(make_trace([[[0, 1]]]))
    assert summary.layers[0].drift == 0
    assert (summary.num_sequences, summary.num_ranks, summary.domain_tokens) == (None, None, {})


@settings(deadline=None)
@given(num_tokens=st.integers(1, 50), at_once=st.sampled_from([1, 7, 40]))
def test_summaries_count_every_token(num_tokens: int, at_once: int) -> None:
    """Counting in blocks loses no token at the end."""
    trace = make_trace((np.arange(num_tokens) % 4)[:, None, None])
    (layer,) = describe(InBlocks(trace, at_once)).layers
    count = np.bincount(np.arange(num_tokens) % 4, minlength=4)
    assert layer.busiest_over_mean == pytest.approx(count.max() / count.mean())
    assert layer.coefficient_of_variation == pytest.approx(count.std() / count.mean())
