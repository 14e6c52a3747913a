"""Drift: bounds and invariances of its figures; stationary traffic starts nothing, real drift does.

Shape letters: W windows, L layers, E experts.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from placement.cost import CostModel
from placement.optimizer import optimize
from placement.plan import Placement
from service.deployments.drift import (
    Drift,
    dispersion_L,
    measure_drift,
    noise_balance,
    shift_of,
    total_variation_L,
)
from service.deployments.loads import merge_parts, unpacked
from service.deployments.records import StoredPart
from service.deployments.resolve import Resolved, resolve
from service.deployments.spec import DeploymentSpec
from traces.synthesize import synthesize

LAYERS, EXPERTS, TOP_K, DEVICES = 3, 32, 4, 8
WINDOW_TOKENS = 2048
THRESHOLD = 0.05

Loads = npt.NDArray[Any]

loads_LE = arrays.arrays(np.int64, (2, 5), elements=st.integers(0, 10_000))


# -- putting windows together --------------------------------------------------------------------------------


def parts_of(load_WRLE: Loads, order: list[int]) -> list[StoredPart]:
    """Return the parts of windows and ranks in some order of arrival."""
    windows, ranks = load_WRLE.shape[:2]
    cells = [(window, rank) for window in range(windows) for rank in range(ranks)]
    return [
        StoredPart(
            window=100 + cells[index][0],
            rank=cells[index][1],
            version=None,
            tokens=1.0,
            load=zlib.compress(load_WRLE[cells[index]].astype("<i8").tobytes()),
            number=number + 1,
        )
        for number, index in enumerate(order)
    ]


@given(
    load_WRLE=arrays.arrays(np.int64, (3, 2, 2, 4), elements=st.integers(1, 1 << 40)),
    order=st.permutations(range(6)),
)
def test_windows_are_the_sum_of_their_parts(load_WRLE: Loads, order: list[int]) -> None:
    """Whatever the order in which ranks post, each window is the sum, in order of its last part."""
    merged = merge_parts(parts_of(load_WRLE, order), num_ranks=2, num_layers=2, num_experts=4)
    assert sorted(merged.window_W.tolist()) == [100, 101, 102]
    assert merged.last_W.tolist() == sorted(merged.last_W.tolist())
    for row, window in enumerate(merged.window_W.tolist()):
        assert (merged.load_WLE[row] == load_WRLE[window - 100].sum(axis=0)).all()
    assert (merged.tokens_W == 2).all()
    assert merged.num_incomplete == 0


@given(
    load_WRLE=arrays.arrays(np.int64, (3, 2, 2, 4), elements=st.integers(1, 100)),
    order=st.permutations(range(6)),
    arrived=st.integers(0, 5),
)
def test_windows_without_every_rank_are_left_out(load_WRLE: Loads, order: list[int], arrived: int) -> None:
    """Complete and incomplete windows together are all that have a part."""
    parts = parts_of(load_WRLE, order[:arrived])
    merged = merge_parts(parts, num_ranks=2, num_layers=2, num_experts=4)
    assert len(merged) + merged.num_incomplete == len({part.window for part in parts})
    assert 2 * len(merged) + merged.num_incomplete == arrived


def test_windows_are_chosen_by_arrival() -> None:
    """The latest ones, and those of which every part came behind a number."""
    parts = parts_of(np.ones((4, 1, 2, 4), dtype=np.int64), [3, 0, 1, 2])
    merged = merge_parts(parts, num_ranks=1, num_layers=2, num_experts=4)
    assert merged.window_W.tolist() == [103, 100, 101, 102]
    assert merged.latest(2).window_W.tolist() == [101, 102]
    assert merged.behind(1).window_W.tolist() == [100, 101, 102]
    assert len(merged.behind(4)) == 0
    assert (unpacked(parts[0].load, num_layers=2, num_experts=4) == 1).all()


def test_a_window_that_counts_nothing_is_left_out() -> None:
    """Nobody was served: that says nothing of the traffic."""
    parts = parts_of(np.zeros((1, 1, 2, 4), dtype=np.int64), [0])
    assert len(merge_parts(parts, num_ranks=1, num_layers=2, num_experts=4)) == 0
    assert len(merge_parts([], num_ranks=1, num_layers=2, num_experts=4)) == 0


# -- figures -------------------------------------------------------------------------------------------------


@given(one_LE=loads_LE, other_LE=loads_LE, scale=st.integers(1, 1000))
def test_distance_is_bounded_symmetric_and_of_shares(one_LE: Loads, other_LE: Loads, scale: int) -> None:
    """Between 0 and 1, 0 for equal loads, the same both ways, and the same however much traffic there is."""
    distance_L = total_variation_L(one_LE, other_LE)
    assert ((distance_L >= 0) & (distance_L <= 1 + 1e-12)).all()
    assert np.allclose(distance_L, total_variation_L(other_LE, one_LE))
    assert np.allclose(distance_L, total_variation_L(one_LE * scale, other_LE), atol=1e-9)
    assert (total_variation_L(one_LE, one_LE) == 0).all()


@given(load_WLE=arrays.arrays(np.int64, (4, 2, 5), elements=st.integers(0, 10_000)))
def test_there_is_no_shift_between_equal_loads(load_WLE: Loads) -> None:
    """And the shift is never more than the distance."""
    shift, distance, noise = shift_of(load_WLE, load_WLE.sum(axis=0))
    assert (shift, distance) == (0.0, 0.0)
    assert noise >= 0
    assert (dispersion_L(load_WLE) >= 1).all()


@given(
    load_WLE=arrays.arrays(np.int64, (3, 2, 5), elements=st.integers(1, 10_000)),
    fitted_LE=arrays.arrays(np.int64, (2, 5), elements=st.integers(1, 10_000)),
)
def test_a_shift_is_what_noise_does_not_explain(load_WLE: Loads, fitted_LE: Loads) -> None:
    """Never negative, never more than the distance itself."""
    shift, distance, _ = shift_of(load_WLE, fitted_LE)
    assert 0 <= shift <= distance <= 1 + 1e-12


@given(
    load_WLE=arrays.arrays(np.int64, (3, 2, 5), elements=st.integers(0, 10_000)), devices=st.integers(1, 64)
)
def test_noise_lies_between_even_and_all_on_one(load_WLE: Loads, devices: int) -> None:
    """More traffic is less noise."""
    noise = noise_balance(load_WLE, devices)
    assert 1 <= noise <= devices
    assert noise_balance(load_WLE * 10, devices) <= noise + 1e-12


def test_noise_is_what_an_even_placement_shows() -> None:
    """Drawn independently onto eight devices, the fullest one is about as full as the formula says."""
    load_WLE = np.random.default_rng(0).multinomial(4000, np.full(8, 1 / 8), size=(200, 1))
    seen = float((load_WLE.max(axis=2) / load_WLE.mean(axis=2)).mean())
    assert noise_balance(load_WLE, 8) == pytest.approx(seen, abs=0.01)


def figures(**changes: Any) -> Drift:
    """Measure some drift."""
    given_: dict[str, Any] = {
        "balance": 1.3,
        "floor": 1.05,
        "noise_floor": 1.02,
        "predicted": 1.1,
        "attainable": None,
        "recent_WLE": np.full((2, 1, 4), 100),
        "fitted_LE": None,
    }
    return measure_drift(**{**given_, **changes})


def test_the_reference_is_what_can_be_expected() -> None:
    """Predicted, else the floor; never below noise, nor below what was tried in vain."""
    assert (figures().reference, figures().reference_of) == (1.1, "predicted")
    assert (figures(predicted=None).reference, figures(predicted=None).reference_of) == (1.05, "floor")
    assert figures(noise_floor=1.2).reference_of == "noise"
    assert figures(attainable=1.28).reference_of == "attainable"
    assert figures(attainable=1.01).reference_of == "predicted"
    assert figures().excess == pytest.approx(1.3 / 1.1 - 1)


def test_excess_and_shift_decide_together() -> None:
    """Excess over the threshold, unless the traffic is the one that was fitted."""
    fitted_LE = np.array([[100, 100, 100, 100]])
    assert figures().is_due(0.1)
    assert not figures().is_due(0.2)
    assert not figures(fitted_LE=fitted_LE).is_due(0.1)
    assert figures(fitted_LE=np.array([[1000, 10, 10, 10]])).is_due(0.1)


# -- traffic -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Resolved:
    """Eight devices of one node."""
    model = {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K}
    return resolve(DeploymentSpec(topology="h100:1x8", model=model).model_dump(mode="json"))


def windows_of(*, drift: float, seed: int, tokens: int = WINDOW_TOKENS, count: int = 32) -> Loads:
    """Return load windows of a router that drifts from its first to its last token."""
    trace = synthesize(
        num_tokens=tokens * count,
        num_layers=LAYERS,
        num_experts=EXPERTS,
        top_k=TOP_K,
        num_domains=4,
        domain_strength=0.3,
        skew=0.5,
        drift=drift,
        sequence_tokens=64,
        seed=seed,
    )
    ids_WLT = trace.experts_TLK.reshape(count, tokens, LAYERS, TOP_K).transpose(0, 2, 1, 3)
    rows = ids_WLT.reshape(count * LAYERS, -1)
    counts = [np.bincount(row, minlength=EXPERTS) for row in rows]
    return np.array(counts).reshape(count, LAYERS, EXPERTS)


def fitted_on(cluster: Resolved, load_WLE: Loads) -> tuple[Placement, float]:
    """Return a placement for some windows, and its balance there."""
    problem = cluster.problem(load_WLE, device_of_slot_S=np.repeat(np.arange(DEVICES), EXPERTS // DEVICES))
    solution = optimize(problem, work_s=0.2, seed=1)
    return solution.placement, solution.breakdown.metrics.balance


def drift_on(
    cluster: Resolved, placement: Placement, recent: Loads, predicted: float, fitted: Loads
) -> Drift:
    """Measure the drift of a placement."""
    problem = cluster.problem(recent, device_of_slot_S=placement.device_of_slot_S)
    metrics = CostModel(problem).evaluate(placement).metrics
    return measure_drift(
        balance=metrics.balance,
        floor=metrics.balance_floor,
        noise_floor=noise_balance(recent, DEVICES),
        predicted=predicted,
        attainable=None,
        recent_WLE=recent,
        fitted_LE=fitted.sum(axis=0),
    )


@pytest.mark.parametrize("seed", range(3))
def test_stationary_traffic_starts_nothing(cluster: Resolved, seed: int) -> None:
    """A placement fitted to the beginning keeps its promise to the end."""
    load_WLE = windows_of(drift=0.0, seed=seed)
    placement, predicted = fitted_on(cluster, load_WLE[:16])
    for first in range(16, 32, 8):
        found = drift_on(cluster, placement, load_WLE[first : first + 8], predicted, load_WLE[:16])
        assert not found.is_due(THRESHOLD), found


@pytest.mark.parametrize("seed", range(3))
def test_drifting_traffic_does(cluster: Resolved, seed: int) -> None:
    """Where popularity changes from beginning to end, the last windows say so."""
    load_WLE = windows_of(drift=0.7, seed=seed)
    placement, predicted = fitted_on(cluster, load_WLE[:16])
    found = drift_on(cluster, placement, load_WLE[-8:], predicted, load_WLE[:16])
    assert found.is_due(THRESHOLD), found
    assert found.shift is not None
    assert found.shift > 0.05


def test_noisier_windows_of_the_same_traffic_start_nothing(cluster: Resolved) -> None:
    """A placement fitted on long windows is not blamed for the noise of short ones."""
    long_WLE = windows_of(drift=0.0, seed=7, tokens=16384, count=8)
    placement, predicted = fitted_on(cluster, long_WLE)
    # The same router, but little of its traffic at a time.
    rng = np.random.default_rng(0)
    share_LE = long_WLE.sum(axis=0) / long_WLE.sum(axis=(0, 2))[:, None]
    few_WLE = np.stack([[rng.multinomial(512, share_E) for share_E in share_LE] for _ in range(16)])
    found = drift_on(cluster, placement, few_WLE, predicted, long_WLE)
    assert found.balance / predicted - 1 > THRESHOLD
    assert not found.is_due(THRESHOLD), found
