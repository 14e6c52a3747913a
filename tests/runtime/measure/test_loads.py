"""Loads of experts and rows in order: what is measured is what the file will say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from placement.model import preset_model
from placement.runtime.measure.experts import loads, uneven_loads
from placement.runtime.measure.migration import partner_of
from placement.runtime.measure.rows import pairs_in_order
from placement.runtime.measure.shapes import models_named, shape_on_rank
from placement.runtime.measure.sizes import DEFAULT_MODELS, Sizes
from placement.runtime.parallel.rows import combine_rows, expand_rows


def test_even_loads_by_hand() -> None:
    """Of five experts all, half and a quarter have tokens; idle ones lie between the active."""
    found = [load.counts_C for load in loads(5, tokens=(3, 1), shares=(1.0, 0.5, 0.25))]
    assert found == [
        (1, 1, 1, 1, 1),
        (3, 3, 3, 3, 3),
        (1, 0, 1, 0, 0),
        (3, 0, 3, 0, 0),
        (1, 0, 0, 0, 0),
        (3, 0, 0, 0, 0),
    ]


def test_a_single_expert_is_always_active() -> None:
    """Shares of one expert are one expert, once."""
    assert [load.counts_C for load in loads(1, tokens=(2,), shares=(1.0, 0.5, 0.25))] == [(2,)]
    assert uneven_loads(1, tokens=(2,), exponents=(1.0,)) == []


@settings(max_examples=30)
@given(local=st.integers(1, 70), tokens=st.integers(1, 4096), share=st.floats(0.01, 1.0))
def test_even_loads_are_even(local: int, tokens: int, share: float) -> None:
    """As many experts are active as asked for, each with as many tokens."""
    (load,) = loads(local, tokens=(tokens,), shares=(share,))
    assert len(load.counts_C) == local
    assert load.num_active == max(1, round(share * local))
    assert load.num_pairs == load.num_active * tokens


@settings(max_examples=30)
@given(local=st.integers(2, 70), tokens=st.integers(1, 2048), exponent=st.floats(0.1, 2.0))
def test_uneven_loads_keep_their_mean(local: int, tokens: int, exponent: float) -> None:
    """No token is lost to rounding, and no expert has fewer than none."""
    (load,) = uneven_loads(local, tokens=(tokens,), exponents=(exponent,))
    assert load.num_pairs == tokens * local
    assert min(load.counts_C) >= 0


def test_uneven_loads_are_skewed_and_the_same_each_time() -> None:
    """A larger exponent makes the fullest expert fuller; all ranks and runs measure the same loads."""
    mild, strong = uneven_loads(16, tokens=(100,), exponents=(0.5, 1.0))
    assert 100 < max(mild.counts_C) < max(strong.counts_C)
    assert uneven_loads(16, tokens=(100,), exponents=(0.5, 1.0)) == [mild, strong]


@settings(max_examples=30)
@given(data=st.data(), rows=st.integers(1, 12), top_k=st.integers(1, 4), num_keys=st.integers(1, 5))
def test_pairs_are_sorted_by_what_they_go_to(
    data: st.DataObject, rows: int, top_k: int, num_keys: int
) -> None:
    """Keys ascend, tables fit each other, and what is spread and summed again is each row times its pairs."""
    key = st.lists(st.integers(0, num_keys), min_size=top_k, max_size=top_k)
    key_RK = torch.tensor(data.draw(st.lists(key, min_size=rows, max_size=rows)))
    wanted_R = (key_RK < num_keys).sum(dim=1)
    pairs = pairs_in_order(key_RK, num_keys=num_keys, num_pairs=int(wanted_R.sum()))
    at_RK = pairs.pair_RK
    key_P = torch.full((pairs.row_P.shape[0],), -1)
    key_P[at_RK[at_RK >= 0]] = key_RK[at_RK >= 0]
    assert key_P.tolist() == sorted(key_P.tolist())
    assert ((at_RK >= 0) == (key_RK < num_keys)).all()
    x_RH = torch.arange(2.0 * rows).view(rows, 2)
    x_PH = expand_rows(x_RH, pairs.row_P, at_RK)
    assert torch.equal(combine_rows(x_PH, pairs.row_P, at_RK), x_RH * wanted_R.unsqueeze(1))


@given(num_ranks=st.integers(1, 17))
def test_partners_are_each_others(num_ranks: int) -> None:
    """Pairs of neighbours; the last of an odd number has none."""
    partners = [partner_of(rank, num_ranks) for rank in range(num_ranks)]
    assert partners.count(None) == num_ranks % 2
    assert all(partners[partner] == rank for rank, partner in enumerate(partners) if partner is not None)


def test_models_are_measured_once() -> None:
    """Two names of one preset are one model; no name stands for the defaults."""
    assert [model.name for model in models_named(("olmoe", "olmoe-1b-7b", "dsv3"))] == [
        "olmoe-1b-7b",
        "deepseek-v3",
    ]
    assert tuple(model.name for model in models_named(())) == DEFAULT_MODELS


def test_a_rank_measures_its_part_of_the_experts() -> None:
    """64 experts over 3 ranks are 22 at most."""
    shape = shape_on_rank(preset_model("olmoe"), world_size=3, sizes=Sizes(), element_bytes=2)
    assert (shape.hidden_size, shape.expert_hidden_size, shape.local_experts) == (2048, 1024, 22)
    assert shape.params_per_expert == preset_model("olmoe").params_per_expert


def test_experts_are_halved_until_they_fit() -> None:
    """256 experts of 84 MiB: 32 of them fit in 4 GiB, 64 do not."""
    shape = shape_on_rank(preset_model("deepseek-v3"), world_size=1, sizes=Sizes(), element_bytes=2)
    assert shape.local_experts == 32
    assert shape.as_dict()["num_experts"] == 256


def test_experts_that_never_fit_are_one_line() -> None:
    """With what there is and what it takes."""
    sizes = Sizes().within(2**30)
    assert sizes.expert_bytes == 2**28
    with pytest.raises(InputError, match="one expert of mixtral-8x7b takes 336 MiB, more than the 256 MiB"):
        shape_on_rank(preset_model("mixtral-8x7b"), world_size=8, sizes=sizes, element_bytes=2)


def test_sizes_are_kept_where_memory_is_plenty_or_unknown() -> None:
    """Only what would not fit is cut."""
    assert Sizes().within(0) == Sizes()
    assert Sizes().within(2**40) == Sizes()


@pytest.mark.parametrize("sizes_of", [Sizes.for_gpu, Sizes.for_cpu])
def test_quick_measures_less(sizes_of: type[Sizes]) -> None:
    """Fewer points, but the same range of tokens on GPUs."""
    quick, full = sizes_of(quick=True), sizes_of(quick=False)  # type: ignore[call-arg]
    assert len(quick.tokens_per_expert) < len(full.tokens_per_expert)
    assert set(quick.tokens_per_expert) <= set(full.tokens_per_expert)
    assert quick.pace.budget_ms <= full.pace.budget_ms


def test_the_full_range_of_tokens() -> None:
    """From a token for each expert to 4096."""
    for quick in (False, True):
        tokens = Sizes.for_gpu(quick=quick).tokens_per_expert
        assert (tokens[0], tokens[-1]) == (1, 4096)
