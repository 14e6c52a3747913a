"""Compiled search of one layer for few moves: descents of objective + price x moves, and what they met.

A move is an expert copy on a device that did not hold the expert at the start. At a high price only the
changes that win most per move are made; while the price falls, more follow. Every state met on the way is
offered to an archive that keeps the best one for each number of moves, which is the layer's curve of
objective against moves.

Deterministic for a seed. `control` is that of the search kernels: a stop flag, work done, its limit.

Shape letters: W scenarios, E experts, I items, D devices, N words of 64 tokens, M numbers of moves.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from placement.cost.layer_kernels import (
    EMPTY_ITEM,
    OPTIONS,
    Layer,
    State,
    apply_swap,
    new_state,
    rebuild,
    resettle,
    saved_tokens,
    soft_power,
    soft_root,
    state_value,
    swap_allowed,
    swap_value,
)
from placement.solvers.search_kernels import (
    IMPROVES,
    WORK,
    ended,
    is_spare,
    may_hold,
    random_below,
    shuffle,
)

__all__ = ["NOT_MET", "explore_layer", "fall_layer", "rise_layer"]

Array = npt.NDArray[Any]

NOT_MET = 1e300
"""Archived value of a number of moves that no state had; finite, for the loops assume finite numbers."""

OVERLOAD_PENALTY = 100.0
"""Weight, in units of the layer's objective, of exceeding the load limit by its whole."""

FALL, RISE = 0.7, 1.6
"""Factors between the prices of a falling and a rising ladder."""

LEAST_PRICE = 1e-6
"""Lowest price of a ladder before none at all, as a share of the layer's objective."""

MOST_RUNGS = 60

PAIR_WORK = 20
"""What pricing a pair of items takes whatever the number of scenarios, in scenario updates."""


@nb.njit(**OPTIONS)
def _generator(seed: int) -> Array:
    return np.array([np.uint64(seed) * np.uint64(2654435761) + np.uint64(88172645463325252)], np.uint64)


@nb.njit(**OPTIONS)
def _count_moves(state: State, home_ED: Array) -> int:
    moves = 0
    for item in range(state.expert_I.size):
        expert = state.expert_I[item]
        if expert >= 0 and home_ED[expert, state.device_I[item]] == 0:
            moves += 1
    return moves


@nb.njit(**OPTIONS)
def _swap_moves(state: State, home_ED: Array, a: int, b: int) -> int:
    """Return by how many moves a swap lengthens the way from the start."""
    i, j = state.device_I[a], state.device_I[b]
    expert_a, expert_b = state.expert_I[a], state.expert_I[b]
    change = 0
    if expert_a >= 0:
        change += home_ED[expert_a, i] - home_ED[expert_a, j]
    if expert_b >= 0:
        change += home_ED[expert_b, j] - home_ED[expert_b, i]
    return int(change)


@nb.njit(**OPTIONS)
def _overload(layer: Layer, state: State, i: int, j: int, shift: float) -> float:
    """Return by which share the fullest device exceeds the load limit if `shift` goes from i to j."""
    if layer.device_limit >= 1e299:
        return 0.0
    fullest = 0.0
    for device in range(state.total_D.size):
        total = state.total_D[device]
        if device == i:
            total -= shift
        if device == j:
            total += shift
        fullest = max(fullest, total)
    return float(max(0.0, fullest / layer.device_limit - 1.0))


@nb.njit(**OPTIONS)
def _value(layer: Layer, state: State, penalty: float) -> float:
    """Return the objective, and the penalty for an overfull device."""
    return float(state_value(layer, state) + penalty * _overload(layer, state, -1, -1, 0.0))


@nb.njit(**OPTIONS)
def _value_after_swap(layer: Layer, state: State, a: int, b: int, penalty: float) -> float:
    after = swap_value(layer, state, a, b)
    if layer.device_limit >= 1e299:
        return float(after)
    shift = 0.0
    if state.expert_I[a] >= 0:
        shift += layer.total_E[state.expert_I[a]] / state.replicas_E[state.expert_I[a]]
    if state.expert_I[b] >= 0:
        shift -= layer.total_E[state.expert_I[b]] / state.replicas_E[state.expert_I[b]]
    return float(after + penalty * _overload(layer, state, state.device_I[a], state.device_I[b], shift))


@nb.njit(**OPTIONS)
def _table_work(layer: Layer, state: State) -> int:
    """Scenario updates that bringing the tables up to date after a change amounts to."""
    items, links = state.expert_I.size, layer.group_JD.shape[0]
    groups = 2 if items == state.replicas_E.size else min(8, layer.kind_D.size)
    pairs = items * groups * (1 + items // max(layer.kind_D.size, 1)) * links
    return int(pairs * (layer.bits_EN.shape[1] // 8 + layer.mix_WM.size))


@nb.njit(**OPTIONS)
def _archive(
    record: Layer,
    state: State,
    moves: int,
    penalty: float,
    value_M: Array,
    expert_MI: Array,
    device_MI: Array,
) -> None:
    """Keep the state if it is the best met with its number of moves."""
    if moves >= value_M.size:
        return
    value = _value(record, state, penalty)
    if value < value_M[moves]:
        value_M[moves] = value
        expert_MI[moves] = state.expert_I
        device_MI[moves] = state.device_I


@nb.njit(**OPTIONS)
def _experts_value(layer: Layer, state: State) -> float:
    """Return the experts' part of the objective."""
    total = 0.0
    for w in range(layer.weight_W.size):
        if layer.soft:
            total += layer.weight_W[w] * soft_root(state.device_power_W[w]) * state.scale_1J[0]
        else:
            total += layer.weight_W[w] * state.device_top_3W[0, w]
    return total


@nb.njit(**OPTIONS)
def _gradient(layer: Layer, state: State) -> Array:
    """Derivative of the experts' part by each device's cost, ``[devices, scenarios]``; empty if unknown.

    The soft maximum is convex: no change of costs wins more than the derivative says. Where nothing but
    experts costs, that rules most changes out before they are priced.
    """
    if not layer.soft or layer.group_JD.shape[0] > 0:
        return np.empty((0, 0))
    grad_DW = np.zeros_like(state.device_cost_DW)
    inverse = 1.0 / state.scale_1J[0]
    for w in range(grad_DW.shape[1]):
        power = state.device_power_W[w]
        if power <= 0.0:
            continue
        slope = layer.weight_W[w] * soft_root(power) / power
        for device in range(grad_DW.shape[0]):
            share = state.device_cost_DW[device, w] * inverse
            if share > 0.0:
                grad_DW[device, w] = slope * soft_power(share) / share
    return grad_DW


@nb.njit(**OPTIONS)
def _most_won_by_swap(layer: Layer, state: State, grad_DW: Array, a: int, b: int) -> float:
    """Return an upper bound on what a swap wins."""
    i, j = state.device_I[a], state.device_I[b]
    a_at_i, b_at_i = state.cost_KIW[layer.kind_D[i], a], state.cost_KIW[layer.kind_D[i], b]
    a_at_j, b_at_j = state.cost_KIW[layer.kind_D[j], a], state.cost_KIW[layer.kind_D[j], b]
    won = 0.0
    for w in range(grad_DW.shape[1]):
        won += grad_DW[i, w] * (a_at_i[w] - b_at_i[w]) + grad_DW[j, w] * (b_at_j[w] - a_at_j[w])
    return won


@nb.njit(**OPTIONS)
def _most_won_by_holding(layer: Layer, state: State, grad_DW: Array, item: int) -> Array:
    """Bound what a spare item wins by holding each expert, and last by holding none, ``[experts + 1]``."""
    here, own = state.device_I[item], state.expert_I[item]
    won_E = np.zeros(state.replicas_E.size + 1)
    freed = 0.0
    for other in range(state.expert_I.size):
        expert, device = state.expert_I[other], state.device_I[other]
        if expert < 0:
            continue
        replicas, kind = state.replicas_E[expert], layer.kind_D[device]
        grad_W = grad_DW[device]
        if expert == own:
            now_W, then_W = layer.cost_KREW[kind, replicas - 1, own], layer.cost_KREW[kind, replicas - 2, own]
            for w in range(grad_W.size):
                freed += grad_W[w] * (now_W[w] if other == item else now_W[w] - then_W[w])
        elif replicas < layer.cost_KREW.shape[1]:
            now_W = layer.cost_KREW[kind, replicas - 1, expert]
            then_W = layer.cost_KREW[kind, replicas, expert]
            for w in range(grad_W.size):
                won_E[expert] += grad_W[w] * (now_W[w] - then_W[w])
    grad_W, kind = grad_DW[here], layer.kind_D[here]
    for expert in range(state.replicas_E.size):
        if state.replicas_E[expert] < layer.cost_KREW.shape[1]:
            then_W = layer.cost_KREW[kind, state.replicas_E[expert], expert]
            for w in range(grad_W.size):
                won_E[expert] -= grad_W[w] * then_W[w]
    for index in range(won_E.size):
        won_E[index] += freed
    return won_E


@nb.njit(**OPTIONS)
def _held_value(layer: Layer, state: State, item: int, target: int, cost_W: Array, work_W: Array) -> float:
    """Return the experts' part of the objective if an item held `target` (or nothing) instead.

    Only the devices of the two experts' replicas change.
    """
    here, expert = state.device_I[item], state.expert_I[item]
    before = state.replicas_E[expert] if expert >= 0 else 0
    added = state.replicas_E[target] if target >= 0 else 0
    work_W[:] = 0.0
    if layer.soft:
        work_W[:] = state.device_power_W
    inverse = 1.0 / state.scale_1J[0]
    for device in range(layer.kind_D.size):
        has = expert >= 0 and state.has_ED[expert, device] > 0
        gets = target >= 0 and state.has_ED[target, device] > 0
        if not (has or gets or device == here):
            if not layer.soft:
                for w in range(work_W.size):
                    work_W[w] = max(work_W[w], state.device_cost_DW[device, w])
            continue
        kind = layer.kind_D[device]
        cost_W[:] = state.device_cost_DW[device]
        if has:
            cost_W -= layer.cost_KREW[kind, before - 1, expert]
            if device != here:
                cost_W += layer.cost_KREW[kind, before - 2, expert]
        if gets:
            cost_W -= layer.cost_KREW[kind, added - 1, target]
        if gets or (target >= 0 and device == here):
            cost_W += layer.cost_KREW[kind, added, target]
        for w in range(work_W.size):
            if layer.soft:
                work_W[w] += soft_power(cost_W[w] * inverse) - soft_power(
                    state.device_cost_DW[device, w] * inverse
                )
            else:
                work_W[w] = max(work_W[w], cost_W[w])
    total = 0.0
    for w in range(work_W.size):
        fullest = work_W[w]
        if layer.soft:
            fullest = soft_root(fullest) * state.scale_1J[0]
        total += layer.weight_W[w] * fullest
    return total


@nb.njit(**OPTIONS)
def _hold_moves(state: State, home_ED: Array, item: int, target: int) -> int:
    """Return by how many moves it lengthens the way from the start if an item holds `target` instead."""
    device, expert = state.device_I[item], state.expert_I[item]
    change = 0
    if target >= 0:
        change += 1 - home_ED[target, device]
    if expert >= 0:
        change -= 1 - home_ED[expert, device]
    return int(change)


@nb.njit(**OPTIONS)
def _hold(layer: Layer, state: State, item: int, expert: int, control: Array) -> None:
    """Let an item hold another expert, or none."""
    device = state.device_I[item]
    state.expert_I[item] = expert
    if layer.bits_EN.shape[1] > 0:
        control[WORK] += _table_work(layer, state)
        resettle(layer, state, device, device)
    else:
        control[WORK] += state.expert_I.size * (4 * layer.kind_D.size + layer.weight_W.size)
        rebuild(layer, state)


@nb.njit(**OPTIONS)
def _swap_item(
    layer: Layer,
    state: State,
    home_ED: Array,
    a: int,
    value: float,
    moves: int,
    price: float,
    cap: int,
    penalty: float,
    control: Array,
) -> tuple[float, int, float]:
    """Swap item a with the partner that lowers value + price x moves most, if one does.

    Returns
    -------
    tuple
        Value and moves then, and the most that a refused swap would win per move.
    """
    best, partner, rate = value - IMPROVES * abs(value), -1, 0.0
    grad_DW = _gradient(layer, state)
    priced = 0
    for b in range(state.expert_I.size):
        if b == a or not swap_allowed(layer, state, a, b):
            continue
        change = _swap_moves(state, home_ED, a, b)
        if change > 0 and moves + change > cap:
            continue
        if grad_DW.size > 0:
            most = _most_won_by_swap(layer, state, grad_DW, a, b)
            if value - most + price * change > best:
                if change > 0:
                    rate = max(rate, most / change)
                continue
        priced += 1
        plain = _value_after_swap(layer, state, a, b, penalty)
        after = plain + price * change
        if after < best:
            best, partner = after, b
        elif change > 0:
            rate = max(rate, (value - plain) / change)
    control[WORK] += state.expert_I.size * (8 + layer.weight_W.size // 2)
    control[WORK] += priced * (PAIR_WORK + layer.weight_W.size * (1 + 2 * layer.group_JD.shape[0]))
    if partner < 0:
        return value, moves, rate
    change = _swap_moves(state, home_ED, a, partner)
    control[WORK] += _table_work(layer, state) + 8 * state.expert_I.size
    apply_swap(layer, state, a, partner)
    after = _value(layer, state, penalty)
    if after + price * change < value - IMPROVES * abs(value):
        return after, moves + change, rate
    # With replicas the price is an estimate: tokens settle anew after a move.
    apply_swap(layer, state, a, partner)
    return value, moves, rate


@nb.njit(**OPTIONS)
def _easing_target(
    layer: Layer, state: State, home_ED: Array, item: int, room: int, price: float, control: Array
) -> tuple[int, float]:
    """Return the expert (or none) that a spare item had best hold for the experts' sake, else its own.

    Also returns the most that a refused one would win per move.
    """
    cost_W, work_W = np.empty(layer.weight_W.size), np.empty(layer.weight_W.size)
    now = _experts_value(layer, state)
    best, target, rate = now * (1 - IMPROVES), state.expert_I[item], 0.0
    grad_DW = _gradient(layer, state)
    most_E = _most_won_by_holding(layer, state, grad_DW, item) if grad_DW.size > 0 else np.empty(0)
    priced = 0
    for candidate in range(EMPTY_ITEM, state.replicas_E.size):
        if not may_hold(layer, state, item, candidate):
            continue
        change = _hold_moves(state, home_ED, item, candidate)
        if change > 0 and change > room:
            continue
        if most_E.size > 0:
            # The last element is for holding none, which is candidate -1.
            most = most_E[candidate]
            if now - most + price * change > best:
                if change > 0:
                    rate = max(rate, most / change)
                continue
        priced += 1
        plain = _held_value(layer, state, item, candidate, cost_W, work_W)
        if plain + price * change < best:
            best, target = plain + price * change, candidate
        elif change > 0:
            rate = max(rate, (now - plain) / change)
    control[WORK] += state.replicas_E.size * (8 + 2 * layer.weight_W.size)
    control[WORK] += priced * (4 * layer.kind_D.size + 32 * layer.weight_W.size)
    return int(target), rate


@nb.njit(**OPTIONS)
def _sparing_target(layer: Layer, state: State, home_ED: Array, item: int, room: int, control: Array) -> int:
    """Return the expert that spares most tokens a trip in a spare item, else its own."""
    target, most = state.expert_I[item], 0
    control[WORK] += state.expert_I.size * layer.bits_EN.shape[1] // 8
    for candidate in range(state.replicas_E.size):
        if not may_hold(layer, state, item, candidate):
            continue
        change = _hold_moves(state, home_ED, item, candidate)
        if change <= 0 or change <= room:
            saved = saved_tokens(layer, state, candidate, state.device_I[item])
            if saved > most:
                most, target = saved, candidate
    return int(target)


@nb.njit(**OPTIONS)
def _try_target(
    layer: Layer,
    state: State,
    home_ED: Array,
    item: int,
    target: int,
    value: float,
    moves: int,
    price: float,
    penalty: float,
    control: Array,
) -> tuple[float, int]:
    """Let a spare item hold an expert if the exact value and the price allow it."""
    expert = state.expert_I[item]
    if target == expert:
        return value, moves
    change = _hold_moves(state, home_ED, item, target)
    _hold(layer, state, item, target, control)
    after = _value(layer, state, penalty)
    if after + price * change < value - IMPROVES * abs(value):
        return after, moves + change
    _hold(layer, state, item, expert, control)
    return value, moves


@nb.njit(**OPTIONS)
def _retarget_item(
    layer: Layer,
    state: State,
    home_ED: Array,
    item: int,
    value: float,
    moves: int,
    price: float,
    cap: int,
    penalty: float,
    control: Array,
) -> tuple[float, int, float]:
    """Let a spare item hold what eases the fullest devices, or else spares traffic, if that is worth it."""
    target, rate = _easing_target(layer, state, home_ED, item, cap - moves, price, control)
    after, then = _try_target(layer, state, home_ED, item, target, value, moves, price, penalty, control)
    if after == value and layer.bits_EN.shape[1] > 0:
        target = _sparing_target(layer, state, home_ED, item, cap - moves, control)
        after, then = _try_target(layer, state, home_ED, item, target, value, moves, price, penalty, control)
    return after, then, rate


@nb.njit(**OPTIONS)
def _descend(
    layer: Layer,
    record: Layer,
    state: State,
    home_ED: Array,
    price: float,
    cap: int,
    penalty: float,
    random: Array,
    control: Array,
    value_M: Array,
    expert_MI: Array,
    device_MI: Array,
) -> float:
    """Change items in random order until nothing lowers value + price x moves; archive what is met.

    Returns
    -------
    float
        The most that a change refused in the last round would win per move.
    """
    value, moves = _value(layer, state, penalty), _count_moves(state, home_ED)
    spare = state.expert_I.size > state.replicas_E.size and layer.cost_KREW.shape[1] > 1
    order = np.arange(state.expert_I.size)
    improved, rate = True, 0.0
    while improved and not ended(control):
        improved, rate = False, 0.0
        shuffle(order, random)
        for a in order:
            after, then, refused = _swap_item(
                layer, state, home_ED, a, value, moves, price, cap, penalty, control
            )
            rate = max(rate, refused)
            if after != value:
                value, moves, improved = after, then, True
                _archive(record, state, moves, penalty, value_M, expert_MI, device_MI)
            if spare and is_spare(state, a):
                after, then, refused = _retarget_item(
                    layer, state, home_ED, a, value, moves, price, cap, penalty, control
                )
                rate = max(rate, refused)
                if after != value:
                    value, moves, improved = after, then, True
                    _archive(record, state, moves, penalty, value_M, expert_MI, device_MI)
            if ended(control):
                break
    return rate


@nb.njit(**OPTIONS)
def _begin(layer: Layer, expert_I: Array, device_I: Array, control: Array) -> State:
    state = new_state(layer, expert_I, device_I)
    control[WORK] += _table_work(layer, state) * layer.kind_D.size // 2
    return state


@nb.njit(**OPTIONS)
def fall_layer(
    layer: Layer,
    record: Layer,
    expert_I: Array,
    device_I: Array,
    home_ED: Array,
    highest: float,
    lowest: float,
    cap: int,
    seed: int,
    control: Array,
    value_M: Array,
    expert_MI: Array,
    device_MI: Array,
) -> tuple[Array, Array]:
    """Search a layer while the price of a move falls; return expert and device of each item at the end.

    Parameters
    ----------
    layer, record
        What is searched, and what states are archived by.
    home_ED
        Whether the start had an expert on a device.
    highest, lowest
        First and last price of a move; the ladder skips prices at which nothing could happen.
    cap
        Most moves.
    value_M, expert_MI, device_MI
        The archive: best value and items met with each number of moves.
    """
    random = _generator(seed)
    state = _begin(layer, expert_I, device_I, control)
    scale = abs(state_value(layer, state))
    penalty = OVERLOAD_PENALTY * scale
    _archive(record, state, _count_moves(state, home_ED), penalty, value_M, expert_MI, device_MI)
    price = highest
    for _ in range(MOST_RUNGS):
        rate = _descend(
            layer, record, state, home_ED, price, cap, penalty, random, control, value_M, expert_MI, device_MI
        )
        if ended(control) or price <= lowest:
            break
        price = min(FALL * price, 0.999 * rate)
        if price < max(lowest, LEAST_PRICE * scale):
            price = lowest
    return state.expert_I, state.device_I


@nb.njit(**OPTIONS)
def rise_layer(
    layer: Layer,
    record: Layer,
    expert_I: Array,
    device_I: Array,
    home_ED: Array,
    lowest: float,
    cap: int,
    seed: int,
    control: Array,
    value_M: Array,
    expert_MI: Array,
    device_MI: Array,
) -> None:
    """Search a layer while the price of a move rises, until no move is left: the way back to the start."""
    random = _generator(seed)
    state = _begin(layer, expert_I, device_I, control)
    penalty = OVERLOAD_PENALTY * abs(state_value(layer, state))
    _archive(record, state, _count_moves(state, home_ED), penalty, value_M, expert_MI, device_MI)
    price = lowest
    for _ in range(MOST_RUNGS):
        _descend(
            layer, record, state, home_ED, price, cap, penalty, random, control, value_M, expert_MI, device_MI
        )
        if ended(control) or _count_moves(state, home_ED) == 0:
            break
        price *= RISE


@nb.njit(**OPTIONS)
def _kick(layer: Layer, state: State, random: Array, control: Array) -> None:
    """Let two random items change places, or a random spare item hold a random expert or none."""
    num_items = state.expert_I.size
    a, b = random_below(random, num_items), random_below(random, num_items)
    spare = num_items > state.replicas_E.size and layer.cost_KREW.shape[1] > 1
    if spare and random_below(random, 2) == 0:
        expert = random_below(random, state.replicas_E.size + 1) - 1
        if is_spare(state, a) and may_hold(layer, state, a, expert):
            _hold(layer, state, a, expert, control)
    elif a != b and swap_allowed(layer, state, a, b):
        control[WORK] += _table_work(layer, state)
        apply_swap(layer, state, a, b)


@nb.njit(**OPTIONS)
def _send_home(layer: Layer, state: State, home_ED: Array, random: Array, control: Array) -> None:
    """Let a random moved item change places with one of a device that had its expert at the start.

    Of that device, an item that was moved there itself goes first: both may be home then.
    """
    num_items = state.expert_I.size
    offset = random_below(random, num_items)
    for index in range(num_items):
        a = (index + offset) % num_items
        expert = state.expert_I[a]
        if expert < 0 or home_ED[expert, state.device_I[a]] > 0:
            continue
        partner = -1
        for step in range(num_items):
            b = (a + step) % num_items
            if home_ED[expert, state.device_I[b]] == 0 or not swap_allowed(layer, state, a, b):
                continue
            moved = state.expert_I[b] < 0 or home_ED[state.expert_I[b], state.device_I[b]] == 0
            if partner < 0 or moved:
                partner = b
            if moved:
                break
        if partner >= 0:
            control[WORK] += _table_work(layer, state) + 8 * num_items
            apply_swap(layer, state, a, partner)
            return


@nb.njit(**OPTIONS)
def _draw_point(value_M: Array, centre: int, random: Array) -> int:
    """Return a random number of moves near a centre that the archive has a state for; -1 for none."""
    reach = max(4, centre // 2)
    for _ in range(16):
        moves = centre - reach + random_below(random, 2 * reach + 1)
        if 0 <= moves < value_M.size and value_M[moves] < NOT_MET:
            return moves
    return -1


@nb.njit(**OPTIONS)
def explore_layer(
    layer: Layer,
    record: Layer,
    home_ED: Array,
    centre: int,
    highest: float,
    seed: int,
    control: Array,
    value_M: Array,
    expert_MI: Array,
    device_MI: Array,
) -> None:
    """Undo some moves of archived states and spend them anew, until the work is done.

    Parameters
    ----------
    layer, record, home_ED, value_M, expert_MI, device_MI
        As for `fall_layer`; the archive has at least one state.
    centre
        Number of moves around which archived states are taken up.
    highest
        Highest price of a move; the number of moves is capped besides.
    """
    random = _generator(seed)
    first = 0
    while value_M[first] >= NOT_MET:
        first += 1
    state = _begin(layer, expert_MI[first].astype(np.int64), device_MI[first].astype(np.int64), control)
    penalty = OVERLOAD_PENALTY * abs(state_value(layer, state))
    while not ended(control):
        point = _draw_point(value_M, centre, random)
        if point < 0:
            point = first
        state.expert_I[:] = expert_MI[point]
        state.device_I[:] = device_MI[point]
        rebuild(layer, state)
        control[WORK] += _table_work(layer, state) * layer.kind_D.size // 2
        control[WORK] += state.expert_I.size * (4 * layer.kind_D.size + layer.weight_W.size)
        for _ in range(1 + random_below(random, 3)):
            if random_below(random, 3) == 0:
                _kick(layer, state, random, control)
            else:
                _send_home(layer, state, home_ED, random, control)
        price = highest * 2.0 ** -random_below(random, 8)
        cap = point + random_below(random, 3)
        _descend(
            layer, record, state, home_ED, price, cap, penalty, random, control, value_M, expert_MI, device_MI
        )
