"""Compiled loops of the replica splits: water-filling, picks by hash, and what split tokens touch.

Replicas are numbered by slot: `replica_EX` lists the devices of each expert's replicas, padded with -1. How a
token spreads over the replicas of an expert is given in one of two ways: by its hash (then it picks replica
``hash mod replicas``), or by a row of shares, each the probability that it picks that replica, independently
of its other experts.

Shape letters: T tokens, N tokens counted, K top-k, W windows, E experts, X most replicas of one expert,
R rows of shares, D devices, J links, G groups of a link.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

__all__ = ["count_pairs", "count_picks", "count_split_touches", "water_fill"]

Array = npt.NDArray[Any]

_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


@nb.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _surface(level_X: Array, order_X: Array, num: int, amount: float) -> float:
    """Return how high some water stands in `num` joined vessels with floors `level_X`."""
    for x in range(num):
        place = x
        while place > 0 and level_X[order_X[place - 1]] > level_X[x]:
            order_X[place] = order_X[place - 1]
            place -= 1
        order_X[place] = x
    water = amount + level_X[order_X[0]]
    wet = 1
    while wet < num and water > wet * level_X[order_X[wet]]:
        water += level_X[order_X[wet]]
        wet += 1
    return float(water / wet)


@nb.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def water_fill(
    load_WE: Array,
    replica_EX: Array,
    replicas_E: Array,
    num_devices: int,
    tolerance: float,
    most_sweeps: int,
    share_WEX: Array,
) -> None:
    """Split every window's loads so that the fullest device is as light as can be.

    Block-coordinate descent on the sum of squared device loads, from the even split: each replicated expert
    in turn pours its load over its devices, emptiest first, until a sweep moves no more than `tolerance`
    mean device loads. The limit is the most even vector of device loads that any split attains, whose
    largest entry is the optimum of the linear programme: bipartite assignments span a base polytope, on which
    one vector minimises every symmetric convex function at once (Megiddo 1974; Fujishige 1980).

    Parameters
    ----------
    share_WEX
        Result: share of each expert's load on each of its replicas.
    """
    num_windows, num_experts = load_WE.shape
    widest = replica_EX.shape[1]
    flow_EX = np.zeros((num_experts, widest))
    load_D = np.zeros(num_devices)
    level_X = np.zeros(widest)
    order_X = np.zeros(widest, dtype=np.int64)
    for window in range(num_windows):
        load_D[:] = 0.0
        total = 0.0
        for expert in range(num_experts):
            total += load_WE[window, expert]
            for x in range(replicas_E[expert]):
                flow_EX[expert, x] = load_WE[window, expert] / replicas_E[expert]
                load_D[replica_EX[expert, x]] += flow_EX[expert, x]
        least_change = tolerance * total / num_devices
        for _ in range(most_sweeps):
            change = 0.0
            for expert in range(num_experts):
                amount = load_WE[window, expert]
                if replicas_E[expert] == 1 or amount == 0.0:
                    continue
                num = replicas_E[expert]
                for x in range(num):
                    level_X[x] = load_D[replica_EX[expert, x]] - flow_EX[expert, x]
                surface = _surface(level_X, order_X, num, amount)
                for x in range(num):
                    flow = max(surface - level_X[x], 0.0)
                    change = max(change, abs(flow - flow_EX[expert, x]))
                    flow_EX[expert, x] = flow
                    load_D[replica_EX[expert, x]] = level_X[x] + flow
            if change <= least_change:
                break
        for expert in range(num_experts):
            num = replicas_E[expert]
            for x in range(num):
                amount = load_WE[window, expert]
                share_WEX[window, expert, x] = flow_EX[expert, x] / amount if amount > 0.0 else 1.0 / num


@nb.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def count_picks(
    experts_TK: Array, window_T: Array, hash_T: Array, replicas_E: Array, count_WEX: Array
) -> None:
    """Add up how many tokens of each window pick each replica by their hash."""
    num_windows = count_WEX.shape[0]
    for token in range(experts_TK.shape[0]):
        if window_T[token] >= num_windows:
            continue
        for position in range(experts_TK.shape[1]):
            expert = experts_TK[token, position]
            count_WEX[window_T[token], expert, hash_T[token] % replicas_E[expert]] += 1


@nb.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _chances(
    group_D: Array, replica_X: Array, num: int, share_X: Array, group_X: Array, chance_X: Array
) -> int:
    """List the groups of an expert's replicas and the chance of each to be picked; return their number."""
    found = 0
    for x in range(num):
        group = group_D[replica_X[x]]
        place = 0
        while place < found and group_X[place] != group:
            place += 1
        if place == found:
            group_X[place], chance_X[place] = group, 0.0
            found += 1
        chance_X[place] += share_X[x]
    return found


@nb.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def count_split_touches(
    token_N: Array,
    sign: float,
    experts_TK: Array,
    window_T: Array,
    home_row_T: Array,
    hash_T: Array,
    row_T: Array,
    share_REX: Array,
    replica_EX: Array,
    replicas_E: Array,
    group_JD: Array,
    enter_JHG: Array,
    fanout_JW: Array,
    volume_JWG: Array,
) -> None:
    """Add up, per link, what every group is expected to receive in each window, and the groups touched.

    A token touches a group unless none of its experts picks a replica there:
    ``1 - prod over experts (1 - sum of shares in the group)``.

    Parameters
    ----------
    token_N, sign
        Tokens to count, and what to count them by: 1 to add, -1 to take off.
    home_row_T
        Row of `enter_JHG` for each token: 0 unknown, 1 + home device.
    hash_T
        Hash of each token; empty where `share_REX` decides.
    row_T
        Row of `share_REX` of each token.
    fanout_JW, volume_JWG
        Results, added to.
    """
    num_links = group_JD.shape[0]
    by_hash = hash_T.size > 0
    miss_G = np.ones(enter_JHG.shape[2])
    touched_G = np.zeros(enter_JHG.shape[2], dtype=np.int64)
    seen_G = np.full(enter_JHG.shape[2], -1, dtype=np.int64)
    group_X = np.zeros(replica_EX.shape[1], dtype=np.int64)
    chance_X = np.zeros(replica_EX.shape[1])
    for index_N in range(token_N.size):
        token = token_N[index_N]
        window, home = window_T[token], home_row_T[token]
        for link in range(num_links):
            stamp = index_N * num_links + link
            num_touched = 0
            for position in range(experts_TK.shape[1]):
                expert = experts_TK[token, position]
                num = replicas_E[expert]
                if num == 1 or by_hash:
                    pick = 0 if num == 1 else hash_T[token] % num
                    group_X[0], chance_X[0] = group_JD[link, replica_EX[expert, pick]], 1.0
                    num_groups = 1
                else:
                    shares_X = share_REX[row_T[token], expert]
                    num_groups = _chances(
                        group_JD[link], replica_EX[expert], num, shares_X, group_X, chance_X
                    )
                for x in range(num_groups):
                    group = group_X[x]
                    if seen_G[group] != stamp:
                        seen_G[group] = stamp
                        touched_G[num_touched] = group
                        num_touched += 1
                        miss_G[group] = 1.0
                    miss_G[group] *= max(1.0 - chance_X[x], 0.0)
            for x in range(num_touched):
                group = touched_G[x]
                touch = sign * (1.0 - miss_G[group])
                fanout_JW[link, window] += touch
                volume_JWG[link, window, group] += touch * enter_JHG[link, home, group]


@nb.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def count_pairs(
    experts_TK: Array,
    window_T: Array,
    home_row_T: Array,
    hash_T: Array,
    row_T: Array,
    share_REX: Array,
    replica_EX: Array,
    replicas_E: Array,
    enter_HD: Array,
    pairs_WD: Array,
) -> None:
    """Add up the pairs that are expected to enter every device in each window, as `count_split_touches`."""
    by_hash = hash_T.size > 0
    for token in range(experts_TK.shape[0]):
        window, home = window_T[token], home_row_T[token]
        for position in range(experts_TK.shape[1]):
            expert = experts_TK[token, position]
            num = replicas_E[expert]
            if num == 1 or by_hash:
                device = replica_EX[expert, 0 if num == 1 else hash_T[token] % num]
                pairs_WD[window, device] += enter_HD[home, device]
                continue
            for x in range(num):
                device = replica_EX[expert, x]
                pairs_WD[window, device] += share_REX[row_T[token], expert, x] * enter_HD[home, device]
