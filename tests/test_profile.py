"""Tests of routing profiles: what they refuse, windows, weights and transitions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from instances import counts_only, random_profile

from placement.errors import InputError
from placement.profile import RoutingProfile


def profile(**change: Any) -> RoutingProfile:
    """Three tokens in two windows and one in the tail; two layers of three experts, top-1."""
    given: dict[str, Any] = {
        "load_WLE": [[[2, 0, 0], [1, 1, 0]], [[0, 1, 0], [0, 0, 1]]],
        "window_tokens_W": [2, 1],
        "top_k": 1,
        "experts_TLK": np.array([[[0], [0]], [[0], [1]], [[1], [2]], [[2], [2]]], dtype=np.uint8),
        "window_of_token_T": np.array([0, 0, 1, 2]),
        "tail_tokens": 1,
    }
    return RoutingProfile(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load_WLE": [[1.0]]}, r"load_WLE has shape \(1, 1\)"),
        ({"window_tokens_W": [2]}, "window_tokens_W has shape"),
        ({"window_tokens_W": [2, 0]}, "positive number of tokens"),
        ({"load_WLE": [[[2, 0, 0], [1, 1, 0]], [[0, -1, 0], [0, 0, 1]]]}, "window 1 layer 0 expert 1 is -1"),
        ({"load_WLE": [[[2, 0, 0], [1, np.nan, 0]], [[0, 1, 0], [0, 0, 1]]]}, "layer 1 expert 1 is nan"),
        ({"load_WLE": [[[2, 0, 0], [0, 0, 0]], [[0, 1, 0], [0, 0, 0]]]}, "layer 1 routed no token"),
        ({"top_k": 4}, "top-4 of 3 experts"),
        ({"top_k": 0}, "top-0 of 3 experts"),
        ({"tail_tokens": -1}, "tail_tokens is -1"),
        ({"experts_TLK": None}, "cannot give their windows or homes"),
        ({"experts_TLK": np.zeros((4, 2, 2), np.uint8)}, "experts_TLK has shape"),
        ({"experts_TLK": np.zeros((4, 2, 1), np.int64)}, "not unsigned integers"),
        ({"experts_TLK": np.full((4, 2, 1), 3, np.uint8)}, "names expert 3 of 3"),
        ({"window_of_token_T": None}, "must name the window of every sampled token"),
        ({"window_of_token_T": np.array([0, 1, 0, 2])}, "must ascend"),
        ({"window_of_token_T": np.array([0, 0, 1, 3])}, r"within 0\.\.2"),
        ({"window_of_token_T": np.array([2, 2, 2, 2])}, "after the last whole window"),
        ({"home_T": np.zeros(3, np.int64)}, "home_T has shape"),
        ({"home_T": np.array([0, 0, -2, 0])}, "names device -2"),
    ],
)
def test_a_broken_profile_is_refused(change: dict[str, Any], message: str) -> None:
    """Every inconsistency is named with its place."""
    with pytest.raises(InputError, match=message):
        profile(**change)


def test_sizes() -> None:
    """Sizes are those of the arrays; a profile of counts has no token."""
    made = profile()
    assert (made.num_windows, made.num_layers, made.num_experts, made.num_sampled_tokens) == (2, 2, 3, 4)
    assert counts_only(made).num_sampled_tokens == 0
    assert counts_only(made).token_weight_T.size == 0


@given(seed=st.integers(0, 10_000), tail=st.integers(0, 5))
def test_sampled_tokens_stand_for_all(seed: int, tail: int) -> None:
    """Their weights sum to the real tokens of every window and of the tail."""
    made = random_profile(np.random.default_rng(seed), tail=tail, keep=0.4, scale=10.0)
    assert made.window_of_token_T is not None
    weight_W = np.bincount(made.window_of_token_T, made.token_weight_T, minlength=made.num_windows + 1)
    np.testing.assert_allclose(weight_W, [*made.window_tokens_W, 10.0 * tail])


def test_transitions_count_real_tokens() -> None:
    """Row: expert of the layer; column: expert of the next one; the tail included."""
    assert profile().transitions(0).tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 1]]
    halved = profile(window_tokens_W=[4, 1])
    assert halved.transitions(0)[0].tolist() == [2, 2, 0]
    with pytest.raises(InputError, match="transitions need the tokens' experts"):
        counts_only(profile()).transitions(0)


def test_select_windows_renumbers() -> None:
    """A selection keeps its tokens, ascending, and loses the tail."""
    chosen = profile(home_T=np.array([1, -1, 0, 1])).select_windows([1])
    assert chosen.window_of_token_T is not None
    assert chosen.home_T is not None
    assert chosen.window_of_token_T.tolist() == [0]
    assert chosen.home_T.tolist() == [0]
    assert chosen.load_WLE.tolist() == [[[0, 1, 0], [0, 0, 1]]]
    assert chosen.tail_tokens == 0


@pytest.mark.parametrize("windows", [[], [2], [-1]])
def test_windows_that_are_not_there(windows: list[int]) -> None:
    """An empty or impossible selection is refused."""
    with pytest.raises(InputError, match="of 2"):
        profile().select_windows(windows)


def test_windows_without_sampled_tokens() -> None:
    """A selection of which no token was kept says so, rather than failing on an empty table."""
    made = profile(window_of_token_T=np.array([0, 0, 0, 2]))
    with pytest.raises(InputError, match=r"no token of windows \[1\] was sampled"):
        made.select_windows([1])


@given(seed=st.integers(0, 10_000), windows=st.integers(2, 5))
def test_split_alternate_shares_all_windows(seed: int, windows: int) -> None:
    """Even and odd windows together are the whole, token for token."""
    made = random_profile(np.random.default_rng(seed), windows=windows, homes=2)
    fit, held = made.split_alternate()
    assert fit.num_windows + held.num_windows == windows
    np.testing.assert_array_equal(fit.load_WLE, made.load_WLE[::2])
    np.testing.assert_array_equal(held.load_WLE, made.load_WLE[1::2])
    assert fit.num_sampled_tokens + held.num_sampled_tokens == made.num_sampled_tokens


def test_one_window_cannot_be_split() -> None:
    """The message says what to do about it."""
    with pytest.raises(InputError, match="smaller --window"):
        profile().select_windows([0]).split_alternate()


def test_arrays_are_read_only() -> None:
    """A profile does not change under a solver."""
    made = replace(profile(), tail_tokens=0)
    with pytest.raises(ValueError, match="read-only"):
        made.load_WLE[0, 0, 0] = 5
