"""Placements near a start where every layer's cost depends on its neighbours (stay-put semantics).

The layers are swept in turn with their neighbours fixed, while the price of a move falls from the start, and
rises from a placement to steer towards. What a sweep leaves is priced exactly and remembered by its moves.

Shape letters: L layers, E experts, I items, W windows, T tokens.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from placement.change.curves import scenario_weights
from placement.change.relabel import items_on_slots, layer_on_slots
from placement.cost import CostModel
from placement.cost.layers import Neighbours, make_layer, make_scenarios
from placement.plan import Placement, diff
from placement.problem import Objective
from placement.solvers.search import WORK_PER_SECOND, layer_balance, scenario_plan
from placement.stopping import StoppingCriterion

if TYPE_CHECKING:
    from placement.cost.layer_kernels import Layer

__all__ = ["CoupledPaths"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

POLL_S = 0.02

STOP, WORK, LIMIT = 0, 1, 2
"""Elements of the compiled loops' control: as in `kernels`, which is loaded late."""

NO_MOVES = 1e300
"""A price at which only changes without a move are made; finite, as the compiled loops want it."""

HIGHEST, LOWEST, FALL, RISE = 0.3, 1e-4, 0.6, 1.8
"""Prices of a move, as shares of the costliest layer, and the factors between them."""

SWEEPS = 32
"""Sweeps that share the effort."""

LAST_SWEEPS = 4


@dataclass(frozen=True, slots=True, eq=False)
class _Met:
    """A placement that was met: overload beyond the limit, objective, moves."""

    rank: tuple[float, float]
    moves: int
    placement: Placement


class CoupledPaths:
    """Placements at all distances from a start, by sweeps over coupled layers.

    Parameters
    ----------
    model
        Cost model of the problem.
    start, most_moves, seed, stop, threads, work_s, prefer, weight_W
        As for `placement.change.curves.LayerCurves`; sweeps use one thread.
    """

    def __init__(
        self,
        model: CostModel,
        start: Placement,
        *,
        most_moves: int,
        seed: int,
        stop: StoppingCriterion,
        threads: int,
        work_s: float,
        prefer: Placement | None = None,
        weight_W: FloatArray | None = None,
    ) -> None:
        self.model, self.problem = model, model.problem
        self.start, self.prefer = start, prefer
        self.most_moves, self.seed, self.stop = most_moves, seed, stop
        work = work_s * WORK_PER_SECOND / (self.problem.num_layers * SWEEPS)
        self.work_per_layer = work
        self.scenarios = make_scenarios(self.problem.profile, scenario_plan(self.problem, 4 * work))
        self.weight_W = scenario_weights(weight_W, self.scenarios)
        self.met = [self._meet(start)]
        if prefer is not None:
            self.met.append(self._meet(prefer))
        self.costliest = 0.0
        self.draws = 0

    def search(self) -> None:
        """Sweep from the start at falling prices, then from the preferred placement at rising ones."""
        placement = self._sweep(self.start, NO_MOVES, self.most_moves)
        price = HIGHEST * self.costliest
        while price > LOWEST * self.costliest and not self.stop():
            placement = self._sweep(placement, price, self.most_moves)
            price *= FALL
        self._sweep(placement, 0.0, self.most_moves)
        if self.prefer is None:
            return
        placement, price = self.prefer, LOWEST * self.costliest
        while price < self.costliest and not self.stop():
            placement = self._sweep(placement, price, self.most_moves)
            if not diff(self.start, placement):
                break
            price *= RISE

    def deepen(self, budget: int) -> None:
        """Use up the budget from the best placement within it, whatever a move wins."""
        best = self._best(budget)
        for _ in range(LAST_SWEEPS):
            self._sweep(best.placement, 0.0, budget)
            after = self._best(budget)
            if self.stop() or after.rank >= best.rank:
                break
            best = after

    def within(self, budget: int) -> Placement:
        """Return the best placement met within a budget."""
        return self._best(budget).placement

    def _best(self, budget: int) -> _Met:
        near = [met for met in self.met if met.moves <= budget]
        return min(near, key=lambda met: (met.rank, met.moves))

    def _meet(self, placement: Placement) -> _Met:
        problem = self.problem
        overload = 0.0
        if problem.objective is Objective.TRAFFIC:
            limit = problem.max_imbalance * (1 + 1e-9)
            overload = max(0.0, float(layer_balance(problem, placement).max()) - limit)
        rank = (overload, self.model.objective(placement))
        return _Met(rank, len(diff(self.start, placement)), placement)

    def _sweep(self, placement: Placement, price: float, most_moves: int) -> Placement:
        """Improve every layer in turn at a price of a move, and remember what comes of it."""
        self.draws += 1
        order = range(self.problem.num_layers)
        rows = np.array(self._on_slots(placement))
        moves_L = np.bincount([move.layer for move in diff(self.start, placement)], minlength=len(order))
        for layer in order if self.draws % 2 else reversed(order):
            if self.stop():
                break
            room = most_moves - int(moves_L.sum() - moves_L[layer])
            rows[layer] = self._improve_layer(rows, layer, price, room)
            moves_L[layer] = self._moves_of(rows[layer], layer)
        swept = Placement(
            physical_to_logical_map_LS=rows,
            device_of_slot_S=self.problem.device_of_slot_S,
            num_experts=self.problem.num_experts,
            num_devices=self.problem.num_devices,
        )
        self.met.append(self._meet(swept))
        return swept

    def _on_slots(self, placement: Placement) -> list[IntArray]:
        layers = range(self.problem.num_layers)
        return [items_on_slots(self.problem, placement, layer)[0] for layer in layers]

    def _moves_of(self, row_S: IntArray, layer: int) -> int:
        held = row_S >= 0
        home_ED = self.start.count_LED[layer]
        return int((home_ED[row_S[held], self.problem.device_of_slot_S[held]] == 0).sum())

    def _improve_layer(self, rows: IntArray, layer: int, price: float, room: int) -> IntArray:
        """Descend in one layer with the others fixed; return its row."""
        from placement.change.kernels import fall_layer

        compiled = self._compile(rows, layer)
        slots = self.problem.device_of_slot_S
        control = np.zeros(3, dtype=np.int64)
        control[LIMIT] = int(self.work_per_layer)
        value_M = np.full(1, NO_MOVES)
        nowhere = np.zeros((2, 1, slots.size), dtype=np.int16)
        descend = partial(
            fall_layer,
            compiled,
            compiled,
            rows[layer].copy(),
            np.array(slots),
            np.ascontiguousarray(self.start.count_LED[layer]),
            price,
            price,
            max(room, 0),
            self._seed(layer),
            control,
            value_M,
            nowhere[0],
            nowhere[1],
        )
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(descend)
            while not future.done():
                wait([future], timeout=POLL_S)
                control[STOP] = int(self.stop())
        expert_I, device_I = future.result()
        if value_M[0] < NO_MOVES:
            self.costliest = max(self.costliest, float(value_M[0]))
        return layer_on_slots(expert_I, device_I, slots, self.start, layer)

    def _compile(self, rows: IntArray, layer: int) -> Layer:
        most = int(np.bincount(rows[layer][rows[layer] >= 0]).max())
        neighbours = Neighbours(
            previous_T=self._token_devices(rows, layer - 1), next_T=self._token_devices(rows, layer + 1)
        )
        return make_layer(
            self.model,
            layer,
            self.scenarios,
            max_replicas=most,
            neighbours=neighbours,
            weight_W=self.weight_W,
        )

    def _token_devices(self, rows: IntArray, layer: int) -> IntArray:
        """Device of every sampled token's first expert; its home before layer 0, -1 after the last one."""
        profile = self.problem.profile
        assert profile.experts_TLK is not None
        nowhere = np.full(profile.num_sampled_tokens, -1, dtype=np.int64)
        if layer == -1:
            # Hops count boundaries between layers; the way into the first one costs time alone.
            known = profile.home_T is not None and self.problem.objective is not Objective.TRAFFIC
            return np.asarray(profile.home_T) if known else nowhere
        if layer == rows.shape[0]:
            return nowhere
        held = rows[layer] >= 0
        device_E = np.empty(self.problem.num_experts, dtype=np.int64)
        device_E[rows[layer][held][::-1]] = self.problem.device_of_slot_S[held][::-1]
        return np.asarray(device_E[profile.experts_TLK[:, layer, 0]])

    def _seed(self, layer: int) -> int:
        return int(np.random.SeedSequence([self.seed, layer, self.draws]).generate_state(1)[0])
