"""Tables of an exchange are those of a plain loop over tokens.

Shape letters: T tokens, K entries of a token, D targets, S slots.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_checks import EXPERTS, random_placement

from placement.problem import ReplicaSplit
from placement.runtime.parallel import route
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.optional import OptionalKernels
from placement.runtime.parallel.route import Counted, Entries, Placed, count_rows, place_rows
from placement.runtime.parallel.slots import LayerSlots
from placement.runtime.parallel.split import split_of

SIZES = st.tuples(st.sampled_from([0, 1, 5, 40]), st.integers(1, 10), st.integers(1, 9))
SEEDS = st.integers(0, 2**31 - 1)


def drawn(sizes: tuple[int, int, int], seed: int, *, dedup: bool) -> Entries:
    """Random slots, some of them none, and targets, some of them without slots."""
    num_tokens, top_k, num_targets = sizes
    generator = torch.Generator().manual_seed(seed)
    target_S = torch.randint(0, num_targets, (2 * num_targets,), generator=generator)
    named_TK = torch.randint(-1, 2 * num_targets, (num_tokens, top_k), generator=generator)
    return Entries(named_TK=named_TK, split=None, target_S=target_S, num_targets=num_targets, dedup=dedup)


def rows_of(entries: Entries) -> list[list[tuple[int, int]]]:
    """Token and k of each row of each target, found one by one."""
    rows: list[list[tuple[int, int]]] = [[] for _ in range(entries.num_targets)]
    for token, slots in enumerate(entries.named_TK.tolist()):
        for k, slot in enumerate(slots):
            here = rows[int(entries.target_S[slot])] if slot >= 0 else []
            if slot >= 0 and not (entries.dedup and any(one == token for one, _k in here)):
                here.append((token, k))
    return rows


def both(entries: Entries, **options: Any) -> tuple[Counted, Placed]:
    """Counts and places."""
    counted = count_rows(entries)
    return counted, place_rows(counted, **options)


def bits(weight: float) -> int:
    """A float32 as an int32."""
    return int(struct.unpack("i", struct.pack("f", weight))[0])


def test_rows_by_hand() -> None:
    """Target 0 has slots 0 and 1, target 1 slot 2: two tokens, the second with an entry of no slot."""
    entries = Entries(
        named_TK=torch.tensor([[2, 0, 1], [1, -1, 0]]),
        split=None,
        target_S=torch.tensor([0, 0, 1]),
        num_targets=2,
        dedup=True,
    )
    weight_TK = torch.tensor([[0.5, 1.0, 2.0], [4.0, 8.0, 16.0]])
    counted, placed = both(entries, message=True, weight_TK=weight_TK)
    assert counted.count.tolist() == [2, 1]
    assert placed.row_TK.tolist() == [[2, 0, -1], [1, -1, -1]]
    assert placed.token_P[:3].tolist() == [0, 1, 0]
    assert placed.entry_P[:3].tolist() == [1, 3, 0]
    assert placed.message_PW is not None
    assert placed.message_PW[:3].tolist() == [
        [-1, 0, 1, bits(0.0), bits(1.0), bits(2.0)],
        [1, -1, 0, bits(4.0), bits(0.0), bits(16.0)],
        [2, -1, -1, bits(0.5), bits(0.0), bits(0.0)],
    ]


@given(sizes=SIZES, seed=SEEDS, dedup=st.booleans())
@settings(max_examples=60, deadline=None)
def test_places_are_a_loop_s(sizes: tuple[int, int, int], seed: int, dedup: bool) -> None:
    """Rows are in order of targets, then of tokens, then of k; the inverse table says the same."""
    entries = drawn(sizes, seed, dedup=dedup)
    rows = rows_of(entries)
    counted, placed = both(entries)
    flat = [row for of_target in rows for row in of_target]
    assert counted.count.tolist() == [len(of_target) for of_target in rows]
    assert placed.token_P[: len(flat)].tolist() == [token for token, _k in flat]
    assert placed.entry_P[: len(flat)].tolist() == [token * sizes[1] + k for token, k in flat]
    row_TK = np.full(entries.named_TK.shape, -1)
    for row, place in enumerate(flat):
        row_TK[place] = row
    np.testing.assert_array_equal(placed.row_TK.numpy(), row_TK)


@given(sizes=SIZES, seed=SEEDS, dedup=st.booleans(), weighed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_messages_are_a_loop_s(sizes: tuple[int, int, int], seed: int, dedup: bool, weighed: bool) -> None:
    """A row's message has the slots of its target alone, each with its weight."""
    entries = drawn(sizes, seed, dedup=dedup)
    weight_TK = torch.rand(entries.named_TK.shape, generator=torch.Generator().manual_seed(seed))
    weighed &= dedup
    _counted, placed = both(entries, message=True, weight_TK=weight_TK if weighed else None)
    expected = []
    for target, rows in enumerate(rows_of(entries)):
        for token, k in rows:
            slots = entries.named_TK[token].tolist()
            here = [slot >= 0 and int(entries.target_S[slot]) == target for slot in slots]
            if not dedup:
                expected.append([slots[k]])
                continue
            wanted = [slot if there else -1 for slot, there in zip(slots, here, strict=True)]
            weights = [
                one if there else 0.0 for one, there in zip(weight_TK[token].tolist(), here, strict=True)
            ]
            expected.append(wanted + ([bits(one) for one in weights] if weighed else []))
    assert placed.message_PW is not None
    assert placed.message_PW[: len(expected)].tolist() == expected


@given(sizes=SIZES, seed=SEEDS, dedup=st.booleans(), word=st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_what_is_told(sizes: tuple[int, int, int], seed: int, dedup: bool, word: int) -> None:
    """Rows, all entries and the word of each target; the places are the same as without."""
    entries = drawn(sizes, seed, dedup=dedup)
    told_D3 = torch.zeros(entries.num_targets, 3, dtype=torch.int64)
    counted = count_rows(entries, told=told_D3, word=word)
    assert counted.count is told_D3
    pairs = rows_of(replace(entries, dedup=False))
    expected = [
        [len(of_target), len(all_of_target), word]
        for of_target, all_of_target in zip(rows_of(entries), pairs, strict=True)
    ]
    assert told_D3.tolist() == expected
    assert torch.equal(place_rows(counted).row_TK, both(entries)[1].row_TK)


@given(rule=st.sampled_from(ReplicaSplit), seed=st.integers(0, 999), dedup=st.booleans())
@settings(max_examples=30, deadline=None)
def test_experts_go_by_their_split(rule: ReplicaSplit, seed: int, dedup: bool) -> None:
    """Experts with a split are placed as the slots that the split gives."""
    slots = LayerSlots.of_layer(random_placement(seed, num_layers=1, num_devices=4), 0)
    mesh = replace(Mesh.single(), rank=3, world_size=4, devices_per_node=2)
    split = split_of(rule, slots, mesh)
    expert_TK = torch.randint(0, EXPERTS, (31, 3), generator=torch.Generator().manual_seed(seed))
    entries = Entries(
        named_TK=expert_TK,
        split=split,
        target_S=slots.tensor("rank_of_slot_S", mesh.device),
        num_targets=4,
        dedup=dedup,
    )
    (counted, placed), (expected, wanted) = (
        both(one, message=True) for one in (entries, replace(entries, named_TK=split(expert_TK), split=None))
    )
    num_rows = int(expected.count.sum())
    assert torch.equal(counted.count, expected.count)
    assert torch.equal(placed.row_TK, wanted.row_TK)
    assert placed.message_PW is not None
    assert wanted.message_PW is not None
    assert torch.equal(placed.message_PW[:num_rows], wanted.message_PW[:num_rows])


def test_narrow_ids_in_a_wider_message() -> None:
    """Slots are taken as they arrive: int32, beside the bits of weights."""
    entries = drawn((5, 3, 4), 1, dedup=True)
    wide_TW = torch.cat([entries.named_TK, torch.full((5, 3), 77)], dim=1).to(torch.int32)
    assert torch.equal(both(replace(entries, named_TK=wide_TW[:, :3]))[1].row_TK, both(entries)[1].row_TK)


@pytest.mark.parametrize("fails", ["count_rows", "place_rows"])
def test_kernels_that_fail_are_replaced(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """Torch gives the same tables, told once in a warning."""
    entries = drawn((40, 4, 3), 2, dedup=True)
    expected_D3 = torch.zeros(3, 3, dtype=torch.int64)
    expected = place_rows(count_rows(entries, told=expected_D3, word=5), message=True)

    def failing(*_: object, **__: object) -> Placed:
        raise RuntimeError("no such kernel")

    def spoiling(entries: Entries, *, told: torch.Tensor, word: int) -> Counted:
        told += 9
        if fails == "count_rows":
            raise RuntimeError("no such kernel")
        return Counted(entries=entries, count=told.copy_(expected_D3), scratch=told)

    kernels = OptionalKernels("placement.runtime.parallel.route_triton", "the routing of tokens")
    module = ModuleType("kernels")
    module.__dict__.update(count_rows=spoiling, place_rows=failing)
    kernels._module, kernels._usable = module, True
    monkeypatch.setattr(route, "_KERNELS", kernels)
    monkeypatch.setattr(route, "_uses_kernels", lambda _entries: kernels.load())
    told_D3 = torch.zeros(3, 3, dtype=torch.int64)
    with pytest.warns(RuntimeWarning, match="routing of tokens.*no such kernel"):
        actual = place_rows(count_rows(entries, told=told_D3, word=5), message=True)
    assert not kernels.load()
    assert torch.equal(told_D3, expected_D3)
    assert torch.equal(actual.row_TK, expected.row_TK)
