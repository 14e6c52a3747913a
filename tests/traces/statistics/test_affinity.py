"""Tests of pairs of experts against chance: what shuffles keep, and what lift and information are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from traces.statistics import collect
from traces.statistics.affinity import (
    coactivation,
    coactivations,
    entropy_bits,
    mutual_information_bits,
    strongest,
    transition,
    transitions,
)
from traces.statistics.shuffle import partner_shuffles
from traces.synthesize import synthesize

Ids = np.ndarray


def independent(num_tokens: int, num_experts: int, top_k: int, *, seed: int, layers: int = 2) -> Ids:
    """Return tokens whose experts are chosen by popularity alone, ``[tokens, layers, k]``."""
    rng = np.random.default_rng(seed)
    popularity_E = np.log(np.linspace(1, 3, num_experts))
    noise = rng.gumbel(size=(num_tokens, layers, num_experts))
    return np.argsort(-(popularity_E + noise), axis=2)[:, :, :top_k].astype(np.uint8)


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(1, 60),
    num_experts=st.integers(1, 9),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_shuffles_keep_loads_and_distinct_experts(
    num_tokens: int, num_experts: int, seed: int, data: st.DataObject
) -> None:
    """Every expert is selected as often, no token twice, and the routing given is untouched."""
    top_k = data.draw(st.integers(1, num_experts))
    ids_TK = independent(num_tokens, num_experts, top_k, seed=seed)[:, 0]
    before = ids_TK.copy()
    for null_TK in partner_shuffles(ids_TK, num_shuffles=2, rng=np.random.default_rng(seed)):
        np.testing.assert_array_equal(
            np.bincount(null_TK.ravel(), minlength=num_experts),
            np.bincount(before.ravel(), minlength=num_experts),
        )
        assert (np.diff(np.sort(null_TK, axis=1), axis=1) > 0).all()
    np.testing.assert_array_equal(ids_TK, before)


def test_shuffles_reach_every_routing_alike() -> None:
    """Four experts, each selected by two of four tokens: 18 of the 90 routings repeat two pairs.

    Each token is an edge between two experts. Two double edges: 3 ways times 6 orders of the tokens; a cycle
    of four: 3 ways times 24 orders.
    """
    ids_TK = np.array([[0, 1], [0, 1], [2, 3], [2, 3]], dtype=np.uint8)
    rng = np.random.default_rng(0)
    shuffled = partner_shuffles(ids_TK, num_shuffles=2000, rng=rng)
    doubles = sum(len({tuple(sorted(pair)) for pair in null.tolist()}) == 2 for null in shuffled)
    assert doubles / 2000 == pytest.approx(18 / 90, abs=0.03)


def test_pairs_by_hand() -> None:
    """Three tokens: 0 and 1 twice together, 0 and 2 once; they go on to 0, 0 and 1."""
    ids_TLK = np.array([[[0, 1], [0, 2]], [[1, 0], [0, 2]], [[0, 2], [1, 2]]], dtype=np.uint8)
    together = coactivation(ids_TLK, 0, num_experts=3)
    assert together.observed_EE.tolist() == [[0, 2, 1], [2, 0, 0], [1, 0, 0]]
    following = transition(ids_TLK, 0, num_experts=3)
    assert following.observed_EE.tolist() == [[2, 1, 3], [2, 0, 2], [0, 1, 1]]
    assert following.expected_EE[0].tolist() == [2, 1, 3]


@settings(max_examples=5, deadline=None)
@given(num_experts=st.integers(4, 12), top_k=st.integers(2, 3), seed=st.integers(0, 1000))
def test_independent_routers_look_like_chance(num_experts: int, top_k: int, seed: int) -> None:
    """Lift is near 1 and mutual information near that of the shuffles, in a layer and between layers."""
    ids_TLK = independent(3000, num_experts, top_k, seed=seed)
    for pairs in (
        coactivation(ids_TLK, 0, num_experts=num_experts, seed=seed),
        transition(ids_TLK, 0, num_experts=num_experts, seed=seed),
    ):
        assert np.nanmean(pairs.lift_EE) == pytest.approx(1, abs=0.03)
        assert abs(pairs.excess_bits) < 0.01
        assert pairs.exceeds_EE.mean() < 0.1


@settings(max_examples=10, deadline=None)
@given(num_experts=st.integers(2, 20), seed=st.integers(0, 1000))
def test_a_deterministic_transition_tells_all_there_is(num_experts: int, seed: int) -> None:
    """With top-1 and the next expert a function of this one, information is entropy; lift is 1 / share."""
    rng = np.random.default_rng(seed)
    here_T = rng.integers(num_experts, size=4000)
    ids_TLK = np.stack([here_T, rng.permutation(num_experts)[here_T]], axis=1)[:, :, np.newaxis]
    pairs = transition(ids_TLK.astype(np.uint8), 0, num_experts=num_experts)
    assert pairs.bits == pytest.approx(pairs.entropy_bits)
    assert pairs.null_bits < 0.1 * pairs.bits
    assert pairs.is_above_chance
    followed = pairs.observed_EE > 0
    assert followed.sum() == np.unique(here_T).size
    np.testing.assert_allclose(pairs.lift_EE[followed], 4000 / pairs.observed_EE[followed])
    assert pairs.exceeds_EE[followed].all()


def test_coactivation_is_symmetric_without_a_diagonal() -> None:
    """A pair is a pair both ways, and no expert is its own partner."""
    pairs = coactivation(independent(3000, 8, 3, seed=1), 1, num_experts=8)
    for table in (pairs.observed_EE, pairs.expected_EE, pairs.lift_EE, pairs.exceeds_EE):
        np.testing.assert_array_equal(table, table.T)
    assert np.isnan(np.diag(pairs.lift_EE)).all()
    assert not np.diag(pairs.exceeds_EE).any()
    assert pairs.observed_EE.sum() == 3000 * 3 * 2


def test_partners_are_found() -> None:
    """Experts 0 and 1 of 600 tokens are always together: no pair is further from chance."""
    ids_TLK = independent(4000, 8, 2, seed=2)
    ids_TLK[:600, 0] = (0, 1)
    pairs = coactivation(ids_TLK, 0, num_experts=8)
    lift_EE = np.where(pairs.exceeds_EE, pairs.lift_EE, 0)
    assert np.argwhere(lift_EE == lift_EE.max()).tolist() == [[0, 1], [1, 0]]
    assert pairs.is_above_chance
    assert pairs.to_dict()["highest lift"] == pairs.lift_EE[0, 1]


def test_the_limit_of_chance_holds() -> None:
    """By chance some pair passes the limit of 20 shuffles in 1 of 21 traces: hardly in 10 of 60."""
    passed = sum(
        bool(transition(independent(500, 6, 2, seed=seed), 0, num_experts=6, seed=seed).exceeds_EE.any())
        for seed in range(60)
    )
    assert passed <= 10


def test_entropy_and_information_by_hand() -> None:
    """Two even experts are a bit; a table of independent counts tells nothing."""
    assert entropy_bits([5, 5, 0]) == 1.0
    assert entropy_bits([0, 0]) == 0.0
    assert mutual_information_bits([[1, 0], [0, 1]]) == pytest.approx(1.0)
    assert mutual_information_bits(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0.0, abs=1e-12)


def test_of_statistics() -> None:
    """All layers at once, the same with the same seed; none of top-1, none after the last layer."""
    trace = synthesize(num_tokens=3000, num_layers=3, num_experts=8, top_k=2, seed=4)
    statistics = collect(trace, window_tokens=500, max_sampled_tokens=2000, parts=())
    together, following = coactivations(statistics), transitions(statistics)
    assert [(each.layer, each.other) for each in (*together, *following)] == [
        (0, 0), (1, 1), (2, 2), (0, 1), (1, 2),
    ]  # fmt: skip
    assert [each.bits for each in coactivations(statistics)] == [each.bits for each in together]
    np.testing.assert_array_equal(coactivations(statistics)[1].null_SEE, together[1].null_SEE)
    assert strongest(together).excess_bits == max(each.excess_bits for each in together)
    top_one = synthesize(num_tokens=300, num_layers=1, num_experts=8, top_k=1, seed=4)
    alone = collect(top_one, window_tokens=100, parts=())
    assert coactivations(alone) == transitions(alone) == ()


def test_what_cannot_be_counted() -> None:
    """Each is said in a line."""
    ids_TLK = independent(10, 4, 1, seed=0)
    with pytest.raises(InputError, match="selects one expert"):
        coactivation(ids_TLK, 0, num_experts=4)
    with pytest.raises(InputError, match="no layer follows layer 1"):
        transition(ids_TLK, 1, num_experts=4)
    with pytest.raises(InputError, match="0 shuffles"):
        transition(ids_TLK, 0, num_experts=4, num_shuffles=0)
    with pytest.raises(InputError, match="no sampled tokens"):
        transition(ids_TLK[:0], 0, num_experts=4)
    trace = synthesize(num_tokens=300, num_layers=2, num_experts=8, top_k=2, seed=4)
    with pytest.raises(InputError, match="no sampled tokens"):
        coactivations(collect(trace, window_tokens=100, max_sampled_tokens=0, parts=()))
