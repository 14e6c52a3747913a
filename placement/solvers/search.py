"""Scenario-aware local search of the exact objective, layer by layer.

Each layer is improved by swaps (a device keeps its number of slots), moves into empty slots and re-targeting
of replicas, from several starts: the greedy balance, the balance-only and the traffic-only optimum, and a
given placement. The search prices softened scenarios finer than the windows (`ScenarioPlan`), because what
is fitted to few windows exactly does not hold on others; see the README for what that is worth.

Layers are independent but for stay-put semantics, where they are swept in turn with their neighbours fixed.

Shape letters: W scenarios, L layers, E experts, I items, D devices, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from placement.cost import CostModel
from placement.cost.incremental import layer_row
from placement.cost.layers import Neighbours, ScenarioPlan, make_layer, make_scenarios
from placement.errors import InfeasibleError
from placement.plan import EMPTY, Placement
from placement.problem import Objective, PlacementProblem, Risk, Semantics
from placement.solvers.greedy import greedy_placement
from placement.solvers.protocol import SolveRequest

if TYPE_CHECKING:
    from placement.cost.layer_kernels import Layer

__all__ = ["SearchSolver", "layer_balance", "scenario_plan"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

WORK_PER_SECOND = 4.0e8
"""Scenario updates that one thread of a current server makes in a second (measured, rounded down)."""

LEAST_WORK_S, MOST_WORK_S = 8.0, 60.0
"""Effort when none is asked for, in seconds of one thread: by the size of the problem, within these."""

DEFAULT_SCENARIOS = 64

DESCENT_WORK = 24
"""Scenario updates per pair of items and scenario that one descent takes, about."""

TABLE_BYTES = 256 * 2**20
"""Memory that the swap tables of one layer may take."""

MAX_SEARCH_TOKENS = 65_536
"""Tokens whose expert sets are searched on; loads are counted on all."""

STOP, WORK, LIMIT = 0, 1, 2
"""Elements of the compiled loops' control: as in `search_kernels`, which is loaded late."""

LEVEL_ATTEMPTS = 8

MOST_FAILURES = 32
"""Kicked searches in a row that may come to nothing before a layer is left as it is."""

TABU, TABU_WITH_REPLICAS = 50, 15
"""Swaps of a tabu search. With replicas a swap settles tokens anew, and kicks change what is replicated."""

TENURE = 5
POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _LayerSolution:
    """Contents of one layer: expert and device of each item, and their searched objective."""

    value: float
    expert_I: IntArray
    device_I: IntArray


def default_work_s(problem: PlacementProblem) -> float:
    """Choose the effort by size: some descents over `DEFAULT_SCENARIOS` scenarios, within limits."""
    updates = problem.num_layers * problem.num_slots**2 * DESCENT_WORK * DEFAULT_SCENARIOS
    work_s = float(np.clip(updates / WORK_PER_SECOND, LEAST_WORK_S, MOST_WORK_S))
    if problem.objective is Objective.TRAFFIC:
        # One mixture of all scenarios: what is counted is dearer there than elsewhere.
        work_s *= 0.6
    # Replicas multiply the choices, and every move settles tokens anew.
    return work_s if problem.num_slots == problem.num_experts else 1.5 * work_s


def scenario_plan(problem: PlacementProblem, work_per_layer: float) -> ScenarioPlan:
    """Choose the scenarios to search on: quarters of a window, two overlapping ones each, softened.

    Their number is limited so that the tables of a layer stay within `TABLE_BYTES` and the effort suffices
    for some descents.
    """
    items = problem.num_slots
    tiers = 1 if problem.calibration.flat else problem.topology.num_tiers
    per_scenario = 8 * items * (items + 2 * problem.num_devices) * tiers
    affordable = work_per_layer / (items**2 * DESCENT_WORK)
    most = int(np.clip(min(TABLE_BYTES // per_scenario, affordable), 12, 400))
    pieces = 4
    if problem.profile.num_sampled_tokens == 0 or 2 * problem.profile.num_windows > most:
        pieces = 1
    return ScenarioPlan(
        pieces_per_window=pieces,
        span_pieces=2 if pieces > 1 else 1,
        shrink=0.1,
        soft=True,
        max_tokens=MAX_SEARCH_TOKENS,
        max_scenarios=most,
    )


class SearchSolver:
    """Local search of the exact objective over scenarios."""

    name = "search"

    def solve(self, request: SolveRequest) -> Placement:
        """Return the best placement that the search finds.

        Raises
        ------
        InfeasibleError
            If a load limit cannot be kept, naming the layer and the best that was reached.
        """
        start = greedy_placement(request.problem) if request.start is None else request.start
        request.problem.check_capacity(start)
        run = _Run(request, start)
        coupled = request.problem.layers_are_coupled
        placement = run.sweep_layers() if coupled else run.separate_layers()
        _check_limit(request, placement)
        return placement


def _check_limit(request: SolveRequest, placement: Placement) -> None:
    problem = request.problem
    if problem.objective is not Objective.TRAFFIC:
        return
    balance_L = layer_balance(problem, placement)
    worst = int(balance_L.argmax())
    if balance_L[worst] > problem.max_imbalance * (1 + 1e-9):
        raise InfeasibleError(
            f"layer {worst}: the most even placement found loads its fullest device with "
            f"{balance_L[worst]:.4f} of the mean, "
            f"above --max-imbalance {problem.max_imbalance}; allow "
            f"{np.ceil(balance_L[worst] * 1000) / 1000:.3f} or add spare slots for replicas"
        )


def layer_balance(problem: PlacementProblem, placement: Placement) -> FloatArray:
    """Fullest / mean device of each layer's summed load, ``[layers]``."""
    share_LED = placement.count_LED / placement.replicas_LE[:, :, None]
    load_LD = np.einsum("le,led->ld", problem.profile.load_WLE.sum(axis=0), share_LED)
    return np.asarray(load_LD.max(axis=1) / load_LD.mean(axis=1))


class _Run:
    """One solve: scenarios, control flags and the incumbent of every layer."""

    def __init__(self, request: SolveRequest, start: Placement) -> None:
        self.request = request
        self.problem = request.problem
        spare = self.problem.num_slots - self.problem.num_experts
        self.max_replicas = min(self.problem.num_devices, 1 + spare)
        if self.problem.layers_are_coupled:
            # Where a stay-put token goes depends on where it is: replicas are left to other solvers.
            self.max_replicas = max(1, int(start.replicas_LE.max()))
        work_s = default_work_s(self.problem) if request.work_s is None else request.work_s
        self.work_per_layer = work_s * WORK_PER_SECOND / self.problem.num_layers
        self.plan = scenario_plan(self.problem, self.work_per_layer)
        self.scenarios = make_scenarios(self.problem.profile, self.plan)
        self.weight_W: FloatArray | None = None
        self.start = start
        self.best = [self._items(start, layer) for layer in range(self.problem.num_layers)]
        self.controls = [np.zeros(3, dtype=np.int64) for _ in self.best]

    def _items(self, placement: Placement, layer: int) -> _LayerSolution:
        """Contents of a placement's layer on the problem's slots; nothing priced yet."""
        row_S = np.full(self.problem.num_slots, EMPTY, dtype=np.int64)
        for device in range(self.problem.num_devices):
            slots = np.nonzero(self.problem.device_of_slot_S == device)[0]
            held = placement.physical_to_logical_map_LS[layer, placement.device_of_slot_S == device]
            held = held[held != EMPTY]
            row_S[slots[: held.size]] = held
        return _LayerSolution(value=np.inf, expert_I=row_S, device_I=np.array(self.problem.device_of_slot_S))

    def placement(self) -> Placement:
        """Return the placement that the layers' incumbents form."""
        slots = self.problem.device_of_slot_S
        rows = [layer_row(best.expert_I, best.device_I, slots) for best in self.best]
        return Placement(
            physical_to_logical_map_LS=np.stack(rows),
            device_of_slot_S=slots,
            num_experts=self.problem.num_experts,
            num_devices=self.problem.num_devices,
        )

    def separate_layers(self) -> Placement:
        """Improve independent layers: one descent each, then each as long as its effort lasts."""
        self.request.report(self.placement())
        self._each_layer(self._descend_layer, share=0.6)
        self.request.report(self.placement())
        self._each_layer(self._deepen_layer)
        if self.problem.risk is not Risk.MEAN:
            self._chase_risk()
        return self.placement()

    def _each_layer(
        self, improve: Callable[[int, npt.NDArray[np.int64]], _LayerSolution], *, share: float = 1.0
    ) -> None:
        """Run a function for every layer on the threads allowed, and keep what it returns."""
        for control in self.controls:
            control[LIMIT] = int(share * self.work_per_layer)
        with ThreadPoolExecutor(self.request.threads) as pool:
            futures = {
                pool.submit(partial(improve, layer, self.controls[layer])): layer
                for layer in range(len(self.best))
            }
            for future in self._as_completed(futures):
                self.best[futures[future]] = future.result()

    def _as_completed(self, futures: Iterable[Future[_LayerSolution]]) -> Iterable[Future[_LayerSolution]]:
        """Yield futures as they end, passing the stop criterion on to the compiled loops."""
        waiting = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=POLL_S, return_when=FIRST_COMPLETED)
                if self.request.stop():
                    self._stop_all()
                yield from done
        except BaseException:
            # Leave no thread computing for a solve that is over.
            self._stop_all()
            raise

    def _stop_all(self) -> None:
        for control in self.controls:
            control[STOP] = 1

    def _make_layer(self, layer: int, *, neighbours: Neighbours | None = None) -> Layer:
        return make_layer(
            self.request.model,
            layer,
            self.scenarios,
            max_replicas=self.max_replicas,
            neighbours=neighbours,
            weight_W=self.weight_W,
        )

    def _search(
        self,
        compiled: Layer,
        items: _LayerSolution,
        control: npt.NDArray[np.int64],
        *,
        kicks: int = 0,
        tabu: int = 0,
        seed: int,
    ) -> _LayerSolution:
        from placement.solvers.search_kernels import search_layer

        value, expert_I, device_I = search_layer(
            compiled, items.expert_I, items.device_I, kicks, tabu, TENURE, seed, control
        )
        return _LayerSolution(value=float(value), expert_I=expert_I, device_I=device_I)

    def _seed(self, layer: int, attempt: int) -> int:
        return int(np.random.SeedSequence([self.request.seed, layer, attempt]).generate_state(1)[0])

    def _descend_layer(self, layer: int, control: npt.NDArray[np.int64]) -> _LayerSolution:
        """Descend from every start and keep the best."""
        compiled = self._make_layer(layer)
        found = [
            self._search(compiled, start, control, seed=self._seed(layer, attempt))
            for attempt, start in enumerate(self._starts(layer, control))
        ]
        return min(found, key=partial(self._rank, layer))

    def _rank(self, layer: int, solution: _LayerSolution) -> tuple[float, float]:
        """Order solutions of a layer: by how far they exceed the load limit, then by value."""
        if self.problem.objective is not Objective.TRAFFIC:
            return 0.0, solution.value
        held = solution.expert_I >= 0
        expert_I, device_I = solution.expert_I[held], solution.device_I[held]
        total_E = self.problem.profile.load_WLE[:, layer].sum(axis=0)
        share_I = (total_E / np.bincount(expert_I, minlength=total_E.size))[expert_I]
        load_D = np.bincount(device_I, weights=share_I, minlength=self.problem.num_devices)
        excess = load_D.max() / load_D.mean() - self.problem.max_imbalance * (1 + 1e-9)
        return max(0.0, float(excess)), solution.value

    def _starts(self, layer: int, control: npt.NDArray[np.int64]) -> list[_LayerSolution]:
        """Return the given start and, for step time, the balance-only and traffic-only optima."""
        problem = self.problem
        if problem.objective is Objective.TRAFFIC:
            return [self.best[layer], self._level(layer, control)]
        starts = [self.best[layer]]
        if problem.objective is Objective.STEP_TIME and problem.semantics is Semantics.DISPATCH:
            for objective in (Objective.BALANCE, Objective.TRAFFIC):
                part = CostModel(replace(problem, objective=objective, risk=Risk.MEAN, max_imbalance=1.25))
                compiled = make_layer(part, layer, self.scenarios, max_replicas=self.max_replicas)
                starts.append(
                    self._search(compiled, self.best[layer], control, seed=self._seed(layer, len(starts)))
                )
        return starts

    def _level(self, layer: int, control: npt.NDArray[np.int64]) -> _LayerSolution:
        """Even out a layer's summed load as far as possible: where a load limit is tight, the only way in."""
        even = CostModel(replace(self.problem, objective=Objective.BALANCE))
        whole = make_scenarios(
            self.problem.profile, ScenarioPlan(span_pieces=self.problem.profile.num_windows)
        )
        compiled = make_layer(even, layer, whole, max_replicas=self.max_replicas)
        best = self._search(compiled, self.best[layer], control, seed=self._seed(layer, 50))
        for attempt in range(LEVEL_ATTEMPTS):
            if best.value <= self.problem.max_imbalance:
                break
            found = self._search(
                compiled, best, control, kicks=attempt % 4, tabu=100, seed=self._seed(layer, 51 + attempt)
            )
            best = min(best, found, key=lambda solution: solution.value)
        return best

    def _deepen_layer(self, layer: int, control: npt.NDArray[np.int64]) -> _LayerSolution:
        """Tabu search from the incumbent, then from kicked incumbents, as long as the effort lasts."""
        compiled = self._make_layer(layer)
        best = self.best[layer]
        if not np.isfinite(best.value):
            best = self._search(compiled, best, control, seed=self._seed(layer, 0))
        attempt, failures = 0, 0
        tabu = TABU if self.max_replicas == 1 else TABU_WITH_REPLICAS
        while control[STOP] == 0 and control[WORK] < control[LIMIT] and failures < MOST_FAILURES:
            kicks = 0 if attempt == 0 else 2 + attempt % 4
            found = self._search(
                compiled, best, control, kicks=kicks, tabu=tabu, seed=self._seed(layer, 100 + attempt)
            )
            better = self._rank(layer, found) < self._rank(layer, best)
            best, failures = (found, 0) if better else (best, failures + 1)
            attempt += 1
        return best

    def _chase_risk(self) -> None:
        """Shift weight to the windows that are worst now and search again, while the risk falls."""
        model = self.request.model
        best, risk = list(self.best), model.objective(self.placement())
        for _ in range(4):
            if self.request.stop():
                break
            self.weight_W = self._tail_weights(model)
            self.best = [replace(solution, value=np.inf) for solution in self.best]
            for control in self.controls:
                control[WORK] = 0
            self._each_layer(self._deepen_layer)
            after = model.objective(self.placement())
            if after >= risk:
                break
            best, risk = list(self.best), after
            self.request.report(self.placement())
        self.best = best

    def _tail_weights(self, model: CostModel) -> FloatArray:
        """Half of the weight on all scenarios, half on those of the costliest tenth of the windows."""
        breakdown = model.evaluate(self.placement())
        cost_W = breakdown.step_W
        if self.problem.objective is Objective.BALANCE:
            cost_W = breakdown.balance_WL.mean(axis=1)
        worst = np.argsort(-cost_W)[: max(1, cost_W.size // 10)]
        pieces = self.scenarios.scale_P.size // cost_W.size
        window_W = self.scenarios.mix_WM[:, self.scenarios.mix_WM.shape[1] // 2] // pieces
        tail_W = np.isin(window_W, worst).astype(np.float64)
        return np.asarray(0.5 / tail_W.size + 0.5 * tail_W / max(tail_W.sum(), 1.0))

    def sweep_layers(self) -> Placement:
        """Improve coupled layers in turn, each against its neighbours, until a sweep changes nothing."""
        best, value = self.placement(), np.inf
        self.request.report(best)
        for sweep in range(MAX_SWEEPS):
            self._sweep(sweep)
            placement = self.placement()
            after = self.request.model.objective(placement)
            if after < value * (1 - 1e-6):
                best, value = placement, after
                self.request.report(best)
            elif sweep > 1:
                break
            if self.request.stop():
                break
        return best

    def _sweep(self, sweep: int) -> None:
        """Search every layer once, first to last on even sweeps, last to first on odd ones."""
        layers = range(self.problem.num_layers)
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            if self.request.stop():
                return
            compiled = self._make_layer(layer, neighbours=self._neighbours(layer, ahead=sweep > 0))
            self._each_one(layer, compiled, sweep)

    def _each_one(self, layer: int, compiled: Layer, sweep: int) -> None:
        control = np.zeros(3, dtype=np.int64)
        control[LIMIT] = int(self.work_per_layer)
        self.controls = [control]
        with ThreadPoolExecutor(1) as pool:
            seed = self._seed(layer, sweep)
            future = pool.submit(
                self._search, compiled, self.best[layer], self.controls[0], tabu=30, seed=seed
            )
            for done in self._as_completed([future]):
                self.best[layer] = done.result()

    def _neighbours(self, layer: int, *, ahead: bool) -> Neighbours:
        """Where tokens are before and after a layer; the next layer counts once it has been placed."""
        before = self._token_devices(layer - 1) if layer > 0 else self._homes()
        after = layer + 1 < self.problem.num_layers and ahead
        nowhere = np.full(self.problem.profile.num_sampled_tokens, -1, dtype=np.int64)
        return Neighbours(previous_T=before, next_T=self._token_devices(layer + 1) if after else nowhere)

    def _homes(self) -> IntArray:
        profile = self.problem.profile
        # Hops count boundaries between layers; the way into the first one costs time alone.
        if profile.home_T is None or self.problem.objective is Objective.TRAFFIC:
            return np.full(profile.num_sampled_tokens, -1, dtype=np.int64)
        return profile.home_T

    def _token_devices(self, layer: int) -> IntArray:
        """Device of every sampled token's first expert in a layer."""
        experts_TLK = self.problem.profile.experts_TLK
        assert experts_TLK is not None
        best = self.best[layer]
        device_E = np.full(self.problem.num_experts, -1, dtype=np.int64)
        held = best.expert_I >= 0
        device_E[best.expert_I[held][::-1]] = best.device_I[held][::-1]
        return np.asarray(device_E[experts_TLK[:, layer, 0]])


MAX_SWEEPS = 12
