"""Tokens use the replicas that the cost model says they use."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_checks import EXPERTS, random_placement

from placement.cost.split import HASH_MULTIPLIER
from placement.problem import ReplicaSplit
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.slots import LayerSlots
from placement.runtime.parallel.split import split_of

DEVICES = 4


def mesh_of(rank: int) -> Mesh:
    """Two nodes of two devices, seen by a rank."""
    return replace(Mesh.single(), rank=rank, world_size=DEVICES, devices_per_node=2)


def chosen(
    rule: ReplicaSplit, seed: int, rank: int, **options: object
) -> tuple[LayerSlots, np.ndarray, np.ndarray]:
    """Tables, experts and slots of some tokens, ``[tokens, 2]``."""
    slots = LayerSlots.of_layer(random_placement(seed, num_layers=1, num_devices=DEVICES), 0)
    expert_TK = torch.randint(0, EXPERTS, (64, 2), generator=torch.Generator().manual_seed(seed))
    split = split_of(rule, slots, mesh_of(rank), **options)  # type: ignore[arg-type]
    return slots, expert_TK.numpy(), split(expert_TK).numpy()


@settings(max_examples=40, deadline=None)
@given(rule=st.sampled_from(ReplicaSplit), seed=st.integers(0, 999), rank=st.integers(0, DEVICES - 1))
def test_slots_hold_the_expert(rule: ReplicaSplit, seed: int, rank: int) -> None:
    """Whatever the rule, a token goes to one of its expert's replicas."""
    share_EX = None
    if rule is ReplicaSplit.LP:
        slots = LayerSlots.of_layer(random_placement(seed, num_layers=1, num_devices=DEVICES), 0)
        real_EX = np.arange(slots.slot_EX.shape[1]) < slots.replicas_E[:, None]
        share_EX = np.random.default_rng(seed).random(real_EX.shape) * real_EX + 1e-9 * real_EX
    slots, expert_TK, slot_TK = chosen(rule, seed, rank, share_EX=share_EX)
    assert (slots.expert_S[slot_TK] == expert_TK).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), rank=st.integers(0, DEVICES - 1))
def test_hash_is_vllm_s(seed: int, rank: int) -> None:
    """Replica ``h mod r`` by slot, with Knuth's hash of the token's place."""
    slots, expert_TK, slot_TK = chosen(ReplicaSplit.HASH, seed, rank)
    hash_T1 = (np.arange(len(expert_TK)) * HASH_MULTIPLIER % 2**32)[:, None]
    np.testing.assert_array_equal(slot_TK, slots.slot_EX[expert_TK, hash_T1 % slots.replicas_E[expert_TK]])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), rank=st.integers(0, DEVICES - 1))
def test_nearest_prefers_rank_then_node(seed: int, rank: int) -> None:
    """The replica here, else ``rank mod number`` of those on the node, else of all."""
    slots, expert_TK, slot_TK = chosen(ReplicaSplit.NEAREST, seed, rank)
    for expert, slot in zip(expert_TK.ravel(), slot_TK.ravel(), strict=True):
        held = np.flatnonzero(slots.expert_S == expert)
        ranks = slots.rank_of_slot_S[held]
        near = held[ranks // 2 == rank // 2] if (ranks // 2 == rank // 2).any() else held
        near = held[ranks == rank] if (ranks == rank).any() else near
        assert slot == near[rank % near.size]


@pytest.mark.parametrize("rank", range(DEVICES))
def test_even_takes_turns(rank: int) -> None:
    """Replicas of an expert get equally many of the tokens that all want it."""
    slots = LayerSlots.of_layer(random_placement(5, num_layers=1, num_devices=DEVICES), 0)
    split = split_of(ReplicaSplit.EVEN, slots, mesh_of(rank))
    for expert in range(EXPERTS):
        slot_T = split(torch.full((60, 1), expert)).flatten()
        counts = torch.bincount(slot_T, minlength=slots.expert_S.size)[slots.expert_S == expert]
        assert counts.max() - counts.min() <= 1


def test_lp_follows_its_shares() -> None:
    """Each replica gets about its share of many tokens."""
    slots = LayerSlots.of_layer(random_placement(5, num_layers=1, num_devices=DEVICES), 0)
    expert = int(np.argmax(slots.replicas_E))
    num_replicas = int(slots.replicas_E[expert])
    assert num_replicas >= 2
    share_EX = np.zeros(slots.slot_EX.shape)
    share_EX[:, 0] = 1.0
    share_EX[expert, :2] = 0.25, 0.75
    split = split_of(ReplicaSplit.LP, slots, mesh_of(0), share_EX=share_EX)
    slot_T = split(torch.full((20_000, 1), expert)).flatten().numpy()
    counts = np.bincount(slot_T, minlength=slots.expert_S.size)[slots.slot_EX[expert, :num_replicas]]
    np.testing.assert_allclose(counts / 20_000, share_EX[expert, :num_replicas], atol=0.02)
