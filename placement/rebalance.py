"""Drop-in for DeepSeek's EPLB: the same call and the same maps, with more even loads.

Shape letters: L MoE layers, E experts, R replicas (physical slots, device by device), X most replicas of
one expert, N nodes, G devices ("GPUs"), W windows, M experts of a node.
"""

from __future__ import annotations

import heapq
import sys
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from placement.errors import InfeasibleError, InputError
from placement.plan import EMPTY
from placement.solvers import eplb
from placement.solvers.balance import balance_layers
from placement.solvers.packing import check_weight
from placement.solvers.replicas import logical_to_physical, without_duplicates

__all__ = ["rebalance_experts"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

SMALLEST = float(np.finfo(np.float64).tiny)

GROUP_NODES = 200_000
"""Tree nodes spent per layer on packing expert groups onto nodes: exact for 16 groups or so."""

LEAST_STEPS = 16
SHARES = 3
"""Steps that a layer is followed when moves are limited: `SHARES` times its share, at least `LEAST_STEPS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """What is to be placed where; groups and nodes are 1 where groups need not stay whole."""

    num_replicas: int
    num_groups: int
    num_nodes: int
    num_gpus: int


def rebalance_experts(
    weight: npt.ArrayLike,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    windows: npt.ArrayLike | None = None,
    previous: npt.ArrayLike | None = None,
    max_moves: int | None = None,
    seed: int = 0,
) -> tuple[IntArray, IntArray, IntArray]:
    """Place experts and replicas evenly; call and results as `rebalance_experts` of DeepSeek's EPLB.

    Where the nodes divide the expert groups, groups stay whole on a node. Unlike EPLB it never puts an
    expert twice on a device; its fullest device is never fuller than that of EPLB's answer with such
    duplicates repaired.

    Parameters
    ----------
    weight
        Load of each expert, ``[layers, experts]``. With a torch tensor the results are tensors too.
    num_replicas
        Physical slots per layer; a multiple of `num_gpus`.
    num_groups
        Expert groups of the model (1 where its routing knows none).
    num_nodes, num_gpus
        Nodes, and devices of all nodes; a multiple of `num_nodes`.
    windows
        Loads of several windows, ``[windows, layers, experts]``: if given, the mean over windows of fullest /
        mean device is lowered, starting from the most even placement of `weight`.
    previous
        Expert of each slot as it is now, ``[layers, replicas]``: devices are numbered so that most replicas
        stay where they are, and those that stay keep their slot.
    max_moves
        Replicas, of all layers together, that devices without them may receive; needs `previous`. What is
        not moved stays as it was: the promises about EPLB and about groups end here.
    seed
        Seed; the same arguments give the same maps.

    Returns
    -------
    phy2log, log2phy, logcnt
        Expert of each slot, ``[layers, replicas]``; slots of each expert, padded with -1, ``[layers, experts,
        most replicas]``; replicas of each expert, ``[layers, experts]``.

    Raises
    ------
    InputError
        If an argument is malformed, or groups and nodes do not divide experts and devices.
    InfeasibleError
        If there are fewer slots than experts, slots do not divide evenly over the devices, or a device has
        more slots than there are experts for it.
    """
    weight_LE = check_weight(_as_numpy(weight), name="weight").astype(np.float64)
    # EPLB checks what its signature asks for; its answer is what ours is measured by.
    scaled_LE = weight_LE / max(float(weight_LE.max()), SMALLEST)
    theirs = eplb.rebalance_experts(scaled_LE, num_replicas, num_groups, num_nodes, num_gpus)
    sizes = _sizes(weight_LE.shape[1], num_replicas, num_groups, num_nodes, num_gpus)
    load_WLE = None if windows is None else _check_windows(_as_numpy(windows), weight_LE)
    score_WLE = weight_LE[None] if load_WLE is None else load_WLE
    before_LR = None if previous is None else _check_previous(_as_numpy(previous), weight_LE, sizes)
    if max_moves is not None and (before_LR is None or max_moves < 0):
        raise InputError(f"max_moves is {max_moves}; it goes with previous and must be 0 or more")
    map_LR = _place(weight_LE, load_WLE, sizes, seed)
    map_LR = _better_of(map_LR, theirs[0], scaled_LE, score_WLE, sizes)
    if before_LR is not None:
        map_LR = _keep_places(map_LR, before_LR, sizes)
        if max_moves is not None:
            map_LR = _limit_moves(map_LR, before_LR, weight_LE, score_WLE, sizes, max_moves)
    log2phy, logcnt = logical_to_physical(map_LR, weight_LE.shape[1])
    return _like(weight, map_LR, log2phy, logcnt)


# ------------------------------------------------------------------------------------------ what is taken in


def _torch() -> Any:
    """Return torch where the caller has loaded it, else None: nobody else has tensors."""
    return sys.modules.get("torch")


def _as_numpy(values: Any) -> npt.ArrayLike:
    torch = _torch()
    if torch is None or not isinstance(values, torch.Tensor):
        return cast("npt.ArrayLike", values)
    tensor = values.detach().cpu()
    if tensor.is_floating_point():
        # numpy has no bfloat16; double precision holds every other type.
        tensor = tensor.double()
    return cast("npt.ArrayLike", tensor.numpy())


def _like(weight: Any, *results: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    torch = _torch()
    if torch is None or not isinstance(weight, torch.Tensor):
        return cast("tuple[IntArray, IntArray, IntArray]", results)
    tensors = tuple(torch.from_numpy(np.ascontiguousarray(result)) for result in results)
    return cast("tuple[IntArray, IntArray, IntArray]", tensors)


def _sizes(num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> _Sizes:
    """Choose the policy; no device may need an expert twice."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    experts, slots = num_experts // num_nodes, num_replicas // num_gpus
    if slots > experts:
        raise InfeasibleError(
            f"{slots} slots per GPU cannot be filled from {experts} experts without holding one twice; use "
            f"at most {experts * num_gpus} replicas"
        )
    return _Sizes(num_replicas=num_replicas, num_groups=num_groups, num_nodes=num_nodes, num_gpus=num_gpus)


def _check_windows(values: npt.ArrayLike, weight_LE: FloatArray) -> FloatArray:
    try:
        load_WLE = np.asarray(values)
    except ValueError as exc:
        raise InputError("windows must be a table [windows, layers, experts]") from exc
    if load_WLE.ndim != 3 or load_WLE.shape[1:] != weight_LE.shape or not len(load_WLE):
        raise InputError(
            f"windows has shape {load_WLE.shape}, not [windows, {weight_LE.shape[0]}, {weight_LE.shape[1]}]"
        )
    rows = load_WLE.reshape(-1, load_WLE.shape[2])
    return check_weight(rows, name="windows").astype(np.float64).reshape(load_WLE.shape)


def _check_previous(values: npt.ArrayLike, weight_LE: FloatArray, sizes: _Sizes) -> IntArray:
    """Return a placement that could have come from here: whole, and without duplicates."""
    before_LR = np.asarray(values)
    shape = (weight_LE.shape[0], sizes.num_replicas)
    if before_LR.shape != shape or before_LR.dtype.kind not in "iu":
        raise InputError(
            f"previous has shape {before_LR.shape} of {before_LR.dtype}, not {list(shape)} of expert ids"
        )
    before_LR = before_LR.astype(np.int64)
    _, count_LE = logical_to_physical(before_LR, weight_LE.shape[1])
    if (count_LE == 0).any():
        layer, expert = (int(i[0]) for i in np.nonzero(count_LE == 0))
        raise InputError(f"previous gives expert {expert} of layer {layer} no slot")
    sorted_LGR = np.sort(before_LR.reshape(shape[0], sizes.num_gpus, -1), axis=2)
    twice = np.nonzero(np.diff(sorted_LGR, axis=2) == 0)
    if twice[0].size:
        raise InputError(f"previous holds an expert of layer {twice[0][0]} twice on GPU {twice[1][0]}")
    return before_LR


# --------------------------------------------------------------------------------------------- the placement


def _place(weight_LE: FloatArray, load_WLE: FloatArray | None, sizes: _Sizes, seed: int) -> IntArray:
    gpus, slots = sizes.num_gpus // sizes.num_nodes, sizes.num_replicas // sizes.num_gpus
    slots_D = np.full(gpus, slots, dtype=np.int64)
    if sizes.num_nodes == 1:
        return balance_layers(weight_LE, slots_D, load_WLE=load_WLE, seed=seed)
    expert_LNM = _experts_of_nodes(weight_LE, sizes)
    map_LNR = np.empty((len(weight_LE), sizes.num_nodes, gpus * slots), dtype=np.int64)
    for node in range(sizes.num_nodes):
        expert_LM = expert_LNM[:, node]
        local = balance_layers(
            np.take_along_axis(weight_LE, expert_LM, axis=1),
            slots_D,
            load_WLE=None if load_WLE is None else np.take_along_axis(load_WLE, expert_LM[None], axis=2),
            per_window=False,
            seed=seed,
        )
        map_LNR[:, node] = np.take_along_axis(expert_LM, local, axis=1)
    return map_LNR.reshape(len(weight_LE), -1)


def _experts_of_nodes(weight_LE: FloatArray, sizes: _Sizes) -> IntArray:
    """Pack whole groups onto nodes so that the fullest node is emptiest, ``[layers, nodes, experts]``."""
    from placement.solvers.balance.kernels import partition_equal

    num_layers, num_experts = weight_LE.shape
    expert_GM = np.arange(num_experts).reshape(sizes.num_groups, -1)
    expert_LNM = np.empty((num_layers, sizes.num_nodes, num_experts // sizes.num_nodes), dtype=np.int64)
    for layer, weight_E in enumerate(weight_LE):
        load_G = weight_E[expert_GM].sum(axis=1)
        node_G = partition_equal(load_G / max(load_G.max(), SMALLEST), sizes.num_nodes, GROUP_NODES)
        groups = np.argsort(node_G, kind="stable").reshape(sizes.num_nodes, -1)
        expert_LNM[layer] = expert_GM[groups].reshape(sizes.num_nodes, -1)
    return expert_LNM


def _fullest(map_LR: IntArray, score_WLE: FloatArray, num_gpus: int) -> FloatArray:
    """Mean over windows of fullest / mean device, by layer; 0 where no window has load."""
    fullest_L = np.empty(len(map_LR))
    for layer, row_R in enumerate(map_LR):
        load_WE = score_WLE[:, layer]
        share_WE = load_WE / np.bincount(row_R, minlength=load_WE.shape[1])
        load_WG = share_WE[:, row_R].reshape(len(load_WE), num_gpus, -1).sum(axis=2)
        mean_W = load_WG.mean(axis=1)
        ratio_W = np.divide(load_WG.max(axis=1), mean_W, out=np.zeros_like(mean_W), where=mean_W > 0)
        fullest_L[layer] = ratio_W.mean()
    return fullest_L


def _better_of(
    map_LR: IntArray, theirs_LR: IntArray, scaled_LE: FloatArray, score_WLE: FloatArray, sizes: _Sizes
) -> IntArray:
    """Take EPLB's layers, repaired, where they are more even."""
    better_L = _fullest(theirs_LR, score_WLE, sizes.num_gpus) < _fullest(map_LR, score_WLE, sizes.num_gpus)
    _, count_LE = logical_to_physical(theirs_LR, scaled_LE.shape[1])
    # More replicas than devices cannot be repaired, and with groups a repair must stay inside the node.
    layers = np.nonzero(better_L & (count_LE.max(axis=1) <= sizes.num_gpus // sizes.num_nodes))[0]
    if not layers.size:
        return map_LR
    repaired = without_duplicates(
        theirs_LR[layers], sizes.num_gpus, scaled_LE[layers], num_nodes=sizes.num_nodes
    )
    ours, theirs = (
        _fullest(rows, score_WLE[:, layers], sizes.num_gpus) for rows in (map_LR[layers], repaired)
    )
    whole = _same_nodes(theirs_LR[layers], repaired, sizes.num_nodes)
    result = map_LR.copy()
    chosen = (theirs < ours) & whole
    result[layers[chosen]] = repaired[chosen]
    return result


def _same_nodes(a_LR: IntArray, b_LR: IntArray, num_nodes: int) -> npt.NDArray[np.bool_]:
    """Whether every node of a layer holds the same replicas in both maps."""
    a, b = (np.sort(rows.reshape(len(rows), num_nodes, -1), axis=2) for rows in (a_LR, b_LR))
    return np.asarray((a == b).all(axis=(1, 2)))


# ---------------------------------------------------------------------------------- from where things are now


def _keep_places(map_LR: IntArray, before_LR: IntArray, sizes: _Sizes) -> IntArray:
    """Number nodes and devices so that most replicas stay, and let those that stay keep their slot."""
    kept = np.empty_like(map_LR)
    shape = (sizes.num_nodes, sizes.num_gpus // sizes.num_nodes, -1)
    for layer, (after_R, before_R) in enumerate(zip(map_LR, before_LR, strict=True)):
        after_NGS = _relabel(after_R.reshape(shape), before_R.reshape(shape), int(map_LR.max()) + 1)
        rows = zip(after_NGS.reshape(sizes.num_gpus, -1), before_R.reshape(sizes.num_gpus, -1), strict=True)
        kept[layer] = np.concatenate([_same_slots(after_S, before_S) for after_S, before_S in rows])
    return kept


def _relabel(after_NGS: IntArray, before_NGS: IntArray, num_experts: int) -> IntArray:
    """Order nodes, and devices within them, for the largest overlap: two levels of linear assignment."""
    from scipy.optimize import linear_sum_assignment

    num_nodes, num_gpus, _ = after_NGS.shape
    held = np.zeros((2, num_nodes * num_gpus, num_experts), dtype=np.float32)
    for side, content in zip(held, (before_NGS, after_NGS), strict=True):
        side[np.arange(num_nodes * num_gpus)[:, None], content.reshape(num_nodes * num_gpus, -1)] = 1.0
    common = (held[0] @ held[1].T).reshape(num_nodes, num_gpus, num_nodes, num_gpus).swapaxes(1, 2)
    stays_NN = np.zeros((num_nodes, num_nodes))
    gpu_NNG = np.zeros((num_nodes, num_nodes, num_gpus), dtype=np.int64)
    for here in range(num_nodes):
        for there in range(num_nodes):
            row, column = linear_sum_assignment(common[here, there], maximize=True)
            stays_NN[here, there] = common[here, there][row, column].sum()
            gpu_NNG[here, there] = column
    _, node_N = linear_sum_assignment(stays_NN, maximize=True)
    return np.stack([after_NGS[there, gpu_NNG[here, there]] for here, there in enumerate(node_N)])


def _same_slots(after_S: IntArray, before_S: IntArray) -> IntArray:
    """Order a device's experts so that those it held keep their slot."""
    stays_S = np.isin(before_S, after_S)
    row_S = np.where(stays_S, before_S, EMPTY)
    row_S[~stays_S] = after_S[~np.isin(after_S, before_S)]
    return row_S


def _num_moves(after_R: IntArray, before_R: IntArray, num_gpus: int) -> int:
    """Replicas that devices receive which did not hold them."""
    after_GS, before_GS = after_R.reshape(num_gpus, -1), before_R.reshape(num_gpus, -1)
    # No GPU holds an expert twice, so that slots without a partner are experts received.
    return int((~(after_GS[:, :, None] == before_GS[:, None, :]).any(axis=2)).sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Stage:
    """A layer after some moves."""

    moves: int
    value: float
    row_R: IntArray


def _limit_moves(
    map_LR: IntArray,
    before_LR: IntArray,
    weight_LE: FloatArray,
    score_WLE: FloatArray,
    sizes: _Sizes,
    max_moves: int,
) -> IntArray:
    """Spend the moves where they lower the fullest devices most: best gain per move first."""
    if sum(_num_moves(a, b, sizes.num_gpus) for a, b in zip(map_LR, before_LR, strict=True)) <= max_moves:
        return map_LR
    result = before_LR.copy()
    # The budget is for all layers: none is followed much further than its share, or a call takes seconds.
    most_steps = min(max_moves, max(LEAST_STEPS, SHARES * max_moves // len(map_LR)))
    stages = [
        _stages(
            before_LR[layer],
            map_LR[layer],
            weight_LE[layer],
            score_WLE[:, [layer]],
            sizes,
            max_moves,
            most_steps,
        )
        for layer in range(len(map_LR))
    ]
    at_L = [0] * len(map_LR)
    offers: list[tuple[float, int, int]] = []

    def offer(layer: int, left: int) -> None:
        """Queue the affordable stage of a layer with the best gain per move."""
        now = stages[layer][at_L[layer]]
        for at, later in enumerate(stages[layer][at_L[layer] + 1 :], start=at_L[layer] + 1):
            if later.moves - now.moves <= left:
                gain = (now.value - later.value) / (later.moves - now.moves)
                heapq.heappush(offers, (-gain, layer, at))

    left = max_moves
    for layer in range(len(map_LR)):
        offer(layer, left)
    while offers:
        _, layer, at = heapq.heappop(offers)
        cost = stages[layer][at].moves - stages[layer][at_L[layer]].moves
        if at > at_L[layer] and cost <= left:
            left -= cost
            at_L[layer] = at
            result[layer] = stages[layer][at].row_R
            offer(layer, left)
    return result


def _stages(
    before_R: IntArray,
    after_R: IntArray,
    weight_E: FloatArray,
    score_W1E: FloatArray,
    sizes: _Sizes,
    max_moves: int,
    most_steps: int,
) -> list[_Stage]:
    """List ever better states of a layer by moves: step by step from the old one, and the new one."""
    from placement.solvers.balance.kernels import improve_once

    def stage(row_R: IntArray) -> _Stage:
        value = float(_fullest(row_R[None], score_W1E, sizes.num_gpus)[0])
        return _Stage(moves=_num_moves(row_R, before_R, sizes.num_gpus), value=value, row_R=row_R.copy())

    # Steps know no groups: with several nodes they are made inside the one with the fullest device.
    size = sizes.num_replicas // sizes.num_nodes
    gpus = sizes.num_gpus // sizes.num_nodes
    starts = np.arange(gpus + 1, dtype=np.int64) * (size // gpus)
    share_E = weight_E / max(float(weight_E.max()), SMALLEST)
    found, row_R = [stage(before_R)], before_R.copy()
    candidates = [stage(after_R)]
    for _ in range(most_steps):
        peak_N = (
            (share_E / np.bincount(row_R))[row_R].reshape(sizes.num_nodes, gpus, -1).sum(axis=2).max(axis=1)
        )
        node = int(np.argmax(peak_N))
        part = slice(node * size, (node + 1) * size)
        experts, local = np.unique(row_R[part], return_inverse=True)
        local = local.astype(np.int64)
        if not improve_once(share_E[experts], np.ones(gpus), starts, local):
            break
        row_R[part] = experts[local]
        candidates.append(stage(row_R))
        if candidates[-1].moves > max_moves:
            break
    for candidate in sorted(candidates, key=lambda one: (one.moves, one.value)):
        if candidate.value < found[-1].value and candidate.moves > found[-1].moves:
            found.append(candidate)
    return found
