"""Compiled state of one layer under swap moves: exact cost of a move without evaluating the layer anew.

Tokens are bits. For every expert a bit set says which sampled tokens select it; a device (or node) is
touched by the union of its experts' sets. Keeping the tokens covered at least once and at least twice by
every group, the distinct tokens after swapping item a of group g against item b of group h are

    volume(g) - only_a(g) + new_b(g) + both(a, b)

with only_a the tokens that a alone brings to g, new_b those of b that g does not see yet, and both those
of b among only_a. These three tables make a swap cost O(windows), whatever the number of tokens. The third
is by far the largest and most of it is never asked for, so its rows are counted when a swap is priced
exactly; `swap_estimate` guesses those not yet counted, and looks at some of the scenarios only.

An item is one expert copy (or an empty slot) on a device; moves swap items between devices, so every
device keeps its number of slots.

Shape letters: W scenarios, E experts, I items, D devices, J links, G groups, H homes, K device kinds,
R replica counts, N words of 64 tokens, Q segments of words, P pieces of windows, Y terms, X curve points,
O top-k positions, M pieces mixed into a scenario.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as llvm_ir
import numba as nb
import numpy as np
import numpy.typing as npt
from numba.core import types
from numba.experimental import structref
from numba.extending import intrinsic

__all__ = [
    "EMPTY_ITEM",
    "Layer",
    "State",
    "apply_swap",
    "items_of",
    "make_compiled_layer",
    "new_state",
    "rebuild",
    "resettle",
    "saved_tokens",
    "soft_power",
    "soft_root",
    "state_value",
    "swap_allowed",
    "swap_estimate",
    "swap_value",
]

Array = npt.NDArray[Any]

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    # Sums over scenarios may be reassociated so that they vectorise; nothing relies on NaN or infinity.
    "fastmath": {"nnan", "ninf", "nsz", "arcp", "contract", "reassoc"},
}

EMPTY_ITEM = -1

SOFT_POWER = 16
"""Power of the norm that softens maxima: devices within 1 / 16 of the fullest count as full too, about what
the loads of windows not seen differ by."""


@structref.register
class _LayerType(types.StructRef):
    """Compiled type of `Layer`."""


@structref.register
class _StateType(types.StructRef):
    """Compiled type of `State`."""


class Layer(structref.StructRefProxy):
    """What never changes while one layer is searched; a compiled structure of the fields below.

    Passed to compiled code by reference: a tuple of as many arrays makes compiling several times slower.
    """

    cost_KREW: Array
    """Cost of an expert's replica on a device kind when it has 1 + r replicas."""
    weight_W: Array
    """Weight of each scenario in the objective; they sum to 1."""
    kind_D: Array
    group_JD: Array
    num_groups_J: Array
    enter_JHG: Array
    bits_EN: Array
    position_bits_OEN: Array
    """`bits_EN` by position in the token's own order; empty where no expert can be replicated."""
    segment_start_Q: Array
    segment_piece_Q: Array
    segment_home_Q: Array
    scale_P: Array
    mix_WM: Array
    shrink: float
    """Weight of the mean over pieces in every scenario's token counts."""
    additive_JGEW: Array
    """Volume that an expert adds to a group, where volumes add up (no de-duplication); else empty."""
    base_JGW: Array
    curve_x_YJX: Array
    curve_y_YJX: Array
    curve_points_YJ: Array
    """Points of the curve of a link in a term (dispatch, combine); 0 where the link has no part in it."""
    overlap_EE: Array
    """Share of an expert's sampled tokens (row) that select another expert too (column)."""
    total_E: Array
    device_limit: float
    """Largest allowed sum of `total_E` over a device's experts; infinite where there is no limit."""
    sums_volume: bool
    """True: minimise the summed volume (traffic); False: charge the fullest device and link."""
    soft: bool
    """True: replace every maximum over devices or groups by the `SOFT_POWER`-norm."""

    def __new__(cls, *values: Any) -> Layer:
        """Return a compiled structure of the values, one for each field."""
        return structref.StructRefProxy.__new__(cls, *values)  # type: ignore[no-untyped-call]


class State(structref.StructRefProxy):
    """Where the items of one layer are, and the tables that price a swap; a compiled structure."""

    expert_I: Array
    device_I: Array
    replicas_E: Array
    has_ED: Array
    cost_KIW: Array
    device_cost_DW: Array
    device_top_3W: Array
    device_top_id_3W: Array
    device_power_W: Array
    """Sum over devices of (cost / `device_scale`)^SOFT_POWER."""
    item_bits_IN: Array
    previous_bits_IN: Array
    once_JGN: Array
    twice_JGN: Array
    volume_JGW: Array
    volume_top_J3W: Array
    volume_top_id_J3W: Array
    volume_power_JW: Array
    only_JIW: Array
    new_JGIW: Array
    both_JIIW: Array
    both_known_JII: Array
    """Whether a row of `both_JIIW` has been counted since its group or the other item's tokens changed."""
    total_D: Array
    scratch_N: Array
    count_N: Array
    scratch_P: Array
    scratch_JW: Array
    scratch_2W: Array
    scale_1J: Array
    """Magnitudes by which costs, then each link's volumes, are divided before they are raised to a power."""

    def __new__(cls, *values: Any) -> State:
        """Return a compiled structure of the values, one for each field."""
        return structref.StructRefProxy.__new__(cls, *values)  # type: ignore[no-untyped-call]


LAYER_FIELDS = tuple(Layer.__annotations__)
STATE_FIELDS = tuple(State.__annotations__)


def make_compiled_layer(**fields: Any) -> Layer:
    """Return a `Layer` of the fields by name; one compiled type serves all.

    Arrays become contiguous and writable, which is part of their compiled type.
    """
    values = []
    for name in LAYER_FIELDS:
        value = fields.pop(name)
        values.append(np.require(value, requirements=["C", "W"]) if isinstance(value, np.ndarray) else value)
    assert not fields, f"unknown fields {sorted(fields)}"
    return Layer(*values)


structref.define_proxy(Layer, _LayerType, list(LAYER_FIELDS))  # type: ignore[no-untyped-call]
structref.define_proxy(State, _StateType, list(STATE_FIELDS))  # type: ignore[no-untyped-call]


@nb.njit(**OPTIONS)
def items_of(state: State) -> tuple[Array, Array, bool]:
    """Return expert and device of each item, and whether any expert is replicated."""
    return state.expert_I, state.device_I, state.replicas_E.max() > 1


@intrinsic
def _popcount(context: Any, word: Any) -> Any:
    """Count the set bits of a word; LLVM turns a loop of these into vector instructions."""
    signature = types.int64(types.uint64)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        count = builder.module.declare_intrinsic("llvm.ctpop", [llvm_ir.IntType(64)])
        return builder.call(count, arguments)

    return signature, generate


@nb.njit(**OPTIONS)
def new_state(layer: Layer, expert_I: Array, device_I: Array) -> State:
    """Allocate a state for the given items and fill it."""
    num_items, num_scenarios = expert_I.size, layer.weight_W.size
    num_devices, num_links = layer.kind_D.size, layer.group_JD.shape[0]
    num_words = layer.bits_EN.shape[1]
    num_groups = 0
    for link in range(num_links):
        num_groups = max(num_groups, layer.num_groups_J[link])
    covers = num_links if num_words > 0 else 0
    state = State(
        expert_I.copy(),
        device_I.copy(),
        np.zeros(layer.cost_KREW.shape[2], np.int64),
        np.zeros((layer.cost_KREW.shape[2], num_devices), np.int64),
        np.zeros((layer.cost_KREW.shape[0], num_items, num_scenarios)),
        np.zeros((num_devices, num_scenarios)),
        np.zeros((3, num_scenarios)),
        np.zeros((3, num_scenarios), np.int64),
        np.zeros(num_scenarios),
        np.zeros((num_items, num_words), np.uint64),
        np.zeros((num_items, num_words), np.uint64),
        np.zeros((covers, num_groups, num_words), np.uint64),
        np.zeros((covers, num_groups, num_words), np.uint64),
        np.zeros((num_links, num_groups, num_scenarios)),
        np.zeros((num_links, 3, num_scenarios)),
        np.zeros((num_links, 3, num_scenarios), np.int64),
        np.zeros((num_links, num_scenarios)),
        np.zeros((num_links, num_items, num_scenarios)),
        np.zeros((num_links, num_groups, num_items, num_scenarios)),
        np.zeros((covers, num_items, num_items, num_scenarios)),
        np.zeros((covers, num_items, num_items), np.bool_),
        np.zeros(num_devices),
        np.zeros(num_words, np.uint64),
        np.zeros(num_words, np.int64),
        np.zeros(layer.scale_P.size),
        np.zeros((max(num_links, 1), num_scenarios)),
        np.zeros((2, num_scenarios)),
        np.ones(1 + num_links),
    )
    rebuild(layer, state)
    return state


@nb.njit(**OPTIONS)
def rebuild(layer: Layer, state: State) -> None:
    """Recompute everything from `expert_I` and `device_I`."""
    _count_replicas(layer, state)
    for device in range(layer.kind_D.size):
        _sum_device(layer, state, device)
    _rank_devices(layer, state)
    if layer.bits_EN.shape[1] > 0:
        _assign_tokens(layer, state)
    for link in range(layer.group_JD.shape[0]):
        for group in range(layer.num_groups_J[link]):
            _refresh_group(layer, state, link, group)
        _rank_groups(layer, state, link)


@nb.njit(**OPTIONS)
def resettle(layer: Layer, state: State, i: int, j: int) -> None:
    """Bring everything up to date after items of devices i and j changed, where tokens may change replica.

    Only groups that gain or lose an item or a token are recomputed whole.
    """
    state.previous_bits_IN[:] = state.item_bits_IN
    _count_replicas(layer, state)
    for device in range(layer.kind_D.size):
        _sum_device(layer, state, device)
    _rank_devices(layer, state)
    _assign_tokens(layer, state)
    changed_I = np.zeros(state.expert_I.size, np.bool_)
    dirty_D = np.zeros(layer.kind_D.size, np.bool_)
    dirty_D[i] = dirty_D[j] = True
    for item in range(state.expert_I.size):
        if (state.previous_bits_IN[item] != state.item_bits_IN[item]).any():
            changed_I[item] = True
            dirty_D[state.device_I[item]] = True
    for link in range(layer.group_JD.shape[0]):
        dirty_G = np.zeros(layer.num_groups_J[link], np.bool_)
        for device in range(dirty_D.size):
            if dirty_D[device]:
                dirty_G[layer.group_JD[link, device]] = True
        for group in range(dirty_G.size):
            if dirty_G[group]:
                _refresh_group(layer, state, link, group)
            else:
                _refresh_foreign(layer, state, link, group, changed_I)
        _rank_groups(layer, state, link)


@nb.njit(**OPTIONS)
def _refresh_foreign(layer: Layer, state: State, link: int, group: int, changed_I: Array) -> None:
    """Recompute what items of other groups whose tokens changed would bring to an unchanged group."""
    if layer.num_groups_J[link] == 1:
        return
    enter_H = layer.enter_JHG[link, :, group]
    once_N = state.once_JGN[link, group]
    words_N = state.scratch_N
    for item in range(changed_I.size):
        if not changed_I[item]:
            continue
        for n in range(once_N.size):
            words_N[n] = ~once_N[n]
        _count_common(
            layer, state, state.item_bits_IN[item], words_N, enter_H, state.new_JGIW[link, group, item]
        )
        for member in range(changed_I.size):
            state.both_known_JII[link, member, item] = False


@nb.njit(**OPTIONS)
def _count_replicas(layer: Layer, state: State) -> None:
    state.replicas_E[:] = 0
    state.has_ED[:] = 0
    state.total_D[:] = 0.0
    for item in range(state.expert_I.size):
        expert = state.expert_I[item]
        if expert >= 0:
            state.replicas_E[expert] += 1
            state.has_ED[expert, state.device_I[item]] += 1
    for item in range(state.expert_I.size):
        expert = state.expert_I[item]
        if expert < 0:
            state.cost_KIW[:, item] = 0.0
            continue
        replicas = state.replicas_E[expert]
        state.total_D[state.device_I[item]] += layer.total_E[expert] / replicas
        for kind in range(layer.cost_KREW.shape[0]):
            state.cost_KIW[kind, item] = layer.cost_KREW[kind, replicas - 1, expert]


@nb.njit(**OPTIONS)
def _sum_device(layer: Layer, state: State, device: int) -> None:
    cost_W = state.device_cost_DW[device]
    cost_W[:] = 0.0
    kind = layer.kind_D[device]
    for item in range(state.expert_I.size):
        if state.device_I[item] == device and state.expert_I[item] >= 0:
            item_W = state.cost_KIW[kind, item]
            for w in range(cost_W.size):
                cost_W[w] += item_W[w]


@nb.njit(**OPTIONS)
def _assign_tokens(layer: Layer, state: State) -> None:
    """Give every item the tokens that it brings to its device.

    An expert's only copy brings all its tokens. Of a replicated expert, tokens that already go to a device
    with a replica need nothing more; the others go to the first replica (the lowest device).
    """
    num_devices, num_words = layer.kind_D.size, layer.bits_EN.shape[1]
    state.item_bits_IN[:] = 0
    touched_DN = np.zeros((num_devices, num_words), np.uint64)
    any_replicated = False
    for item in range(state.expert_I.size):
        expert = state.expert_I[item]
        if expert < 0:
            continue
        if state.replicas_E[expert] > 1:
            any_replicated = True
            continue
        device = state.device_I[item]
        for n in range(num_words):
            state.item_bits_IN[item, n] = layer.bits_EN[expert, n]
            touched_DN[device, n] |= layer.bits_EN[expert, n]
    if not any_replicated:
        return
    first_E = np.full(state.replicas_E.size, -1, np.int64)
    for item in range(state.expert_I.size):
        expert = state.expert_I[item]
        if expert >= 0 and (first_E[expert] < 0 or state.device_I[item] < state.device_I[first_E[expert]]):
            first_E[expert] = item
    need_N = state.scratch_N
    for position in range(layer.position_bits_OEN.shape[0]):
        for expert in range(state.replicas_E.size):
            if state.replicas_E[expert] < 2:
                continue
            need_N[:] = layer.position_bits_OEN[position, expert]
            for device in range(num_devices):
                if state.has_ED[expert, device] > 0:
                    for n in range(num_words):
                        need_N[n] &= ~touched_DN[device, n]
            item = first_E[expert]
            device = state.device_I[item]
            for n in range(num_words):
                state.item_bits_IN[item, n] |= need_N[n]
                touched_DN[device, n] |= need_N[n]


@nb.njit(**OPTIONS)
def _count_common(layer: Layer, state: State, x_N: Array, y_N: Array, enter_H: Array, out_W: Array) -> None:
    """Weigh the tokens in both sets, piece by piece, and mix the pieces into scenarios."""
    piece_P, scale_P, mix_WM = state.scratch_P, layer.scale_P, layer.mix_WM
    start_Q, segment_piece_Q, home_Q = layer.segment_start_Q, layer.segment_piece_Q, layer.segment_home_Q
    piece_P[:] = 0.0
    # Segments are a few words long: counting all words first lets the loop vectorise.
    count_N = state.count_N
    for n in range(count_N.size):
        count_N[n] = _popcount(x_N[n] & y_N[n])  # type: ignore[call-arg]
    for q in range(segment_piece_Q.size):
        count = 0
        for n in range(start_Q[q], start_Q[q + 1]):
            count += count_N[n]
        piece_P[segment_piece_Q[q]] += count * enter_H[home_Q[q]]
    mean = 0.0
    for p in range(piece_P.size):
        piece_P[p] *= scale_P[p]
        mean += piece_P[p]
    mean *= layer.shrink / piece_P.size
    num_mixed = mix_WM.shape[1]
    factor = (1.0 - layer.shrink) / num_mixed
    for w in range(out_W.size):
        mixed = 0.0
        for m in range(num_mixed):
            mixed += piece_P[mix_WM[w, m]]
        out_W[w] = mixed * factor + mean


@nb.njit(**OPTIONS)
def _refresh_group(layer: Layer, state: State, link: int, group: int) -> None:
    """Recompute volume and tables of one group of a link."""
    if layer.bits_EN.shape[1] > 0:
        _refresh_cover(layer, state, link, group)
        return
    volume_W = state.volume_JGW[link, group]
    volume_W[:] = layer.base_JGW[link, group]
    for item in range(state.expert_I.size):
        expert = state.expert_I[item]
        new_W = state.new_JGIW[link, group, item]
        if expert < 0:
            new_W[:] = 0.0
        else:
            share = 1.0 / state.replicas_E[expert]
            for w in range(new_W.size):
                new_W[w] = layer.additive_JGEW[link, group, expert, w] * share
        if layer.group_JD[link, state.device_I[item]] == group:
            state.only_JIW[link, item] = new_W
            for w in range(new_W.size):
                volume_W[w] += new_W[w]


@nb.njit(**OPTIONS)
def _refresh_cover(layer: Layer, state: State, link: int, group: int) -> None:
    once_N, twice_N = state.once_JGN[link, group], state.twice_JGN[link, group]
    enter_H = layer.enter_JHG[link, :, group]
    once_N[:] = 0
    twice_N[:] = 0
    for item in range(state.expert_I.size):
        if layer.group_JD[link, state.device_I[item]] == group and state.expert_I[item] >= 0:
            bits_N = state.item_bits_IN[item]
            for n in range(once_N.size):
                twice_N[n] |= once_N[n] & bits_N[n]
                once_N[n] |= bits_N[n]
    _count_common(layer, state, once_N, once_N, enter_H, state.volume_JGW[link, group])
    if layer.num_groups_J[link] == 1:
        return
    words_N = state.scratch_N
    for n in range(once_N.size):
        words_N[n] = ~once_N[n]
    for item in range(state.expert_I.size):
        if layer.group_JD[link, state.device_I[item]] != group:
            _count_common(
                layer, state, state.item_bits_IN[item], words_N, enter_H, state.new_JGIW[link, group, item]
            )
    for item in range(state.expert_I.size):
        if layer.group_JD[link, state.device_I[item]] != group:
            continue
        for n in range(once_N.size):
            words_N[n] = state.item_bits_IN[item, n] & ~twice_N[n]
        _count_common(layer, state, words_N, words_N, enter_H, state.only_JIW[link, item])
        state.both_known_JII[link, item] = False


@nb.njit(**OPTIONS)
def _count_both(layer: Layer, state: State, link: int, item: int, other: int) -> None:
    """Count the tokens that an item alone brings to its group and that an item elsewhere shares."""
    if state.both_known_JII[link, item, other]:
        return
    group = layer.group_JD[link, state.device_I[item]]
    twice_N, words_N, bits_N = state.twice_JGN[link, group], state.scratch_N, state.item_bits_IN[item]
    for n in range(words_N.size):
        words_N[n] = bits_N[n] & ~twice_N[n]
    enter_H = layer.enter_JHG[link, :, group]
    out_W = state.both_JIIW[link, item, other]
    _count_common(layer, state, words_N, state.item_bits_IN[other], enter_H, out_W)
    state.both_known_JII[link, item, other] = True


@nb.njit(**OPTIONS)
def _rank_devices(layer: Layer, state: State) -> None:
    _top3(state.device_cost_DW, layer.kind_D.size, state.device_top_3W, state.device_top_id_3W)
    if layer.soft:
        state.scale_1J[0] = _sum_powers(state.device_cost_DW, layer.kind_D.size, state.device_power_W)


@nb.njit(**OPTIONS)
def _rank_groups(layer: Layer, state: State, link: int) -> None:
    num_groups = layer.num_groups_J[link]
    _top3(state.volume_JGW[link], num_groups, state.volume_top_J3W[link], state.volume_top_id_J3W[link])
    if layer.soft:
        state.scale_1J[1 + link] = _sum_powers(
            state.volume_JGW[link], num_groups, state.volume_power_JW[link]
        )


@nb.njit(**OPTIONS)
def soft_power(value: float) -> float:
    """Raise to `SOFT_POWER`."""
    value *= value
    value *= value
    value *= value
    return value * value


@nb.njit(**OPTIONS)
def soft_root(value: float) -> float:
    """Return the root that undoes `soft_power`."""
    return float(np.sqrt(np.sqrt(np.sqrt(np.sqrt(max(value, 0.0))))))


@nb.njit(**OPTIONS)
def _sum_powers(value_GW: Array, num_groups: int, power_W: Array) -> float:
    """Sum powers over groups; return the scale that keeps them in range."""
    scale = 0.0
    for group in range(num_groups):
        for w in range(power_W.size):
            scale = max(scale, value_GW[group, w])
    if scale == 0.0:
        scale = 1.0
    power_W[:] = 0.0
    for group in range(num_groups):
        for w in range(power_W.size):
            power_W[w] += soft_power(value_GW[group, w] / scale)
    return scale


@nb.njit(**OPTIONS)
def _top3(value_GW: Array, num_groups: int, top_3W: Array, id_3W: Array) -> None:
    """Keep the three largest groups of each scenario: a swap changes two, so the third always stands."""
    for w in range(value_GW.shape[1]):
        first, second, third = -np.inf, -np.inf, -np.inf
        first_id, second_id, third_id = -1, -1, -1
        for group in range(num_groups):
            value = value_GW[group, w]
            if value > first:
                third, third_id = second, second_id
                second, second_id = first, first_id
                first, first_id = value, group
            elif value > second:
                third, third_id = second, second_id
                second, second_id = value, group
            elif value > third:
                third, third_id = value, group
        top_3W[0, w], top_3W[1, w], top_3W[2, w] = first, second, third
        id_3W[0, w], id_3W[1, w], id_3W[2, w] = first_id, second_id, third_id


@nb.njit(**OPTIONS)
def _curve(x_X: Array, y_X: Array, points: int, value: float) -> float:
    index = 1
    while index < points - 1 and value > x_X[index]:
        index += 1
    slope = (y_X[index] - y_X[index - 1]) / (x_X[index] - x_X[index - 1])
    return y_X[index - 1] + slope * (value - x_X[index - 1])


@nb.njit(**OPTIONS)
def _terms_value(layer: Layer, volume_JW: Array, num_scenarios: int) -> float:
    """Return the weighted time of all exchange terms over the first scenarios, given the fullest groups."""
    total = 0.0
    num_links = layer.group_JD.shape[0]
    weight_W = layer.weight_W
    for term in range(layer.curve_points_YJ.shape[0]):
        if num_links == 1 and layer.curve_points_YJ[term, 0] == 2:
            x0, y0 = layer.curve_x_YJX[term, 0, 0], layer.curve_y_YJX[term, 0, 0]
            slope = (layer.curve_y_YJX[term, 0, 1] - y0) / (layer.curve_x_YJX[term, 0, 1] - x0)
            volume_W = volume_JW[0]
            for w in range(num_scenarios):
                total += weight_W[w] * (y0 + slope * (volume_W[w] - x0))
            continue
        for w in range(num_scenarios):
            longest = 0.0
            for link in range(num_links):
                points = layer.curve_points_YJ[term, link]
                if points > 0:
                    time = _curve(
                        layer.curve_x_YJX[term, link],
                        layer.curve_y_YJX[term, link],
                        points,
                        volume_JW[link, w],
                    )
                    longest = max(longest, time)
            total += weight_W[w] * longest
    return total


@nb.njit(**OPTIONS)
def state_value(layer: Layer, state: State) -> float:
    """Return the objective of the state as it stands."""
    total = 0.0
    if layer.sums_volume:
        for link in range(layer.group_JD.shape[0]):
            for group in range(layer.num_groups_J[link]):
                for w in range(layer.weight_W.size):
                    total += layer.weight_W[w] * state.volume_JGW[link, group, w]
        return total
    for w in range(layer.weight_W.size):
        fullest = state.device_top_3W[0, w]
        if layer.soft:
            fullest = soft_root(state.device_power_W[w]) * state.scale_1J[0]
        total += layer.weight_W[w] * fullest
    for link in range(layer.group_JD.shape[0]):
        _present_volume(layer, state, link, layer.weight_W.size)
    return total + _terms_value(layer, state.scratch_JW, layer.weight_W.size)


@nb.njit(**OPTIONS)
def _present_volume(layer: Layer, state: State, link: int, num_scenarios: int) -> None:
    """Write the fullest (or soft fullest) group of a link in the first scenarios to `scratch_JW`."""
    volume_W = state.scratch_JW[link]
    if not layer.soft:
        volume_W[:] = state.volume_top_J3W[link, 0]
        return
    for w in range(num_scenarios):
        volume_W[w] = soft_root(state.volume_power_JW[link, w]) * state.scale_1J[1 + link]


@nb.njit(**OPTIONS)
def swap_allowed(layer: Layer, state: State, a: int, b: int) -> bool:
    """Return whether items a and b may change places: no expert twice on a device, load limit kept.

    A device that is over the limit already may only become less full.
    """
    i, j = state.device_I[a], state.device_I[b]
    expert_a, expert_b = state.expert_I[a], state.expert_I[b]
    if i == j or expert_a == expert_b:
        return False
    if expert_a >= 0 and state.has_ED[expert_a, j] > 0:
        return False
    if expert_b >= 0 and state.has_ED[expert_b, i] > 0:
        return False
    if layer.device_limit < np.inf:
        total_a = layer.total_E[expert_a] / state.replicas_E[expert_a] if expert_a >= 0 else 0.0
        total_b = layer.total_E[expert_b] / state.replicas_E[expert_b] if expert_b >= 0 else 0.0
        if state.total_D[i] + total_b - total_a > max(layer.device_limit, state.total_D[i]):
            return False
        if state.total_D[j] + total_a - total_b > max(layer.device_limit, state.total_D[j]):
            return False
    return True


@nb.njit(**OPTIONS)
def swap_value(layer: Layer, state: State, a: int, b: int) -> float:
    """Return the objective after items a and b of different devices change places.

    Exact while no expert is replicated; with replicas the tokens keep their replica, and `apply_swap`
    settles them anew.
    """
    if layer.bits_EN.shape[1] > 0:
        for link in range(layer.group_JD.shape[0]):
            if layer.group_JD[link, state.device_I[a]] != layer.group_JD[link, state.device_I[b]]:
                _count_both(layer, state, link, a, b)
                _count_both(layer, state, link, b, a)
    return swap_estimate(layer, state, a, b, layer.weight_W.size)


@nb.njit(**OPTIONS)
def swap_estimate(layer: Layer, state: State, a: int, b: int, num_scenarios: int) -> float:
    """Return about what `swap_value` returns, from the first scenarios alone.

    Tokens that the two items share are taken from the table where they have been counted, else from the
    experts' usual overlap. Only estimates over as many scenarios compare.
    """
    if layer.sums_volume:
        return _swapped_sum(layer, state, a, b)
    i, j = state.device_I[a], state.device_I[b]
    total = _swapped_devices(layer, state, a, b, num_scenarios)
    for link in range(layer.group_JD.shape[0]):
        if layer.group_JD[link, i] == layer.group_JD[link, j]:
            _present_volume(layer, state, link, num_scenarios)
        else:
            _swapped_volume(layer, state, link, a, b, num_scenarios)
    return total + _terms_value(layer, state.scratch_JW, num_scenarios)


@nb.njit(**OPTIONS)
def _swapped_sum(layer: Layer, state: State, a: int, b: int) -> float:
    """Return the summed volume of all links after a swap."""
    i, j = state.device_I[a], state.device_I[b]
    covers = layer.bits_EN.shape[1] > 0
    total = state_value(layer, state)
    for link in range(layer.group_JD.shape[0]):
        g, h = layer.group_JD[link, i], layer.group_JD[link, j]
        if g == h:
            continue
        only_a, only_b = state.only_JIW[link, a], state.only_JIW[link, b]
        new_a, new_b = state.new_JGIW[link, h, a], state.new_JGIW[link, g, b]
        for w in range(layer.weight_W.size):
            total += layer.weight_W[w] * (new_b[w] - only_a[w] + new_a[w] - only_b[w])
        if covers:
            for item, other in ((a, b), (b, a)):
                both_W, share = _shared(layer, state, link, item, other)
                for w in range(layer.weight_W.size):
                    total += layer.weight_W[w] * share * both_W[w]
    return total


@nb.njit(**OPTIONS)
def _shared(layer: Layer, state: State, link: int, item: int, other: int) -> tuple[Array, float]:
    """Return a row and the factor that turns it into the tokens of `both`: counted, or guessed."""
    if state.both_known_JII[link, item, other]:
        return state.both_JIIW[link, item, other], 1.0
    expert, shared = state.expert_I[item], state.expert_I[other]
    if expert < 0 or shared < 0:
        return state.only_JIW[link, item], 0.0
    return state.only_JIW[link, item], layer.overlap_EE[expert, shared]


@nb.njit(**OPTIONS)
def _third_of(top_3W: Array, id_3W: Array, w: int, i: int, j: int) -> float:
    """Return the largest of the three kept that belongs to neither i nor j."""
    fullest = top_3W[2, w]
    if id_3W[1, w] != i and id_3W[1, w] != j:
        fullest = top_3W[1, w]
    if id_3W[0, w] != i and id_3W[0, w] != j:
        fullest = top_3W[0, w]
    return float(fullest)


@nb.njit(**OPTIONS)
def _swapped_devices(layer: Layer, state: State, a: int, b: int, num_scenarios: int) -> float:
    """Return the weighted cost of the fullest device over the first scenarios after a swap."""
    i, j = state.device_I[a], state.device_I[b]
    out_i, in_i = state.cost_KIW[layer.kind_D[i], a], state.cost_KIW[layer.kind_D[i], b]
    out_j, in_j = state.cost_KIW[layer.kind_D[j], b], state.cost_KIW[layer.kind_D[j], a]
    cost_i, cost_j = state.device_cost_DW[i], state.device_cost_DW[j]
    weight_W = layer.weight_W
    total = 0.0
    if layer.soft:
        power_W = state.device_power_W
        scale = state.scale_1J[0]
        inverse = 1.0 / scale
        for w in range(num_scenarios):
            power = power_W[w] - soft_power(cost_i[w] * inverse) - soft_power(cost_j[w] * inverse)
            power += soft_power((cost_i[w] - out_i[w] + in_i[w]) * inverse)
            power += soft_power((cost_j[w] - out_j[w] + in_j[w]) * inverse)
            total += weight_W[w] * soft_root(power)
        return total * scale
    top_3W, id_3W = state.device_top_3W, state.device_top_id_3W
    for w in range(num_scenarios):
        fullest = _third_of(top_3W, id_3W, w, i, j)
        fullest = max(fullest, max(cost_i[w] - out_i[w] + in_i[w], cost_j[w] - out_j[w] + in_j[w]))
        total += weight_W[w] * fullest
    return total


@nb.njit(**OPTIONS)
def _swapped_volume(layer: Layer, state: State, link: int, a: int, b: int, num_scenarios: int) -> None:
    """Write the fullest group of a link after a swap across two of its groups to `scratch_JW`.

    Of the first scenarios only.
    """
    g, h = layer.group_JD[link, state.device_I[a]], layer.group_JD[link, state.device_I[b]]
    after_g, after_h = state.scratch_2W[0], state.scratch_2W[1]
    volume_g, volume_h = state.volume_JGW[link, g], state.volume_JGW[link, h]
    only_a, only_b = state.only_JIW[link, a], state.only_JIW[link, b]
    new_a, new_b = state.new_JGIW[link, h, a], state.new_JGIW[link, g, b]
    for w in range(num_scenarios):
        after_g[w] = volume_g[w] - only_a[w] + new_b[w]
        after_h[w] = volume_h[w] - only_b[w] + new_a[w]
    if layer.bits_EN.shape[1] > 0:
        both_a, share_a = _shared(layer, state, link, a, b)
        both_b, share_b = _shared(layer, state, link, b, a)
        for w in range(num_scenarios):
            after_g[w] += share_a * both_a[w]
            after_h[w] += share_b * both_b[w]
    fullest_W = state.scratch_JW[link]
    if layer.soft:
        power_W = state.volume_power_JW[link]
        scale = state.scale_1J[1 + link]
        inverse = 1.0 / scale
        for w in range(num_scenarios):
            power = power_W[w] + soft_power(after_g[w] * inverse) + soft_power(after_h[w] * inverse)
            power -= soft_power(volume_g[w] * inverse) + soft_power(volume_h[w] * inverse)
            fullest_W[w] = soft_root(power) * scale
        return
    top_3W, id_3W = state.volume_top_J3W[link], state.volume_top_id_J3W[link]
    for w in range(num_scenarios):
        fullest = _third_of(top_3W, id_3W, w, g, h)
        fullest_W[w] = max(fullest, max(after_g[w], after_h[w]))


@nb.njit(**OPTIONS)
def apply_swap(layer: Layer, state: State, a: int, b: int) -> None:
    """Let items a and b of different devices change places and bring all tables up to date."""
    i, j = state.device_I[a], state.device_I[b]
    state.device_I[a], state.device_I[b] = j, i
    replicated = False
    for expert in range(state.replicas_E.size):
        if state.replicas_E[expert] > 1:
            replicated = True
    if replicated and layer.bits_EN.shape[1] > 0:
        resettle(layer, state, i, j)
        return
    for item in (a, b):
        expert = state.expert_I[item]
        if expert >= 0:
            total = layer.total_E[expert] / state.replicas_E[expert]
            before = j if item == b else i
            after = state.device_I[item]
            state.has_ED[expert, before] -= 1
            state.has_ED[expert, after] += 1
            state.total_D[before] -= total
            state.total_D[after] += total
    _sum_device(layer, state, i)
    _sum_device(layer, state, j)
    _rank_devices(layer, state)
    for link in range(layer.group_JD.shape[0]):
        g, h = layer.group_JD[link, i], layer.group_JD[link, j]
        if g == h:
            continue
        _refresh_group(layer, state, link, g)
        _refresh_group(layer, state, link, h)
        _rank_groups(layer, state, link)


@nb.njit(**OPTIONS)
def saved_tokens(layer: Layer, state: State, expert: int, device: int) -> int:
    """Count sampled tokens that another replica of an expert on a device would spare a trip.

    They go to that device anyway, and to the device where they read the expert now for nothing else.
    """
    if layer.bits_EN.shape[1] == 0:
        return 0
    # Groups of the innermost link are devices.
    once_N = state.once_JGN[0, device]
    saved = 0
    for item in range(state.expert_I.size):
        if state.expert_I[item] == expert:
            bits_N, twice_N = state.item_bits_IN[item], state.twice_JGN[0, state.device_I[item]]
            for n in range(once_N.size):
                saved += _popcount(bits_N[n] & ~twice_N[n] & once_N[n])  # type: ignore[call-arg]
    return saved
