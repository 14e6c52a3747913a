"""Compiled moves on a chain of layers: annealing over the whole chain, and descent to a local optimum.

The gain of a move follows from one table: how many tokens an expert shares with the experts that its
neighbouring layers hold on each device. A swap of two slots reads four of its cells; only a swap that is
made pays for bringing the neighbours' rows up to date. Load limits are priced while annealing, so that it
may pass between placements that a hard limit would part, and kept strictly by the descent.

With replicas a token's way depends on where it is, and transitions no longer tell it. But a layer's experts
part its tokens, so what a layer costs, given the layers around it, is a sum over experts of a table: hops of
an expert's tokens by the device that they come from and the one they are served on.

Deterministic for a seed. `control` is a flag that another thread may set to end a loop early; what was found
so far stands.

Shape letters: L layers, B boundaries between layers (L - 1), E experts, Q load situations, S slots,
D devices, H devices that tokens come from (row 0: nowhere yet; row 1 + d: device d), T tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt

__all__ = [
    "Chain",
    "State",
    "anneal",
    "descend",
    "improve_layer",
    "pull_back",
    "summarise_layer",
    "walk_layers",
]

Array = npt.NDArray[Any]

OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}

POLL_MOVES = 8192
"""Moves between two looks at the flag, at the temperature, and at the incumbent."""

IMPROVES = 1e-9
"""A swap must keep this share of a layer's tokens more, so that rounding never counts as progress."""


class Chain(NamedTuple):
    """What a placement of one copy of each expert is judged by.

    ahead_BEE counts tokens by their expert in a layer and in the next; back_BEE is its transpose. limit_LQ is
    the load that a device may carry in each layer and load situation, before `price` tokens kept are paid for
    every unit beyond; an infinite price forbids it.
    """

    ahead_BEE: Array
    back_BEE: Array
    load_LEQ: Array
    limit_LQ: Array
    price: float
    device_S: Array


class State(NamedTuple):
    """A placement, with the tokens kept_LED that an expert would share with its neighbours on a device."""

    expert_LS: Array
    device_LE: Array
    kept_LED: Array
    load_LDQ: Array


@nb.njit(**OPTIONS)
def _random_float(random: Array) -> float:
    """Draw from [0, 1) and advance the generator (xorshift64*)."""
    x = random[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    random[0] = x
    return float((x * np.uint64(2685821657736338717)) >> np.uint64(11)) * 2.0**-53


@nb.njit(**OPTIONS)
def new_state(chain: Chain, expert_LS: Array) -> State:
    """Build the tables of a placement, given as the expert of each slot (-1: empty)."""
    num_layers, num_experts, num_loads = chain.load_LEQ.shape
    num_devices = chain.device_S.max() + 1
    state = State(
        expert_LS.copy(),
        np.zeros((num_layers, num_experts), np.int64),
        np.zeros((num_layers, num_experts, num_devices)),
        np.zeros((num_layers, num_devices, num_loads)),
    )
    for layer in range(num_layers):
        for slot in range(expert_LS.shape[1]):
            if expert_LS[layer, slot] >= 0:
                state.device_LE[layer, expert_LS[layer, slot]] = chain.device_S[slot]
    for b in range(num_layers - 1):
        for e in range(num_experts):
            for f in range(num_experts):
                count = chain.ahead_BEE[b, e, f]
                state.kept_LED[b, e, state.device_LE[b + 1, f]] += count
                state.kept_LED[b + 1, f, state.device_LE[b, e]] += count
    _sum_loads(chain, state)
    return state


@nb.njit(**OPTIONS)
def _sum_loads(chain: Chain, state: State) -> None:
    """Sum the devices' loads anew, so that rounding does not pile up."""
    state.load_LDQ[:] = 0.0
    for layer in range(chain.load_LEQ.shape[0]):
        for e in range(chain.load_LEQ.shape[1]):
            state.load_LDQ[layer, state.device_LE[layer, e]] += chain.load_LEQ[layer, e]


@nb.njit(**OPTIONS)
def _is_within_limits(chain: Chain, state: State) -> bool:
    worst = 0.0
    for layer in range(chain.limit_LQ.shape[0]):
        for device in range(state.load_LDQ.shape[1]):
            worst = max(worst, (state.load_LDQ[layer, device] - chain.limit_LQ[layer]).max())
    return worst <= 0


@nb.njit(**OPTIONS)
def total_kept(state: State) -> float:
    """Count the tokens that stay, over all boundaries."""
    total = 0.0
    for layer in range(state.device_LE.shape[0]):
        for e in range(state.device_LE.shape[1]):
            total += state.kept_LED[layer, e, state.device_LE[layer, e]]
    return total / 2  # each boundary is seen from both sides


@nb.njit(**OPTIONS)
def _relocate(chain: Chain, state: State, layer: int, expert: int, target: int) -> None:
    """Move an expert to another device and tell its neighbours."""
    source = state.device_LE[layer, expert]
    state.device_LE[layer, expert] = target
    for load in range(chain.limit_LQ.shape[1]):
        state.load_LDQ[layer, source, load] -= chain.load_LEQ[layer, expert, load]
        state.load_LDQ[layer, target, load] += chain.load_LEQ[layer, expert, load]
    if layer > 0:
        for f in range(state.device_LE.shape[1]):
            count = chain.back_BEE[layer - 1, expert, f]
            state.kept_LED[layer - 1, f, source] -= count
            state.kept_LED[layer - 1, f, target] += count
    if layer + 1 < state.device_LE.shape[0]:
        for f in range(state.device_LE.shape[1]):
            count = chain.ahead_BEE[layer, expert, f]
            state.kept_LED[layer + 1, f, source] -= count
            state.kept_LED[layer + 1, f, target] += count


@nb.njit(**OPTIONS)
def _swap_change(chain: Chain, state: State, layer: int, a: int, b: int) -> tuple[float, float]:
    """Return what swapping two slots adds to the tokens kept and to the load beyond the limit."""
    p, q = chain.device_S[a], chain.device_S[b]
    e, f = state.expert_LS[layer, a], state.expert_LS[layer, b]
    gain, excess = 0.0, 0.0
    if e >= 0:
        gain += state.kept_LED[layer, e, q] - state.kept_LED[layer, e, p]
    if f >= 0:
        gain += state.kept_LED[layer, f, p] - state.kept_LED[layer, f, q]
    for load in range(chain.limit_LQ.shape[1]):
        shift = 0.0
        if e >= 0:
            shift += chain.load_LEQ[layer, e, load]
        if f >= 0:
            shift -= chain.load_LEQ[layer, f, load]
        over_p = state.load_LDQ[layer, p, load] - chain.limit_LQ[layer, load]
        over_q = state.load_LDQ[layer, q, load] - chain.limit_LQ[layer, load]
        excess += max(0.0, over_p - shift) + max(0.0, over_q + shift) - max(0.0, over_p) - max(0.0, over_q)
    return gain, excess


@nb.njit(**OPTIONS)
def _swap(chain: Chain, state: State, layer: int, a: int, b: int) -> None:
    p, q = chain.device_S[a], chain.device_S[b]
    e, f = state.expert_LS[layer, a], state.expert_LS[layer, b]
    state.expert_LS[layer, a], state.expert_LS[layer, b] = f, e
    if e >= 0:
        _relocate(chain, state, layer, e, q)
    if f >= 0:
        _relocate(chain, state, layer, f, p)


@nb.njit(**OPTIONS)
def anneal(
    chain: Chain,
    expert_LS: Array,
    temperatures: tuple[float, float],
    prices: tuple[float, float],
    moves: int,
    seed: int,
    control: Array,
) -> Array:
    """Anneal all layers at once by random swaps of two slots of a layer, then descend.

    Parameters
    ----------
    temperatures
        First and last temperature, in tokens kept; falling geometrically.
    prices
        Tokens kept that a unit of load beyond the limit is worth, first and last; rising geometrically.
    moves
        Swaps to try.

    Returns
    -------
    Array
        Expert of each slot: the best placement met within the limits, or the last one if there was none.
    """
    random = np.array([np.uint64(seed) * np.uint64(2654435761) + np.uint64(88172645463325252)], np.uint64)
    num_layers, num_slots = expert_LS.shape
    state = new_state(chain, expert_LS)
    best, best_LS = -1.0, expert_LS.copy()
    done = 0
    while done < moves and control[0] == 0:
        share = done / moves
        temperature = temperatures[0] * (temperatures[1] / temperatures[0]) ** share
        price = prices[0] * (prices[1] / prices[0]) ** share
        for _ in range(POLL_MOVES):
            layer = int(_random_float(random) * num_layers)
            a = int(_random_float(random) * num_slots)
            b = int(_random_float(random) * num_slots)
            if chain.device_S[a] == chain.device_S[b]:
                continue
            gain, excess = _swap_change(chain, state, layer, a, b)
            value = gain - price * excess
            if value >= 0 or _random_float(random) < np.exp(value / temperature):
                _swap(chain, state, layer, a, b)
        done += POLL_MOVES
        _sum_loads(chain, state)
        kept = total_kept(state)
        if kept > best and _is_within_limits(chain, state):
            best, best_LS = kept, state.expert_LS.copy()
    _descend(chain, state, control)
    if best < 0 or (total_kept(state) > best and _is_within_limits(chain, state)):
        best_LS = state.expert_LS
    return best_LS


@nb.njit(**OPTIONS)
def _descend(chain: Chain, state: State, control: Array) -> None:
    """Swap while that is better: tokens kept, less the price of load beyond the limits."""
    num_layers, num_slots = state.expert_LS.shape
    improved = True
    while improved and control[0] == 0:
        improved = False
        for layer in range(num_layers):
            least_load = IMPROVES * chain.limit_LQ[layer].sum()
            least_gain = IMPROVES * chain.load_LEQ[layer].sum()
            for a in range(num_slots):
                for b in range(a + 1, num_slots):
                    if chain.device_S[a] == chain.device_S[b]:
                        continue
                    gain, excess = _swap_change(chain, state, layer, a, b)
                    if abs(excess) > least_load:
                        gain -= chain.price * excess
                    if gain > least_gain and (excess <= 0 or chain.price < np.inf):
                        _swap(chain, state, layer, a, b)
                        improved = True
        _sum_loads(chain, state)


@nb.njit(**OPTIONS)
def descend(chain: Chain, expert_LS: Array, control: Array) -> Array:
    """Descend from a placement to one that no swap of two slots improves."""
    state = new_state(chain, expert_LS)
    _descend(chain, state, control)
    return state.expert_LS


@nb.njit(**OPTIONS)
def _first_holder(held_D: Array) -> int:
    """Return the device of an expert's first replica: slots are in device order."""
    for device in range(held_D.size):
        if held_D[device]:
            return device
    return -1


@nb.njit(**OPTIONS)
def walk_layers(expert_TL: Array, home_T: Array, held_LED: Array, here_LT: Array) -> None:
    """Fill in where every token is before each layer (-1: nowhere yet)."""
    for token in range(expert_TL.shape[0]):
        here = home_T[token]
        for layer in range(expert_TL.shape[1]):
            here_LT[layer, token] = here
            held_D = held_LED[layer, expert_TL[token, layer]]
            if here < 0 or not held_D[here]:
                here = _first_holder(held_D)


@nb.njit(**OPTIONS)
def pull_back(expert_T: Array, held_ED: Array, ahead_TD: Array) -> None:
    """Turn hops after a layer, by the device there, into those from its entry on, by the device before."""
    for token in range(expert_T.size):
        held_D = held_ED[expert_T[token]]
        first = ahead_TD[token, _first_holder(held_D)] + 1
        for device in range(held_D.size):
            if not held_D[device]:
                ahead_TD[token, device] = first


@nb.njit(**OPTIONS)
def summarise_layer(
    expert_T: Array, here_T: Array, ahead_TD: Array, weight_T: Array, num_experts: int, charged: bool
) -> Array:
    """Sum the hops into and after a layer, by expert, device before and device there.

    Parameters
    ----------
    ahead_TD
        Hops after the layer, by the device there.
    charged
        Whether entering the layer from another device counts.

    Returns
    -------
    Array
        Hops of each expert's tokens, ``[experts, 1 + devices, devices]``.
    """
    num_devices = ahead_TD.shape[1]
    hops_EHD = np.zeros((num_experts, 1 + num_devices, num_devices))
    for token in range(expert_T.size):
        row_D = hops_EHD[expert_T[token], 1 + here_T[token]]
        for device in range(num_devices):
            entered = 1 if charged and here_T[token] >= 0 and here_T[token] != device else 0
            row_D[device] += weight_T[token] * (ahead_TD[token, device] + entered)
    return hops_EHD


@nb.njit(**OPTIONS)
def _expert_hops(hops_HD: Array, held_D: Array) -> float:
    """Hops of one expert's tokens when these devices hold it: served where they are, else on the first."""
    first = _first_holder(held_D)
    total = hops_HD[0, first]
    for device in range(held_D.size):
        total += hops_HD[1 + device, device if held_D[device] else first]
    return total


class Contents(NamedTuple):
    """One layer under improvement: its hops, loads and slots, and who holds what; the last three change."""

    hops_EHD: Array
    device_S: Array
    load_E: Array
    limit: float
    expert_S: Array
    held_ED: Array
    load_D: Array


@nb.njit(**OPTIONS)
def _hops_of(layer: Contents, expert: int) -> float:
    return 0.0 if expert < 0 else _expert_hops(layer.hops_EHD[expert], layer.held_ED[expert])


@nb.njit(**OPTIONS)
def _excess(layer: Contents) -> float:
    """Sum what the devices carry beyond the limit; replicas share their expert's load evenly."""
    layer.load_D[:] = 0.0
    for e in range(layer.load_E.size):
        share = layer.load_E[e] / layer.held_ED[e].sum()
        for device in range(layer.load_D.size):
            if layer.held_ED[e, device]:
                layer.load_D[device] += share
    return float(np.maximum(layer.load_D - layer.limit, 0.0).sum())


@nb.njit(**OPTIONS)
def _put(layer: Contents, slot: int, expert: int) -> None:
    """Let a slot hold another expert, or none (-1)."""
    device, before = layer.device_S[slot], layer.expert_S[slot]
    if before >= 0:
        layer.held_ED[before, device] = False
    if expert >= 0:
        layer.held_ED[expert, device] = True
    layer.expert_S[slot] = expert


@nb.njit(**OPTIONS)
def _may_take(layer: Contents, slot: int, expert: int) -> bool:
    return expert < 0 or not layer.held_ED[expert, layer.device_S[slot]]


@nb.njit(**OPTIONS)
def _is_homeless(layer: Contents, expert: int) -> bool:
    return expert >= 0 and not layer.held_ED[expert].any()


@nb.njit(**OPTIONS)
def _try_change(layer: Contents, a: int, b: int, x: int, excess: float) -> tuple[bool, float]:
    """Let slot a hold expert x, and slot b (-1: no slot) what a held, if that is better.

    Returns whether it is, and the load beyond the limit afterwards.
    """
    e = layer.expert_S[a]
    before = _hops_of(layer, e) + _hops_of(layer, x)
    _put(layer, a, x)
    if b >= 0:
        _put(layer, b, e)
    if not (_is_homeless(layer, e) or _is_homeless(layer, x)):
        gain = before - _hops_of(layer, e) - _hops_of(layer, x)
        least = IMPROVES * (1.0 + before)
        # Loads take longer to sum than hops, and matter only to what is worth it.
        if excess > 0 or gain > least:
            after = _excess(layer)
            if after < excess - IMPROVES * layer.limit or (after <= excess and gain > least):
                return True, after
    if b >= 0:
        _put(layer, b, x)
    _put(layer, a, e)
    return False, excess


@nb.njit(**OPTIONS)
def _improve_slot(layer: Contents, a: int, excess: float) -> tuple[bool, float]:
    """Exchange what a slot holds with another slot, or replace it, wherever that is better."""
    improved = False
    for b in range(layer.expert_S.size):
        e, f = layer.expert_S[a], layer.expert_S[b]
        apart = layer.device_S[a] != layer.device_S[b] and e != f
        if apart and _may_take(layer, a, f) and _may_take(layer, b, e):
            better, excess = _try_change(layer, a, b, f, excess)
            improved = improved or better
    for f in range(-1, layer.load_E.size):
        if f != layer.expert_S[a] and _may_take(layer, a, f):
            better, excess = _try_change(layer, a, -1, f, excess)
            improved = improved or better
    return improved, excess


@nb.njit(**OPTIONS)
def improve_layer(
    hops_EHD: Array, expert_S: Array, device_S: Array, load_E: Array, limit: float, control: Array
) -> bool:
    """Change a layer's contents in place while that lessens the load beyond the limit, or the hops.

    Two slots change places, or a slot that is empty, or holds one of several replicas, takes another expert
    or none. Returns whether anything changed.
    """
    num_experts, num_devices = hops_EHD.shape[0], hops_EHD.shape[2]
    held_ED = np.zeros((num_experts, num_devices), np.bool_)
    layer = Contents(hops_EHD, device_S, load_E, limit, expert_S, held_ED, np.zeros(num_devices))
    for slot in range(expert_S.size):
        if expert_S[slot] >= 0:
            held_ED[expert_S[slot], device_S[slot]] = True
    excess = _excess(layer)
    changed, improved = False, True
    while improved and control[0] == 0:
        improved = False
        for a in range(expert_S.size):
            better, excess = _improve_slot(layer, a, excess)
            improved = improved or better
        changed = changed or improved
    return changed
