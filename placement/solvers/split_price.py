"""Prices one layer under the engine's replica split, whole or by what a change of some experts changes.

A layer is priced on a sample of the tokens, so that a local search can afford it; `SplitPrice` agrees with
the cost model on the same tokens.

Shape letters: W windows, E experts, X most replicas of one expert, S slots, D devices, T tokens, N tokens
counted, K top-k, J links, G groups of a link.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from placement.cost import CostModel
from placement.cost.breakdown import ratio_to_mean
from placement.cost.split import (
    LayerSplit,
    Replicas,
    device_costs,
    device_loads,
    number_replicas,
)
from placement.plan import Placement
from placement.problem import Objective, PlacementProblem, ReplicaSplit, Semantics
from placement.profile import RoutingProfile

__all__ = ["Priced", "SplitPrice", "layer_costs", "sample_tokens"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

FIXED_WORK = 12_000
"""What a price takes besides counting, in token visits."""

Goal = Callable[[FloatArray], float]
"""Turns a layer's cost in each window into the objective that is to fall."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Priced:
    """Contents of a layer and what they cost.

    Parameters
    ----------
    row_S
        Expert of each slot.
    rank
        By how much the load limit is exceeded, then the objective; smaller is better.
    load_WD
        Realised load of each device.
    split
        How tokens spread.
    volume_JWG, touches_JW
        What groups receive and how many were touched, per sampled token's weight; empty where no exchange
        depends on the placement.
    """

    row_S: IntArray
    rank: tuple[float, float]
    load_WD: FloatArray
    split: LayerSplit
    volume_JWG: FloatArray
    touches_JW: FloatArray


def sample_tokens(profile: RoutingProfile, most: int, seed: int) -> RoutingProfile:
    """Return a profile with at most `most` of its tokens, drawn evenly from windows and tail.

    Drawn at random: a fixed stride would beat with the hash of the token index.
    """
    if profile.num_sampled_tokens <= most:
        return profile
    assert profile.experts_TLK is not None
    assert profile.window_of_token_T is not None
    rng = np.random.default_rng(seed)
    order = rng.permutation(profile.num_sampled_tokens)
    window_T = profile.window_of_token_T[order]
    # The first token of every window stays, so that none is left without.
    first = np.unique(window_T, return_index=True)[1]
    kept = np.sort(order[np.unique(np.append(first, np.arange(most)))])
    return replace(
        profile,
        experts_TLK=profile.experts_TLK[kept],
        window_of_token_T=profile.window_of_token_T[kept],
        home_T=None if profile.home_T is None else profile.home_T[kept],
    )


def layer_costs(model: CostModel, placement: Placement) -> FloatArray:
    """Cost of each layer in each window, ``[windows, layers]``: fullest / mean, step cost, or fanout."""
    breakdown = model.evaluate(placement)
    if model.problem.objective is Objective.BALANCE:
        return breakdown.balance_WL
    if model.problem.objective is Objective.STEP_TIME:
        return breakdown.experts_WL + breakdown.dispatch_WL + breakdown.combine_WL
    return np.full_like(breakdown.balance_WL, breakdown.objective)


class SplitPrice:
    """Prices the contents of one layer under an uneven replica split.

    Parameters
    ----------
    problem
        A problem of one layer.
    goal
        What the layer's costs in the windows add to.

    Attributes
    ----------
    work_left
        Token visits that the caller allows; counted down.
    """

    def __init__(self, problem: PlacementProblem, goal: Goal) -> None:
        self.problem = problem
        self.goal = goal
        self.model = CostModel(problem)
        self.work_left = float("inf")
        self.constant_W: FloatArray | float = 0.0

    @property
    def num_devices(self) -> int:
        """Devices."""
        return self.problem.num_devices

    @cached_property
    def load_WE(self) -> FloatArray:
        """Token-expert pairs, ``[windows, experts]``."""
        return self.problem.profile.load_WLE[:, 0]

    @cached_property
    def counts_tokens(self) -> bool:
        """Whether the cost depends on which devices single tokens touch."""
        problem = self.problem
        return problem.semantics is Semantics.DISPATCH and problem.objective is not Objective.BALANCE

    @cached_property
    def counts_loads(self) -> bool:
        """Whether the cost follows from device loads alone."""
        problem = self.problem
        return problem.objective is Objective.BALANCE or problem.semantics is Semantics.ALLGATHER

    @cached_property
    def links(self) -> tuple[IntArray, FloatArray]:
        """Groups and entering volumes of what is counted: the model's links, or for traffic the devices."""
        group_JD, enter_JHG = self.model.padded_links
        devices = len(self.model.links)
        if self.problem.objective is Objective.TRAFFIC:
            return group_JD[devices : devices + 1], enter_JHG[devices : devices + 1]
        return group_JD[:devices], enter_JHG[:devices]

    @cached_property
    def experts_TK(self) -> npt.NDArray[np.unsignedinteger]:
        """Experts of the sampled tokens."""
        assert self.problem.profile.experts_TLK is not None
        return np.ascontiguousarray(self.problem.profile.experts_TLK[:, 0])

    @cached_property
    def _token_lists(self) -> tuple[IntArray, IntArray]:
        """Tokens ordered by expert, and where each expert's begin."""
        flat = self.experts_TK.ravel().astype(np.int64)
        order = np.argsort(flat, kind="stable") // self.experts_TK.shape[1]
        return order, np.append(0, np.cumsum(np.bincount(flat, minlength=self.problem.num_experts)))

    def tokens_of(self, experts: IntArray) -> IntArray:
        """Tokens that select any of some experts."""
        order, first = self._token_lists
        selects_T = np.zeros(self.problem.profile.num_sampled_tokens, dtype=np.bool_)
        for expert in experts.tolist():
            selects_T[order[first[expert] : first[expert + 1]]] = True
        return np.nonzero(selects_T)[0]

    def price(self, row_S: IntArray) -> Priced:
        """Price a layer's contents from nothing."""
        if self.problem.semantics is Semantics.ALLGATHER and not np.any(self.constant_W):
            breakdown = self.model.evaluate(self.placement(row_S))
            self.constant_W = (breakdown.dispatch_WL + breakdown.combine_WL)[:, 0]
        split = self._split(row_S)
        shape = (len(self.links[0]), self.problem.profile.num_windows + 1, self.num_devices)
        volume_JWG, touches_JW = np.zeros(shape), np.zeros(shape[:2])
        if self.counts_tokens:
            everyone = np.arange(self.problem.profile.num_sampled_tokens)
            self._count(everyone, 1.0, split, touches_JW, volume_JWG)
        return self._priced(row_S, split, touches_JW, volume_JWG)

    def change(self, before: Priced, row_S: IntArray, experts: IntArray) -> Priced:
        """Price contents that differ from others in the replicas of some experts."""
        if not self.counts_tokens or self.problem.replica_split is ReplicaSplit.LP:
            # Loads alone are cheap, and a linear programme splits every expert anew.
            return self.price(row_S)
        tokens = self.tokens_of(experts)
        split = (
            self._split(row_S) if before.split.hash_T.size == 0 else self._split_again(before, row_S, experts)
        )
        volume_JWG, touches_JW = before.volume_JWG.copy(), before.touches_JW.copy()
        self._count(tokens, -1.0, before.split, touches_JW, volume_JWG)
        self._count(tokens, 1.0, split, touches_JW, volume_JWG)
        return self._priced(row_S, split, touches_JW, volume_JWG)

    def _split(self, row_S: IntArray) -> LayerSplit:
        replicas = self._replicas(row_S)
        if self.problem.replica_split is ReplicaSplit.HASH:
            self.work_left -= self.experts_TK.size
        return self.model.split_rule.layer(0, replicas)

    def _split_again(self, before: Priced, row_S: IntArray, experts: IntArray) -> LayerSplit:
        order, first = self._token_lists
        selecting = {e: order[first[e] : first[e + 1]] for e in experts.tolist()}
        return self.model.split_rule.update(before.split, self._replicas(row_S), selecting)

    def _replicas(self, row_S: IntArray) -> Replicas:
        replicas = number_replicas(row_S, self.problem.device_of_slot_S, self.problem.num_experts)
        self.work_left -= FIXED_WORK + self.load_WE.size * replicas.replica_EX.shape[1]
        return replicas

    def _count(
        self,
        token_N: IntArray,
        sign: float,
        split: LayerSplit,
        touches_JW: FloatArray,
        volume_JWG: FloatArray,
    ) -> None:
        self.work_left -= token_N.size * self.experts_TK.shape[1] * len(touches_JW)
        counted = (*self.links, touches_JW, volume_JWG)
        self.model.add_split_touches(split, 0, counted, token_N=token_N, sign=sign)

    def _priced(
        self, row_S: IntArray, split: LayerSplit, touches_JW: FloatArray, volume_JWG: FloatArray
    ) -> Priced:
        load_WD = device_loads(self.load_WE, split, num_devices=self.num_devices)
        if self.counts_loads or self.counts_tokens:
            rank = self._rank(load_WD, split, touches_JW, volume_JWG)
        else:
            rank = 0.0, self.goal(self._evaluated(row_S))
        return Priced(
            row_S=row_S,
            rank=rank,
            load_WD=load_WD,
            split=split,
            volume_JWG=volume_JWG,
            touches_JW=touches_JW,
        )

    def _evaluated(self, row_S: IntArray) -> FloatArray:
        """Cost in each window by the cost model itself: for exchanges that this class does not count."""
        self.work_left -= (
            4 * FIXED_WORK + self.problem.profile.num_sampled_tokens * self.problem.profile.top_k
        )
        return layer_costs(self.model, self.placement(row_S))[:, 0]

    def placement(self, row_S: IntArray) -> Placement:
        """Return a layer's contents as a placement of the one-layer problem."""
        return Placement(
            physical_to_logical_map_LS=row_S[None],
            device_of_slot_S=self.problem.device_of_slot_S,
            num_experts=self.problem.num_experts,
            num_devices=self.num_devices,
        )

    def _rank(
        self, load_WD: FloatArray, split: LayerSplit, touches_JW: FloatArray, volume_JWG: FloatArray
    ) -> tuple[float, float]:
        problem = self.problem
        if problem.objective is Objective.BALANCE:
            return 0.0, self.goal(ratio_to_mean(load_WD))
        if problem.objective is Objective.TRAFFIC:
            excess = float(ratio_to_mean(load_WD.sum(axis=0))) - problem.max_imbalance * (1 + 1e-9)
            return max(0.0, excess), float(self.model.touches_per_token(touches_JW)[0])
        kinds = problem.topology.kind_of_device_D
        experts_WD = device_costs(self.load_WE, split, self.model.expert_curves, kinds)
        exchange_W = self.model.exchange_cost(volume_JWG) if self.counts_tokens else self.constant_W
        return 0.0, self.goal(experts_WD.max(axis=1) + exchange_W)
