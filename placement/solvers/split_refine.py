"""Refines a placement for the replica split that the engine realises, layer by layer.

`search` prices replicas as shared evenly. What an engine does instead changes which replicas are worth their
slots: under ``hash`` replica r of two experts serves the same tokens, so experts that fire together want
their replicas in the same order on the same devices; under ``nearest`` a replica serves its own device's
tokens; under ``lp`` a second copy anywhere off the fullest devices relieves them. So the placement of the
even search is improved by swaps of two slots and by giving a spare slot to another expert, each priced under
the split itself (`SplitPrice`), the first improvement taken. Under ``lp`` the spare slots are tried in order
of the linear programme's prices: an expert of which all replicas sit on fullest devices gains from a copy
elsewhere, by its load in the windows where this is so.

Layers are priced on a sample of the tokens; a layer's new contents are kept only if the cost model, on all
tokens, finds the objective lower. Stay-put layers are coupled, and are priced by whole evaluations.

Shape letters: W windows, L layers, E experts, S slots, D devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from placement.cost import CostModel
from placement.errors import InputError
from placement.plan import EMPTY, Placement
from placement.problem import Objective, PlacementProblem, ReplicaSplit, Semantics
from placement.profile import RoutingProfile
from placement.solvers.greedy import greedy_placement
from placement.solvers.protocol import SolveRequest
from placement.solvers.split_price import Priced, SplitPrice, layer_costs, sample_tokens

__all__ = ["SplitRefineSolver", "relief"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

WORK_PER_SECOND = 4.0e7
"""Token visits that one thread of a current server makes in a second (measured, rounded down)."""

DEFAULT_WORK_S = 10.0
"""Effort when none is asked for, in seconds of one thread."""

STAGES = ((4_096, 0.6), (16_384, 0.4))
"""Tokens that a layer is priced on, and the share of its effort: first roughly and often, then closely."""

MOST_FAILURES = 8
"""Kicked descents without improvement after which a layer is left."""

KICK_TRIALS = 50
"""Moves tried for a kick before it is given up."""

LEAST_GAIN = 1e-9
"""Relative gain below which a move is rounding."""

TIGHT = 1e-6
"""A device within this of the fullest one, relatively, is among the fullest."""


@dataclass(frozen=True, slots=True)
class _Move:
    """New contents of one or two slots: ``(slot, expert)`` each."""

    contents: tuple[tuple[int, int], ...]

    def apply(self, row_S: IntArray) -> IntArray:
        after_S = row_S.copy()
        for slot, expert in self.contents:
            after_S[slot] = expert
        return after_S


class SplitRefineSolver:
    """Local search under the realised replica split."""

    name = "split"

    def solve(self, request: SolveRequest) -> Placement:
        """Return the start, or the greedy placement, improved under the problem's replica split.

        Raises
        ------
        InputError
            If the problem's split is even: that is what ``search`` optimises.
        """
        if request.problem.replica_split is ReplicaSplit.EVEN:
            raise InputError(
                "solver split refines placements for --replica-split nearest, hash or lp; for the even split "
                "use search"
            )
        start = greedy_placement(request.problem) if request.start is None else request.start
        request.problem.check_placement(start)
        request.problem.check_capacity(start)
        found = _Refinement(request, start).run()
        # Where slots are in another order, so are the replicas: laying the start out anew may have cost more.
        return min(found, start, key=partial(_rank_of, request.model))


class _Refinement:
    """One solve: the best rows so far and the costs of all layers."""

    def __init__(self, request: SolveRequest, start: Placement) -> None:
        self.request = request
        self.problem = request.problem
        self.placement = _on_slots(start, self.problem)
        work_s = DEFAULT_WORK_S if request.work_s is None else request.work_s
        self.work_per_layer = work_s * WORK_PER_SECOND / self.problem.num_layers

    def run(self) -> Placement:
        """Refine every layer in turn."""
        self.request.report(self.placement)
        if self.problem.semantics is Semantics.STAY_PUT and self.problem.objective is not Objective.BALANCE:
            self._refine_coupled()
            return self.placement
        self.cost_WL = layer_costs(self.request.model, self.placement)
        for profile, share in self._samples():
            for layer in range(self.problem.num_layers):
                if self.request.stop():
                    return self.placement
                price = SplitPrice(self.problem.one_layer(layer, profile=profile), partial(self._goal, layer))
                price.work_left = share * self.work_per_layer
                self._keep(layer, self._improve(price, layer))
        return self.placement

    def _samples(self) -> list[tuple[RoutingProfile, float]]:
        """Return samples of the tokens and each one's share of the effort; one where few tokens are all."""
        profile = self.problem.profile
        if profile.num_sampled_tokens <= STAGES[0][0]:
            return [(profile, 1.0)]
        return [(sample_tokens(profile, most, self.request.seed), share) for most, share in STAGES]

    def _goal(self, layer: int, cost_W: FloatArray) -> float:
        """Return the objective if a layer costs `cost_W` in the windows."""
        cost_WL = self.cost_WL.copy()
        cost_WL[:, layer] = cost_W
        if self.problem.objective is Objective.STEP_TIME:
            return self.problem.risk.summarise(cost_WL.sum(axis=1))
        return self.problem.risk.summarise(cost_WL.ravel())

    def _improve(self, price: SplitPrice, layer: int) -> IntArray:
        """Climb down from the incumbent, then from kicked incumbents, as long as the effort lasts."""
        rng = np.random.default_rng([self.request.seed, layer])
        best = self._descend(price, price.price(self.placement.physical_to_logical_map_LS[layer]), rng)
        failures = 0
        while failures < MOST_FAILURES and not self._over(price):
            found = self._descend(price, self._kicked(price, best, rng, kicks=2 + failures % 3), rng)
            better = _better(found.rank, best.rank)
            best, failures = (found, 0) if better else (best, failures + 1)
        return best.row_S

    def _over(self, price: SplitPrice) -> bool:
        return price.work_left < 0 or self.request.stop()

    def _descend(self, price: SplitPrice, start: Priced, rng: np.random.Generator) -> Priced:
        """Take improving moves until none is left."""
        best, improved = start, True
        while improved:
            improved = False
            for move in self._moves(best, price, rng):
                if self._over(price):
                    return best
                if not self._allowed(best.row_S, move):
                    continue
                found = self._moved(price, best, move)
                if _better(found.rank, best.rank):
                    best, improved = found, True
        return best

    def _moved(self, price: SplitPrice, before: Priced, move: _Move) -> Priced:
        touched = {expert for slot, new in move.contents for expert in (int(before.row_S[slot]), new)}
        experts = np.array(sorted(touched - {EMPTY}), dtype=np.int64)
        return price.change(before, move.apply(before.row_S), experts)

    def _kicked(self, price: SplitPrice, best: Priced, rng: np.random.Generator, *, kicks: int) -> Priced:
        """Make some moves whatever they cost, one in two of them a swap."""
        for _ in range(kicks):
            fills, swaps = self._fills(best.row_S), _swaps(best.row_S)
            moves = fills if fills and rng.random() < 0.5 else swaps
            for index in rng.permutation(len(moves))[:KICK_TRIALS]:
                if self._allowed(best.row_S, moves[index]):
                    best = self._moved(price, best, moves[index])
                    break
        return best

    def _fills(self, row_S: IntArray) -> list[_Move]:
        """Every expert, or none, into every slot that is empty or holds a second replica."""
        spare = np.nonzero(_is_spare(row_S, self.problem.num_experts))[0]
        contents = range(EMPTY, self.problem.num_experts)
        return [_Move(((int(slot), expert),)) for slot in spare for expert in contents]

    def _moves(self, best: Priced, price: SplitPrice, rng: np.random.Generator) -> Iterator[_Move]:
        """Yield moves, those of spare slots first, in random order or (lp) by price."""
        row_S = best.row_S
        fills, swaps = self._fills(row_S), _swaps(row_S)
        order = rng.permutation(len(fills))
        if self.problem.replica_split is ReplicaSplit.LP and fills:
            # One column more: emptying a slot, which is number -1, relieves nothing.
            gain_ED = np.vstack([relief(price.load_WE, best), np.zeros(self.problem.num_devices)])
            slots, experts = np.array([move.contents[0] for move in fills]).T
            order = np.argsort(-gain_ED[experts, self.problem.device_of_slot_S[slots]], kind="stable")
        for index in order:
            yield fills[index]
        spare_S = _is_spare(row_S, self.problem.num_experts)
        order = rng.permutation(len(swaps))
        # Swaps that move a replica first: they are what the even search mispriced.
        moves_spare = np.array(
            [any(spare_S[slot] for slot, _ in swap.contents) for swap in swaps], dtype=bool
        )
        for index in order[np.argsort(~moves_spare[order], kind="stable")]:
            yield swaps[index]

    def _allowed(self, row_S: IntArray, move: _Move) -> bool:
        """Return whether a move changes something, keeps every expert, and puts none twice on a device."""
        device_S = self.problem.device_of_slot_S
        if len(move.contents) == 2:
            (a, new_a), (b, new_b) = move.contents
            stale = new_a != row_S[b] or new_b != row_S[a]
            if stale or device_S[a] == device_S[b] or new_a == new_b:
                return False
        else:
            ((slot, new),) = move.contents
            gone = row_S[slot]
            if gone == new or (gone != EMPTY and np.count_nonzero(row_S == gone) < 2):
                return False
        return all(
            new == EMPTY or not (row_S[device_S == device_S[slot]] == new).any()
            for slot, new in move.contents
        )

    def _keep(self, layer: int, row_S: IntArray) -> None:
        """Keep a layer's new contents if the cost model finds them better on all tokens."""
        before_S = self.placement.physical_to_logical_map_LS[layer]
        if np.array_equal(row_S, before_S):
            return
        alone = self.problem.one_layer(layer)
        price = SplitPrice(alone, partial(self._goal, layer))
        after = price.placement(row_S)
        cost_W = layer_costs(price.model, after)[:, 0]
        rank = self._exact_rank(price, layer, row_S, cost_W)
        if _better(rank, self._exact_rank(price, layer, before_S, self.cost_WL[:, layer])):
            self.cost_WL[:, layer] = cost_W
            self.placement = self._with_row(layer, row_S)

    def _exact_rank(
        self, price: SplitPrice, layer: int, row_S: IntArray, cost_W: FloatArray
    ) -> tuple[float, float]:
        if self.problem.objective is Objective.TRAFFIC:
            return price.price(row_S).rank
        return 0.0, self._goal(layer, cost_W)

    def _with_row(self, layer: int, row_S: IntArray) -> Placement:
        rows_LS = self.placement.physical_to_logical_map_LS.copy()
        rows_LS[layer] = row_S
        return self.placement.with_layers(rows_LS)

    def _refine_coupled(self) -> None:
        """Take improving moves of coupled layers, each priced by a whole evaluation."""
        model = self.request.model
        size = max(1, self.problem.profile.num_sampled_tokens) * self.problem.profile.top_k
        evaluations = max(1, int(self.work_per_layer / (size * self.problem.num_layers)))
        best = _rank_of(model, self.placement)
        for layer in range(self.problem.num_layers):
            rng = np.random.default_rng([self.request.seed, layer])
            price = SplitPrice(self.problem.one_layer(layer), _no_goal)
            row_S = self.placement.physical_to_logical_map_LS[layer]
            left = evaluations
            for move in self._moves(price.price(row_S), price, rng):
                if left == 0 or self.request.stop():
                    break
                row_S = self.placement.physical_to_logical_map_LS[layer]
                if not self._allowed(row_S, move):
                    continue
                left -= 1
                candidate = self._with_row(layer, move.apply(row_S))
                rank = _rank_of(model, candidate)
                if _better(rank, best):
                    best, self.placement = rank, candidate


def _is_spare(row_S: IntArray, num_experts: int) -> npt.NDArray[np.bool_]:
    """Slots that may be given away: empty, or holding one of several replicas."""
    replicas_E = np.bincount(row_S[row_S != EMPTY], minlength=num_experts)
    return np.asarray((row_S == EMPTY) | (replicas_E[row_S] > 1))


def _swaps(row_S: IntArray) -> list[_Move]:
    """Every pair of slots, each with the other's contents."""
    first, second = np.triu_indices(row_S.size, k=1)
    pairs = zip(first.tolist(), second.tolist(), strict=True)
    return [_Move(((a, int(row_S[b])), (b, int(row_S[a])))) for a, b in pairs]


def relief(load_WE: FloatArray, priced: Priced) -> FloatArray:
    """Price a copy of each expert on each device under the LP split, ``[experts, devices]``.

    In a window the programme's prices are ``1 / n`` on the n fullest devices and 0 elsewhere. An expert whose
    replicas all sit on priced devices relieves them by a copy on a free one, at first by the price for every
    pair that it moves; at most by its load.
    """
    fullest_WD = priced.load_WD >= priced.load_WD.max(axis=1, keepdims=True) * (1 - TIGHT)
    price_WD = fullest_WD / fullest_WD.sum(axis=1, keepdims=True)
    replica_EX = priced.split.replicas.replica_EX
    padded_WEX = np.where((replica_EX >= 0)[None], price_WD[:, replica_EX], np.inf)
    cheapest_WE = padded_WEX.min(axis=2)
    gain_WED = load_WE[:, :, None] * np.maximum(cheapest_WE[:, :, None] - price_WD[:, None, :], 0.0)
    return np.asarray(gain_WED.mean(axis=0))


def _better(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Return whether one rank beats another by more than rounding."""
    if one[0] != other[0]:
        return one[0] < other[0] - LEAST_GAIN
    return one[1] < other[1] - LEAST_GAIN * abs(other[1])


def _rank_of(model: CostModel, placement: Placement) -> tuple[float, float]:
    breakdown = model.evaluate(placement)
    problem = model.problem
    if problem.objective is not Objective.TRAFFIC:
        return 0.0, breakdown.objective
    excess = breakdown.metrics.worst_layer_balance - problem.max_imbalance * (1 + 1e-9)
    return max(0.0, excess), breakdown.objective


def _no_goal(cost_W: FloatArray) -> float:
    return 0.0


def _on_slots(start: Placement, problem: PlacementProblem) -> Placement:
    """Lay a placement out on the problem's slots, device by device, replicas in the same order of devices."""
    if np.array_equal(start.device_of_slot_S, problem.device_of_slot_S):
        return start
    rows_LS = np.full((problem.num_layers, problem.num_slots), EMPTY, dtype=np.int64)
    for layer, row_S in enumerate(start.physical_to_logical_map_LS):
        for device in range(problem.num_devices):
            slots = np.nonzero(problem.device_of_slot_S == device)[0]
            held = row_S[(start.device_of_slot_S == device) & (row_S != EMPTY)]
            rows_LS[layer, slots[: held.size]] = held
    return Placement(
        physical_to_logical_map_LS=rows_LS,
        device_of_slot_S=problem.device_of_slot_S,
        num_experts=problem.num_experts,
        num_devices=problem.num_devices,
    )
