"""MoETuner as a solver: it minimises its own two objectives; the cost model prices what comes out.

Go and Mahajan, "MoETuner: Optimized Mixture of Expert Serving with Balanced Expert Placement and Token
Routing" (arXiv 2502.06643). Stage 1 clusters each layer's experts by their load over all windows, stage 2
puts clusters on devices by the transitions of tokens between consecutive layers. See `clusters` and `devices`
for the formulations and for what the print leaves open.

What a placement problem adds to the paper: a cluster has as many experts as a device has slots at most;
spare slots stay empty; devices without slots take no part; memory over all layers is the paper's E L / G
experts per device (in proportion to slots where they differ), loosened by as little as possible where no
assignment of the clusters keeps it. A trace of expert counts has no transitions: stage 1 alone is solved.

With up to five devices a shortest path gives the optimum of stage 2 without memory limits. Where that keeps
them, one program, the paper's, starts from it and proves it; where it does not, it is a bound still. Programs
beyond a bearable size are solved in parts: some layers free, all others kept. The whole has no proof then.

Shape letters: L layers, E experts, D devices, G devices with slots, C clusters (as many), S slots.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from placement.cost.incremental import layer_row
from placement.errors import InfeasibleError, InputError
from placement.plan import Placement
from placement.problem import PlacementProblem
from placement.solvers.milp import MilpProgram, MilpResult, MilpStatus, solve_milp
from placement.solvers.moetuner.clusters import (
    ClusterProblem,
    cluster_program,
    clusters_of,
    even_clusters,
    imbalance,
    least_imbalance,
)
from placement.solvers.moetuner.devices import (
    DeviceProblem,
    Reading,
    better_devices,
    chain_optimum,
    device_program,
    excess_program,
    fits,
    memory_excess,
    part_of,
    travel_cost,
)
from placement.solvers.protocol import SolveRequest

__all__ = ["PAPER_GAP", "MoetunerSolver"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

PAPER_GAP = 0.025
"""Relative gap at which the paper stops its solver."""

DEFAULT_WORK_S = 60.0

MOST_PRODUCTS = 1_500
"""Products of a program of stage 2 that no shortest path solves: five transitions of four devices. The
relaxations of larger ones take minutes, whatever the limit on nodes."""

MOST_TRANSITION_PRODUCTS = 140_000
"""Products of one transition that are accepted: 19 devices."""

NONZEROS_PER_SECOND = 2.0e6
"""Nonzeros of a program times nodes that a backend gets through in a second (measured with HiGHS, about)."""

NODE_NONZEROS = 2_000
"""What a node costs beside its nonzeros."""

IN_PROCESS_NONZEROS = 3_000
"""Programs up to this size are solved in this process: starting another one would take longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoetunerSolver:
    """MoETuner's two stages.

    Effort is counted in nodes, so the result does not depend on the machine unless `SolveRequest.stop` ends
    it.

    Parameters
    ----------
    backend
        One of `placement.solvers.milp.BACKENDS`.
    reading
        How stage 2 summarises the traffic of pairs of devices.
    relative_gap
        Where proofs may end; the paper's by default.
    balance_tolerance
        Share of a layer's load within which stage 1 may end as well, its relaxation being 0.
    """

    backend: str = "highs"
    reading: Reading = Reading.MAXIMUM
    relative_gap: float = PAPER_GAP
    balance_tolerance: float = 1e-3

    @property
    def name(self) -> str:
        """Name on the command line and in results."""
        return "moetuner" if self.reading is Reading.MAXIMUM else "moetuner-sum"

    def solve(self, request: SolveRequest) -> Placement:
        """Return MoETuner's placement; stopped early, what it has by then.

        Raises
        ------
        InfeasibleError
            If a layer has fewer experts than there are devices.
        BackendError
            If the backend fails.
        """
        problem = request.problem
        device_G = np.nonzero(problem.slots_D)[0]
        cluster_LE = self._clusters(request, problem.slots_D[device_G])
        cluster_LG = np.tile(np.arange(device_G.size), (problem.num_layers, 1))
        if problem.num_layers > 1 and device_G.size > 1 and problem.profile.num_sampled_tokens:
            cluster_LG = self._devices(request, cluster_LE, device_G)
        device_LC = device_G[np.argsort(cluster_LG, axis=1)]
        return _placement(problem, np.take_along_axis(device_LC, cluster_LE, axis=1))

    def _clusters(self, request: SolveRequest, slots_G: IntArray) -> IntArray:
        """Solve stage 1 layer by layer: cluster of each expert, ``[layers, experts]``."""
        load_LE = request.problem.profile.load_WLE.sum(axis=0)
        problems = [ClusterProblem(load_E=load_E, capacity_C=slots_G) for load_E in load_LE]
        work_s = self._work_s(request) / 2 / len(problems)
        with ThreadPoolExecutor(max_workers=request.threads) as pool:
            found = pool.map(lambda problem: self._one_layer(request, problem, work_s), problems)
            return np.stack(list(found))

    def _one_layer(self, request: SolveRequest, problem: ClusterProblem, work_s: float) -> IntArray:
        start_E = even_clusters(problem, request.stop)
        reached, allowed = imbalance(problem, start_E), self.balance_tolerance * problem.load_E.sum()
        if reached - least_imbalance(problem) <= max(allowed, self.relative_gap * reached):
            return start_E
        program, x_CE = cluster_program(problem, start_E)
        result = self._minimise(request, program, work_s, absolute_gap=float(allowed))
        if result.value_V is None or result.objective >= reached:
            return start_E
        return clusters_of(x_CE, result.value_V)

    def _devices(self, request: SolveRequest, cluster_LE: IntArray, device_G: IntArray) -> IntArray:
        """Solve stage 2: cluster on each device, ``[layers, devices]``."""
        if device_G.size**4 > MOST_TRANSITION_PRODUCTS:
            raise InputError(
                f"{self.name} over {device_G.size} devices has {device_G.size**4:,} products in every pair "
                f"of layers; at most {MOST_TRANSITION_PRODUCTS:,} are accepted; use another solver"
            )
        problem = _device_problem(request.problem, cluster_LE, device_G, self.reading)
        work_s = self._work_s(request) / 2
        start_LG = np.tile(np.arange(device_G.size), (problem.num_layers, 1))
        if not fits(problem, start_LG):
            problem, start_LG = self._loosened(request, problem, start_LG, work_s / 4)
        chain = chain_optimum(problem, request.stop)
        if chain is not None and fits(problem, chain[1]):
            start_LG = chain[1]
        start_LG = better_devices(problem, start_LG, request.stop)
        if chain is not None and fits(problem, chain[1]):
            return self._travel_least(request, problem, start_LG, work_s, chain[0])
        if chain is not None and self._near(problem, start_LG, chain[0]):
            return start_LG
        return self._part_by_part(request, problem, start_LG, work_s)

    def _part_by_part(
        self, request: SolveRequest, problem: DeviceProblem, start_LG: IntArray, work_s: float
    ) -> IntArray:
        """Free as many layers at a time as make a program of bearable size, all others kept."""
        layers, products = problem.num_layers, problem.num_devices**4
        free = layers if (layers - 1) * products <= MOST_PRODUCTS else max(1, MOST_PRODUCTS // products - 1)
        best_LG = start_LG.copy()
        for first in range(0, layers, free):
            if request.stop():
                break
            end, begin = min(layers, first + free), max(0, first - 1)
            part = part_of(problem, best_LG, first, end)
            covered = slice(begin, begin + part.num_layers)
            chain = chain_optimum(part, request.stop)
            least = None if chain is None else chain[0]
            if least is not None and self._near(part, best_LG[covered], least):
                continue
            share_s = work_s * (end - first) / layers
            best_LG[covered] = self._travel_least(request, part, best_LG[covered], share_s, least)
        return best_LG

    def _near(self, problem: DeviceProblem, cluster_LG: IntArray, chain_cost_L: FloatArray) -> bool:
        """Return whether the shortest path's bound proves an assignment to be within the gap."""
        return bool(travel_cost(problem, cluster_LG) * (1 - self.relative_gap) <= chain_cost_L[-1])

    def _travel_least(
        self,
        request: SolveRequest,
        problem: DeviceProblem,
        start_LG: IntArray,
        work_s: float,
        chain_cost_L: FloatArray | None,
    ) -> IntArray:
        program, y_LCG = device_program(problem, start_LG, chain_cost_L)
        result = self._minimise(request, program, work_s)
        if result.value_V is None:
            return start_LG
        found_LG = _on_devices(y_LCG, result.value_V)
        better = travel_cost(problem, found_LG) < travel_cost(problem, start_LG)
        return found_LG if better and fits(problem, found_LG) else start_LG

    def _loosened(
        self, request: SolveRequest, problem: DeviceProblem, start_LG: IntArray, work_s: float
    ) -> tuple[DeviceProblem, IntArray]:
        """Find clusters that keep the memory limits, or loosen these by the least that is found."""
        program, y_LCG = excess_program(problem, start_LG)
        result = self._minimise(request, program, work_s)
        if result.value_V is not None:
            start_LG = _on_devices(y_LCG, result.value_V)
        excess = memory_excess(problem, start_LG)
        return replace(problem, memory_G=problem.memory_G + excess), start_LG

    def _minimise(
        self, request: SolveRequest, program: MilpProgram, work_s: float, *, absolute_gap: float = 0.0
    ) -> MilpResult:
        nodes = work_s * NONZEROS_PER_SECOND / (program.num_nonzeros + NODE_NONZEROS)
        result = solve_milp(
            program,
            backend=self.backend,
            node_limit=max(1, int(nodes)),
            relative_gap=self.relative_gap,
            absolute_gap=absolute_gap,
            seed=request.seed,
            stop=request.stop,
            in_process=program.num_nonzeros <= IN_PROCESS_NONZEROS,
        )
        if result.status is MilpStatus.INFEASIBLE:
            raise InfeasibleError(f"{self.name}: no assignment keeps the limits, as {self.backend} proves")
        return result

    def _work_s(self, request: SolveRequest) -> float:
        return DEFAULT_WORK_S if request.work_s is None else request.work_s


def _on_devices(y_LCG: IntArray, value_V: FloatArray) -> IntArray:
    return np.asarray(value_V[y_LCG].argmax(axis=1), dtype=np.int64)


def _device_problem(
    problem: PlacementProblem, cluster_LE: IntArray, device_G: IntArray, reading: Reading
) -> DeviceProblem:
    """Gather what stage 2 knows of clusters and devices."""
    layers, devices = problem.num_layers, device_G.size
    slots_G = problem.slots_D[device_G]
    member_LCE = (cluster_LE[:, None, :] == np.arange(devices)[:, None]).astype(np.float64)
    size_LC = member_LCE.sum(axis=2).astype(np.int64)
    allowed_LCG = size_LC[:, :, None] <= slots_G
    allowed_LCG[0] &= _first_layer(problem, devices)
    traffic_NCC = [
        member_LCE[layer] @ problem.profile.transitions(layer) @ member_LCE[layer + 1].T
        for layer in range(layers - 1)
    ]
    return DeviceProblem(
        traffic_NCC=np.stack(traffic_NCC),
        slowness_GG=_slowness(problem, device_G),
        size_LC=size_LC,
        allowed_LCG=allowed_LCG,
        memory_G=problem.num_experts * layers * slots_G / slots_G.sum(),
        reading=reading,
    )


def _first_layer(problem: PlacementProblem, devices: int) -> npt.NDArray[np.bool_]:
    """Return where the first layer's clusters may be: devices that are alike can be renamed."""
    allowed_CG = np.ones((devices, devices), dtype=np.bool_)
    alike = problem.topology.is_homogeneous and len(set(problem.slots_D.tolist())) == 1
    if alike and problem.topology.num_tiers == 1:
        return np.eye(devices, dtype=np.bool_)
    if alike:
        # Groups of one size: any device can be renamed to any other, but not all at will.
        allowed_CG[0, 1:] = allowed_CG[1:, 0] = False
    return allowed_CG


def _slowness(problem: PlacementProblem, device_G: IntArray) -> FloatArray:
    """Fastest bandwidth of any pair / bandwidth of each pair, ``[devices, devices]``; 0 on the diagonal."""
    topology = problem.topology
    bandwidth_GG = np.full((device_G.size, device_G.size), np.inf)
    for i, a in enumerate(device_G.tolist()):
        for j, b in enumerate(device_G.tolist()):
            tier = topology.tier_between(a, b)
            if tier is not None:
                # A pair is as fast as its slower end.
                bandwidth_GG[i, j] = topology.tiers[tier].effective_bandwidth_D[[a, b]].min()
    apart = np.isfinite(bandwidth_GG)
    return np.where(apart, bandwidth_GG[apart].max() / bandwidth_GG, 0.0)


def _placement(problem: PlacementProblem, device_LE: IntArray) -> Placement:
    experts = np.arange(problem.num_experts)
    rows = [layer_row(experts, device_E, problem.device_of_slot_S) for device_E in device_LE]
    return Placement(
        physical_to_logical_map_LS=np.stack(rows),
        device_of_slot_S=problem.device_of_slot_S,
        num_experts=problem.num_experts,
        num_devices=problem.num_devices,
    )
