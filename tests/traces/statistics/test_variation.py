"""Tests of loads over windows and kinds of traffic, of how they age, and of what is said of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from placement.learning import LearningCurve
from traces.statistics import collect
from traces.statistics.affinity import coactivations, transitions
from traces.statistics.ageing import load_ageing
from traces.statistics.findings import (
    affinity_finding,
    ageing_finding,
    information_finding,
    kinds_finding,
    learning_finding,
    load_finding,
    variation_finding,
)
from traces.statistics.kinds import kind_loads
from traces.statistics.variation import load_variation
from traces.synthesize import synthesize
from traces.trace import Trace


def drawn(share_WE: np.ndarray, *, pairs: int = 4000, seed: int = 0) -> np.ndarray:
    """Return multinomial loads of one layer, ``[windows, 1, experts]``."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(pairs, share_WE)[:, np.newaxis]


EVEN = np.full(8, 1 / 8)
UNEVEN = np.arange(1, 9) / 36


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), windows=st.integers(1, 12))
def test_unevenness_is_divided_completely(seed: int, windows: int) -> None:
    """The parts are not negative, and add up to the mean square distance from even."""
    load_WLE = np.random.default_rng(seed).integers(0, 20, size=(windows, 2, 5)) + 1
    variation = load_variation(load_WLE)
    relative = load_WLE / load_WLE.mean(axis=2, keepdims=True)
    parts = np.array([variation.steady_L, variation.moving_L, variation.chance_L])
    assert (parts >= -1e-12).all()
    np.testing.assert_allclose(parts.sum(axis=0), ((relative - 1) ** 2).mean(axis=(0, 2)))
    assert sum(variation.shares) == pytest.approx(1)
    np.testing.assert_allclose(variation.busiest_WL, relative.max(axis=2))


@pytest.mark.parametrize(
    ("share_WE", "largest"),
    [
        (np.tile(EVEN, (40, 1)), 2),
        (np.tile(UNEVEN, (40, 1)), 0),
        (np.array([UNEVEN, UNEVEN[::-1]] * 20), 1),
    ],
    ids=["chance", "steady", "moving"],
)
def test_causes_of_unevenness_are_told_apart(share_WE: np.ndarray, largest: int) -> None:
    """Even loads differ by chance, one uneven load stays, two in turns move."""
    assert load_variation(drawn(share_WE)).shares[largest] > 0.9


def test_ageing_of_traffic_without_memory() -> None:
    """Windows of the same traffic: how old they are makes no difference."""
    ageing = load_ageing(drawn(np.tile(UNEVEN, (60, 1))))
    assert ageing.distance_N.max() - ageing.distance_N.min() < 0.01
    assert ageing.null == pytest.approx(ageing.distance_N.mean(), abs=0.005)
    assert np.isnan(ageing.recent_W[0])
    assert not np.isnan(ageing.recent_W[1:]).any()


def test_ageing_of_traffic_that_turns_slowly() -> None:
    """Shares that go round in 64 windows: half of the lead is lost at some lag in between."""
    phase = 2 * np.pi * (np.arange(128)[:, np.newaxis] / 64 + np.arange(8) / 8)
    share_WE = (1 + 0.8 * np.cos(phase)) / 8
    ageing = load_ageing(drawn(share_WE), span=1)
    assert ageing.order_matters
    assert ageing.half_life is not None
    assert 2 < ageing.half_life < 16
    assert ageing.distance_N[0] < 0.1 < ageing.null
    assert [row["windows before"] for row in ageing.table()] == ageing.lag_N.tolist()


def test_ageing_by_hand() -> None:
    """Two experts in turns: the window before tells the opposite, the one before that everything."""
    load_WLE = np.array([[[4, 0]], [[0, 4]]] * 4)
    ageing = load_ageing(load_WLE, span=1)
    assert ageing.lag_N.tolist() == [1, 2, 3, 4]
    assert ageing.distance_N.tolist() == [1, 0, 1, 0]
    assert ageing.earlier_W[1:4].tolist() == [1, 0.5, pytest.approx(2 / 3)]
    assert not ageing.order_matters
    assert ageing.half_life is None


def traffic(**options: Any) -> Trace:
    """Return a small synthetic trace."""
    sizes = {"num_tokens": 6000, "num_layers": 2, "num_experts": 8, "top_k": 2, "sequence_tokens": 50}
    return synthesize(**{**sizes, "seed": 5, **options})


def dealt(trace: Trace, domain_of_sequence: np.ndarray, names: tuple[str, ...]) -> Trace:
    """Return a trace whose sequences are of given domains."""
    assert trace.sequence_T is not None
    return replace(trace, domain_T=domain_of_sequence[trace.sequence_T], domain_names=names)


def statistics(trace: Trace, **options: Any) -> Any:
    """Return statistics with a sample of all tokens."""
    return collect(trace, window_tokens=500, max_sampled_tokens=6000, parts=(), **options)


def test_kinds_that_differ_and_kinds_that_do_not() -> None:
    """Domains of other experts differ; domains dealt out to sequences at random do not."""
    rng = np.random.default_rng(0)
    kind_S = rng.integers(2, size=120)
    experts = np.argsort(rng.random((6000, 2, 4)), axis=2)[:, :, :2]
    sequence_T = np.arange(6000) // 50
    apart = experts + 4 * kind_S[sequence_T][:, np.newaxis, np.newaxis]
    plain = {"num_experts": 8, "sequence_T": sequence_T, "domain_T": kind_S[sequence_T]}
    kinds = kind_loads(statistics(Trace(experts_TLK=apart, **plain, domain_names=("code", "prose"))))
    assert kinds is not None
    assert kinds.distance_C.tolist() == [1, 1]
    assert kinds.differ_C.all()
    alike = kind_loads(statistics(Trace(experts_TLK=experts, **plain, domain_names=("code", "prose"))))
    assert alike is not None
    assert alike.distance_C.max() < 0.05
    assert not alike.differ_C.any()
    assert [row["domain"] for row in alike.table()] == ["code", "prose"]


def test_kinds_where_no_domain_is_known() -> None:
    """Ranks stand in for domains, and stretches of time for ranks."""
    trace = replace(traffic(), domain_T=None, domain_names=())
    ranks = kind_loads(statistics(replace(trace, rank_T=np.arange(6000) % 3)))
    stretches = kind_loads(statistics(trace))
    assert ranks is not None
    assert stretches is not None
    assert (ranks.what, ranks.names) == ("rank", ("rank 0", "rank 1", "rank 2"))
    assert (stretches.what, len(stretches.names)) == ("stretch", 8)
    assert kinds_finding(stretches).startswith("Of all stretches, stretch ")
    one = dealt(trace, np.zeros(120, dtype=int), ("prose",))
    assert kind_loads(statistics(one)) is None
    with pytest.raises(InputError, match="no sampled tokens"):
        kind_loads(collect(trace, window_tokens=500, max_sampled_tokens=0, parts=()))


def test_too_few_windows() -> None:
    """Said in a line."""
    with pytest.raises(InputError, match="no four windows"):
        load_ageing(np.ones((3, 1, 4)))
    with pytest.raises(InputError, match=r"not \[windows, layers, experts\]"):
        load_variation(np.ones((0, 1, 4)))


def test_findings_say_what_was_found() -> None:
    """Sentences carry the numbers of the statistics that they are about."""
    uneven = load_variation(drawn(np.tile(UNEVEN, (40, 1))))
    assert "Expert 7 of layer 0 is the busiest, with 1.77 times" in load_finding(uneven)
    assert "more stays than moves" in variation_finding(uneven)
    moving = load_variation(drawn(np.array([UNEVEN, UNEVEN[::-1]] * 20)))
    assert "more moves than stays" in variation_finding(moving)
    assert "chance" in variation_finding(load_variation(drawn(np.tile(EVEN, (40, 1)))))
    idle = load_variation(np.array([[[4, 0, 0]]]))
    assert load_finding(idle).endswith("2 experts are never selected.")
    steady = load_ageing(np.array([[[4, 0]], [[0, 4]]] * 4), span=1)
    assert ageing_finding(steady, window_tokens=10).endswith("makes no difference.")
    assert kinds_finding(None) == "The trace knows one kind of traffic only."


def test_findings_of_a_trace() -> None:
    """Every sentence is whole for a trace with structure, and for one without."""
    for strength in (0.0, 2.0):
        counted = statistics(traffic(domain_strength=strength, coactivation=strength, drift=strength))
        together, following = coactivations(counted), transitions(counted)
        texts = [
            load_finding(load_variation(counted.load_WLE)),
            variation_finding(load_variation(counted.load_WLE)),
            kinds_finding(kind_loads(counted)),
            ageing_finding(load_ageing(counted.load_WLE), window_tokens=500),
            affinity_finding(together),
            affinity_finding(following),
            information_finding(following),
        ]
        for text in texts:
            assert text.endswith(".")
            assert "nan" not in text
    assert information_finding(()) == "There is one MoE layer only, so no expert is followed by another."
    assert affinity_finding(()) == "No token selects two experts whose pairs could be counted."


def test_finding_of_a_learning_curve() -> None:
    """How many windows are enough, or that none are."""
    curve = LearningCurve(
        windows_N=np.array([1, 2, 4]),
        spread_RN=np.array([[1.3, 1.1, 1.1]]),
        consecutive_RN=np.array([[1.4, 1.3, 1.1]]),
        fitted_RN=np.array([[1.0, 1.0, 1.05]]),
        unfitted=1.5,
        unit="max/mean",
    )
    text = learning_finding(curve, window_tokens=1000)
    assert "is 1.100 with a placement fitted to 4 windows and 1.500 with experts in order" in text
    assert "As few as 2 windows (2,000 tokens) spread over the trace come within 2\N{NO-BREAK SPACE}%" in text
    assert text.endswith("of consecutive ones it takes 4.")
    assert "too few" in learning_finding(replace(curve, unfitted=1.05), window_tokens=1000)
