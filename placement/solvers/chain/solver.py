"""Places all layers of a stay-put chain at once.

Where a token stays on the device of its first expert, layers are coupled, and improving one against its
neighbours soon gets stuck: neighbours would have to change along with it. So several placements are annealed,
all layers at a time; the best chain is put together from their layers (`recombine`); and each layer is then
made optimal against its neighbours (`assign_layer`). Spare slots are filled afterwards with the replicas that
keep most tokens in place (`Walk`).

For step time a price is put on the loads of every window instead of a limit on their sum, and the best
placement by the true costs is improved by `search`, as is the start that `search` would take by itself.

Shape letters: P placements, L layers, E experts, S slots, D devices.
"""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from placement.errors import InfeasibleError, InputError
from placement.plan import EMPTY, Placement
from placement.problem import Objective, PlacementProblem, Risk, Semantics
from placement.solvers.chain.assignment import assign_layer, level_layer
from placement.solvers.chain.model import devices_of, make_chain, placement_of, price_loads, rows_of
from placement.solvers.chain.recombine import overload, recombine
from placement.solvers.greedy import greedy_placement
from placement.solvers.protocol import SolveRequest
from placement.solvers.search import SearchSolver, layer_balance

if TYPE_CHECKING:
    from placement.calibration import PiecewiseLinear
    from placement.cost import CostModel
    from placement.solvers.chain.kernels import Chain

__all__ = ["ChainSolver"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

MOVES_PER_SECOND = 2.0e7
"""Swaps that one thread of a current server tries in a second (measured, rounded down)."""

LOADS_PER_MOVE = 20
"""Load situations that take as long to price as the rest of a swap."""

STEPS_PER_SECOND = 1.0e8
"""Steps of tokens that one thread of a current server walks in a second (measured, rounded down)."""

MOVES_PER_PAIR = 3200
"""Swaps tried for each pair of slots of a layer when no effort is asked for, over all placements."""

LEAST_PER_PAIR = 200
"""Swaps for each pair of slots below which one placement is not worth annealing beside others."""

MOST_WORK_S = 60.0

MOST_PLACEMENTS = 8

HOT, COLD = 0.6, 0.008
"""First and last temperature, as shares of the tokens that a mean expert passes on."""

SOFT, HARD = 0.3, 100.0
"""Tokens that a unit of load beyond the limit is worth, first and last."""

PROGRAM_S = 1e-4
"""Seconds that an integer program takes for each expert and device, about."""

LARGEST_PROGRAM = 2048
"""Experts times devices above which a layer is assigned without integer programs."""

POLISH_SHARE = 0.2
"""Share of the effort for making layers optimal against their neighbours."""

PRICES = (0.8, 1.4)
"""Prices of load that chains for step time are annealed with, as multiples of the estimate."""

FULLEST_SHARE = 2.4
"""How much more a pair beyond the mean tells on the fullest device than a token that moves (measured)."""

MOST_RENAMINGS = 100
"""Exchanges of two devices priced where devices differ."""

POLL_S = 0.02


class ChainSolver:
    """Anneals, recombines and polishes whole chains of layers; for stay-put semantics."""

    name = "chain"

    def solve(self, request: SolveRequest) -> Placement:
        """Return the best placement found.

        Raises
        ------
        InputError
            If the problem's layers are not a chain.
        InfeasibleError
            If a load limit cannot be kept, naming the layer and the best that was reached.
        """
        problem = request.problem
        if problem.semantics is not Semantics.STAY_PUT or problem.objective is Objective.BALANCE:
            raise InputError(
                f"solver chain takes --semantics stay-put with --objective traffic or step-time, not "
                f"{problem.semantics} {problem.objective}; use search"
            )
        if request.start is not None:
            problem.check_capacity(request.start)
        if problem.objective is Objective.STEP_TIME:
            placement = _solve_step_time(request)
            _prove_by_parts(request)
            return placement
        placement = _solve_traffic(request, max_imbalance=problem.max_imbalance)
        _check_limit(problem, placement)
        return placement


def _prove_by_parts(request: SolveRequest) -> None:
    """Bound a step time of few experts by its parts' optima: far tighter than what scales."""
    from placement.solvers.exact.parts import bound_by_parts, can_bound_by_parts

    if can_bound_by_parts(request.problem) and not request.stop():
        request.prove(bound_by_parts(replace(request, work_s=None, start=None)))


def chain_work_s(problem: PlacementProblem) -> float:
    """Choose the effort by size: swaps in proportion to the pairs of slots, within a limit."""
    moves = problem.num_layers * problem.num_slots**2 * MOVES_PER_PAIR
    work_s = min(moves / MOVES_PER_SECOND, MOST_WORK_S)
    return work_s if problem.num_slots == problem.num_experts else 2.0 * work_s


def _solve_traffic(request: SolveRequest, *, max_imbalance: float) -> Placement:
    """Minimise hops within a load limit; as far as it can be kept."""
    run = _Run(request, max_imbalance)
    device_LE = run.place_once()
    found = [placement_of(request.problem, rows_of(run.chain.device_S, device_LE))]
    if request.problem.num_slots > request.problem.num_experts:
        found.append(run.fill_spare_slots(found[0]))
    if request.start is not None:
        found.append(request.start)
    return min(found, key=run.rank)


class _Run:
    """One solve for hops: the chain, its effort, and the way from a start to a placement."""

    def __init__(self, request: SolveRequest, max_imbalance: float) -> None:
        self.request, self.problem = request, request.problem
        self.chain: Chain = make_chain(request.problem, max_imbalance=max_imbalance)
        self.slots_D = request.problem.slots_D
        self.max_imbalance = max_imbalance
        self.load_LE, self.limit_L = self.chain.load_LEQ[:, :, 0], self.chain.limit_LQ[:, 0]
        work_s = chain_work_s(self.problem) if request.work_s is None else request.work_s
        self.work_s = work_s if self.problem.num_slots == self.problem.num_experts else work_s / 2
        self.control = np.zeros(1, dtype=np.int64)

    def rank(self, placement: Placement) -> tuple[float, float]:
        """Order placements: by how far they exceed the load limit, then by the objective."""
        breakdown = self.request.model.evaluate(placement)
        excess = breakdown.metrics.worst_layer_balance - self.max_imbalance * (1 + 1e-9)
        return max(0.0, excess), breakdown.objective

    def place_once(self) -> IntArray:
        """Place one copy of each expert: device of each, ``[layers, experts]``."""
        start_LE = self._start()
        self._report(start_LE)
        if self.request.stop() or self._is_hopeless(start_LE):
            return start_LE
        annealed = self._anneal(start_LE)
        device_LE = recombine(self.chain, np.stack([start_LE, *annealed]))
        self._report(device_LE)
        return self._polish(device_LE)

    def place_priced(self, price: float) -> Placement:
        """Place one copy of each expert with a price on uneven loads; the best by the model's objective."""
        start_LE = self._start()
        self.chain = price_loads(self.chain, self.problem, price=price)
        found = [start_LE]
        if not self.request.stop():
            found += self._anneal(start_LE)
            found.append(recombine(self.chain, np.stack(found)))
        placements = [placement_of(self.problem, rows_of(self.chain.device_S, LE)) for LE in found]
        best = min(placements, key=self.request.model.objective)
        self.request.report(best)
        return best

    def _is_hopeless(self, start_LE: IntArray) -> bool:
        """Return whether a limit that must be kept is out of reach, even for an integer program."""
        replicas = self.problem.num_slots > self.problem.num_experts
        programs = start_LE.shape[1] * self.slots_D.size <= LARGEST_PROGRAM
        binding = self.request.model.problem.objective is Objective.TRAFFIC
        return bool(binding and programs and not replicas and overload(self.chain, start_LE).any())

    def _report(self, device_LE: IntArray) -> None:
        self.request.report(placement_of(self.problem, rows_of(self.chain.device_S, device_LE)))

    def _start(self) -> IntArray:
        """Return a local optimum near the start that keeps the load limit in as many layers as possible."""
        from placement.solvers.chain.kernels import descend

        start = self.request.start
        if start is None:
            start = greedy_placement(self.problem)
        # Of replicas the first stays.
        rows_LS = rows_of(self.chain.device_S, start.first_device_LE)
        device_LE = self._devices(descend(self.chain, rows_LS, self.control))
        for layer in np.nonzero(overload(self.chain, device_LE))[0]:
            if self.request.stop() or device_LE.shape[1] * self.slots_D.size > LARGEST_PROGRAM:
                break
            level_E = level_layer(self.load_LE[layer], self.slots_D, self.limit_L[layer])
            if level_E is not None:
                device_LE[layer] = level_E
        return device_LE

    def _devices(self, expert_LS: IntArray) -> IntArray:
        return devices_of(self.chain.device_S, expert_LS, self.problem.num_experts)

    def _anneal(self, start_LE: IntArray) -> list[IntArray]:
        """Anneal several placements from one start, on the threads allowed."""
        from placement.solvers.chain.kernels import anneal

        seeds = [[self.request.seed, index] for index in range(self._num_placements())]
        unit, price = self._passed_on(), self.chain.price
        prices = (price, price) if np.isfinite(price) else (SOFT, HARD)
        rows_LS = rows_of(self.chain.device_S, start_LE)
        with ThreadPoolExecutor(self.request.threads) as pool:
            futures = [
                pool.submit(
                    anneal,
                    self.chain,
                    rows_LS,
                    (HOT * unit, COLD * unit),
                    prices,
                    int(self._anneal_moves() / len(seeds)),
                    int(np.random.SeedSequence(seed).generate_state(1)[0]),
                    self.control,
                )
                for seed in seeds
            ]
            self._wait(futures)
        return [self._devices(future.result()) for future in futures]

    def _passed_on(self) -> float:
        """Tokens that a mean expert passes on to the next layer."""
        boundaries, experts, _ = self.chain.ahead_BEE.shape
        total = float(self.chain.ahead_BEE.sum())
        return max(total / max(int(boundaries) * int(experts), 1), 1e-9)

    def _anneal_moves(self) -> float:
        num_loads = int(self.chain.limit_LQ.shape[1])
        return (1 - POLISH_SHARE) * self.work_s * MOVES_PER_SECOND / (1 + num_loads / LOADS_PER_MOVE)

    def _num_placements(self) -> int:
        """Placements to anneal: as many as the effort suffices for, since their best layers add up."""
        least = LEAST_PER_PAIR * self.problem.num_layers * self.problem.num_slots**2
        return int(np.clip(self._anneal_moves() / least, 2, MOST_PLACEMENTS))

    def _wait(self, futures: list[Future[IntArray]]) -> None:
        """Wait for compiled loops, passing the stop criterion on to them."""
        waiting = set(futures)
        try:
            while waiting:
                _, waiting = wait(waiting, timeout=POLL_S, return_when=FIRST_COMPLETED)
                if self.request.stop():
                    self.control[0] = 1
        except BaseException:
            # Leave no thread computing for a solve that is over.
            self.control[0] = 1
            raise

    def _polish(self, device_LE: IntArray) -> IntArray:
        """Make layers optimal against their neighbours in turn, until none changes or the effort is spent."""
        size = device_LE.shape[1] * self.slots_D.size
        programs = int(np.ceil(POLISH_SHARE * self.work_s / (PROGRAM_S * size)))
        device_LE = device_LE.copy()
        unchanged, layer, num_layers = 0, 0, device_LE.shape[0]
        while unchanged < num_layers and programs > 0 and not self.request.stop():
            programs -= 1
            unchanged = 0 if self._improve_layer(device_LE, layer) else unchanged + 1
            layer = (layer + 1) % num_layers
            if layer == 0:
                device_LE = recombine(self.chain, device_LE[None])
        device_LE = recombine(self.chain, device_LE[None])
        self._report(device_LE)
        return device_LE

    def _improve_layer(self, device_LE: IntArray, layer: int) -> bool:
        """Assign one layer's experts anew if that keeps more tokens; return whether it did."""
        kept_ED = self._kept(device_LE, layer)
        limit = float(self.limit_L[layer])
        if kept_ED.size > LARGEST_PROGRAM:
            limit = float("inf")
        found_E = assign_layer(kept_ED, self.slots_D, self.load_LE[layer], limit)
        if found_E is None:
            return False
        found_LE = device_LE.copy()
        found_LE[layer] = found_E
        over, over_after = (overload(self.chain, each_LE)[layer] for each_LE in (device_LE, found_LE))
        experts = np.arange(found_E.size)
        kept, kept_after = (kept_ED[experts, each_LE[layer]].sum() for each_LE in (device_LE, found_LE))
        if (over_after, -kept_after) >= (over, -kept * (1 + 1e-9)):
            return False
        device_LE[layer] = found_E
        return True

    def _kept(self, device_LE: IntArray, layer: int) -> FloatArray:
        """Tokens that each expert of a layer shares with its neighbours on each device."""
        kept_ED = np.zeros((device_LE.shape[1], self.slots_D.size))
        devices = np.arange(self.slots_D.size)
        if layer > 0:
            kept_ED += self.chain.back_BEE[layer - 1] @ (device_LE[layer - 1][:, None] == devices)
        if layer + 1 < len(device_LE):
            kept_ED += self.chain.ahead_BEE[layer] @ (device_LE[layer + 1][:, None] == devices)
        return kept_ED

    def fill_spare_slots(self, placement: Placement) -> Placement:
        """Fill spare slots with the replicas that keep most tokens in place."""
        from placement.solvers.chain.replicas import Walk

        walk = Walk(self.problem, self.limit_L, self.request.stop)
        kicks = int(self.work_s * STEPS_PER_SECOND / (10 * walk.work))
        rows = [placement]
        if self.request.start is not None:
            rows.append(placement_of(self.problem, self._rows(self.request.start)))
        best = min(rows, key=self.rank)
        random = np.random.default_rng([self.request.seed, 1])
        found_LS = walk.search(np.array(best.physical_to_logical_map_LS), kicks=kicks, random=random)
        filled = placement_of(self.problem, found_LS)
        self.request.report(filled)
        return filled

    def _rows(self, placement: Placement) -> IntArray:
        """Lay a placement with replicas out on the problem's slots."""
        rows_LS = np.full((self.problem.num_layers, self.problem.num_slots), EMPTY, dtype=np.int64)
        for layer, device in np.ndindex(self.problem.num_layers, self.problem.num_devices):
            held = np.nonzero(placement.count_LED[layer, :, device])[0]
            slots = np.nonzero(self.problem.device_of_slot_S == device)[0]
            rows_LS[layer, slots[: held.size]] = held
        return rows_LS


def _check_limit(problem: PlacementProblem, placement: Placement) -> None:
    balance_L = layer_balance(problem, placement)
    worst = int(balance_L.argmax())
    if balance_L[worst] > problem.max_imbalance * (1 + 1e-9):
        raise InfeasibleError(
            f"layer {worst}: the most even placement found loads its fullest device with "
            f"{balance_L[worst]:.4f} of the mean, "
            f"above --max-imbalance {problem.max_imbalance}; allow "
            f"{np.ceil(balance_L[worst] * 1000) / 1000:.3f} or add spare slots for replicas"
        )


def _solve_step_time(request: SolveRequest) -> Placement:
    """Improve the best of some chains, and the start by itself, on the true costs."""
    problem, model = request.problem, request.model
    work_s = 2.0 * chain_work_s(problem) if request.work_s is None else request.work_s
    part = replace(
        request,
        problem=replace(problem, objective=Objective.TRAFFIC, risk=Risk.MEAN),
        start=None,
        work_s=work_s / len(PRICES),
    )
    found = []
    for factor in PRICES:
        run = _Run(part, problem.max_imbalance)
        found.append(run.place_priced(factor * _load_price(model)))
    if problem.num_slots > problem.num_experts:
        found.append(_solve_traffic(part, max_imbalance=problem.max_imbalance))
    best = _rename_devices(request, min(found, key=model.objective))
    found = [best]
    for start in (best, request.start):
        if not request.stop():
            found.append(SearchSolver().solve(replace(request, start=start)))
    if request.start is not None:
        found.append(request.start)
    return min(found, key=model.objective)


def _load_price(model: CostModel) -> float:
    """Tokens that must stay to make up for a token-expert pair beyond a device's mean.

    The ratio of what a pair costs on the fullest device to what a token costs that enters it, at the loads of
    this traffic. Both maxima are over devices; of the loads beyond the mean, which several devices share,
    about `FULLEST_SHARE` as many tell on the fullest device as of all tokens that move.
    """
    profile, devices = model.problem.profile, model.problem.num_devices
    pairs = float(profile.load_WLE.mean())
    tokens = float(profile.window_tokens_W.mean()) / devices
    pair_cost = max(_slope(curve, pairs) for curve in model.expert_curves)
    token_cost = max(_slope(link.dispatch, tokens) for link in model.links)
    if token_cost <= 0:
        return HARD
    return float(np.clip(FULLEST_SHARE * pair_cost / token_cost, 1e-3, HARD))


def _slope(curve: PiecewiseLinear, x: float) -> float:
    return float(curve(2.0 * x) - curve(x)) / x


def _rename_devices(request: SolveRequest, placement: Placement) -> Placement:
    """Exchange the contents of two devices in all layers while that lessens the step time.

    Hops do not tell devices apart; homes, nodes and kinds of device do.
    """
    problem = request.problem
    topology = problem.topology
    if problem.profile.home_T is None and topology.num_nodes == 1 and len(topology.kinds) == 1:
        return placement
    slots_D = problem.slots_D
    best, least = placement, request.model.objective(placement)
    evaluations, pair, unchanged = 0, 0, 0
    pairs = [pair for pair in combinations(range(slots_D.size), 2) if slots_D[pair[0]] == slots_D[pair[1]]]
    while unchanged < len(pairs) and evaluations < MOST_RENAMINGS and not request.stop():
        found = _exchanged(best, *pairs[pair])
        value = request.model.objective(found)
        evaluations, pair = evaluations + 1, (pair + 1) % len(pairs)
        unchanged += 1
        if value < least * (1 - 1e-9):
            best, least, unchanged = found, value, 0
    return best


def _exchanged(placement: Placement, p: int, q: int) -> Placement:
    rows_LS = placement.physical_to_logical_map_LS.copy()
    at_p, at_q = (placement.device_of_slot_S == device for device in (p, q))
    rows_LS[:, at_p] = placement.physical_to_logical_map_LS[:, at_q]
    rows_LS[:, at_q] = placement.physical_to_logical_map_LS[:, at_p]
    return placement.with_layers(rows_LS)
