"""Tests of the greedy equal-count packing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from placement.errors import InfeasibleError, InputError
from placement.solvers.packing import pack_equal, pack_equal_ranked


def one_by_one(weight_N: list[float], num_bins: int) -> list[int]:
    """The rule in plain Python, item by item."""
    capacity = len(weight_N) // num_bins
    if capacity == 1:
        return list(range(num_bins))
    load, count, bin_N = [0.0] * num_bins, [0] * num_bins, [0] * len(weight_N)
    for item in sorted(range(len(weight_N)), key=lambda i: (-weight_N[i], i)):
        target = min((b for b in range(num_bins) if count[b] < capacity), key=lambda b: (load[b], b))
        bin_N[item] = target
        load[target] += weight_N[item]
        count[target] += 1
    return bin_N


def test_longest_first_by_hand() -> None:
    """8, 7, 6, 5 into two bins of two: 8 + 5 against 7 + 6 is perfect."""
    assert pack_equal([[5, 6, 7, 8]], 2).tolist() == [[0, 1, 1, 0]]


def test_full_bins_take_no_more() -> None:
    """9 fills bin 0 with one zero only: equal counts come before load."""
    assert pack_equal([[9, 1, 1, 1]], 2).tolist() == [[0, 1, 1, 0]]


def test_layers_are_packed_on_their_own() -> None:
    """Each row is a problem of its own."""
    assert pack_equal([[4, 3, 2, 1], [1, 1, 1, 9]], 2).tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]


def test_ties_go_by_number() -> None:
    """Equal weights and equal loads take the lowest number first."""
    assert pack_equal([[1, 1, 1, 1, 1, 1]], 3).tolist() == [[0, 1, 2, 0, 1, 2]]


def test_one_item_per_bin_stays() -> None:
    """With one item per bin there is nothing to balance."""
    assert pack_equal([[1, 5, 3]], 3).tolist() == [[0, 1, 2]]


def test_rank_is_the_order_of_packing() -> None:
    """The heavier item of a bin comes first in it."""
    bins, ranks = pack_equal_ranked([[5, 6, 7, 8]], 2)
    assert bins.tolist() == [[0, 1, 1, 0]]
    assert ranks.tolist() == [[1, 1, 0, 0]]


@given(
    st.integers(1, 5).flatmap(
        lambda bins: st.tuples(
            st.just(bins),
            hnp.arrays(
                np.float64,
                st.tuples(st.integers(1, 3), st.integers(1, 4).map(lambda capacity: capacity * bins)),
                elements=st.integers(0, 20).map(float) | st.floats(0, 1e6),
            ),
        )
    )
)
def test_packing_follows_the_rule(problem: tuple[int, npt.NDArray[np.float64]]) -> None:
    """All layers at once give what the rule gives item by item, with equal counts and ranks 0, 1, ..."""
    num_bins, weight = problem
    bins, ranks = pack_equal_ranked(weight, num_bins)
    capacity = weight.shape[1] // num_bins
    for layer in range(weight.shape[0]):
        assert bins[layer].tolist() == one_by_one(weight[layer].tolist(), num_bins)
        slots = sorted(zip(bins[layer].tolist(), ranks[layer].tolist(), strict=True))
        assert slots == [(b, r) for b in range(num_bins) for r in range(capacity)]


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([1.0, 2.0], r"weight has shape \(2,\), not \[layers, items\]"),
        ([[]], r"weight has shape \(1, 0\)"),
        ([[1.0, float("nan")]], r"weight\[0\]\[1\] is nan; loads are finite and not negative"),
        ([[1.0, -2.0]], r"weight\[0\]\[1\] is -2.0"),
        ([[1.0, float("inf")]], r"weight\[0\]\[1\] is inf"),
        ([[1e308, 1e308]], "weight of layer 0 sums to infinity"),
        ([["a", "b"]], "weight holds <U1 values, not numbers"),
        ([[1.0], [1.0, 2.0]], "rows of equal length"),
    ],
)
def test_malformed_weights_are_refused(weight: list[list[float]], message: str) -> None:
    """Loads are a table of finite numbers of 0 or more."""
    with pytest.raises(InputError, match=message):
        pack_equal(weight, 2)


def test_uneven_counts_are_infeasible() -> None:
    """Five items do not fill two bins evenly."""
    with pytest.raises(InfeasibleError, match=r"5 items do not divide evenly over 2 bins \(1 left over\)"):
        pack_equal([[1, 2, 3, 4, 5]], 2)


def test_no_bin_is_an_error() -> None:
    """There must be a bin."""
    with pytest.raises(InputError, match="0 bins"):
        pack_equal([[1, 2]], 0)
