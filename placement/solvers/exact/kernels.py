"""Compiled loops of the exact solver: partitions of experts into the slots of devices.

Shape letters: N rows of all tables, Y phases, W windows, P positions, M masks, C candidate masks of all
sizes, E experts, S sizes, G groups closing, R masks of one size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt

__all__ = ["MEAN", "PruneState", "Shape", "best_rest", "branch_and_bound", "least_sum", "open_position"]

Array = npt.NDArray[Any]

_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}

MEAN, QUANTILE, WORST = 0, 1, 2
"""How windows are summarised: as `placement.problem.Risk`, in its order."""

PRUNE = 1.0 - 1e-11
"""What cannot be better by more than this factor is cut off; proofs step back further."""


class Shape(NamedTuple):
    """What the compiled search needs to know of a layer: its layout and its subsets.

    `candidate_C` lists masks by size and rank, `start_S` where each size begins, `lowest_SE` where the masks
    of each lowest expert begin within their size. Groups closing at position p are rows
    ``close_P[p]:close_P[p + 1]`` of the group arrays.
    """

    rank_M: Array
    candidate_C: Array
    start_S: Array
    lowest_SE: Array
    size_P: Array
    sibling_P: Array
    opens_P: Array
    row_P: Array
    rest_row_P: Array
    close_P: Array
    group_first_G: Array
    group_sibling_G: Array
    group_row_G: Array


class PruneState(NamedTuple):
    """Where a branch and bound stands; kept between calls so that it can be interrupted."""

    depth_1: Array
    mask_P: Array
    used_P: Array
    next_P: Array
    end_P: Array
    upper_PYW: Array
    best_1: Array
    best_mask_P: Array


@nb.njit(**_OPTIONS)
def _lowest(mask: int) -> int:
    expert = 0
    while mask and not mask & 1:
        mask >>= 1
        expert += 1
    return expert


@nb.njit(**_OPTIONS)
def _candidates(shape: Shape, position: int, used: int, mask_P: Array) -> tuple[int, int]:
    """Range of candidates that may fill a position."""
    size = shape.size_P[position]
    start, end = shape.start_S[size], shape.start_S[size + 1]
    if size == 0:
        return start, end
    rest = (shape.rank_M.size - 1) ^ used
    if position == shape.size_P.size - 1:
        start += shape.rank_M[rest]
        return start, start + 1
    if shape.opens_P[position]:
        lowest = _lowest(rest)
        return start + shape.lowest_SE[size, lowest], start + shape.lowest_SE[size, lowest + 1]
    if shape.sibling_P[position] >= 0:
        start += shape.lowest_SE[size, _lowest(mask_P[shape.sibling_P[position]]) + 1]
    return start, end


@nb.njit(**_OPTIONS)
def open_position(shape: Shape, position: int, state: PruneState) -> None:
    """Begin with the first of the masks that may fill a position."""
    used = state.used_P[position]
    state.next_P[position], state.end_P[position] = _candidates(shape, position, used, state.mask_P)


@nb.njit(**_OPTIONS)
def best_rest(table_NYW: Array, shape: Shape, position: int, first: int, last: int) -> None:
    """Fill the table of what the devices from a position on cost at the least, phase by phase and window by
    window, with the masks of rank `first` to `last` left for them.
    """
    num_positions = shape.size_P.size
    size = shape.size_P[position]
    left = 0
    for p in range(position, num_positions):
        left += shape.size_P[p]
    num_phases, num_windows = table_NYW.shape[1:]
    for rank in range(first, last):
        rest = shape.candidate_C[shape.start_S[left] + rank]
        out = table_NYW[shape.rest_row_P[position] + rank]
        out[:] = np.inf
        start, end = shape.start_S[size], shape.start_S[size + 1]
        if size and shape.opens_P[position]:
            lowest = _lowest(rest)
            end = start + shape.lowest_SE[size, lowest + 1]
            start = start + shape.lowest_SE[size, lowest]
        for candidate in range(start, end):
            mask = shape.candidate_C[candidate]
            if mask & ~rest:
                continue
            here = table_NYW[shape.row_P[position] + shape.rank_M[mask]]
            after = table_NYW[shape.rest_row_P[position + 1] + shape.rank_M[rest ^ mask]]
            for y in range(num_phases):
                for w in range(num_windows):
                    out[y, w] = min(out[y, w], max(here[y, w], after[y, w]))


@nb.njit(**_OPTIONS)
def least_sum(
    value_N: Array, after_R: Array, shape: Shape, position: int, out_R: Array, chosen_R: Array
) -> None:
    """One step of the least sum over partitions: from what is left after a position to what is left before.

    Parameters
    ----------
    value_N
        Value of each mask on a device, infinite where it may not be there.
    after_R
        Least sum of the later positions by the rank of the mask left to them.
    out_R, chosen_R
        Results: least sum with this position, and the mask that it takes.
    """
    size = shape.size_P[position]
    left = 0
    for p in range(position, shape.size_P.size):
        left += shape.size_P[p]
    for rank in range(out_R.size):
        rest = shape.candidate_C[shape.start_S[left] + rank]
        out_R[rank], chosen_R[rank] = np.inf, -1
        start, end = shape.start_S[size], shape.start_S[size + 1]
        if size and shape.opens_P[position]:
            lowest = _lowest(rest)
            end = start + shape.lowest_SE[size, lowest + 1]
            start = start + shape.lowest_SE[size, lowest]
        for candidate in range(start, end):
            mask = shape.candidate_C[candidate]
            if mask & ~rest:
                continue
            value = value_N[shape.row_P[position] + shape.rank_M[mask]] + after_R[shape.rank_M[rest ^ mask]]
            if value < out_R[rank]:
                out_R[rank], chosen_R[rank] = value, mask


@nb.njit(**_OPTIONS)
def _summarise(cost_W: Array, risk: int) -> float:
    """Summarise windows as `Risk.summarise` does."""
    if risk == MEAN:
        return cost_W.mean()
    ordered_W = np.sort(cost_W)
    if risk == QUANTILE:
        at = 0.95 * (cost_W.size - 1)
        below = int(np.floor(at))
        above = min(below + 1, cost_W.size - 1)
        return ordered_W[below] + (at - below) * (ordered_W[above] - ordered_W[below])
    worst = max(1, int(np.rint(0.05 * cost_W.size)))
    return ordered_W[cost_W.size - worst :].mean()


@nb.njit(**_OPTIONS)
def _bound(upper_YW: Array, rest_YW: Array, risk: int, cost_W: Array) -> float:
    """Value of the windows when every phase costs at least both."""
    cost_W[:] = 0.0
    for y in range(upper_YW.shape[0]):
        for w in range(cost_W.size):
            cost_W[w] += max(upper_YW[y, w], rest_YW[y, w])
    return _summarise(cost_W, risk)


@nb.njit(**_OPTIONS)
def _raise(out_YW: Array, by_YW: Array) -> None:
    for y in range(out_YW.shape[0]):
        for w in range(out_YW.shape[1]):
            out_YW[y, w] = max(out_YW[y, w], by_YW[y, w])


@nb.njit(**_OPTIONS)
def _close_groups(table_NYW: Array, shape: Shape, position: int, mask_P: Array, upper_YW: Array) -> bool:
    """Charge the groups that a position completes; False if their order breaks the symmetry."""
    for g in range(shape.close_P[position], shape.close_P[position + 1]):
        held = 0
        for p in range(shape.group_first_G[g], position + 1):
            held |= mask_P[p]
        sibling = shape.group_sibling_G[g]
        if sibling >= 0 and held:
            before = 0
            for p in range(sibling, shape.group_first_G[g]):
                before |= mask_P[p]
            if _lowest(held) < _lowest(before):
                return False
        _raise(upper_YW, table_NYW[shape.group_row_G[g] + shape.rank_M[held]])
    return True


@nb.njit(**_OPTIONS)
def branch_and_bound(table_NYW: Array, shape: Shape, risk: int, state: PruneState, budget: int) -> bool:
    """Search depth first for the best partition; True once it is done, False when the budget is spent.

    Parameters
    ----------
    table_NYW
        Cost of masks by part, then what is left at the least.
    state
        Where to go on; `best_1` and `best_mask_P` are the result.
    budget
        Nodes to look at in this call.
    """
    last = shape.size_P.size - 1
    every = shape.rank_M.size - 1
    cost_W = np.empty(table_NYW.shape[2])
    p = state.depth_1[0]
    while p >= 0:
        if state.next_P[p] >= state.end_P[p]:
            p -= 1
            continue
        mask = shape.candidate_C[state.next_P[p]]
        state.next_P[p] += 1
        if mask & state.used_P[p]:
            continue
        budget -= 1
        state.mask_P[p] = mask
        upper_YW = state.upper_PYW[p + 1]
        upper_YW[:] = state.upper_PYW[p]
        _raise(upper_YW, table_NYW[shape.row_P[p] + shape.rank_M[mask]])
        if _close_groups(table_NYW, shape, p, state.mask_P, upper_YW):
            used = state.used_P[p] | mask
            rest_YW = (
                upper_YW if p == last else table_NYW[shape.rest_row_P[p + 1] + shape.rank_M[every ^ used]]
            )
            value = _bound(upper_YW, rest_YW, risk, cost_W)
            if p == last:
                if value < state.best_1[0]:
                    state.best_1[0] = value
                    state.best_mask_P[:] = state.mask_P
            elif value < state.best_1[0] * PRUNE:
                p += 1
                state.used_P[p] = used
                open_position(shape, p, state)
        if budget <= 0:
            break
    state.depth_1[0] = p
    return p < 0


@nb.njit(**_OPTIONS)
def reach_by_hops(
    value_C: Array,
    transitions_EE: Array,
    device_CE: Array,
    next_device_QE: Array,
    class_Q: Array,
    first: int,
    last: int,
    best_C: Array,
    from_C: Array,
    by_C: Array,
) -> None:
    """Extend chains by a layer, from the classes `first` to `last` of this one, at the fewest hops.

    Parameters
    ----------
    value_C
        Least cost of a chain that ends in each class.
    transitions_EE
        Tokens by their expert in this layer and in the next.
    device_CE, next_device_QE
        Device of each expert in every class, and in every labelled placement of the next layer.
    class_Q
        Class of each labelled placement; negative where it is not allowed.
    best_C, from_C, by_C
        Results, lowered: least cost by class of the next layer, and the class and the labelled placement
        that give it.
    """
    num_experts = transitions_EE.shape[0]
    moved_DE = np.empty((device_CE.max() + 1, num_experts))
    for c in range(first, last):
        if not np.isfinite(value_C[c]):
            continue
        # Tokens of each next expert that are on another device than its own.
        for e in range(num_experts):
            total = 0.0
            for d in range(moved_DE.shape[0]):
                moved_DE[d, e] = 0.0
            for e_before in range(num_experts):
                moved_DE[device_CE[c, e_before], e] -= transitions_EE[e_before, e]
                total += transitions_EE[e_before, e]
            for d in range(moved_DE.shape[0]):
                moved_DE[d, e] += total
        for q in range(next_device_QE.shape[0]):
            to = class_Q[q]
            if to < 0:
                continue
            cost = value_C[c]
            for e in range(num_experts):
                cost += moved_DE[next_device_QE[q, e], e]
            if cost < best_C[to]:
                best_C[to], from_C[to], by_C[to] = cost, c, q


@nb.njit(**_OPTIONS)
def reach_by_time(
    value_C: Array,
    time_N: Array,
    row_GC: Array,
    next_rank_GQ: Array,
    class_Q: Array,
    term_C: Array,
    num_windows: int,
    first: int,
    last: int,
    best_C: Array,
    from_C: Array,
    by_C: Array,
) -> None:
    """Extend chains by a layer, from the classes `first` to `last` of this one, at the least step time.

    Parameters
    ----------
    value_C
        Least cost of a chain that ends in each class.
    time_N
        Time of the exchange by part, pair of masks and window, flat.
    row_GC
        Where in `time_N` the pairs of each part's mask in every class begin.
    next_rank_GQ
        Rank of each part's mask in every labelled placement of the next layer.
    class_Q, term_C
        Class of each labelled placement; cost of the next layer's experts by class.
    best_C, from_C, by_C
        Results, lowered: as in `reach_by_hops`.
    """
    num_parts = row_GC.shape[0]
    slowest_W = np.empty(num_windows)
    for c in range(first, last):
        for q in range(next_rank_GQ.shape[1]):
            to = class_Q[q]
            slowest_W[:] = 0.0
            for g in range(num_parts):
                start = row_GC[g, c] + next_rank_GQ[g, q] * num_windows
                for w in range(num_windows):
                    slowest_W[w] = max(slowest_W[w], time_N[start + w])
            cost = value_C[c] + term_C[to] + slowest_W.mean()
            if cost < best_C[to]:
                best_C[to], from_C[to], by_C[to] = cost, c, q


@nb.njit(**_OPTIONS)
def best_ahead(kept_LRR: Array, value_LR: Array) -> Array:
    """Most that a path can add after each layer and group, ``[layers, groups]``; 0 after the last layer.

    Parameters
    ----------
    kept_LRR
        Tokens kept between a group and a group of the next layer.
    value_LR
        What each group is worth by itself, minus infinity where it may not be.
    """
    num_layers, num_groups = value_LR.shape
    ahead_LR = np.zeros((num_layers, num_groups))
    for layer in range(num_layers - 2, -1, -1):
        for g in range(num_groups):
            best = -np.inf
            for h in range(num_groups):
                best = max(best, kept_LRR[layer, g, h] + value_LR[layer + 1, h] + ahead_LR[layer + 1, h])
            ahead_LR[layer, g] = best
    return ahead_LR


@nb.njit(**_OPTIONS)
def best_behind(kept_LRR: Array, value_LR: Array) -> Array:
    """Most that a path can be worth up to each layer and group, that group included, ``[layers, groups]``."""
    num_layers, num_groups = value_LR.shape
    behind_LR = np.full((num_layers, num_groups), -np.inf)
    behind_LR[0] = value_LR[0]
    for layer in range(num_layers - 1):
        for g in range(num_groups):
            for h in range(num_groups):
                behind_LR[layer + 1, h] = max(
                    behind_LR[layer + 1, h], behind_LR[layer, g] + kept_LRR[layer, g, h]
                )
        behind_LR[layer + 1] += value_LR[layer + 1]
    return behind_LR


@nb.njit(**_OPTIONS)
def best_through(
    kept_LRR: Array, value_LR: Array, behind_LR: Array, ahead_LR: Array, layer: int, group: int, path_L: Array
) -> None:
    """Write down the best path through a group of a layer."""
    num_layers, num_groups = value_LR.shape
    path_L[layer] = group
    for before in range(layer - 1, -1, -1):
        best = -np.inf
        for g in range(num_groups):
            worth = behind_LR[before, g] + kept_LRR[before, g, path_L[before + 1]]
            if worth > best:
                best, path_L[before] = worth, g
    for after in range(layer + 1, num_layers):
        best = -np.inf
        for g in range(num_groups):
            worth = kept_LRR[after - 1, path_L[after - 1], g] + value_LR[after, g] + ahead_LR[after, g]
            if worth > best:
                best, path_L[after] = worth, g


@nb.njit(**_OPTIONS)
def split_in_two(
    first_LRR: Array,
    second_LRR: Array,
    first_value_LR: Array,
    second_value_LR: Array,
    held_L: Array,
    first_mask_R: Array,
    rank_M: Array,
    first_L: Array,
    second_L: Array,
) -> float:
    """Divide the experts of two devices between them in the best way; return what they keep, or -inf.

    Parameters
    ----------
    first_LRR, second_LRR
        Tokens kept between groups of the sizes of the two devices.
    first_value_LR, second_value_LR
        What groups are worth by themselves, minus infinity where they may not be.
    held_L
        Experts of both together, as masks.
    first_mask_R
        Masks of the first device's size by rank.
    first_L, second_L
        Results: rank of each device's mask in every layer.
    """
    num_layers = held_L.size
    states_LX = np.empty((num_layers, first_mask_R.size), dtype=np.int64)
    other_LX = np.empty_like(states_LX)
    count_L = np.zeros(num_layers, dtype=np.int64)
    for layer in range(num_layers):
        for rank in range(first_mask_R.size):
            mask = first_mask_R[rank]
            if mask & ~held_L[layer]:
                continue
            other = rank_M[held_L[layer] ^ mask]
            if first_value_LR[layer, rank] > -np.inf and second_value_LR[layer, other] > -np.inf:
                states_LX[layer, count_L[layer]] = rank
                other_LX[layer, count_L[layer]] = other
                count_L[layer] += 1
        if count_L[layer] == 0:
            return -np.inf
    most = count_L.max()
    best_LX = np.full((num_layers, most), -np.inf)
    from_LX = np.zeros((num_layers, most), dtype=np.int64)
    for x in range(count_L[0]):
        best_LX[0, x] = first_value_LR[0, states_LX[0, x]] + second_value_LR[0, other_LX[0, x]]
    for layer in range(1, num_layers):
        for x in range(count_L[layer]):
            here, there = states_LX[layer, x], other_LX[layer, x]
            for before in range(count_L[layer - 1]):
                worth = (
                    best_LX[layer - 1, before]
                    + first_LRR[layer - 1, states_LX[layer - 1, before], here]
                    + second_LRR[layer - 1, other_LX[layer - 1, before], there]
                )
                if worth > best_LX[layer, x]:
                    best_LX[layer, x], from_LX[layer, x] = worth, before
            best_LX[layer, x] += first_value_LR[layer, here] + second_value_LR[layer, there]
    at = best_LX[num_layers - 1].argmax()
    total = best_LX[num_layers - 1, at]
    for layer in range(num_layers - 1, -1, -1):
        first_L[layer], second_L[layer] = states_LX[layer, at], other_LX[layer, at]
        at = from_LX[layer, at]
    return total


@nb.njit(**_OPTIONS)
def every_path(
    kept_LRR: Array,
    value_LR: Array,
    ahead_LR: Array,
    least: float,
    next_L: Array,
    worth_L: Array,
    out_NL: Array,
) -> int:
    """List the paths worth at least so much; return how many there are, or one more than there is room for.

    Parameters
    ----------
    next_L, worth_L
        Scratch: the group to try next in each layer, and the worth of the path up to it.
    out_NL
        Result: groups of each path.
    """
    num_layers, num_groups = value_LR.shape
    path_L = np.zeros(num_layers, dtype=np.int64)
    found, layer = 0, 0
    next_L[0] = 0
    while layer >= 0:
        g = next_L[layer]
        if g == num_groups:
            layer -= 1
            continue
        next_L[layer] += 1
        worth = value_LR[layer, g]
        if layer > 0:
            worth += worth_L[layer - 1] + kept_LRR[layer - 1, path_L[layer - 1], g]
        if worth + ahead_LR[layer, g] < least:
            continue
        path_L[layer], worth_L[layer] = g, worth
        if layer < num_layers - 1:
            layer += 1
            next_L[layer] = 0
            continue
        if found == out_NL.shape[0]:
            return found + 1
        out_NL[found] = path_L
        found += 1
    return found
