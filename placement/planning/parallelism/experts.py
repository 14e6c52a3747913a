"""Places each stage's experts on its expert-parallel group, for the loads that real routing has.

Stages are alike in their groups, and layers are balanced one by one, so one problem over all layers gives
every stage its part.

Shape letters: L MoE layers, E experts, D devices of a group, W windows, S slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from placement.calibration import Calibration
from placement.cost import CostModel
from placement.model_shape import ModelShape
from placement.optimizer import optimize
from placement.plan import Placement
from placement.planning.parallelism.hill_climb import climb
from placement.planning.parallelism.network import members_per_level
from placement.planning.parallelism.strategy import Mesh
from placement.problem import Objective, Semantics, make_problem
from placement.profile import RoutingProfile
from placement.solution import relative_gap
from placement.solvers.contiguous import contiguous_placement
from placement.solvers.eplb import EplbSolver
from placement.solvers.protocol import SolveRequest
from placement.stopping import Never
from placement.tier import Tier
from placement.topology import Topology

__all__ = [
    "CONTIGUOUS",
    "EPLB",
    "HILL_CLIMB",
    "OURS",
    "ExpertPlan",
    "PolicyScore",
    "group_topology",
    "place_experts",
]

FloatArray = npt.NDArray[np.float64]

CONTIGUOUS, EPLB, HILL_CLIMB, OURS = "contiguous", "eplb", "hill climb", "moe-placement"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyScore:
    """One way to place the experts.

    Parameters
    ----------
    placement
        Where every expert of every MoE layer lives, on the devices of one group.
    fitted
        Objective on the windows that it was fitted to.
    held_out_factor_L
        Load of the fullest device over the mean in each layer, mean over the windows held out,
        ``[layers]``.
    """

    placement: Placement
    fitted: float
    held_out_factor_L: FloatArray

    @property
    def held_out_factor(self) -> float:
        """Load of the fullest device over the mean, over held-out windows and layers."""
        return float(self.held_out_factor_L.mean())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertPlan:
    """Placements of a model's experts on groups of one size.

    Parameters
    ----------
    policies
        All that were compared, by name; `OURS` is never worse than any of them on the fitted windows.
    objective
        What was minimised.
    lower_bound, gap
        Lower bound on the fitted objective, and how far ours may be from the best.
    """

    policies: Mapping[str, PolicyScore]
    objective: Objective
    lower_bound: float
    gap: float

    @property
    def ours(self) -> PolicyScore:
        """The placement that is recommended."""
        return self.policies[OURS]


def group_topology(topology: Topology, mesh: Mesh, *, bytes_per_device: int) -> Topology:
    """Return the devices of one expert-parallel group with the tiers between them.

    Parameters
    ----------
    bytes_per_device
        What each device's experts of all layers weigh: stages share them, and the memory of stages has been
        checked by then.
    """
    sizes = [int(group_sizes[0]) for group_sizes in topology.group_sizes]
    members = members_per_level(sizes, count=mesh.expert, stride=mesh.tensor)
    device_D = np.arange(mesh.expert)
    tiers: list[Tier] = []
    for tier, within in zip(topology.tiers, members, strict=True):
        group_D = device_D // within
        bandwidth_D = np.full(mesh.expert, float(tier.bandwidth_D[0]))
        tiers.append(replace(tier, group_D=group_D, bandwidth_D=bandwidth_D, ports=None))
        if within >= mesh.expert:
            break
    return Topology(
        name=f"{topology.name}, expert-parallel group",
        kinds=(topology.kind_of(0),),
        kind_of_device_D=np.zeros(mesh.expert, dtype=np.int64),
        tiers=tuple(tiers),
        memory_bytes_D=np.full(mesh.expert, bytes_per_device, dtype=np.int64),
    )


def place_experts(
    profile: RoutingProfile,
    topology: Topology,
    model: ModelShape,
    mesh: Mesh,
    *,
    calibration: Calibration,
    objective: Objective = Objective.BALANCE,
    max_swaps: int | None = None,
    seed: int = 0,
    work_s: float | None = None,
) -> ExpertPlan:
    """Place the experts on every other window and score all policies on the windows between.

    Ours starts from the best of the others, so that it is never worse on the fitted windows.

    Parameters
    ----------
    model
        The model, its experts whole.
    max_swaps
        Limit of Piper's hill climbing for each layer; None for no limit.
    work_s
        Effort of our solver, seconds of one thread; None for its own choice.

    Raises
    ------
    InputError
        If the traffic is not the model's, or has a single window.
    """
    # Loads decide alone: every token-expert pair travels, wherever its token lives.
    loads = replace(profile, experts_TLK=None, window_of_token_T=None, home_T=None)
    fit, held_out = loads.split_alternate()
    split = replace(model, expert_hidden_size=model.expert_hidden_size // mesh.tensor)
    held = model.num_experts // mesh.expert * model.num_layers * split.bytes_per_expert()
    problem = make_problem(
        fit,
        group_topology(topology, mesh, bytes_per_device=held),
        model=split,
        semantics=Semantics.DISPATCH_NODEDUP,
        objective=objective,
        calibration=calibration,
    )
    cost = CostModel(problem)
    placements = _others(cost, max_swaps=max_swaps, seed=seed)
    best = min(placements.values(), key=cost.objective)
    solution = optimize(problem, seed=seed, work_s=work_s, start=best)
    placements[OURS] = solution.placement
    scorer = CostModel(problem.with_profile(held_out))
    ours = cost.objective(solution.placement)
    return ExpertPlan(
        policies={
            name: PolicyScore(
                placement=placement,
                fitted=cost.objective(placement),
                held_out_factor_L=scorer.evaluate(placement).balance_WL.mean(axis=0),
            )
            for name, placement in placements.items()
        },
        objective=objective,
        lower_bound=min(solution.lower_bound, ours),
        gap=relative_gap(ours, solution.lower_bound),
    )


def _others(cost: CostModel, *, max_swaps: int | None, seed: int) -> dict[str, Placement]:
    """Return the placements of engines and of Piper."""
    problem = cost.problem
    contiguous = contiguous_placement(problem)
    device_LE, _ = climb(
        problem.profile.load_WLE.sum(axis=0),
        contiguous.first_device_LE,
        num_devices=problem.num_devices,
        max_swaps=max_swaps,
    )
    request = SolveRequest(problem=problem, model=cost, stop=Never(), seed=seed)
    # Devices hold equally many experts before and after a swap: ordered by device, they fill the slots.
    climbed = contiguous.with_layers(np.argsort(device_LE, axis=1, kind="stable"))
    return {
        CONTIGUOUS: contiguous,
        EPLB: EplbSolver().solve(request),
        HILL_CLIMB: climbed,
    }
