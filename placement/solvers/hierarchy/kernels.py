"""Compiled parts of the hierarchy solver: experts to nodes, spare slots to copies, replicas to devices.

Shape letters: E experts, N nodes, D devices, S slots, T tokens, K top-k, Q expert choices of all tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt

from placement.solvers.balance.kernels import EMPTY, State, _descend, _device_of_slot, _new_state, _recount

__all__ = ["make_cut", "place_copies", "place_on_devices", "search_nodes"]

Array = npt.NDArray[Any]

_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}

STILL_OVER = 1e-9
"""Relative excess over a limit that is rounding."""


class Cut(NamedTuple):
    """Tokens over nodes while every expert has one home; `node_E` and what follows change in place.

    Parameters
    ----------
    experts_TK
        Experts of each token.
    start_E, token_Q
        Tokens of expert ``e``: ``token_Q[start_E[e] : start_E[e + 1]]``.
    load_E
        Loads.
    node_E, load_N
        Home of each expert, and the load that is at home on each node.
    held_TN
        Experts of each token on each node.
    leave_E
        Tokens that visit their expert's node for it alone: they leave if it does.
    enter_EN
        Tokens of an expert that do not visit a node yet: they come if it does.
    mark_T
        Scratch.
    """

    experts_TK: Array
    start_E: Array
    token_Q: Array
    load_E: Array
    node_E: Array
    load_N: Array
    held_TN: Array
    leave_E: Array
    enter_EN: Array
    mark_T: Array


@nb.njit(**_OPTIONS)
def make_cut(experts_TK: Array, load_E: Array, node_E: Array, num_nodes: int) -> Cut:
    """Count tokens over nodes for given homes."""
    num_tokens, top_k = experts_TK.shape
    start_E = np.zeros(load_E.size + 1, dtype=np.int64)
    for expert in experts_TK.ravel():
        start_E[expert + 1] += 1
    start_E = np.cumsum(start_E)
    token_Q = np.empty(num_tokens * top_k, dtype=np.int64)
    next_E = start_E.copy()
    for token in range(num_tokens):
        for expert in experts_TK[token]:
            token_Q[next_E[expert]] = token
            next_E[expert] += 1
    load_N = np.zeros(num_nodes)
    for expert in range(load_E.size):
        load_N[node_E[expert]] += load_E[expert]
    cut = Cut(
        experts_TK,
        start_E,
        token_Q,
        load_E,
        node_E.copy(),
        load_N,
        np.zeros((num_tokens, num_nodes), dtype=np.int64),
        np.zeros(load_E.size, dtype=np.int64),
        np.zeros((load_E.size, num_nodes), dtype=np.int64),
        np.full(num_tokens, -1, dtype=np.int64),
    )
    for token in range(num_tokens):
        for expert in experts_TK[token]:
            cut.held_TN[token, node_E[expert]] += 1
        _tally(cut, token, 1)
    return cut


@nb.njit(**_OPTIONS)
def _tally(cut: Cut, token: int, sign: int) -> None:
    """Add a token to, or take it from, the tables of its experts."""
    held_N = cut.held_TN[token]
    for expert in cut.experts_TK[token]:
        if held_N[cut.node_E[expert]] == 1:
            cut.leave_E[expert] += sign
        for node in range(held_N.size):
            if held_N[node] == 0:
                cut.enter_EN[expert, node] += sign


@nb.njit(**_OPTIONS)
def _optimistic(cut: Cut, a: int, b: int) -> int:
    """Return a bound from below on the visits that a swap of two experts' homes adds."""
    n, m = cut.node_E[a], cut.node_E[b]
    return cut.enter_EN[a, m] + cut.enter_EN[b, n] - cut.leave_E[a] - cut.leave_E[b]


@nb.njit(**_OPTIONS)
def _shared(cut: Cut, a: int, b: int) -> int:
    """Return what the bound is short of: tokens of both experts visit both nodes after as before."""
    n, m = cut.node_E[a], cut.node_E[b]
    for q in range(cut.start_E[a], cut.start_E[a + 1]):
        cut.mark_T[cut.token_Q[q]] = a
    short = 0
    for q in range(cut.start_E[b], cut.start_E[b + 1]):
        token = cut.token_Q[q]
        if cut.mark_T[token] == a:
            short += (cut.held_TN[token, n] == 1) + (cut.held_TN[token, m] == 1)
    for q in range(cut.start_E[a], cut.start_E[a + 1]):
        cut.mark_T[cut.token_Q[q]] = -1
    return short


@nb.njit(**_OPTIONS)
def _rehome(cut: Cut, expert: int, node: int) -> None:
    """Give an expert another home."""
    before = cut.node_E[expert]
    for q in range(cut.start_E[expert], cut.start_E[expert + 1]):
        _tally(cut, cut.token_Q[q], -1)
        cut.held_TN[cut.token_Q[q], before] -= 1
        cut.held_TN[cut.token_Q[q], node] += 1
    cut.node_E[expert] = node
    for q in range(cut.start_E[expert], cut.start_E[expert + 1]):
        _tally(cut, cut.token_Q[q], 1)
    cut.load_N[before] -= cut.load_E[expert]
    cut.load_N[node] += cut.load_E[expert]


@nb.njit(**_OPTIONS)
def _swap_homes(cut: Cut, a: int, b: int) -> None:
    n, m = cut.node_E[a], cut.node_E[b]
    _rehome(cut, a, m)
    _rehome(cut, b, n)


@nb.njit(**_OPTIONS)
def _relieve(cut: Cut, limit_N: Array) -> bool:
    """Make the swap that takes load off the node furthest over its limit for the fewest visits per load."""
    over = int(np.argmax(cut.load_N / limit_N))
    excess = cut.load_N[over] - limit_N[over]
    if excess <= STILL_OVER * limit_N[over]:
        return False
    best, first, second = np.inf, -1, -1
    for a in range(cut.load_E.size):
        if cut.node_E[a] != over:
            continue
        for b in range(cut.load_E.size):
            m = cut.node_E[b]
            shift = cut.load_E[a] - cut.load_E[b]
            if m == over or shift <= 0.0:
                continue
            # The other node may end over its limit as well, but by less than this one is now.
            excess_m = max(cut.load_N[m] + shift - limit_N[m], 0.0)
            gain = min(shift, excess) - 2.0 * (excess_m - max(cut.load_N[m] - limit_N[m], 0.0))
            if gain <= 1e-3 * excess:
                continue
            visits = _optimistic(cut, a, b)
            # Below zero a small swap is no better than a large one.
            price = visits / gain if visits > 0 else visits * gain
            if price < best:
                best, first, second = price, a, b
    if first < 0:
        return False
    _swap_homes(cut, first, second)
    return True


@nb.njit(**_OPTIONS)
def search_nodes(cut: Cut, limit_N: Array, work: int) -> int:
    """Swap homes until no node is over its limit where that can be had, then while visits fall.

    Returns
    -------
    int
        Pairs of experts looked at.
    """
    done = 0
    num_experts = cut.load_E.size
    for _ in range(4 * num_experts):
        done += num_experts * num_experts // limit_N.size
        if not _relieve(cut, limit_N):
            break
    improved = True
    while improved and done < work:
        improved = False
        for a in range(num_experts):
            best, partner = 0, -1
            for b in range(num_experts):
                if cut.node_E[a] == cut.node_E[b] or _optimistic(cut, a, b) >= best:
                    continue
                if not _fits(cut, a, b, limit_N):
                    continue
                visits = _optimistic(cut, a, b) + _shared(cut, a, b)
                done += (cut.start_E[a + 1] - cut.start_E[a]) // 32
                if visits < best:
                    best, partner = visits, b
            done += num_experts
            if partner >= 0:
                _swap_homes(cut, a, partner)
                improved = True
    return done


@nb.njit(**_OPTIONS)
def _fits(cut: Cut, a: int, b: int, limit_N: Array) -> bool:
    """Whether a swap keeps both nodes within their limits, or no further over them than they are."""
    n, m = cut.node_E[a], cut.node_E[b]
    shift = cut.load_E[a] - cut.load_E[b]
    if shift > 0.0:
        return bool(cut.load_N[m] + shift <= max(limit_N[m], cut.load_N[m]))
    return bool(cut.load_N[n] - shift <= max(limit_N[n], cut.load_N[n]))


@nb.njit(**_OPTIONS)
def place_copies(load_E: Array, node_E: Array, slots_N: Array, devices_N: Array, speed_N: Array) -> Array:
    """Give every slot that homes leave to a copy: to even out nodes first, then to split hot experts.

    A copy on a later node takes load off the home without a token that needs to go there: tokens read a
    replicated expert where they are anyway, else at its first replica, which is at home.

    Returns
    -------
    Array
        Replicas of each expert on each node, ``[experts, nodes]``.
    """
    count_EN = np.zeros((load_E.size, slots_N.size), dtype=np.int64)
    free_N = slots_N.copy()
    for expert in range(load_E.size):
        count_EN[expert, node_E[expert]] = 1
        free_N[node_E[expert]] -= 1
    fair_N = load_E.sum() * speed_N / speed_N.sum()
    device_fair = load_E.sum() / devices_N.sum()
    load_N = np.zeros(slots_N.size)
    while free_N.sum() > 0:
        for node in range(slots_N.size):
            load_N[node] = (load_E * count_EN[:, node] / count_EN.sum(axis=1)).sum()
        expert, node = _split_giant(load_E, count_EN, node_E, free_N, devices_N, load_N, device_fair)
        if expert < 0:
            expert, node = _shed(load_E, count_EN, free_N, devices_N, load_N, fair_N)
        if expert < 0:
            expert, node = _split_at_home(load_E, count_EN, free_N, devices_N)
        if expert < 0:
            break
        count_EN[expert, node] += 1
        free_N[node] -= 1
    return count_EN


@nb.njit(**_OPTIONS)
def _split_giant(
    load_E: Array,
    count_EN: Array,
    node_E: Array,
    free_N: Array,
    devices_N: Array,
    load_N: Array,
    device_fair: float,
) -> tuple[int, int]:
    """Return a copy for an expert whose replicas nearly fill a device each, or -1."""
    share_E = load_E / count_EN.sum(axis=1)
    expert = int(np.argmax(share_E))
    if share_E[expert] <= 0.75 * device_fair:
        return -1, -1
    home = node_E[expert]
    best, chosen = np.inf, -1
    for node in range(free_N.size):
        if (
            free_N[node] > 0
            and count_EN[expert, node] < devices_N[node]
            and load_N[node] < best
            and node >= home
        ):
            best, chosen = load_N[node], node
    return (expert, chosen) if chosen >= 0 else (-1, -1)


@nb.njit(**_OPTIONS)
def _shed(
    load_E: Array, count_EN: Array, free_N: Array, devices_N: Array, load_N: Array, fair_N: Array
) -> tuple[int, int]:
    """Return the copy that evens out the node loads most (their squared excess), or -1."""
    best, chosen, target = -1e-12 * fair_N.sum() ** 2, -1, -1
    replicas_E = count_EN.sum(axis=1)
    for expert in range(load_E.size):
        first = 0
        while count_EN[expert, first] == 0:
            first += 1
        share = load_E[expert] / replicas_E[expert]
        less = load_E[expert] / (replicas_E[expert] + 1)
        for node in range(first + 1, free_N.size):
            if free_N[node] == 0 or count_EN[expert, node] >= devices_N[node]:
                continue
            change = 0.0
            for n in range(free_N.size):
                count = count_EN[expert, n]
                shift = count * (less - share) + (less if n == node else 0.0)
                change += (load_N[n] + shift - fair_N[n]) ** 2 - (load_N[n] - fair_N[n]) ** 2
            if change < best:
                best, chosen, target = change, expert, node
    return chosen, target


@nb.njit(**_OPTIONS)
def _split_at_home(load_E: Array, count_EN: Array, free_N: Array, devices_N: Array) -> tuple[int, int]:
    """Return another replica of the hottest expert that lives on one node alone and fits there, or -1."""
    best, chosen, target = -1.0, -1, -1
    for node in range(free_N.size):
        if free_N[node] == 0:
            continue
        for expert in range(load_E.size):
            here, total = count_EN[expert, node], count_EN[expert].sum()
            if here == 0 or here >= devices_N[node]:
                continue
            share = load_E[expert] / total
            # Another replica of an expert that lives elsewhere too would draw load here.
            rank = share if here == total else 1e-6 * share
            if rank > best:
                best, chosen, target = rank, expert, node
    return chosen, target


@nb.njit(**_OPTIONS)
def place_on_devices(
    load_E: Array, speed_D: Array, start_D: Array, node_D: Array, count_EN: Array, tolerance: float
) -> Array:
    """Pack each node's replicas onto its devices, longest first, then exchange within nodes.

    Returns
    -------
    Array
        Expert of each slot; -1 where a node has fewer replicas than slots.
    """
    state = _new_state(load_E, speed_D, start_D)
    device_S = _device_of_slot(start_D)
    free_D = np.diff(start_D)
    share_E = load_E / count_EN.sum(axis=1)
    for expert in np.argsort(-share_E, kind="mergesort"):
        for node in range(count_EN.shape[1]):
            for _ in range(count_EN[expert, node]):
                _place_in_node(state, free_D, node_D, expert, node, share_E[expert])
    _recount(state)
    _descend(
        state,
        device_S,
        (1.0 + tolerance) * load_E.sum() / speed_D.sum(),
        node_D,
        np.zeros(1, dtype=np.int64),
    )
    return state.expert_S


@nb.njit(**_OPTIONS)
def _place_in_node(state: State, free_D: Array, node_D: Array, expert: int, node: int, share: float) -> None:
    """Put a replica on the device of its node that it fills least; make room by a move inside the node."""
    best, chosen = np.inf, -1
    for device in range(free_D.size):
        if node_D[device] == node and free_D[device] > 0 and state.held_ED[expert, device] == 0:
            time = (state.load_D[device] + share) / state.speed_D[device]
            if time < best:
                best, chosen = time, device
    if chosen < 0:
        chosen = _room_in_node(state, free_D, node_D, expert, node)
    if chosen < 0:
        return
    state.expert_S[state.start_D[chosen + 1] - free_D[chosen]] = expert
    state.held_ED[expert, chosen] = 1
    state.load_D[chosen] += share
    free_D[chosen] -= 1


@nb.njit(**_OPTIONS)
def _room_in_node(state: State, free_D: Array, node_D: Array, expert: int, node: int) -> int:
    """Move a replica of a full device without the expert to one with room in the same node; -1 for none."""
    for device in range(free_D.size):
        if node_D[device] != node or state.held_ED[expert, device] > 0:
            continue
        for slot in range(state.start_D[device], state.start_D[device + 1]):
            other = state.expert_S[slot]
            for target in range(free_D.size):
                if node_D[target] == node and free_D[target] > 0 and state.held_ED[other, target] == 0:
                    state.expert_S[state.start_D[target + 1] - free_D[target]] = other
                    state.held_ED[other, target] = 1
                    free_D[target] -= 1
                    last = state.start_D[device + 1] - 1
                    state.expert_S[slot] = state.expert_S[last]
                    state.expert_S[last] = EMPTY
                    state.held_ED[other, device] = 0
                    free_D[device] += 1
                    return device
    return -1
