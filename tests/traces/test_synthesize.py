"""Tests of `traces.synthesize`: valid, reproducible, and every knob does what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from traces.statistics import describe
from traces.synthesize import synthesize
from traces.trace import Trace


def make(**changes: Any) -> Trace:
    sizes = {"num_tokens": 8000, "num_layers": 2, "num_experts": 16, "top_k": 4, "seed": 5}
    return synthesize(**{**sizes, **changes})


def flat(**changes: Any) -> Trace:
    """A trace without any structure but what is asked for."""
    none = {"skew": 0.0, "domain_strength": 0.0, "coactivation": 0.0, "layer_affinity": 0.0, "drift": 0.0}
    return make(**{**none, **changes})


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(1, 200),
    num_layers=st.integers(1, 4),
    num_experts=st.sampled_from([1, 3, 16, 300]),
    top_k=st.integers(1, 8),
    num_domains=st.integers(1, 5),
    sequence_tokens=st.integers(1, 100),
)
def test_any_size_is_a_valid_trace(
    num_tokens: int, num_layers: int, num_experts: int, top_k: int, num_domains: int, sequence_tokens: int
) -> None:
    """Shapes are as asked, sequences are numbered from 0 and cut where they should be."""
    top_k = min(top_k, num_experts)
    trace = make(
        num_tokens=num_tokens,
        num_layers=num_layers,
        num_experts=num_experts,
        top_k=top_k,
        num_domains=num_domains,
        sequence_tokens=sequence_tokens,
    )
    assert trace.experts_TLK.shape == (num_tokens, num_layers, top_k)
    assert trace.num_experts == num_experts
    assert len(trace.domain_names) == num_domains
    assert trace.sequence_T is not None
    assert trace.position_T is not None
    np.testing.assert_array_equal(
        trace.sequence_T * sequence_tokens + trace.position_T, np.arange(num_tokens)
    )


def test_the_seed_decides() -> None:
    """The same arguments give the same trace, another seed another one."""
    assert make().digest == make().digest
    assert make().digest != make(seed=6).digest


def test_sequences_have_one_domain_and_domains_come_in_bursts() -> None:
    """A sequence never mixes domains, and neighbours share theirs more often than chance."""
    trace = make(num_layers=1, num_domains=4, sequence_tokens=10)
    assert trace.domain_T is not None
    domain_of_sequence = trace.domain_T.reshape(-1, 10)
    assert (domain_of_sequence == domain_of_sequence[:, :1]).all()
    same = (np.diff(domain_of_sequence[:, 0]) == 0).mean()
    assert 0.75 < same < 0.88  # three of four stay, a quarter of the redraws returns: 13/16


def test_without_structure_experts_are_alike() -> None:
    """All knobs at zero give even loads, no drift and partners by chance."""
    layer = describe(flat()).layers[0]
    assert layer.busiest_over_mean < 1.05
    assert layer.drift < 0.03
    assert layer.coactivation == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(
    ("knob", "figure"),
    [("skew", "coefficient_of_variation"), ("drift", "drift"), ("coactivation", "coactivation")],
)
def test_each_knob_raises_its_figure(knob: str, figure: str) -> None:
    """Zero, some and much give growing figures."""
    figures = [getattr(describe(flat(**{knob: value})).layers[0], figure) for value in (0.0, 0.8, 2.0)]
    assert figures == sorted(figures)
    assert figures[2] > figures[0] + 0.2


def test_domains_prefer_different_experts() -> None:
    """Two domains' loads are far apart with `domain_strength` and alike without."""

    def distance(trace: Trace) -> float:
        shares = [
            np.bincount(trace.experts_TLK[trace.domain_T == domain, 0].ravel(), minlength=16)
            for domain in (0, 1)
        ]
        first, second = (share / share.sum() for share in shares)
        return float(0.5 * np.abs(first - second).sum())

    assert distance(flat(sequence_tokens=50)) < 0.1
    assert distance(flat(sequence_tokens=50, domain_strength=1.0)) > 0.2


def test_layers_predict_each_other_with_layer_affinity() -> None:
    """The first expert of one layer tells something of the next one's only if affinity is given."""

    def dependence(trace: Trace) -> float:
        count = np.zeros((16, 16))
        np.add.at(count, (trace.experts_TLK[:, 0, 0], trace.experts_TLK[:, 1, 0]), 1)
        chance = np.outer(count.sum(axis=1), count.sum(axis=0)) / count.sum()
        return float(0.5 * np.abs(count - chance).sum() / count.sum())

    assert dependence(flat(coactivation=2.0)) < 0.1
    assert dependence(flat(coactivation=2.0, layer_affinity=0.9)) > 0.2


def test_choices_follow_the_stated_probabilities() -> None:
    """With popularity 1/r and top-1 of three experts, shares are 6/11, 3/11 and 2/11."""
    trace = flat(num_tokens=30_000, num_layers=1, num_experts=3, top_k=1, skew=1.0)
    share = np.sort(np.bincount(trace.experts_TLK.ravel(), minlength=3))[::-1] / 30_000
    np.testing.assert_allclose(share, [6 / 11, 3 / 11, 2 / 11], atol=0.012)


def test_group_limited_tokens_stay_in_few_groups() -> None:
    """With 2 of 4 groups per token, no token's four experts lie in three; without a limit most do."""

    def groups_per_token(trace: Trace) -> list[int]:
        return [len(set(groups)) for groups in (trace.experts_TLK[:, 0] // 4).tolist()]

    limited, free = flat(num_groups=4, top_groups=2), flat(num_groups=4, top_groups=4)
    assert max(groups_per_token(limited)) == 2
    assert np.mean(groups_per_token(free)) > 2.5
    assert free.digest == flat().digest


def test_groups_with_the_best_pair_win() -> None:
    """Experts 0 and 1 are ever popular, so their group of two is among the two chosen."""
    popularity = [[1e6, 1e6, 1, 1, 1, 1, 1, 1]]
    trace = flat(num_experts=8, top_k=2, num_groups=4, top_groups=1, popularity_LE=popularity)
    assert (np.sort(trace.experts_TLK, axis=2) == [0, 1]).mean() > 0.99


def test_loads_follow_a_given_popularity() -> None:
    """Top-1 of shares 0.6, 0.3, 0.1 in one layer and reversed in the next, taken in turn."""
    popularity = np.array([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]])
    trace = flat(num_tokens=30_000, num_layers=3, num_experts=3, top_k=1, popularity_LE=popularity)
    for layer, expected in enumerate(popularity[[0, 1, 0]]):
        share = np.bincount(trace.experts_TLK[:, layer].ravel(), minlength=3) / 30_000
        np.testing.assert_allclose(share, expected, atol=0.012)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"num_domains": -1}, "num_domains is -1"),
        ({"top_k": 17}, "top_k is 17 of 16 experts"),
        ({"num_experts": 70_000}, "at most 65536"),
        ({"skew": -0.1}, "skew is -0.1"),
        ({"drift": float("nan")}, "drift is nan"),
        ({"coactivation": float("inf")}, "coactivation is inf"),
        ({"layer_affinity": 1.5}, "layer_affinity is 1.5"),
        ({"num_groups": 3}, "16 experts do not form 3 equal groups"),
        ({"num_groups": 4, "top_groups": 5}, "top_groups is 5 of 4 groups"),
        ({"num_groups": 8, "top_groups": 1}, "1 of 8 groups hold 2 experts, fewer than top_k 4"),
        ({"popularity_LE": [[1.0, 2.0]]}, r"popularity has shape \(1, 2\), not \[layers, 16\]"),
        ({"popularity_LE": [[0.0] * 16]}, "above 0 somewhere in every layer"),
    ],
)
def test_numbers_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    """Every bad argument is named with its value."""
    with pytest.raises(InputError, match=message):
        make(**changes)
