"""Compiled local search over the items of one layer: descent by swaps, tabu search, re-targeting of replicas.

Deterministic for a seed. `control` has three elements: a flag that another thread may set to end a loop early
(the best solution found so far stands), a count of the work done in scenario updates, and its limit.
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
    state_value,
    swap_allowed,
    swap_estimate,
    swap_value,
)

__all__ = [
    "IMPROVES",
    "LIMIT",
    "STOP",
    "WORK",
    "ended",
    "is_spare",
    "may_hold",
    "random_below",
    "retarget_pass",
    "search_layer",
    "shuffle",
]

Array = npt.NDArray[Any]

STOP, WORK, LIMIT = 0, 1, 2
"""Elements of `control`."""

SCREEN_FROM, SCREEN_SHARE = 48, 4
"""From so many scenarios on, swaps are screened by an estimate over one in so many of them."""

ROW_FINALISTS, FINALISTS = 4, 16
"""Swaps that are priced exactly after screening those of one item, or all."""

FEW_SCENARIOS, OVERHEAD_SCENARIOS = 8, 48
"""Over fewer scenarios a swap is nearly all overhead: as dear as over so many (measured)."""

IMPROVES = 1e-9
"""A move must win this share of the objective, so that rounding never counts as progress."""


@nb.njit(**OPTIONS)
def ended(control: Array) -> bool:
    """Return whether somebody wants the search to end, or its work is done."""
    return bool(control[STOP] != 0 or control[WORK] > control[LIMIT])


@nb.njit(**OPTIONS)
def random_below(random: Array, bound: int) -> int:
    """Draw from 0..bound-1 and advance the generator (xorshift64*)."""
    x = random[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    random[0] = x
    return int((x * np.uint64(2685821657736338717)) >> np.uint64(33)) % bound


@nb.njit(**OPTIONS)
def shuffle(order: Array, random: Array) -> None:
    """Put an array into random order, in place."""
    for index in range(order.size - 1, 0, -1):
        other = random_below(random, index + 1)
        order[index], order[other] = order[other], order[index]


@nb.njit(**OPTIONS)
def _row_work(layer: Layer) -> int:
    """Count the scenario updates that counting one row of a table of tokens amounts to."""
    return int(layer.group_JD.shape[0] * (layer.bits_EN.shape[1] // 8 + layer.mix_WM.size))


@nb.njit(**OPTIONS)
def _move_work(layer: Layer, state: State) -> int:
    """Count the scenario updates that bringing the tables up to date after a swap amounts to."""
    groups = 2
    if state.expert_I.size > state.replicas_E.size:
        # Tokens settle on replicas anew, which touches more groups.
        groups = min(8, layer.kind_D.size)
    return state.expert_I.size * (groups + 1) * _row_work(layer)


@nb.njit(**OPTIONS)
def _screened(layer: Layer) -> int:
    """Return how many scenarios screening looks at: all when there are few."""
    num_scenarios = layer.weight_W.size
    return num_scenarios // SCREEN_SHARE if num_scenarios >= SCREEN_FROM else num_scenarios


@nb.njit(**OPTIONS)
def _pricing_work(layer: Layer, num_screened: int, num_exact: int) -> int:
    """Count the scenario updates of screening some swaps and pricing some exactly."""
    per_scenario = 2 + 2 * layer.group_JD.shape[0]
    screened, priced = _screened(layer), layer.weight_W.size
    if priced < FEW_SCENARIOS:
        screened = priced = OVERHEAD_SCENARIOS
    exact = num_exact * (priced * per_scenario + 2 * _row_work(layer))
    return int(num_screened * screened * per_scenario + exact)


@nb.njit(**OPTIONS)
def _insert(value: float, index: int, value_K: Array, index_K: Array) -> None:
    """Keep the smallest values and their indices, ascending."""
    if value >= value_K[-1]:
        return
    k = value_K.size - 1
    while k > 0 and value_K[k - 1] > value:
        value_K[k], index_K[k] = value_K[k - 1], index_K[k - 1]
        k -= 1
    value_K[k], index_K[k] = value, index


@nb.njit(**OPTIONS)
def _partners(layer: Layer, state: State, a: int) -> tuple[Array, bool]:
    """Return the items to price swaps of item a with (or -1), and whether they were screened."""
    few, num_items = _screened(layer), state.expert_I.size
    if few == layer.weight_W.size:
        # An estimate over all scenarios costs what the exact price does.
        every = np.full(num_items, -1)
        for b in range(num_items):
            if b != a and swap_allowed(layer, state, a, b):
                every[b] = b
        return every, False
    value_K, partner_K = np.full(ROW_FINALISTS, np.inf), np.full(ROW_FINALISTS, -1)
    for b in range(num_items):
        if b != a and swap_allowed(layer, state, a, b):
            _insert(swap_estimate(layer, state, a, b, few), b, value_K, partner_K)
    return partner_K, True


@nb.njit(**OPTIONS)
def _best_partner(layer: Layer, state: State, a: int, value: float, control: Array) -> int:
    """Return the item whose swap with item a improves on a value most; -1 if none does."""
    num_items = state.expert_I.size
    partner_K, screened = _partners(layer, state, a)
    best, partner, priced = value - IMPROVES * abs(value), -1, 0
    for b in partner_K:
        if b >= 0:
            priced += 1
            after = swap_value(layer, state, a, b)
            if after < best:
                best, partner = after, b
    control[WORK] += _pricing_work(layer, num_items if screened else 0, priced)
    return partner


@nb.njit(**OPTIONS)
def _improve_item(layer: Layer, state: State, a: int, value: float, control: Array) -> float:
    """Swap item a with its best partner if that improves; return the value then."""
    partner = _best_partner(layer, state, a, value, control)
    if partner < 0:
        return value
    control[WORK] += _move_work(layer, state)
    apply_swap(layer, state, a, partner)
    after = state_value(layer, state)
    if after < value - IMPROVES * abs(value):
        return after
    # With replicas the price is an estimate: tokens settle anew after a move.
    control[WORK] += _move_work(layer, state)
    apply_swap(layer, state, a, partner)
    return value


@nb.njit(**OPTIONS)
def _descend(layer: Layer, state: State, random: Array, control: Array) -> float:
    """Swap each item in turn with its best partner until a whole round has brought nothing."""
    value = state_value(layer, state)
    order = np.arange(state.expert_I.size)
    shuffle(order, random)
    turn, in_vain = 0, 0
    while in_vain < order.size and not ended(control):
        after = _improve_item(layer, state, order[turn % order.size], value, control)
        in_vain = 0 if after < value else in_vain + 1
        value = after
        turn += 1
    return value


@nb.njit(**OPTIONS)
def _best_swap(
    layer: Layer, state: State, free_after_I: Array, iteration: int, aspiration: float, control: Array
) -> tuple[float, int, int]:
    """Return the cheapest swap that is not tabu, or beats the aspiration value."""
    few, num_items = _screened(layer), state.expert_I.size
    value_K, pair_K = np.full(FINALISTS, np.inf), np.full(FINALISTS, -1)
    tabu_value_K, tabu_pair_K = np.full(1, np.inf), np.full(1, -1)
    for a in range(num_items):
        for b in range(a + 1, num_items):
            if not swap_allowed(layer, state, a, b):
                continue
            estimate = swap_estimate(layer, state, a, b, few)
            if free_after_I[a] > iteration or free_after_I[b] > iteration:
                _insert(estimate, a * num_items + b, tabu_value_K, tabu_pair_K)
            else:
                _insert(estimate, a * num_items + b, value_K, pair_K)
    best, best_a, best_b = np.inf, -1, -1
    for pair in pair_K:
        if pair >= 0:
            after = swap_value(layer, state, pair // num_items, pair % num_items)
            if after < best:
                best, best_a, best_b = after, pair // num_items, pair % num_items
    if tabu_pair_K[0] >= 0:
        a, b = tabu_pair_K[0] // num_items, tabu_pair_K[0] % num_items
        after = swap_value(layer, state, a, b)
        if after < min(best, aspiration):
            best, best_a, best_b = after, a, b
    control[WORK] += _pricing_work(layer, num_items * (num_items - 1) // 2, FINALISTS + 1)
    return best, best_a, best_b


@nb.njit(**OPTIONS)
def _repair_limit(layer: Layer, state: State, control: Array) -> None:
    """Swap items off overfull devices until every device keeps its load limit, or no swap helps."""
    while not ended(control):
        fullest = int(np.argmax(state.total_D))
        if state.total_D[fullest] <= layer.device_limit:
            return
        best, best_a, best_b = state.total_D[fullest], -1, -1
        for a in range(state.expert_I.size):
            if state.device_I[a] != fullest or state.expert_I[a] < 0:
                continue
            total_a = layer.total_E[state.expert_I[a]] / state.replicas_E[state.expert_I[a]]
            for b in range(state.expert_I.size):
                if not swap_allowed(layer, state, a, b):
                    continue
                expert = state.expert_I[b]
                total_b = layer.total_E[expert] / state.replicas_E[expert] if expert >= 0 else 0.0
                after = max(
                    state.total_D[fullest] + total_b - total_a,
                    state.total_D[state.device_I[b]] + total_a - total_b,
                )
                if after < best * (1 - IMPROVES):
                    best, best_a, best_b = after, a, b
        if best_a < 0:
            return
        apply_swap(layer, state, best_a, best_b)


@nb.njit(**OPTIONS)
def _devices_value(layer: Layer, cost_DW: Array) -> float:
    total = 0.0
    for w in range(cost_DW.shape[1]):
        fullest = cost_DW[0, w]
        for device in range(1, cost_DW.shape[0]):
            fullest = max(fullest, cost_DW[device, w])
        total += layer.weight_W[w] * fullest
    return total


@nb.njit(**OPTIONS)
def _change_replicas(
    layer: Layer, state: State, expert: int, before: int, after: int, skip: int, cost_DW: Array
) -> None:
    """Re-price the other replicas of an expert in `cost_DW` when their number changes."""
    for item in range(state.expert_I.size):
        if state.expert_I[item] == expert and item != skip:
            device = state.device_I[item]
            kind = layer.kind_D[device]
            for w in range(cost_DW.shape[1]):
                cost_DW[device, w] += (
                    layer.cost_KREW[kind, after - 1, expert, w] - layer.cost_KREW[kind, before - 1, expert, w]
                )


@nb.njit(**OPTIONS)
def _retarget_estimate(layer: Layer, state: State, item: int, target: int, cost_DW: Array) -> float:
    """Return the experts' part of the objective if the item held a replica of `target` instead."""
    cost_DW[:] = state.device_cost_DW
    device = state.device_I[item]
    kind = layer.kind_D[device]
    expert = state.expert_I[item]
    if expert >= 0:
        replicas = state.replicas_E[expert]
        cost_DW[device] -= layer.cost_KREW[kind, replicas - 1, expert]
        _change_replicas(layer, state, expert, replicas, replicas - 1, item, cost_DW)
    if target >= 0:
        replicas = state.replicas_E[target]
        cost_DW[device] += layer.cost_KREW[kind, replicas, target]
        _change_replicas(layer, state, target, replicas, replicas + 1, item, cost_DW)
    return _devices_value(layer, cost_DW)


@nb.njit(**OPTIONS)
def is_spare(state: State, item: int) -> bool:
    """Return whether an item is empty, or one of several replicas."""
    expert = state.expert_I[item]
    return bool(expert < 0 or state.replicas_E[expert] > 1)


@nb.njit(**OPTIONS)
def may_hold(layer: Layer, state: State, item: int, expert: int) -> bool:
    """Return whether a spare item may hold another expert, or none."""
    if expert == state.expert_I[item]:
        return False
    if expert < 0:
        return True
    spread = state.has_ED[expert, state.device_I[item]] == 0
    return bool(spread and state.replicas_E[expert] < layer.cost_KREW.shape[1])


@nb.njit(**OPTIONS)
def _easing_target(layer: Layer, state: State, item: int, control: Array) -> int:
    """Return the expert (or none) that eases the fullest devices most in a spare item, else its own."""
    cost_DW = np.empty_like(state.device_cost_DW)
    target = state.expert_I[item]
    best = _devices_value(layer, state.device_cost_DW) * (1 - IMPROVES)
    control[WORK] += state.replicas_E.size * state.device_cost_DW.size
    for candidate in range(EMPTY_ITEM, state.replicas_E.size):
        if may_hold(layer, state, item, candidate):
            estimate = _retarget_estimate(layer, state, item, candidate, cost_DW)
            if estimate < best:
                best, target = estimate, candidate
    return int(target)


@nb.njit(**OPTIONS)
def _sparing_target(layer: Layer, state: State, item: int, control: Array) -> int:
    """Return the expert that spares most tokens a trip in a spare item, else its own."""
    target, most = state.expert_I[item], 0
    control[WORK] += state.expert_I.size * layer.bits_EN.shape[1] // 8
    for candidate in range(state.replicas_E.size):
        if may_hold(layer, state, item, candidate):
            saved = saved_tokens(layer, state, candidate, state.device_I[item])
            if saved > most:
                most, target = saved, candidate
    return int(target)


@nb.njit(**OPTIONS)
def _retarget_item(layer: Layer, state: State, item: int, value: float, control: Array) -> float:
    """Let a spare item hold the expert (or none) that helps most; return the value then."""
    if not is_spare(state, item):
        return value
    # What eases the fullest devices, or else spares traffic, is worth settling tokens for.
    after = _try_target(layer, state, item, _easing_target(layer, state, item, control), value, control)
    if after < value:
        return after
    return _try_target(layer, state, item, _sparing_target(layer, state, item, control), value, control)


@nb.njit(**OPTIONS)
def _try_target(layer: Layer, state: State, item: int, target: int, value: float, control: Array) -> float:
    """Let an item hold an expert if the exact value improves; return the value then."""
    expert = state.expert_I[item]
    if target == expert:
        return value
    _hold(layer, state, item, target, control)
    after = state_value(layer, state)
    within = layer.device_limit == np.inf or state.total_D.max() <= layer.device_limit
    if after < value - IMPROVES * abs(value) and within:
        return after
    _hold(layer, state, item, expert, control)
    return value


@nb.njit(**OPTIONS)
def _hold(layer: Layer, state: State, item: int, expert: int, control: Array) -> None:
    """Let an item hold another expert, or none."""
    device = state.device_I[item]
    state.expert_I[item] = expert
    if layer.bits_EN.shape[1] > 0:
        control[WORK] += _move_work(layer, state)
        resettle(layer, state, device, device)
    else:
        rebuild(layer, state)


@nb.njit(**OPTIONS)
def retarget_pass(layer: Layer, state: State, random: Array, control: Array) -> float:
    """Offer every spare item (empty, or one of several replicas) its best expert, in random order."""
    value = state_value(layer, state)
    order = np.arange(state.expert_I.size)
    shuffle(order, random)
    for item in order:
        if ended(control):
            break
        value = _retarget_item(layer, state, item, value, control)
    return value


@nb.njit(**OPTIONS)
def _settle(layer: Layer, state: State, random: Array, control: Array) -> float:
    """Alternate swaps and re-targeting until neither improves."""
    value = _descend(layer, state, random, control)
    has_spare = state.expert_I.size > state.replicas_E.size and layer.cost_KREW.shape[1] > 1
    while has_spare and not ended(control):
        after = retarget_pass(layer, state, random, control)
        if after >= value - IMPROVES * abs(value):
            break
        value = _descend(layer, state, random, control)
    return value


@nb.njit(**OPTIONS)
def _kick(layer: Layer, state: State, random: Array, control: Array) -> None:
    """Make a random change: two items change places, or a spare item holds another expert or none."""
    num_items, num_experts = state.expert_I.size, state.replicas_E.size
    a, b = random_below(random, num_items), random_below(random, num_items)
    has_spare = num_items > num_experts and layer.cost_KREW.shape[1] > 1
    if not has_spare or random_below(random, 2) == 0:
        if a != b and swap_allowed(layer, state, a, b):
            apply_swap(layer, state, a, b)
        return
    expert = random_below(random, num_experts + 1) - 1
    for offset in range(num_items):
        item = (a + offset) % num_items
        if is_spare(state, item) and may_hold(layer, state, item, expert):
            _hold(layer, state, item, expert, control)
            return


@nb.njit(**OPTIONS)
def search_layer(
    layer: Layer,
    expert_I: Array,
    device_I: Array,
    kicks: int,
    tabu_iterations: int,
    tenure: int,
    seed: int,
    control: Array,
) -> tuple[float, Array, Array]:
    """Improve one layer from a given start: descent, then tabu search from the local optimum.

    Parameters
    ----------
    kicks
        Random changes to make before the descent.
    tabu_iterations
        Best swaps to make after the descent, improving or not.
    tenure
        Iterations for which a swapped item stays put, plus up to as many at random.

    Returns
    -------
    tuple
        Best objective met, and its experts and devices by item.
    """
    random = np.array([np.uint64(seed) * np.uint64(2654435761) + np.uint64(88172645463325252)], np.uint64)
    state = new_state(layer, expert_I, device_I)
    control[WORK] += _move_work(layer, state) * layer.kind_D.size // 2
    for _ in range(kicks):
        _kick(layer, state, random, control)
    if layer.device_limit < np.inf:
        _repair_limit(layer, state, control)
    best = _settle(layer, state, random, control)
    best_expert_I, best_device_I = state.expert_I.copy(), state.device_I.copy()
    free_after_I = np.zeros(expert_I.size, np.int64)
    since_best = 0
    for iteration in range(1, tabu_iterations + 1):
        if ended(control) or since_best > tabu_iterations // 2:
            break
        _, a, b = _best_swap(layer, state, free_after_I, iteration, best - IMPROVES * abs(best), control)
        if a < 0:
            break
        control[WORK] += _move_work(layer, state)
        apply_swap(layer, state, a, b)
        free_after_I[a] = iteration + tenure + random_below(random, tenure + 1)
        free_after_I[b] = iteration + tenure + random_below(random, tenure + 1)
        value = state_value(layer, state)
        since_best += 1
        if value < best - IMPROVES * abs(best):
            best, since_best = value, 0
            best_expert_I[:], best_device_I[:] = state.expert_I, state.device_I
    return best, best_expert_I, best_device_I
