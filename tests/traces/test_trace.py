"""Tests of `traces.trace`: what a trace accepts, its digest, and cutting it into parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.errors import InputError
from traces.synthesize import synthesize
from traces.trace import UNKNOWN_DOMAIN, Trace, joined

# Three tokens, two layers, top-2 of four experts.
EXPERTS_TLK = [[[0, 1], [2, 3]], [[1, 2], [3, 0]], [[3, 1], [0, 2]]]


def make_trace(**changes: Any) -> Trace:
    return Trace(**{"experts_TLK": np.array(EXPERTS_TLK), "num_experts": 4, **changes})


def counting_trace(num_tokens: int, **changes: Any) -> Trace:
    """A one-layer, top-1 trace whose positions number the tokens."""
    number_T = np.arange(num_tokens)
    fields = {"experts_TLK": (number_T % 4)[:, None, None], "num_experts": 4, "position_T": number_T}
    return Trace(**{**fields, **changes})


def test_shape_and_order_are_kept() -> None:
    """The ids stay in recorded order, in one byte each."""
    trace = make_trace()
    assert (trace.num_tokens, trace.num_layers, trace.top_k) == (3, 2, 2)
    assert trace.experts_TLK.dtype == np.uint8
    assert trace.experts_TLK.tolist() == EXPERTS_TLK
    assert trace.size_bytes == 12


def test_more_than_256_experts_take_two_bytes() -> None:
    """Ids over 255 survive."""
    trace = make_trace(experts_TLK=np.array([[[299, 0]]]), num_experts=300)
    assert trace.experts_TLK.dtype == np.uint16
    assert trace.experts_TLK.tolist() == [[[299, 0]]]


def test_arrays_are_read_only() -> None:
    """A trace cannot be changed through its arrays."""
    trace = make_trace(sequence_T=np.zeros(3, dtype=np.int32))
    assert trace.sequence_T is not None
    assert not trace.experts_TLK.flags.writeable
    assert not trace.sequence_T.flags.writeable


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_TLK": np.zeros((0, 2, 2), np.uint8)}, r"empty: \(0, 2, 2\)"),
        ({"experts_TLK": np.zeros((3, 2), np.uint8)}, r"shape \(3, 2\), not \[tokens, layers, k\]"),
        ({"experts_TLK": np.array(EXPERTS_TLK, float)}, "float64 values, not integers"),
        ({"experts_TLK": np.full((3, 2, 2), np.nan)}, "float64 values, not integers"),
        ({"experts_TLK": np.array(EXPERTS_TLK, object)}, "object values, not integers"),
        ({"experts_TLK": np.array([[[0, 1]], [[2, 4]]])}, r"token 1 layer 0 names expert 4, outside 0\.\.3"),
        ({"experts_TLK": np.array([[[0, 1], [-1, 2]]])}, r"token 0 layer 1 names expert -1, outside 0\.\.3"),
        (
            {"experts_TLK": np.array([[[0, 1], [2, 1]], [[0, 1], [3, 3]]])},
            "token 1 layer 1 names expert 3 twice",
        ),
        ({"num_experts": 0}, "0 experts per layer"),
        ({"num_experts": 70_000}, "70000 experts per layer"),
        ({"sequence_T": np.zeros(2, int)}, r"sequence_T has shape \(2,\), the trace 3 tokens"),
        ({"position_T": np.zeros(3)}, "position_T holds float64 values"),
        ({"position_T": np.array([0, -1, 1])}, "token 1 has position_T -1"),
        ({"sequence_T": np.array([0, 2**63, 1], np.uint64)}, f"token 1 has sequence_T {2**63}"),
        ({"rank_T": np.array([0, 0, -2])}, "token 2 has rank_T -2"),
        (
            {"domain_T": np.array([0, 1, 0]), "domain_names": ("code",)},
            r"token 1 has domain_T 1, outside -1\.\.0",
        ),
        ({"domain_names": ("code", "code")}, "two domains have the name 'code'"),
        ({"domain_names": ("a\nb",)}, "control characters"),
        ({"model_name": "\ud800"}, "control characters"),
        ({"moe_layer_ids": (1,)}, "names 1 layers, the trace has 2"),
        ({"moe_layer_ids": (2, 1)}, "do not ascend"),
    ],
)
def test_invalid_content_is_refused_on_one_line(changes: dict[str, Any], message: str) -> None:
    """Every inconsistency is an input error that names the place."""
    with pytest.raises(InputError, match=message) as caught:
        make_trace(**changes)
    assert "\n" not in str(caught.value)


def test_repeated_expert_is_found_far_into_a_long_trace() -> None:
    """The check in pieces names the token by its number in the whole trace."""
    experts_TLK = np.tile(np.array([[[0, 1, 2, 3]]], np.uint8), (300_000, 1, 1))
    experts_TLK[287_654, 0] = [0, 3, 2, 3]
    with pytest.raises(InputError, match="token 287654 layer 0 names expert 3 twice"):
        Trace(experts_TLK=experts_TLK, num_experts=4)


def test_digest_depends_on_content_not_on_representation() -> None:
    """Wide, Fortran-ordered or foreign-endian arrays of the same values have the same digest."""
    plain = make_trace(sequence_T=np.arange(3))
    other = make_trace(
        experts_TLK=np.asfortranarray(np.array(EXPERTS_TLK, ">i8")), sequence_T=np.arange(3, dtype=np.uint8)
    )
    assert plain.digest == other.digest
    assert plain.digest.startswith("sha256:")


@pytest.mark.parametrize(
    "changes",
    [
        {"experts_TLK": np.array(EXPERTS_TLK)[:, ::-1]},
        {"num_experts": 5},
        {"sequence_T": np.zeros(3, int)},
        {"position_T": np.zeros(3, int)},
        {"rank_T": np.zeros(3, int)},
        {"domain_names": ("code",)},
        {"domain_names": ("code",), "domain_T": np.zeros(3, int)},
        {"model_name": "m"},
        {"moe_layer_ids": (1, 2)},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_digest_changes_with_every_part(changes: dict[str, Any]) -> None:
    """No part of the content is left out of the digest."""
    assert make_trace(**changes).digest != make_trace().digest


def test_domains_of_no_token_are_no_domains() -> None:
    """A trace whose tokens all lack a domain equals one without domains."""
    unknown_T = np.full(3, UNKNOWN_DOMAIN)
    assert make_trace(domain_T=unknown_T, domain_names=("code",)).domain_T is None


@pytest.mark.parametrize(
    ("index", "expected"),
    [([2, 0], [2, 0]), (np.array([False, True, True]), [1, 2]), (slice(1, None), [1, 2])],
)
def test_selected_tokens_keep_all_their_fields(index: Any, expected: list[int]) -> None:
    """Numbers, masks and slices select the same token of every array."""
    trace = make_trace(rank_T=np.array([5, 6, 7]), domain_T=np.array([0, 1, 0]), domain_names=("a", "b"))
    chosen = trace.select_tokens(index)
    assert chosen.experts_TLK.tolist() == [EXPERTS_TLK[i] for i in expected]
    assert chosen.rank_T is not None
    assert chosen.rank_T.tolist() == [[5, 6, 7][i] for i in expected]
    assert chosen.sequence_T is None
    assert chosen.domain_names == ("a", "b")


@pytest.mark.parametrize("index", [[3], [-1], [], [0.5], [[0]], [True, False]])
def test_tokens_that_are_not_there_cannot_be_selected(index: list[Any]) -> None:
    """Numbers out of range, empty selections and short masks are input errors."""
    with pytest.raises(InputError, match="select"):
        make_trace().select_tokens(index)


def test_alternate_windows_are_split_and_the_rest_is_dropped() -> None:
    """Eleven tokens in windows of two: windows 0, 2, 4 against 1, 3; the last token is in neither."""
    even, odd = counting_trace(11).split_alternate(2)
    assert even.position_T is not None
    assert odd.position_T is not None
    assert even.position_T.tolist() == [0, 1, 4, 5, 8, 9]
    assert odd.position_T.tolist() == [2, 3, 6, 7]


@given(num_tokens=st.integers(2, 60), window_tokens=st.integers(1, 30))
def test_split_parts_hold_every_whole_window_once(num_tokens: int, window_tokens: int) -> None:
    """Both parts together are the whole windows, and differ by at most one window."""
    window_tokens = min(window_tokens, num_tokens // 2)
    trace = counting_trace(num_tokens)
    even, odd = trace.split_alternate(window_tokens)
    whole = trace.count_windows(window_tokens) * window_tokens
    both = np.concatenate([even.position_T, odd.position_T])
    assert sorted(both.tolist()) == list(range(whole))
    assert even.num_tokens - odd.num_tokens in (0, window_tokens)


@pytest.mark.parametrize("window_tokens", [0, -1, 4])
def test_windows_that_do_not_fit_are_refused(window_tokens: int) -> None:
    """No window, or one longer than the trace, is an input error."""
    with pytest.raises(InputError, match=f"window of {window_tokens}"):
        make_trace().count_windows(window_tokens)


def test_a_single_window_cannot_be_split() -> None:
    """The message says which window would do."""
    with pytest.raises(InputError, match=r"3 tokens, less than two windows of 2 .* at most 1 tokens"):
        make_trace().split_alternate(2)


def test_ranks_are_interleaved_evenly_and_in_order() -> None:
    """Rank 0 recorded four tokens while rank 1 recorded two."""
    trace = counting_trace(6, rank_T=np.array([0, 0, 0, 0, 1, 1]))
    mixed = trace.interleave_ranks()
    assert mixed.rank_T is not None
    assert mixed.position_T is not None
    assert mixed.rank_T.tolist() == [0, 1, 0, 0, 1, 0]
    assert mixed.position_T.tolist() == [0, 4, 1, 2, 5, 3]


@pytest.mark.parametrize("rank_T", [None, np.full(6, 3)])
def test_one_rank_needs_no_interleaving(rank_T: np.ndarray[Any, Any] | None) -> None:
    """Without several ranks the trace stays as it is."""
    trace = counting_trace(6, rank_T=rank_T)
    assert trace.interleave_ranks() is trace


def test_replace_checks_again() -> None:
    """A trace cannot be made invalid afterwards."""
    trace = synthesize(num_tokens=20, num_layers=2, num_experts=8, top_k=2, seed=0)
    with pytest.raises(InputError, match="outside"):
        replace(trace, num_experts=2)


def test_what_was_checked_before_is_taken_as_it_is() -> None:
    """The same trace as the constructor's, read-only; what is no part of a trace is refused."""
    ids = np.array([[[0, 1]], [[2, 3]]], dtype=np.uint8)
    checked = Trace(experts_TLK=ids, num_experts=4, rank_T=np.array([0, 1]), model_name="m")
    trusted = Trace.trusted(experts_TLK=ids, num_experts=4, rank_T=np.array([0, 1]), model_name="m")
    assert trusted.digest == checked.digest
    assert not trusted.experts_TLK.flags.writeable
    with pytest.raises(InputError, match="is empty"):
        Trace.trusted(experts_TLK=ids[:0], num_experts=4)
    with pytest.raises(TypeError, match="a trace has no colour"):
        Trace.trusted(experts_TLK=ids, num_experts=4, colour="red")


def test_parts_of_one_trace_join() -> None:
    """Slices joined are the trace again; parts of other models are refused with what differs."""
    ids = np.arange(12, dtype=np.uint8).reshape(6, 1, 2)
    trace = Trace(experts_TLK=ids, num_experts=12, position_T=np.arange(6))
    parts = [trace.select_tokens(slice(0, 2)), trace.select_tokens(slice(2, 6))]
    assert joined(parts).digest == trace.digest
    with pytest.raises(InputError, match="differ in num_experts: 12 and 13"):
        joined([trace, Trace(experts_TLK=ids, num_experts=13, position_T=np.arange(6))])
    with pytest.raises(InputError, match="some parts of a trace have position_T"):
        joined([trace, Trace(experts_TLK=ids, num_experts=12)])
    with pytest.raises(InputError, match="holds no token"):
        joined([])
