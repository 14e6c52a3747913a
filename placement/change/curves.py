"""Objective against moves, layer by layer, where layers are independent.

Every layer is searched from the start while the price of a move falls, and, where a placement to steer
towards is given, from there while the price rises. The archives of both, deepened around the prices that
matter, are the layer's curve; a knapsack then shares any budget between layers.

Shape letters: L layers, E experts, I items, S slots, D devices, M numbers of moves, W scenarios.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from placement.change.divide import BudgetTable
from placement.change.relabel import items_on_slots, layer_on_slots
from placement.cost import CostModel
from placement.cost.layers import Scenarios, make_layer, make_scenarios
from placement.plan import EMPTY, Placement
from placement.problem import Objective, Risk
from placement.solvers.search import WORK_PER_SECOND, scenario_plan
from placement.stopping import StoppingCriterion

if TYPE_CHECKING:
    from placement.cost.layer_kernels import Layer

__all__ = ["LayerCurves", "scenario_weights", "tail_weights"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Control = npt.NDArray[np.int64]
Archive = tuple[FloatArray, npt.NDArray[np.int16], npt.NDArray[np.int16]]

POLL_S = 0.02

STOP, WORK, LIMIT = 0, 1, 2
"""Elements of the compiled loops' control: as in `kernels`, which is loaded late."""

FALL_SHARE, RISE_SHARE = 0.5, 0.7
"""Shares of the effort by which the way from the start, then the way back, must have ended."""

LEAST_PRICE, LOWEST_RISE = 1e-5, 1e-4
"""First price to explore with at least, and first one to rise from, as shares of the layer's objective."""

CALL_WORK = 32_000
"""Work of handing a layer to the compiled loops, 80 microseconds: on tiny layers more than they do there."""

PATIENCE = 200
"""Falls in a row that find nothing better after which a layer is taken for searched."""

FEW_SCENARIOS = 4
"""Up to so many scenarios nothing is known of how loads vary: states are archived by the objective itself."""


class LayerCurves:
    """The curves of all layers.

    Parameters
    ----------
    model
        Cost model of the problem; its layers must be independent.
    start
        Where moves are counted from.
    most_moves
        Largest budget over all layers that will be asked for.
    seed, stop, threads
        As in a solve.
    work_s
        Effort in seconds of one thread.
    prefer
        A placement to steer towards as well.
    weight_W
        Weight of each window; equal by default.
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
        self.problem = model.problem
        self.model = model
        self.start = start
        self.prefer = prefer
        self.seed, self.stop, self.threads = seed, stop, threads
        self.cap = min(most_moves, self.problem.num_slots)
        self.work_per_layer = work_s * WORK_PER_SECOND / self.problem.num_layers
        self.plan = scenario_plan(self.problem, self.work_per_layer)
        self.scenarios = make_scenarios(self.problem.profile, self.plan)
        self.weight_W = scenario_weights(weight_W, self.scenarios)
        shape = (self.problem.num_layers, self.cap + 1)
        self.value_LM = np.full(shape, np.inf)
        self.expert_LMI = np.full((*shape, self.problem.num_slots), EMPTY, dtype=np.int16)
        self.device_LMI = np.zeros((*shape, self.problem.num_slots), dtype=np.int16)
        self.controls = [np.zeros(3, dtype=np.int64) for _ in range(self.problem.num_layers)]

    def search(self) -> None:
        """Find the curves: the way from the start, and the way back from the preferred placement."""
        self._each_layer(self._walk_layer)

    def deepen(self, budget: int) -> None:
        """Spend what is left of the effort near the price of a move at a budget."""
        price, moves_L = self._price_at(budget), self.table(budget).moves_L(budget)
        self._each_layer(partial(self._explore_layer, price=price, moves_L=moves_L))

    def within(self, budget: int) -> Placement:
        """Return the best placement of the curves within a budget, on the problem's slots."""
        moves_L = BudgetTable(self.value_LM, budget).moves_L(budget)
        return self.placement(moves_L)

    def table(self, budget: int) -> BudgetTable:
        """Return the knapsack's table up to a budget."""
        return BudgetTable(self.value_LM, budget)

    def placement(self, moves_L: IntArray) -> Placement:
        """Return the placement that gives each layer so many moves."""
        rows = [
            layer_on_slots(
                self.expert_LMI[layer, moves].astype(np.int64),
                self.device_LMI[layer, moves].astype(np.int64),
                self.problem.device_of_slot_S,
                self.start,
                layer,
            )
            for layer, moves in enumerate(moves_L)
        ]
        return Placement(
            physical_to_logical_map_LS=np.stack(rows),
            device_of_slot_S=self.problem.device_of_slot_S,
            num_experts=self.problem.num_experts,
            num_devices=self.problem.num_devices,
        )

    def _price_at(self, budget: int) -> float:
        """Return what one more move would win at a budget; 0 where it would win nothing."""
        table = BudgetTable(self.value_LM, self.value_LM.shape[0] * self.cap)
        at = min(budget, table.total_B.size - 1)
        near = max(1, at // 10)
        low, high = max(0, at - near), min(table.total_B.size - 1, at + near)
        return float((table.total_B[low] - table.total_B[high]) / max(high - low, 1))

    def _make_layers(self, layer: int) -> tuple[Layer, Layer]:
        """Compiled layer to search, and the one to archive by."""
        spare = self.problem.num_slots - self.problem.num_experts
        options: dict[str, Any] = {
            "max_replicas": min(self.problem.num_devices, 1 + spare),
            "weight_W": self.weight_W,
        }
        searched = make_layer(self.model, layer, self.scenarios, **options)
        if self.scenarios.num_scenarios > FEW_SCENARIOS:
            return searched, searched
        sharp = replace(self.scenarios, plan=replace(self.plan, soft=False))
        return searched, make_layer(self.model, layer, sharp, **options)

    def _walk_layer(self, layer: int, control: Control) -> None:
        """Archive the start, fall from it to a price of nothing, and rise from the preferred placement."""
        layers = self._make_layers(layer)
        archive = self._archive(layer)
        self._fall(layer, layers, control, archive, share=FALL_SHARE, attempt=0)
        if self.prefer is not None:
            self._rise(layer, layers, control, archive)
        self._keep(layer, archive)

    def _fall(
        self,
        layer: int,
        layers: tuple[Layer, Layer],
        control: Control,
        archive: Archive,
        *,
        share: float,
        attempt: int,
    ) -> None:
        from placement.change.kernels import NOT_MET, fall_layer

        control[LIMIT] = int(share * self.work_per_layer)
        items = items_on_slots(self.problem, self.start, layer)
        seed = self._seed(layer, attempt)
        fall_layer(*layers, *items, self._home_ED(layer), NOT_MET, 0.0, self.cap, seed, control, *archive)
        control[WORK] += CALL_WORK

    def _rise(self, layer: int, layers: tuple[Layer, Layer], control: Control, archive: Archive) -> None:
        from placement.change.kernels import rise_layer

        assert self.prefer is not None
        control[LIMIT] = int(RISE_SHARE * self.work_per_layer)
        items = items_on_slots(self.problem, self.prefer, layer)
        lowest = LOWEST_RISE * abs(float(archive[0].min()))
        seed = self._seed(layer, 0)
        rise_layer(*layers, *items, self._home_ED(layer), lowest, self.cap, seed, control, *archive)

    def _explore_layer(self, layer: int, control: Control, *, price: float, moves_L: IntArray) -> None:
        """Fall anew in other orders for half of the effort left, then undo and spend moves about a budget."""
        from placement.change.kernels import explore_layer

        layers = self._make_layers(layer)
        archive = self._archive(layer)
        attempt, half, idle = 1, (control[WORK] + self.work_per_layer) / 2, 0
        while control[STOP] == 0 and control[WORK] < half and idle < PATIENCE:
            before_M = archive[0].copy()
            self._fall(layer, layers, control, archive, share=1.0, attempt=attempt)
            idle = 0 if (archive[0] < before_M).any() else idle + 1
            attempt += 1
        # Where one more move wins nothing, nearly any price will do.
        price = max(price, LEAST_PRICE * abs(float(archive[0].min())))
        if price > 0:
            # As much again as the falls took, which is all that is left unless they ran out of finds.
            control[LIMIT] = int(min(self.work_per_layer, 2 * control[WORK]))
            centre, seed = int(moves_L[layer]), self._seed(layer, attempt)
            explore_layer(*layers, self._home_ED(layer), centre, price, seed, control, *archive)
        self._keep(layer, archive)

    def _home_ED(self, layer: int) -> npt.NDArray[np.int8]:
        """Whether the start has each expert on each device."""
        return np.ascontiguousarray(self.start.count_LED[layer])

    def _archive(self, layer: int) -> Archive:
        """Return the archive of a layer in the form of the compiled loops, which know no infinity."""
        from placement.change.kernels import NOT_MET

        value_M = np.minimum(self.value_LM[layer], NOT_MET)
        return value_M, self.expert_LMI[layer], self.device_LMI[layer]

    def _keep(self, layer: int, archive: Archive) -> None:
        from placement.change.kernels import NOT_MET

        value_M = archive[0]
        self.value_LM[layer] = np.where(value_M < NOT_MET, value_M, np.inf)

    def _seed(self, layer: int, attempt: int) -> int:
        return int(np.random.SeedSequence([self.seed, layer, attempt]).generate_state(1)[0])

    def _each_layer(self, work: Callable[[int, Control], None]) -> None:
        """Run a function for every layer on the threads allowed, passing the stop criterion on."""
        with ThreadPoolExecutor(self.threads) as pool:
            waiting = {pool.submit(work, layer, control) for layer, control in enumerate(self.controls)}
            try:
                while waiting:
                    done, waiting = wait(waiting, timeout=POLL_S)
                    for future in done:
                        future.result()
                    if self.stop():
                        self._stop_all()
            except BaseException:
                # Leave no thread computing for a solve that is over.
                self._stop_all()
                raise

    def _stop_all(self) -> None:
        for control in self.controls:
            control[STOP] = 1


def scenario_weights(weight_W: FloatArray | None, scenarios: Scenarios) -> FloatArray | None:
    """Return the weight of each scenario, that of the window in its middle; None for equal weights."""
    if weight_W is None:
        return None
    mix_WM = scenarios.mix_WM
    pieces = scenarios.scale_P.size // weight_W.size
    return np.asarray(weight_W[mix_WM[:, mix_WM.shape[1] // 2] // pieces])


def tail_weights(model: CostModel, placement: Placement) -> FloatArray | None:
    """Weight of each window for a tail risk: half on all, half on the costliest tenth; None for the mean."""
    problem = model.problem
    if problem.risk is Risk.MEAN:
        return None
    breakdown = model.evaluate(placement)
    cost_W = breakdown.step_W
    if problem.objective is Objective.BALANCE:
        cost_W = breakdown.balance_WL.mean(axis=1)
    tail_W = np.zeros(cost_W.size)
    tail_W[np.argsort(-cost_W, kind="stable")[: max(1, cost_W.size // 10)]] = 1.0
    return np.asarray(0.5 / tail_W.size + 0.5 * tail_W / tail_W.sum())
