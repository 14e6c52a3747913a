"""DeepSeek's expert-parallelism load balancer (EPLB): replicate the hottest experts, pack longest first.

The algorithm as published at https://github.com/deepseek-ai/EPLB: same signature, same results, with equal
loads taken in order of their number where the published code leaves their order to an unstable sort. It
sees average loads only. It may put two replicas of one expert on one device, where the second is wasted;
`placement.solvers.replicas.without_duplicates` repairs that.

Shape letters: L MoE layers, E experts, R replicas (physical slots, device by device), X most replicas of
one expert, N nodes, G devices ("GPUs"), M experts of a node, P replicas of a node; Y = L x N.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InfeasibleError, InputError
from placement.plan import Placement
from placement.solvers.packing import check_weight, pack_equal_ranked
from placement.solvers.protocol import SolveRequest
from placement.solvers.replicas import scatter_slots, without_duplicates

__all__ = ["EplbSolver", "rebalance_experts", "replicate_experts"]

IntArray = npt.NDArray[np.int64]
Weight = npt.NDArray[np.floating[Any]]


def rebalance_experts(
    weight_LE: npt.ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[IntArray, IntArray, IntArray]:
    """Place experts and replicas by their average loads, as DeepSeek's function of the same name does.

    Where the nodes divide the expert groups, the hierarchical policy: groups are packed onto nodes, hot
    experts replicated within their node, replicas packed onto the node's devices. Otherwise the global
    policy: the same with one group and one node.

    Parameters
    ----------
    weight_LE
        Load of each expert, ``[layers, experts]``.
    num_replicas
        Physical slots per layer; a multiple of `num_gpus`.
    num_groups
        Expert groups of the model (1 where its routing knows none).
    num_nodes, num_gpus
        Nodes, and devices of all nodes; a multiple of `num_nodes`.

    Returns
    -------
    physical_to_logical_LR, logical_to_physical_LEX, logical_count_LE
        Expert of each slot; slots of each expert in order of replication, padded with -1; replicas of each
        expert.

    Raises
    ------
    InputError
        If the loads are malformed, or groups and nodes do not divide experts and devices.
    InfeasibleError
        If there are fewer slots than experts, or slots do not divide evenly over the devices.
    """
    weight = _single_precision(weight_LE)
    if num_groups < 1 or num_nodes < 1 or num_gpus < 1:
        raise InputError(f"{num_groups} groups, {num_nodes} nodes, {num_gpus} GPUs; each must be 1 or more")
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    _check_sizes(weight.shape[1], num_replicas, num_groups, num_nodes, num_gpus)
    p2l_LR, rank_LR, count_LE = _hierarchical(weight, num_replicas, num_groups, num_nodes, num_gpus)
    return p2l_LR, scatter_slots(p2l_LR, rank_LR, count_LE), count_LE


def _single_precision(weight_LE: npt.ArrayLike) -> Weight:
    """Round the loads as published, so that near ties fall the same way."""
    weight = check_weight(weight_LE, name="weight")
    with np.errstate(over="ignore"):
        return check_weight(weight.astype(np.float32), name="weight (single precision)")


def _check_sizes(num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> None:
    if num_experts % num_groups:
        raise InputError(f"{num_experts} experts do not form {num_groups} equal groups")
    if num_gpus % num_nodes:
        raise InputError(f"{num_gpus} GPUs do not divide evenly over {num_nodes} nodes")
    if num_replicas < num_experts:
        raise InfeasibleError(
            f"{num_replicas} replicas cannot hold {num_experts} experts; at least {num_experts} are needed"
        )
    if num_replicas % num_gpus:
        raise InfeasibleError(
            f"{num_replicas} replicas do not divide evenly over {num_gpus} GPUs; "
            f"add {-num_replicas % num_gpus} spare slots"
        )


def replicate_experts(weight_LE: Weight, num_replicas: int) -> tuple[IntArray, IntArray, IntArray]:
    """Give each slot beyond one per expert to the expert with the highest load per replica.

    Parameters
    ----------
    weight_LE
        Load of each expert, ``[layers, experts]``.
    num_replicas
        Slots; at least as many as experts.

    Returns
    -------
    expert_LR, rank_LR, count_LE
        Expert of each slot (the first slots hold the experts in order), how many replicas of it came before
        that one, and replicas of each expert.
    """
    num_layers, num_experts = weight_LE.shape
    layer_L = np.arange(num_layers)
    expert_LR = np.tile(np.arange(num_replicas, dtype=np.int64), (num_layers, 1))
    rank_LR = np.zeros((num_layers, num_replicas), dtype=np.int64)
    count_LE = np.ones((num_layers, num_experts), dtype=np.int64)
    per_replica_LE = weight_LE.copy()
    for slot in range(num_experts, num_replicas):
        hottest_L = per_replica_LE.argmax(axis=1)
        expert_LR[:, slot] = hottest_L
        rank_LR[:, slot] = count_LE[layer_L, hottest_L]
        count_LE[layer_L, hottest_L] += 1
        per_replica_LE[layer_L, hottest_L] = _share(
            weight_LE[layer_L, hottest_L], count_LE[layer_L, hottest_L]
        )
    return expert_LR, rank_LR, count_LE


def _share(weight: Weight, count: IntArray) -> Weight:
    """Load per replica, in the precision of the loads."""
    share: Weight = weight / count.astype(weight.dtype)
    return share


def _hierarchical(
    weight_LE: Weight, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[IntArray, IntArray, IntArray]:
    """Return expert and replica rank of each slot, and replicas of each expert."""
    num_layers, num_experts = weight_LE.shape
    expert_of_place_LE = _groups_to_nodes(weight_LE, num_groups, num_nodes)
    weight_YM = np.take_along_axis(weight_LE, expert_of_place_LE, axis=1).reshape(num_layers * num_nodes, -1)
    place_YP, rank_YP, count_YM = replicate_experts(weight_YM, num_replicas // num_nodes)
    replica_weight_YP = np.take_along_axis(_share(weight_YM, count_YM), place_YP, axis=1)
    replica_of_slot_YP = _replicas_to_devices(replica_weight_YP, num_gpus // num_nodes)

    place_YP = np.take_along_axis(place_YP, replica_of_slot_YP, axis=1)
    first_place_N = np.arange(num_nodes)[:, None] * (num_experts // num_nodes)
    place_LR = (place_YP.reshape(num_layers, num_nodes, -1) + first_place_N).reshape(num_layers, -1)
    rank_LR = np.take_along_axis(rank_YP, replica_of_slot_YP, axis=1).reshape(num_layers, -1)
    count_LE = np.empty((num_layers, num_experts), dtype=np.int64)
    np.put_along_axis(count_LE, expert_of_place_LE, count_YM.reshape(num_layers, -1), axis=1)
    return np.take_along_axis(expert_of_place_LE, place_LR, axis=1), rank_LR, count_LE


def _groups_to_nodes(weight_LE: Weight, num_groups: int, num_nodes: int) -> IntArray:
    """Order the experts node by node: expert of each place, ``[layers, experts]``."""
    num_layers, num_experts = weight_LE.shape
    group_weight = weight_LE.reshape(num_layers, num_groups, -1).sum(axis=2)
    node, rank = pack_equal_ranked(group_weight, num_nodes)
    place_of_group = node * (num_groups // num_nodes) + rank
    group_size = num_experts // num_groups
    place_LE = (place_of_group[:, :, None] * group_size + np.arange(group_size)).reshape(num_layers, -1)
    return _inverse(place_LE)


def _replicas_to_devices(weight_YP: Weight, num_devices: int) -> IntArray:
    """Pack replicas onto the devices of their node: replica in each slot, ``[layers x nodes, replicas]``."""
    device, rank = pack_equal_ranked(weight_YP, num_devices)
    return _inverse(device * (weight_YP.shape[1] // num_devices) + rank)


def _inverse(permutation: IntArray) -> IntArray:
    """Invert the permutation in each row."""
    inverse = np.empty_like(permutation)
    np.put_along_axis(inverse, permutation, np.arange(permutation.shape[1])[None, :], axis=1)
    return inverse


class EplbSolver:
    """DeepSeek's balancer as a solver, with experts that it puts twice on a device repaired."""

    name = "eplb"

    def solve(self, request: SolveRequest) -> Placement:
        """Return EPLB's placement on the summed loads; every slot holds a replica.

        Raises
        ------
        InfeasibleError
            If devices have different numbers of slots, which EPLB does not know.
        """
        problem = request.problem
        if len(set(problem.slots_D.tolist())) > 1:
            raise InfeasibleError(
                f"eplb needs equal slots on every device; they are {sorted(set(problem.slots_D.tolist()))}"
            )
        groups = 1 if problem.model is None else problem.model.num_expert_groups
        nodes = problem.topology.num_nodes
        if groups % nodes or problem.num_devices % nodes or len(set(problem.topology.group_sizes[0])) > 1:
            nodes = 1
        load_LE = problem.profile.load_WLE.sum(axis=0)
        map_LS, _, _ = rebalance_experts(load_LE, problem.num_slots, groups, nodes, problem.num_devices)
        map_LS = without_duplicates(map_LS, problem.num_devices, load_LE, num_nodes=nodes)
        return Placement(
            physical_to_logical_map_LS=map_LS,
            device_of_slot_S=problem.device_of_slot_S,
            num_experts=problem.num_experts,
            num_devices=problem.num_devices,
        )
