"""Tests of predicted layer times: one layer by hand, and what must hold for any."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_files import CURVES, SHAPE, counts, curves

from placement.calibration import PiecewiseLinear
from placement.cost.layer_program import DEDUP, PAIRS
from placement.cost.layer_time import LayerCounts, predict_layer, straightened, tokens_with_padding
from placement.errors import InputError

# 1000 tokens on each of two ranks, 4 experts each.
EVEN = counts([[2000, 2000], [2000, 2000]], tokens_RR=[[900, 900], [900, 900]])
SKEW = counts([[1000, 3000], [1500, 2500]], tokens_RR=[[700, 1000], [800, 1000]])
# The smallest exchange is 20 us and two operations; one row has 1000 numbers at 0.9 x 2000 GB/s.
OPERATION_S = 10e-6
ELEMENT_S = 1 / 1.8e12


def moved(rows: float, bytes_per_element: float) -> float:
    """Seconds in which kernels move rows of 1000 numbers."""
    return rows * 1000 * bytes_per_element * ELEMENT_S


def exchanged(received_bytes: float) -> float:
    """Seconds of an exchange: 20 us and 100 GB/s."""
    return 20e-6 + received_bytes / 1e11


def products(tokens: float) -> float:
    """Seconds of 8 experts of more than 256 tokens."""
    return 0.8e-3 + (tokens - 256) / 128 * 0.4e-3


def test_pairs_by_hand() -> None:
    """One row for each pair: every phase from bytes, operations and curves; the busiest rank counts."""
    time = predict_layer(SHAPE, SKEW, curves(), dedup=False)
    assert time.prepare_s == pytest.approx(20 * OPERATION_S + 20e-6 + moved(4000, 4))
    # 3000 rows of 2 kB leave rank 0, and after them 8 bytes for each.
    assert time.dispatch_s == pytest.approx(exchanged(3000 * 2000) + exchanged(3000 * 8))
    # 5500 pairs on 8 experts: each rounded up to a multiple of 256 tokens, by 128 on the average.
    experts_s = products(5500 / 8 + 128) + 18 * OPERATION_S + moved(5500, 4 + 6)
    assert time.experts_s == pytest.approx(experts_s)
    assert time.combine_s == pytest.approx(3000 * 2000 / 1e11)
    assert time.unpermute_s == pytest.approx(OPERATION_S + moved(4000, 26) + moved(1000, 10))
    assert time.total_s == pytest.approx(sum(time.phases().values()))


def test_tokens_by_hand() -> None:
    """De-duplicated, rows are distinct tokens, and the experts' rank expands, weighs and sums."""
    time = predict_layer(SHAPE, SKEW, curves(), dedup=True)
    assert time.prepare_s == pytest.approx(20 * OPERATION_S + 20e-6 + moved(1800, 4))
    small_s = exchanged(1000 * 4 * 8) + exchanged(1000 * 4 * 4)
    assert time.dispatch_s == pytest.approx(exchanged(1000 * 2000) + small_s)
    handling_s = 27 * OPERATION_S + moved(5500, 4 + 10) + moved(2000, 2)
    assert time.experts_s == pytest.approx(products(5500 / 8 + 128) + handling_s)
    assert time.unpermute_s == pytest.approx(OPERATION_S + moved(1800, 18) + moved(1000, 10))


def test_the_programs_differ_where_they_should() -> None:
    """Pairs are weighed at home, tokens at the experts."""
    assert DEDUP.prepare_bytes == PAIRS.prepare_bytes
    assert DEDUP.reduce_bytes > PAIRS.reduce_bytes
    assert DEDUP.unpermute_bytes < PAIRS.unpermute_bytes


def test_measured_steps_take_the_place_of_counted_bytes() -> None:
    """What a file measured is neither counted nor charged for operations."""
    steps = {
        f"{name}_ms": [
            {"rows": 1000, "hidden": 1000, "ms": ms},
            {"rows": 9000, "hidden": 1000, "ms": 9 * ms},
        ]
        for name, ms in (("prepare", 0.1), ("expand", 0.02), ("reduce", 0.03), ("unpermute", 0.2))
    }
    time = predict_layer(SHAPE, SKEW, curves(**steps, counts_exchange_ms=0.07), dedup=False)
    assert time.prepare_s == pytest.approx(0.4e-3 + 0.07e-3)
    assert time.experts_s == pytest.approx(products(5500 / 8 + 128) + 5.5 * 0.05e-3)
    assert time.unpermute_s == pytest.approx(0.8e-3)
    # One of the experts' two steps alone is not enough.
    half = predict_layer(SHAPE, SKEW, curves(expand_ms=steps["expand_ms"]), dedup=False)
    assert half.experts_s == predict_layer(SHAPE, SKEW, curves(), dedup=False).experts_s


def test_fewer_active_experts() -> None:
    """As many pairs on half the experts: more tokens each, half the weights to read."""
    few = dataclasses.replace(EVEN, active_R=np.full(2, 4.0))
    time = predict_layer(SHAPE, few, curves(), dedup=False)
    handling_s = 18 * OPERATION_S + moved(4000, 10)
    assert time.experts_s == pytest.approx(products(1000 + 128) / 2 + handling_s)


def test_a_rank_without_pairs_computes_nothing() -> None:
    """No pair, no product; the other rank takes its time."""
    idle = predict_layer(SHAPE, counts([[0, 0], [0, 0]], tokens=0), curves(), dedup=False)
    assert idle.experts_s == pytest.approx(18 * OPERATION_S)
    assert idle.combine_s == 0.0


def test_a_host_may_be_slower_than_its_exchange() -> None:
    """An operation costs what a launch was measured to cost, if that is more."""
    slow = predict_layer(SHAPE, EVEN, curves(launch_ms=0.05), dedup=False)
    usual = predict_layer(SHAPE, EVEN, curves(), dedup=False)
    assert slow.prepare_s - usual.prepare_s == pytest.approx(20 * 40e-6)


def test_known_loads_are_rounded_one_by_one() -> None:
    """Whole tiles waste nothing; just above one tile almost another is wasted."""
    assert tokens_with_padding(512, np.full(8, 512.0)) == 512
    assert tokens_with_padding(257, np.full(8, 257.0)) == pytest.approx(257 + 255)
    assert tokens_with_padding(512) == 512 + 128
    # At 100 tokens tiles are of 128; nobody pays for more than twice the tokens.
    assert tokens_with_padding(100) == 150
    assert tokens_with_padding(4, np.full(8, 4.0)) == 8
    even = dataclasses.replace(EVEN, load_RC=[np.full(8, 500.0)] * 2)
    known = predict_layer(SHAPE, even, curves(), dedup=False)
    assert known.experts_s == pytest.approx(products(512) + 18 * OPERATION_S + moved(4000, 10))


def test_curves_near_a_line_are_lines() -> None:
    """Noise goes, and with it the last two points' slope; a curve with a bend stays as it is."""
    x = np.array([0.0, 1.0, 4.0, 16.0, 64.0])
    noisy = PiecewiseLinear(x=x, y=(1 + x) * np.array([1.05, 1.05, 0.95, 1.05, 0.95]))
    line = straightened(noisy)
    assert line(640.0) == pytest.approx(641, rel=0.06)
    np.testing.assert_allclose(line(x[1:]), noisy.y[1:], rtol=0.2)
    bent = PiecewiseLinear(x=x, y=np.array([1.0, 1.0, 1.0, 1.0, 90.0]))
    assert straightened(bent) is bent
    short = PiecewiseLinear.line(intercept=1.0, slope=2.0)
    assert straightened(short) is short


LOADS = st.lists(st.integers(0, 5000), min_size=9, max_size=9)


@settings(max_examples=50, deadline=None)
@given(pairs=LOADS, more=LOADS, dedup=st.booleans(), order=st.permutations(range(3)))
def test_more_traffic_never_takes_less_time(
    pairs: list[int], more: list[int], dedup: bool, order: list[int]
) -> None:
    """Any number of ranks: no phase falls when counts rise, and the ranks' names do not matter."""

    def times(pairs_RR: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
        tokens_RR = np.minimum(pairs_RR, 1000)
        layer = counts(pairs_RR.tolist(), tokens_RR=tokens_RR.tolist())
        return np.array(list(predict_layer(SHAPE, layer, curves(), dedup=dedup).phases().values()))

    first_RR = np.array(pairs, dtype=np.float64).reshape(3, 3)
    before, after = times(first_RR), times(first_RR + np.array(more).reshape(3, 3))
    # Above 128 tokens per expert tiles are larger: padding jumps up, never down.
    assert (after >= before - 1e-12).all()
    np.testing.assert_allclose(times(first_RR[np.ix_(order, order)]), before, rtol=1e-9)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"pairs_RR": np.ones((2, 3))}, r"pairs_RR has shape \(2, 3\), not \(2, 2\)"),
        ({"tokens_RR": np.ones(2)}, r"tokens_RR has shape \(2,\), not \(2, 2\)"),
        ({"pairs_RR": np.array([[1, -1], [1, 1]])}, "pairs_RR holds a number that is negative"),
        ({"active_R": np.array([1, np.nan])}, "active_R holds a number that is negative or not finite"),
        ({"pairs_RR": np.float64(3)}, r"pairs_RR has shape \(\), not \(0, 0\)"),
        ({"load_RC": [np.ones(8)]}, "load_RC tells of 1 ranks, pairs_RR of 2"),
    ],
)
def test_counts_that_do_not_fit(entries: dict[str, Any], message: str) -> None:
    """Shapes and numbers are checked."""
    with pytest.raises(InputError, match=message):
        dataclasses.replace(EVEN, **entries)


def test_what_is_missing_is_said() -> None:
    """Distinct tokens for de-duplicated rows, memory bandwidth for rows."""
    plain = counts([[1, 1], [1, 1]])
    assert isinstance(plain, LayerCounts)
    with pytest.raises(InputError, match="need tokens_RR"):
        predict_layer(SHAPE, plain, curves(), dedup=True)
    # Without a copy's speed the weights' serves: 8 experts of 1.5 M weights of two bytes in 0.8 ms.
    read = {key: value for key, value in CURVES.items() if key != "hbm_gb_s"} | {"gpu": "mystery"}
    time = predict_layer(SHAPE, plain, curves(**read, hbm_gb_s=None), dedup=False)
    assert time.unpermute_s == pytest.approx(
        OPERATION_S + (2 * 1000 * 26 + 1000 * 1000 * 10) / (8 * 3e6 / 0.8e-3)
    )
