"""Placement on several nodes: expert groups on nodes first, then relaxed as far as even loads ask for.

A token's copy crosses the network once per node that it visits. Experts of a gating group (or experts that
fire together) therefore share a node; where that overloads a node, its hot experts get copies on emptier
nodes, which costs no visit because tokens read a replicated expert where they are anyway, and only then do
single experts change nodes, those first whose tokens visit the other node already. How far to go is
decided per layer by the cost model.

Shape letters: C candidates, W windows, L MoE layers, E experts, S slots, N nodes, D devices, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.cost import CostModel
from placement.errors import InputError
from placement.plan import Placement
from placement.problem import Objective, PlacementProblem
from placement.solvers.balance.layers import device_starts
from placement.solvers.hierarchy.groups import cluster_experts, group_homes
from placement.solvers.protocol import SolveRequest
from placement.solvers.split_price import sample_tokens

__all__ = ["HierarchySolver", "layer_node_fanout"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

BALANCE_LIMIT = 1.02
"""Fullest / mean device of summed loads, mean over layers, up to which visits are saved first where the
objective is balance."""

SLACKS = (
    *(np.inf, 1.0, 0.7, 0.5, 0.4, 0.35, 0.3, 0.26, 0.22, 0.19),
    *(0.16, 0.13, 0.1, 0.08, 0.06, 0.04, 0.02, 0.01, 0.0),
)
"""How far above its fair load the experts at home on a node may carry it, before copies take load off."""

MAX_TOKENS = 16_384
"""Tokens that are searched on; with 256 experts of which a token takes 8, some 500 for each."""

WORK_PER_LAYER = 3_000_000
"""Pairs of experts looked at per candidate."""

WORK_S_PER_LAYER = 0.3
"""Effort in seconds of one thread that this is."""

TOLERANCE = 1e-3
"""Relative distance to the mean at which exchanges between devices end."""

MOST_STARTS = 2
"""Homes to start from, per layer."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Cluster:
    """Slots, devices and speeds by node; nodes numbered in the order of their first device."""

    node_D: IntArray
    start_D: IntArray
    used_S: IntArray
    speed_D: FloatArray
    slots_N: IntArray
    devices_N: IntArray
    speed_N: FloatArray

    @property
    def alike(self) -> bool:
        """Whether nodes may change places."""
        return all(len(set(values.tolist())) == 1 for values in (self.slots_N, self.devices_N, self.speed_N))


def _cluster(problem: PlacementProblem) -> _Cluster:
    node_of_D = problem.topology.node_of_device_D
    order_N = np.argsort(np.unique(node_of_D, return_index=True)[1], kind="stable")
    node_D = np.argsort(order_N, kind="stable")[node_of_D].astype(np.int64)
    start_D, used_S = device_starts(problem.slots_D, problem.num_experts)
    speed_D = np.ones(problem.num_devices)
    if problem.objective is Objective.STEP_TIME:
        flops_D = problem.topology.achieved_flops_D
        speed_D = flops_D / flops_D.max()
    nodes = problem.topology.num_nodes
    return _Cluster(
        node_D=node_D,
        start_D=start_D,
        used_S=used_S,
        speed_D=speed_D,
        slots_N=np.bincount(node_D, weights=np.diff(start_D), minlength=nodes).astype(np.int64),
        devices_N=np.bincount(node_D, minlength=nodes).astype(np.int64),
        speed_N=np.bincount(node_D, weights=speed_D, minlength=nodes).astype(np.float64),
    )


def _homes(num_experts: int, slots_N: IntArray) -> IntArray:
    """Experts at home on each node: in proportion to its slots."""
    exact_N = num_experts * slots_N / slots_N.sum()
    homes_N = np.floor(exact_N).astype(np.int64)
    rest = num_experts - int(homes_N.sum())
    homes_N[np.argsort(homes_N - exact_N, kind="stable")[:rest]] += 1
    return np.asarray(homes_N)


def _sampled_tokens(problem: PlacementProblem) -> npt.NDArray[np.unsignedinteger] | None:
    experts_TLK = problem.profile.experts_TLK
    if experts_TLK is None:
        return None
    every = max(1, -(-len(experts_TLK) // MAX_TOKENS))
    return np.asarray(experts_TLK[::every])


class HierarchySolver:
    """Homes on nodes, copies, devices; candidates from whole groups to perfectly even nodes."""

    name = "hierarchy"

    def solve(self, request: SolveRequest) -> Placement:
        """Return the best mix of candidates: for each layer the one that suits the objective best.

        For step time that is the least predicted time. For traffic it is the fewest node visits among those
        whose fullest device carries at most `max_imbalance` times the mean; for balance the same with
        `BALANCE_LIMIT` for the mean over layers.

        Raises
        ------
        InputError
            On one node, or where neither tokens nor the model's expert groups are known.
        """
        problem = request.problem
        _check(problem)
        rows_LCS = [self._layer(request, layer) for layer in range(problem.num_layers)]
        maps_CLS = np.stack(rows_LCS, axis=1)
        candidates = [_placement(problem, map_LS) for map_LS in maps_CLS]
        choice_L = _choose(request, candidates)
        found = _placement(problem, maps_CLS[choice_L, np.arange(problem.num_layers)])
        if request.start is None:
            return found
        return min(request.start, found, key=request.model.objective)

    def _layer(self, request: SolveRequest, layer: int) -> IntArray:
        """Return the candidate rows of a layer, ``[candidates, slots]``."""
        from placement.solvers.hierarchy.kernels import make_cut, search_nodes

        problem, cluster = request.problem, _cluster(request.problem)
        load_E = problem.profile.load_WLE[:, layer].sum(axis=0)
        load_E = load_E / load_E.sum()
        tokens = _sampled_tokens(problem)
        experts_TK = None if tokens is None else np.ascontiguousarray(tokens[:, layer].astype(np.int64))
        starts = _starts(problem, cluster, experts_TK, load_E)
        rows = [_row(cluster, problem.num_slots, load_E, home_E) for home_E in starts]
        fair_N = cluster.speed_N / cluster.speed_N.sum()
        for home_E in starts if experts_TK is not None else ():
            cut = make_cut(experts_TK, load_E, home_E, fair_N.size)
            for slack in SLACKS:
                if request.stop():
                    break
                search_nodes(cut, fair_N * (1 + slack), _work(request))
                rows.append(_row(cluster, problem.num_slots, load_E, cut.node_E))
        return np.stack(rows + [rows[-1]] * (MOST_STARTS * (1 + len(SLACKS)) - len(rows)))


def _check(problem: PlacementProblem) -> None:
    if problem.topology.num_nodes == 1:
        raise InputError("hierarchy places experts on several nodes and there is one; use --solver balance")
    groups = 1 if problem.model is None else problem.model.num_expert_groups
    if problem.profile.num_sampled_tokens == 0 and groups == 1:
        raise InputError(
            "hierarchy needs the tokens' experts or the model's expert groups, and the trace has counts "
            "only; use --solver balance, or name a --model with expert groups"
        )


def _work(request: SolveRequest) -> int:
    if request.work_s is None:
        return WORK_PER_LAYER
    return int(WORK_PER_LAYER * request.work_s / (WORK_S_PER_LAYER * request.problem.num_layers))


def _starts(
    problem: PlacementProblem, cluster: _Cluster, experts_TK: IntArray | None, load_E: FloatArray
) -> list[IntArray]:
    groups = 1 if problem.model is None else problem.model.num_expert_groups
    homes_N = _homes(problem.num_experts, cluster.slots_N)
    if groups > 1 and groups % homes_N.size == 0 and len(set(homes_N.tolist())) == 1:
        return group_homes(experts_TK, load_E, groups, homes_N.size)
    if experts_TK is not None:
        return [cluster_experts(experts_TK, problem.num_experts, homes_N)]
    # Groups that do not divide over the nodes: neighbours stay together.
    return [np.repeat(np.arange(homes_N.size), homes_N)]


def _row(cluster: _Cluster, num_slots: int, load_E: FloatArray, home_E: IntArray) -> IntArray:
    """Place homes, copies and devices of a layer."""
    from placement.solvers.hierarchy.kernels import place_copies, place_on_devices

    if cluster.alike:
        # Fullest node first: its copies then lie on later nodes, where they are read in passing only.
        load_N = np.bincount(home_E, weights=load_E, minlength=cluster.slots_N.size)
        home_E = np.argsort(np.argsort(-load_N, kind="stable"), kind="stable")[home_E]
    count_EN = place_copies(load_E, home_E, cluster.slots_N, cluster.devices_N, cluster.speed_N)
    row_S = np.full(num_slots, -1, dtype=np.int64)
    row_S[cluster.used_S] = place_on_devices(
        load_E, cluster.speed_D, cluster.start_D, cluster.node_D, count_EN, TOLERANCE
    )
    return row_S


def _placement(problem: PlacementProblem, map_LS: IntArray) -> Placement:
    return Placement(
        physical_to_logical_map_LS=map_LS,
        device_of_slot_S=problem.device_of_slot_S,
        num_experts=problem.num_experts,
        num_devices=problem.num_devices,
    )


def _choose(request: SolveRequest, candidates: list[Placement]) -> IntArray:
    """Return the best candidate of each layer."""
    problem = request.problem
    if problem.objective is Objective.STEP_TIME:
        return np.asarray(np.argmin(_times(request, candidates), axis=0))
    balance_CL = np.stack([_layer_balance(problem, placement) for placement in candidates])
    visits_CL = np.stack([layer_node_fanout(problem, placement) for placement in candidates])
    if problem.objective is Objective.BALANCE:
        return _fewest_visits(visits_CL, balance_CL, BALANCE_LIMIT)
    excess_CL = np.maximum(balance_CL - problem.max_imbalance, 0.0)
    return np.asarray(np.lexsort((visits_CL, excess_CL), axis=0)[0])


def _times(request: SolveRequest, candidates: list[Placement]) -> FloatArray:
    """Mean step time of each layer on a sample of tokens, ``[candidates, layers]``; of fewer when stopped."""
    profile = sample_tokens(request.problem.profile, MAX_TOKENS, request.seed)
    model = CostModel(request.problem.with_profile(profile))
    time_CL: list[FloatArray] = []
    for placement in candidates:
        if time_CL and request.stop():
            break
        cost = model.evaluate(placement)
        time_CL.append((cost.experts_WL + cost.dispatch_WL + cost.combine_WL).mean(axis=0))
    return np.stack(time_CL)


def _fewest_visits(visits_CL: FloatArray, balance_CL: FloatArray, limit: float) -> IntArray:
    """Choose candidates with the fewest visits whose balance is on the mean over layers within a limit.

    A price on balance, the same for all layers, decides each layer; the lowest price that keeps the limit
    is found by bisection (Lagrangian relaxation). The most even candidates where none does.
    """
    best_L = np.lexsort((visits_CL, balance_CL), axis=0)[0]
    layers = np.arange(best_L.size)
    low, high = -6.0, 6.0  # powers of ten
    for _ in range(40):
        middle = (low + high) / 2
        choice_L = np.argmin(visits_CL + 10.0**middle * balance_CL, axis=0)
        if balance_CL[choice_L, layers].mean() <= limit:
            best_L, high = choice_L, middle
        else:
            low = middle
    return _spend(visits_CL, balance_CL, limit, np.asarray(best_L))


def _spend(visits_CL: FloatArray, balance_CL: FloatArray, limit: float, choice_L: IntArray) -> IntArray:
    """Use up what one price for all layers leaves of the limit: the largest affordable saving first."""
    layers = np.arange(choice_L.size)
    while True:
        left = limit * layers.size - balance_CL[choice_L, layers].sum()
        saved_CL = visits_CL[choice_L, layers] - visits_CL
        affordable_CL = balance_CL - balance_CL[choice_L, layers] <= left
        saved_CL = np.where(affordable_CL, saved_CL, 0.0)
        candidate, layer = np.unravel_index(int(np.argmax(saved_CL)), saved_CL.shape)
        if saved_CL[candidate, layer] <= 0:
            return choice_L
        choice_L = choice_L.copy()
        choice_L[layer] = candidate


def _layer_balance(problem: PlacementProblem, placement: Placement) -> FloatArray:
    share_LED = placement.count_LED / placement.replicas_LE[:, :, None]
    load_LD = np.matmul(problem.profile.load_WLE.sum(axis=0)[:, None], share_LED)[:, 0]
    return np.asarray(load_LD.max(axis=1) / load_LD.mean(axis=1))


def layer_node_fanout(problem: PlacementProblem, placement: Placement) -> FloatArray:
    """Distinct nodes per sampled token in every layer, as the cost model counts them; 0 without tokens."""
    from placement.cost.kernels import count_touches

    experts_TLK = problem.profile.experts_TLK
    if experts_TLK is None:
        return np.zeros(problem.num_layers)
    num_tokens, num_devices = len(experts_TLK), problem.num_devices
    zero_T = np.zeros(num_tokens, dtype=np.int64)
    fanout_L = np.zeros(problem.num_layers)
    for layer in range(problem.num_layers):
        fanout_1W = np.zeros((1, 1), dtype=np.int64)
        count_touches(
            np.ascontiguousarray(experts_TLK[:, layer]),
            zero_T,
            zero_T,
            placement.first_device_LE[layer],
            placement.replicas_LE[layer],
            placement.count_LED[layer],
            problem.topology.node_of_device_D[None],
            np.zeros((1, 1, num_devices)),
            fanout_1W,
            np.zeros((1, 1, num_devices)),
        )
        fanout_L[layer] = fanout_1W[0, 0] / num_tokens
    return fanout_L
