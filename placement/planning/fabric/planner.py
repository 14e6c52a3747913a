"""`plan_fabric`: from demand, or from a placement problem, to a plan.

Shape letters: L layers, S servers, E experts, A all-to-alls, K sets of circuits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from placement.cost import CostModel
from placement.errors import InputError
from placement.planning.fabric.allocation import Allocation, Effort, allocate_circuits
from placement.planning.fabric.completion import (
    FloatArray,
    IntArray,
    all_to_all_time,
    checked_demand,
    paired_demand,
)
from placement.planning.fabric.joint import plan_jointly, time_on
from placement.planning.fabric.plan import FabricAnswer, FabricPlan, PlacementAnswer, Timing
from placement.planning.fabric.prediction import Prediction, score_predictions
from placement.planning.fabric.prices import FabricKind, fabric_cost, nearest_generation, prices_of
from placement.planning.fabric.region import FabricRegion
from placement.planning.fabric.schedule import (
    Schedule,
    best_schedule,
    layer_of_step,
    schedule_time,
    training_exposure,
)
from placement.planning.fabric.statics import (
    fat_tree_time,
    oversubscribed_time,
    relayed_time,
    static_circuits,
)
from placement.planning.fabric.swaps import LayerCost
from placement.planning.fabric.traffic import RegionTraffic, dealt_homes
from placement.problem import PlacementProblem
from placement.solvers.protocol import SolveRequest
from placement.solvers.registry import make_solver

__all__ = ["OVERSUBSCRIPTION", "PlacedTraffic", "plan_fabric"]

OVERSUBSCRIPTION = 3.0
"""Of the oversubscribed tree to compare with: three links down for one up, our assumption."""

STATIC = 0
"""Index of the circuits for the mean demand; those of layer l have index l + 1."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedTraffic:
    """Routing whose experts are still to be placed.

    Parameters
    ----------
    problem
        Profile, topology (a node is a server) and model; one slot per expert.
    batch_tokens
        Tokens of all devices together in one all-to-all.
    placement_work_s
        Effort of the placement to start from, seconds of one thread; None for the search's own choice.
    also
        Further solvers whose placements to start from, and to compare with: ``eplb``.

    Raises
    ------
    InputError
        If there are spare slots or too few tokens.
    """

    problem: PlacementProblem
    batch_tokens: int
    placement_work_s: float | None = None
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problem = self.problem
        if problem.num_slots != problem.num_experts:
            raise InputError(
                f"{problem.num_slots} slots for {problem.num_experts} experts; a fabric is planned for one "
                "copy of each expert"
            )
        if self.batch_tokens < 1:
            raise InputError(f"batch_tokens is {self.batch_tokens}; it must be 1 or more")


def plan_fabric(
    region: FabricRegion,
    *,
    demand: npt.ArrayLike | None = None,
    traffic: PlacedTraffic | None = None,
    timing: Timing | None = None,
    generation: int | None = None,
    oversubscription: float = OVERSUBSCRIPTION,
    effort: Effort | None = None,
) -> FabricPlan:
    """Plan the circuits of a region, and the placement with them where there is routing to place.

    Parameters
    ----------
    region
        Servers, ports and switch.
    demand
        Bytes dispatched in each layer, ``[layers, servers, servers]``.
    traffic
        Routing instead of demand: placement and circuits are then planned together.
    timing
        Compute around the all-to-alls.
    generation
        Link rate of the prices, Gb/s; by default the one nearest to the region's links.
    oversubscription
        Of the oversubscribed tree to compare with, 1 or more.
    effort
        How long to look for circuits.

    Raises
    ------
    InputError
        If not exactly one of demand and traffic is given, or they do not fit the region.
    InfeasibleError
        If the region cannot serve the demand.
    """
    timing = Timing() if timing is None else timing
    generation = nearest_generation(region.link_gbits) if generation is None else generation
    prices_of(generation)
    if (demand is None) == (traffic is None):
        raise InputError("plan either a demand or the traffic of a placement problem")
    placement, prediction = None, None
    notes: tuple[str, ...] = ()
    if traffic is not None:
        demand_LSS, placement, allocations = _placed(region, traffic, timing, effort)
        prediction = _prediction(traffic)
        notes = _notes(traffic)
    else:
        demand_LSS = _seen(_layers(demand, region), timing)
        allocations = tuple(allocate_circuits(demand_SS, region, effort=effort) for demand_SS in demand_LSS)
    static = allocate_circuits(demand_LSS.mean(axis=0), region, effort=effort)
    schedules = _schedules(region, timing, demand_LSS, static, allocations)
    return FabricPlan(
        region=region,
        timing=timing,
        generation=generation,
        demand_LSS=demand_LSS,
        static_SS=static.circuits_SS,
        allocations=allocations,
        schedule=schedules[0],
        always_keep_s=schedules[1].time_s,
        always_change_s=schedules[2].time_s,
        fabrics=_fabrics(region, timing, demand_LSS, schedules[0], generation, oversubscription),
        placement=placement,
        prediction=prediction,
        notes=notes,
    )


def _layers(demand: npt.ArrayLike | None, region: FabricRegion) -> FloatArray:
    demand_LSS = np.asarray(demand, dtype=np.float64)
    if demand_LSS.ndim != 3 or not len(demand_LSS):
        raise InputError(f"demand has shape {demand_LSS.shape}, not [layers, servers, servers]")
    return np.stack([checked_demand(layer, num_servers=region.num_servers) for layer in demand_LSS])


def _seen(demand_LSS: FloatArray, timing: Timing) -> FloatArray:
    """Return dispatched bytes as the links see them."""
    return np.stack([paired_demand(layer) for layer in demand_LSS]) if timing.paired else demand_LSS


def _placed(
    region: FabricRegion, traffic: PlacedTraffic, timing: Timing, effort: Effort | None
) -> tuple[FloatArray, PlacementAnswer, tuple[Allocation, ...]]:
    problem = traffic.problem
    if problem.topology.num_nodes != region.num_servers:
        raise InputError(
            f"the topology has {problem.topology.num_nodes} nodes, the region {region.num_servers} servers"
        )
    fit, held_out = (
        replace(half, home_T=dealt_homes(half, problem.num_devices))
        for half in problem.profile.split_alternate()
    )
    fitted = problem.with_profile(fit)
    starts = {
        "contiguous": _start(fitted, "contiguous", None),
        "optimized": _start(fitted, "search", traffic.placement_work_s),
        **{name: _start(fitted, name, None) for name in traffic.also},
    }
    cost = LayerCost(
        region=region,
        paired=timing.paired,
        all_to_alls=4 if timing.training else 2,
        computes=3 if timing.training else 1,
    )
    here = RegionTraffic.of(fitted, fit, batch_tokens=traffic.batch_tokens)
    there = RegionTraffic.of(fitted, held_out, batch_tokens=traffic.batch_tokens)
    joint = plan_jointly(here, starts, cost, effort=effort)
    answer = PlacementAnswer(
        device_LE=joint.device_LE,
        time_s=joint.time_s,
        held_out_s=time_on(there, joint.layers, cost),
        separate_s={name: sum(layer.time_s for layer in layers) for name, layers in joint.separate.items()},
        separate_held_out_s={name: time_on(there, layers, cost) for name, layers in joint.separate.items()},
    )
    demand_LSS = _seen(here.demand(joint.device_LE), timing)
    return demand_LSS, answer, tuple(layer.allocation for layer in joint.layers)


def _start(problem: PlacementProblem, solver: str, work_s: float | None) -> IntArray:
    """Return the device of each expert where a solver knows nothing of circuits, ``[layers, experts]``."""
    # The solver alone: bounds on step time without circuits are of no use here, and cost most of the time.
    request = SolveRequest(problem=problem, model=CostModel(problem), work_s=work_s)
    return make_solver(solver).solve(request).first_device_LE


def _prediction(traffic: PlacedTraffic) -> Prediction | None:
    load_WLE = traffic.problem.profile.load_WLE
    return score_predictions(load_WLE) if min(load_WLE.shape[:2]) > 1 else None


def _notes(traffic: PlacedTraffic) -> tuple[str, ...]:
    if traffic.problem.profile.home_T is not None:
        return ()
    return (
        "The trace does not say where tokens live: those of each window are dealt to devices in contiguous "
        "blocks.",
    )


def _schedules(
    region: FabricRegion,
    timing: Timing,
    demand_LSS: FloatArray,
    static: Allocation,
    allocations: tuple[Allocation, ...],
) -> tuple[Schedule, Schedule, Schedule]:
    """Return the best schedule, that of never changing, and that of changing at every layer."""
    circuits_KSS = [static.circuits_SS, *(allocation.circuits_SS for allocation in allocations)]
    layer_A = layer_of_step(len(demand_LSS), training=timing.training)
    time_LK = np.array(
        [[all_to_all_time(up_SS, layer, region) for up_SS in circuits_KSS] for layer in demand_LSS]
    )
    own_K = np.arange(-1, len(allocations))
    # The plan's circuits follow from past traffic, so that all of them are known before any gate has run.
    exposed_AK = training_exposure(
        layer_A,
        own_K,
        np.ones(own_K.size, dtype=bool),
        delay_s=region.switch.reconfiguration_s,
        window_s=timing.window_s,
    )
    time_AK = time_LK[layer_A]
    # MixNet makes circuits when the gate has run: the first all-to-all of each layer waits for them.
    blocking_AK = training_exposure(
        layer_A,
        own_K,
        own_K < 0,
        delay_s=region.switch.reconfiguration_s,
        window_s=timing.window_s,
    )
    keep = schedule_time(np.full(layer_A.size, STATIC), time_AK, exposed_AK, start=STATIC)
    change = schedule_time(layer_A + 1, time_AK, blocking_AK, start=STATIC)
    return best_schedule(time_AK, exposed_AK, start=STATIC), keep, change


def _fabrics(
    region: FabricRegion,
    timing: Timing,
    demand_LSS: FloatArray,
    schedule: Schedule,
    generation: int,
    oversubscription: float,
) -> tuple[FabricAnswer, ...]:
    each = 4 if timing.training else 2
    tree_s = each * sum(fat_tree_time(layer, region) for layer in demand_LSS)
    tight_s = each * sum(
        oversubscribed_time(layer, region, oversubscription=oversubscription) for layer in demand_LSS
    )
    prices = prices_of(generation)
    times = {FabricKind.MIXNET: schedule.time_s, FabricKind.FAT_TREE: tree_s, FabricKind.RAIL: tree_s}
    times[FabricKind.OVERSUBSCRIBED] = tight_s
    if region.ports >= 2:
        static_SS = static_circuits(demand_LSS.mean(axis=0), region)
        times[FabricKind.STATIC] = each * sum(relayed_time(static_SS, layer, region) for layer in demand_LSS)
    compute_s = each * len(demand_LSS) * timing.window_s
    return tuple(
        FabricAnswer(
            kind=kind,
            step_s=compute_s + time_s,
            all_to_all_s=time_s,
            dollars=fabric_cost(kind, region, prices, oversubscription=oversubscription),
        )
        for kind, time_s in times.items()
    )
