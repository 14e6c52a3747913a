"""Compiled balancing of one layer: water-filled replicas, longest-first packing, swaps with the fullest.

A layer is slots of devices, slot by slot in device order; slot ``s`` of device ``d`` lies in
``start_D[d] <= s < start_D[d + 1]``. The replicas of an expert share its load evenly. A device's *time* is
its load divided by its speed; what is minimised is the longest.

Shape letters: E experts, S slots, D devices, W windows, P pairs of slots, N slots of one device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt

__all__ = ["balance_layer", "balance_windows", "improve_once", "least_share", "partition_equal"]

Array = npt.NDArray[Any]

_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}

EMPTY = -1

LEAST_PAIRED_SLOTS, MOST_PAIRED_SLOTS = 4, 96
"""Slots per device at which double swaps are tried: with fewer they do what single ones do, with more the
single ones are so many that double ones add nothing."""

GOOD_ENOUGH = 0.25
"""Share of the excess over the target that an exchange may leave and be taken at once."""

LEAST_STEP = 0.01
"""Share of the excess over the target that an exchange must take away: smaller ones lead nowhere."""

PATIENCE = 20
"""Random changes of replicas, per slot (and 20 more), after which a layer is given up if none has helped."""

PAIR_WORK = 24
"""What looking at a pair of devices costs besides its pairs of slots, in pairs of slots."""

LEAST_GAIN = 1e-9
"""Relative gain below which a swap counts as none, so that rounding cannot keep a loop alive."""


class State(NamedTuple):
    """One layer under work; all arrays but the first three change in place."""

    load_E: Array
    speed_D: Array
    start_D: Array
    expert_S: Array
    count_E: Array
    held_ED: Array
    load_D: Array


class Exchange(NamedTuple):
    """Slots of the fullest device and of another that change places, and the longer time of both after.

    Slots of -1 mark a second pair, or any, that is not there.
    """

    time: float
    a1: int
    b1: int
    a2: int
    b2: int


@nb.njit(**_OPTIONS)
def water_fill(load_E: Array, num_slots: int, most: int) -> Array:
    """Give every slot beyond one per expert to the highest load per replica; at most `most` replicas each.

    This minimises the largest load per replica.
    """
    count_E = np.ones(load_E.size, dtype=np.int64)
    share_E = load_E.copy()
    if most == 1:
        return count_E
    for _ in range(min(num_slots, most * load_E.size) - load_E.size):
        hottest = int(np.argmax(share_E))
        count_E[hottest] += 1
        share_E[hottest] = load_E[hottest] / count_E[hottest]
        if count_E[hottest] == most:
            # Full: it only steps aside for others.
            share_E[hottest] = -1.0
    return count_E


@nb.njit(**_OPTIONS)
def least_share(load_E: Array, num_slots: int, most: int) -> float:
    """Return the least that the largest load per replica can be: no device carries less."""
    return float((load_E / water_fill(load_E, num_slots, most)).max())


@nb.njit(**_OPTIONS)
def _share(state: State, expert: int) -> float:
    if expert == EMPTY:
        return 0.0
    return state.load_E[expert] / state.count_E[expert]


@nb.njit(**_OPTIONS)
def _device_of_slot(start_D: Array) -> Array:
    device_S = np.empty(start_D[-1], dtype=np.int64)
    for device in range(start_D.size - 1):
        device_S[start_D[device] : start_D[device + 1]] = device
    return device_S


@nb.njit(**_OPTIONS)
def _recount(state: State) -> None:
    """Bring counts, holdings and loads up to date with the slots."""
    state.count_E[:] = 0
    state.held_ED[:] = 0
    state.load_D[:] = 0.0
    for device in range(state.load_D.size):
        for slot in range(state.start_D[device], state.start_D[device + 1]):
            expert = state.expert_S[slot]
            if expert != EMPTY:
                state.count_E[expert] += 1
                state.held_ED[expert, device] += 1
    _reload(state)


@nb.njit(**_OPTIONS)
def _reload(state: State) -> None:
    """Sum the devices' loads afresh."""
    for device in range(state.load_D.size):
        load = 0.0
        for slot in range(state.start_D[device], state.start_D[device + 1]):
            load += _share(state, state.expert_S[slot])
        state.load_D[device] = load


@nb.njit(**_OPTIONS)
def _new_state(load_E: Array, speed_D: Array, start_D: Array) -> State:
    return State(
        load_E,
        speed_D,
        start_D,
        np.full(start_D[-1], EMPTY, dtype=np.int64),
        np.ones(load_E.size, dtype=np.int64),
        np.zeros((load_E.size, speed_D.size), dtype=np.uint8),
        np.zeros(speed_D.size),
    )


@nb.njit(**_OPTIONS)
def _pack(state: State) -> None:
    """Place all replicas, largest share first, each on the device that it fills least."""
    free_D = np.diff(state.start_D)
    share_E = state.load_E / state.count_E
    for expert in np.argsort(-share_E, kind="mergesort"):
        wanted = state.count_E[expert]
        for _ in range(wanted):
            device = _emptiest(state, free_D, expert, share_E[expert])
            if device < 0:
                device = _make_room(state, free_D, expert)
            if device < 0:
                # No room beside its own replicas, which only uneven slots can bring about.
                state.count_E[expert] -= 1
                continue
            _put(state, free_D, expert, device)
            state.load_D[device] += share_E[expert]
    _recount(state)


@nb.njit(**_OPTIONS)
def _emptiest(state: State, free_D: Array, expert: int, share: float) -> int:
    best, chosen = np.inf, -1
    for device in range(free_D.size):
        if free_D[device] > 0 and state.held_ED[expert, device] == 0:
            time = (state.load_D[device] + share) / state.speed_D[device]
            if time < best:
                best, chosen = time, device
    return chosen


@nb.njit(**_OPTIONS)
def _put(state: State, free_D: Array, expert: int, device: int) -> None:
    state.expert_S[state.start_D[device + 1] - free_D[device]] = expert
    state.held_ED[expert, device] = 1
    free_D[device] -= 1


@nb.njit(**_OPTIONS)
def _make_room(state: State, free_D: Array, expert: int) -> int:
    """Move a replica from a full device without the expert to one with room; return the former, or -1."""
    for device in range(free_D.size):
        if state.held_ED[expert, device] > 0:
            continue
        for slot in range(state.start_D[device], state.start_D[device + 1]):
            other = state.expert_S[slot]
            for target in range(free_D.size):
                if free_D[target] > 0 and other != EMPTY and state.held_ED[other, target] == 0:
                    share = _share(state, other)
                    _put(state, free_D, other, target)
                    state.load_D[target] += share
                    state.load_D[device] -= share
                    state.held_ED[other, device] = 0
                    # Free slots of a device are its last ones.
                    last = state.start_D[device + 1] - free_D[device] - 1
                    state.expert_S[slot] = state.expert_S[last]
                    state.expert_S[last] = EMPTY
                    free_D[device] += 1
                    return device
    return -1


@nb.njit(**_OPTIONS)
def _fullest(state: State) -> int:
    return int(np.argmax(state.load_D / state.speed_D))


@nb.njit(**_OPTIONS)
def _longest(state: State) -> float:
    return float((state.load_D / state.speed_D).max())


@nb.njit(**_OPTIONS)
def _movable(state: State, source: int, target: int, slot_N: Array) -> int:
    """List the slots of a device whose contents the other may take; return their number."""
    found = 0
    for slot in range(state.start_D[source], state.start_D[source + 1]):
        expert = state.expert_S[slot]
        if expert == EMPTY or state.held_ED[expert, target] == 0:
            slot_N[found] = slot
            found += 1
    return found


@nb.njit(**_OPTIONS)
def _after(state: State, full: int, other: int, shift: float) -> float:
    """Return the longer time of two devices after `shift` of load has gone from the first to the second."""
    time_full = (state.load_D[full] - shift) / state.speed_D[full]
    time_other = (state.load_D[other] + shift) / state.speed_D[other]
    return max(time_full, time_other)


@nb.njit(**_OPTIONS)
def _single_swap(state: State, full: int, other: int, best: Exchange, a_N: Array, b_N: Array) -> Exchange:
    """Return the best exchange of one slot against one, if it beats `best`."""
    num_a, num_b = _movable(state, full, other, a_N), _movable(state, other, full, b_N)
    for a in a_N[:num_a]:
        share = _share(state, state.expert_S[a])
        for b in b_N[:num_b]:
            shift = share - _share(state, state.expert_S[b])
            if shift > 0.0:
                time = _after(state, full, other, shift)
                if time < best.time:
                    best = Exchange(time, a, b, -1, -1)
    return best


@nb.njit(**_OPTIONS)
def _pairs(state: State, slot_N: Array, num_slots: int, sum_P: Array, first_P: Array, second_P: Array) -> int:
    found = 0
    for i in range(num_slots):
        share = _share(state, state.expert_S[slot_N[i]])
        for j in range(i):
            sum_P[found] = share + _share(state, state.expert_S[slot_N[j]])
            first_P[found] = slot_N[i]
            second_P[found] = slot_N[j]
            found += 1
    return found


@nb.njit(**_OPTIONS)
def _double_swap(state: State, full: int, other: int, best: Exchange, a_N: Array, b_N: Array) -> Exchange:
    """Return the best exchange of two slots against two, if it beats `best`.

    The time after a shift falls, then rises with it: for each pair of the fullest device only the two pairs
    of the other on either side of the ideal shift matter, found in their sorted sums.
    """
    num_a, num_b = _movable(state, full, other, a_N), _movable(state, other, full, b_N)
    most_a, most_b = num_a * (num_a - 1) // 2, num_b * (num_b - 1) // 2
    if most_a == 0 or most_b == 0:
        return best
    sum_a, first_a, second_a = np.empty(most_a), np.empty(most_a, np.int64), np.empty(most_a, np.int64)
    sum_b, first_b, second_b = np.empty(most_b), np.empty(most_b, np.int64), np.empty(most_b, np.int64)
    _pairs(state, a_N, num_a, sum_a, first_a, second_a)
    _pairs(state, b_N, num_b, sum_b, first_b, second_b)
    order = np.argsort(sum_b)
    sorted_b = sum_b[order]
    speed, speed_other = state.speed_D[full], state.speed_D[other]
    ideal = (state.load_D[full] * speed_other - state.load_D[other] * speed) / (speed + speed_other)
    for p in range(most_a):
        place = np.searchsorted(sorted_b, sum_a[p] - ideal)
        for q in range(max(place - 1, 0), min(place + 1, most_b)):
            shift = sum_a[p] - sorted_b[q]
            time = _after(state, full, other, shift)
            if shift > 0.0 and time < best.time:
                pair = order[q]
                best = Exchange(time, first_a[p], first_b[pair], second_a[p], second_b[pair])
    return best


@nb.njit(**_OPTIONS)
def _best_exchange(
    state: State, full: int, bound: float, good: float, scope_D: Array, double: bool, work_1: Array
) -> Exchange:
    """Return the exchange of the fullest device with another of its scope that leaves both shortest.

    It must leave both below `bound`; the first that leaves them at `good` is taken, emptiest devices first.
    """
    best = Exchange(bound, -1, -1, -1, -1)
    widest = int(np.diff(state.start_D).max())
    a_N, b_N = np.empty(widest, np.int64), np.empty(widest, np.int64)
    for other in np.argsort(state.load_D / state.speed_D):
        if scope_D[other] != scope_D[full] or other == full:
            continue
        work_1[0] += (widest if double else 1) * widest * widest + PAIR_WORK
        if double:
            best = _double_swap(state, full, other, best, a_N, b_N)
        else:
            best = _single_swap(state, full, other, best, a_N, b_N)
        if best.time <= good:
            break
    return best


@nb.njit(**_OPTIONS)
def _exchange(state: State, device_S: Array, a: int, b: int) -> None:
    """Let two slots change places."""
    device_a, device_b = device_S[a], device_S[b]
    expert_a, expert_b = state.expert_S[a], state.expert_S[b]
    shift = _share(state, expert_a) - _share(state, expert_b)
    if expert_a != EMPTY:
        state.held_ED[expert_a, device_a] -= 1
        state.held_ED[expert_a, device_b] += 1
    if expert_b != EMPTY:
        state.held_ED[expert_b, device_b] -= 1
        state.held_ED[expert_b, device_a] += 1
    state.expert_S[a], state.expert_S[b] = expert_b, expert_a
    state.load_D[device_a] -= shift
    state.load_D[device_b] += shift


@nb.njit(**_OPTIONS)
def _step(state: State, device_S: Array, target: float, scope_D: Array, work_1: Array) -> bool:
    """Make the best exchange with the fullest device; False where none helps."""
    full = _fullest(state)
    if state.load_D[full] <= target * state.speed_D[full]:
        return False
    now = state.load_D[full] / state.speed_D[full]
    # Far from the target the first good exchange will do: what it leaves is taken up in later steps.
    good = target + GOOD_ENOUGH * (now - target)
    bound = now - max(now * LEAST_GAIN, LEAST_STEP * (now - target))
    best = _best_exchange(state, full, bound, good, scope_D, False, work_1)
    slots = np.diff(state.start_D).max()
    if best.time > good and LEAST_PAIRED_SLOTS <= slots <= MOST_PAIRED_SLOTS:
        double = _best_exchange(state, full, bound, good, scope_D, True, work_1)
        if double.time < best.time:
            best = double
    if best.a1 < 0:
        return False
    _exchange(state, device_S, best.a1, best.b1)
    if best.a2 >= 0:
        _exchange(state, device_S, best.a2, best.b2)
    return True


@nb.njit(**_OPTIONS)
def _descend(state: State, device_S: Array, target: float, scope_D: Array, work_1: Array) -> None:
    """Exchange until the longest time is at the target or no exchange shortens it.

    Every exchange replaces the longest time by two shorter ones, so this ends.
    """
    while _step(state, device_S, target, scope_D, work_1):
        pass
    _reload(state)


@nb.njit(**_OPTIONS)
def _retarget(state: State, device_S: Array, slot: int, expert: int) -> None:
    """Give a slot to another expert, or to none; the replicas of both share anew."""
    before = state.expert_S[slot]
    device = device_S[slot]
    if before != EMPTY:
        state.count_E[before] -= 1
        state.held_ED[before, device] -= 1
    if expert != EMPTY:
        state.count_E[expert] += 1
        state.held_ED[expert, device] += 1
    state.expert_S[slot] = expert
    _reload(state)


@nb.njit(**_OPTIONS)
def _random_state(seed: int) -> Array:
    """Return the state of a generator, never zero."""
    return np.array([np.uint64(2 * seed + 1)], dtype=np.uint64)


@nb.njit(**_OPTIONS)
def _random_below(random_1: Array, bound: int) -> int:
    """Draw a whole number below a bound: xorshift64* (Vigna, arXiv 1402.6246)."""
    x = random_1[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    random_1[0] = x
    return int((x * np.uint64(0x2545F4914F6CDD1D)) >> np.uint64(33)) % bound


@nb.njit(**_OPTIONS)
def _kick(state: State, device_S: Array, spare_S: Array, random_1: Array, fill: bool) -> bool:
    """Retarget a random replica: half of the time to an expert of the fullest device, rarely to none."""
    spare = 0
    for slot in range(device_S.size):
        expert = state.expert_S[slot]
        if expert == EMPTY or state.count_E[expert] > 1:
            spare_S[spare] = slot
            spare += 1
    if spare == 0:
        return False
    slot = spare_S[_random_below(random_1, spare)]
    if not fill and _random_below(random_1, 8) == 0:
        if state.expert_S[slot] != EMPTY:
            _retarget(state, device_S, slot, EMPTY)
            return True
        return False
    if _random_below(random_1, 2) == 0:
        full = _fullest(state)
        first, last = state.start_D[full], state.start_D[full + 1]
        expert = state.expert_S[first + _random_below(random_1, last - first)]
    else:
        expert = _random_below(random_1, state.load_E.size)
    if expert == EMPTY or state.held_ED[expert, device_S[slot]] > 0:
        return False
    _retarget(state, device_S, slot, expert)
    return True


@nb.njit(**_OPTIONS)
def _restore(state: State, expert_S: Array) -> None:
    state.expert_S[:] = expert_S
    _recount(state)


@nb.njit(**_OPTIONS)
def _fill_empty(state: State, device_S: Array) -> None:
    """Give slots that packing left empty to the hottest expert that their device lacks."""
    for slot in range(device_S.size):
        if state.expert_S[slot] != EMPTY:
            continue
        best, chosen = -1.0, -1
        for expert in range(state.load_E.size):
            if state.held_ED[expert, device_S[slot]] == 0 and _share(state, expert) > best:
                best, chosen = _share(state, expert), expert
        if chosen >= 0:
            _retarget(state, device_S, slot, chosen)


@nb.njit(**_OPTIONS)
def balance_layer(
    load_E: Array, speed_D: Array, start_D: Array, tolerance: float, work: int, seed: int, fill: bool
) -> Array:
    """Place the experts and replicas of one layer so that its fullest device is as short as can be found.

    Parameters
    ----------
    load_E, speed_D
        Loads, and relative speeds of the devices.
    start_D
        First slot of each device, then the number of slots, ``[devices + 1]``; no device has more slots
        than there are experts.
    tolerance
        Relative distance to the floor (mean time, or the least largest share) at which work ends.
    work
        Pairs of slots priced, about, after which no further random change of replicas (each followed by a
        descent) is tried. They also end after `PATIENCE` changes per slot without success.
    fill
        Whether slots must not be left empty where an empty one is better.

    Returns
    -------
    Array
        Expert of each slot; -1 for empty ones.
    """
    state = _new_state(load_E, speed_D, start_D)
    device_S = _device_of_slot(start_D)
    scope_D = np.zeros(speed_D.size, dtype=np.int64)
    state.count_E[:] = water_fill(load_E, start_D[-1], speed_D.size)
    largest = (load_E / state.count_E).max() / speed_D.max()
    target = max(load_E.sum() / speed_D.sum(), largest) * (1.0 + tolerance)
    _pack(state)
    _fill_empty(state, device_S)
    work_1 = np.zeros(1, dtype=np.int64)
    _descend(state, device_S, target, scope_D, work_1)
    best, best_S = _longest(state), state.expert_S.copy()
    spare_S = np.empty(device_S.size, dtype=np.int64)
    random_1 = _random_state(seed)
    patience = PATIENCE * (device_S.size + 20)
    while best > target and work_1[0] < work and patience > 0:
        patience -= 1
        # A kick that fails costs something too, or the loop might not end.
        work_1[0] += device_S.size
        changed = _kick(state, device_S, spare_S, random_1, fill)
        if _random_below(random_1, 2) == 0:
            changed = _kick(state, device_S, spare_S, random_1, fill) or changed
        if not changed:
            continue
        _descend(state, device_S, target, scope_D, work_1)
        time = _longest(state)
        if time <= best:
            if time < best * (1.0 - LEAST_GAIN):
                patience = PATIENCE * (device_S.size + 20)
            best = time
            best_S[:] = state.expert_S
        else:
            _restore(state, best_S)
    return best_S


@nb.njit(**_OPTIONS)
def improve_once(load_E: Array, speed_D: Array, start_D: Array, expert_S: Array) -> bool:
    """Make the one exchange or retargeting that helps the fullest device of a given layer most, in place.

    A retargeting is one copy to move, a single exchange two; double exchanges are left out.
    """
    state = _new_state(load_E, speed_D, start_D)
    _restore(state, expert_S)
    device_S = _device_of_slot(start_D)
    full = _fullest(state)
    scope_D = np.zeros(speed_D.size, dtype=np.int64)
    now = _longest(state) * (1.0 - LEAST_GAIN)
    best = _best_exchange(state, full, now, 0.0, scope_D, False, np.zeros(1, dtype=np.int64))
    rest = _longest(state)
    if best.a1 >= 0:
        _exchange(state, device_S, best.a1, best.b1)
        rest = min(rest, _longest(state))
        _restore(state, expert_S)
    # Half of the gain of an exchange is what a single copy has to beat.
    slot, expert, time = _best_retarget(state, device_S, full)
    if slot >= 0 and time <= now and (now - time) >= 0.5 * (now - rest):
        expert_S[slot] = expert
        return True
    if best.a1 < 0:
        return False
    expert_S[best.a1], expert_S[best.b1] = expert_S[best.b1], expert_S[best.a1]
    return True


@nb.njit(**_OPTIONS)
def _best_retarget(state: State, device_S: Array, full: int) -> tuple[int, int, float]:
    """Return the slot, its new expert and the longest time of the best retargeting; slot -1 for none.

    Slots of replicas (and empty ones) are offered to the experts of the fullest device, slots on the fullest
    device to every expert.
    """
    best = (-1, -1, np.inf)
    for slot in range(device_S.size):
        before = state.expert_S[slot]
        if before != EMPTY and state.count_E[before] < 2:
            continue
        for expert in range(state.load_E.size):
            on_full = state.held_ED[expert, full] > 0
            if (on_full or device_S[slot] == full) and state.held_ED[expert, device_S[slot]] == 0:
                time = _after_retarget(state, device_S[slot], before, expert)
                if time < best[2]:
                    best = (slot, expert, time)
    return best


@nb.njit(**_OPTIONS)
def _after_retarget(state: State, device: int, before: int, expert: int) -> float:
    """Return the longest time after a device's replica of `before` has become one of `expert`."""
    share, count = _share(state, expert), state.count_E[expert]
    after = share * count / (count + 1)
    less = share - after
    more = 0.0
    if before != EMPTY:
        count = state.count_E[before]
        more = _share(state, before) * count / (count - 1) - _share(state, before)
    longest = 0.0
    for d in range(state.load_D.size):
        load = state.load_D[d]
        if state.held_ED[expert, d] > 0:
            load -= less
        if before != EMPTY and state.held_ED[before, d] > 0:
            load += more
        if d == device:
            load += after
            if before != EMPTY:
                load -= _share(state, before) + more
        longest = max(longest, load / state.speed_D[d])
    return longest


@nb.njit(**_OPTIONS)
def partition_equal(load_G: Array, num_bins: int, most_nodes: int) -> Array:
    """Pack items into bins of equal count so that the heaviest bin is lightest: branch and bound.

    Exact unless `most_nodes` nodes of the tree end it early; never worse than longest first.

    Returns
    -------
    Array
        Bin of each item, ``[items]``.
    """
    num_items = load_G.size
    room = num_items // num_bins
    order = np.argsort(-load_G, kind="mergesort")
    total_B, count_B = np.zeros(num_bins), np.zeros(num_bins, dtype=np.int64)
    bin_G = np.full(num_items, -1, dtype=np.int64)
    best_G = bin_G.copy()
    best = np.inf
    floor = load_G.sum() / num_bins
    depth, visited = 0, 0
    # Bins already tried at each depth, in order of their totals on entry.
    tried = np.zeros((num_items, num_bins), dtype=np.uint8)
    while depth >= 0 and visited < most_nodes and best > floor * (1.0 + 1e-12):
        item = order[depth]
        if bin_G[item] >= 0:
            total_B[bin_G[item]] -= load_G[item]
            count_B[bin_G[item]] -= 1
            bin_G[item] = -1
        chosen = -1
        for b in range(num_bins):
            if tried[depth, b] == 0 and count_B[b] < room and (chosen < 0 or total_B[b] < total_B[chosen]):
                chosen = b
        if chosen < 0 or total_B[chosen] + load_G[item] >= best:
            tried[depth] = 0
            depth -= 1
            continue
        visited += 1
        for b in range(num_bins):
            # Bins that hold the same are the same.
            if count_B[b] == count_B[chosen] and total_B[b] == total_B[chosen]:
                tried[depth, b] = 1
        bin_G[item] = chosen
        total_B[chosen] += load_G[item]
        count_B[chosen] += 1
        if depth + 1 < num_items:
            depth += 1
        else:
            best = total_B.max()
            best_G[:] = bin_G
    return best_G


@nb.njit(**_OPTIONS)
def _top3(time_DW: Array, top_3W: Array, id_3W: Array) -> None:
    """Keep the three fullest devices of every window: a swap changes two, so one of them always stands."""
    for w in range(time_DW.shape[1]):
        top_3W[:, w] = -np.inf
        id_3W[:, w] = -1
        for device in range(time_DW.shape[0]):
            time = time_DW[device, w]
            if time > top_3W[0, w]:
                top_3W[2, w], id_3W[2, w] = top_3W[1, w], id_3W[1, w]
                top_3W[1, w], id_3W[1, w] = top_3W[0, w], id_3W[0, w]
                top_3W[0, w], id_3W[0, w] = time, device
            elif time > top_3W[1, w]:
                top_3W[2, w], id_3W[2, w] = top_3W[1, w], id_3W[1, w]
                top_3W[1, w], id_3W[1, w] = time, device
            elif time > top_3W[2, w]:
                top_3W[2, w], id_3W[2, w] = time, device


@nb.njit(**_OPTIONS)
def _window_times(load_EW: Array, state: State, time_DW: Array) -> None:
    time_DW[:] = 0.0
    for device in range(time_DW.shape[0]):
        for slot in range(state.start_D[device], state.start_D[device + 1]):
            expert = state.expert_S[slot]
            if expert != EMPTY:
                part = 1.0 / (state.count_E[expert] * state.speed_D[device])
                for w in range(time_DW.shape[1]):
                    time_DW[device, w] += part * load_EW[expert, w]


@nb.njit(**_OPTIONS)
def _swapped_value(
    load_EW: Array, state: State, time_DW: Array, top_3W: Array, id_3W: Array, move: tuple, best: float
) -> float:
    """Return the sum over windows of the longest time after two slots of devices i, j change places.

    Given up (infinite) once it cannot fall below `best`, since no term is negative.
    """
    i, j, expert_i, expert_j = move
    part_i = 0.0 if expert_i == EMPTY else 1.0 / state.count_E[expert_i]
    part_j = 0.0 if expert_j == EMPTY else 1.0 / state.count_E[expert_j]
    total = 0.0
    for w in range(time_DW.shape[1]):
        shift = part_i * load_EW[expert_i, w] - part_j * load_EW[expert_j, w]
        longest = top_3W[2, w]
        if id_3W[0, w] != i and id_3W[0, w] != j:
            longest = top_3W[0, w]
        elif id_3W[1, w] != i and id_3W[1, w] != j:
            longest = top_3W[1, w]
        longest = max(longest, time_DW[i, w] - shift / state.speed_D[i])
        total += max(longest, time_DW[j, w] + shift / state.speed_D[j])
        if total >= best:
            return np.inf
    return total


@nb.njit(**_OPTIONS)
def balance_windows(
    load_EW: Array, speed_D: Array, start_D: Array, expert_S: Array, work: int, seed: int, fill: bool
) -> tuple[Array, int]:
    """Swap and retarget replicas until the mean over windows of the fullest device stops falling.

    Parameters
    ----------
    load_EW
        Load of each expert in each window, ``[experts, windows]``.
    expert_S
        Where to start: expert of each slot.
    work
        Window terms that are priced at most.
    fill
        Whether slots must not be left empty where an empty one is better.

    Returns
    -------
    Array, int
        Expert of each slot, never worse than at the start; terms priced.
    """
    state = _new_state(load_EW.sum(axis=1), speed_D, start_D)
    _restore(state, expert_S)
    device_S = _device_of_slot(start_D)
    num_windows = load_EW.shape[1]
    time_DW = np.empty((speed_D.size, num_windows))
    top_3W, id_3W = np.empty((3, num_windows)), np.empty((3, num_windows), dtype=np.int64)
    _window_times(load_EW, state, time_DW)
    _top3(time_DW, top_3W, id_3W)
    spare_S = np.empty(device_S.size, dtype=np.int64)
    random_1 = _random_state(seed)
    done = 0
    kept_S = state.expert_S.copy()
    while done < work:
        before = top_3W[0].sum()
        done += _swap_pass(load_EW, state, device_S, time_DW, top_3W, id_3W, work - done)
        if top_3W[0].sum() < before * (1.0 - LEAST_GAIN):
            continue
        # No swap helps: try other replicas, and keep those that do.
        best = top_3W[0].sum()
        improved = False
        for _ in range(device_S.size):
            kept_S[:] = state.expert_S
            done += time_DW.size
            if not _kick(state, device_S, spare_S, random_1, fill):
                continue
            _window_times(load_EW, state, time_DW)
            _top3(time_DW, top_3W, id_3W)
            if top_3W[0].sum() < best * (1.0 - LEAST_GAIN):
                best = top_3W[0].sum()
                improved = True
            else:
                _restore(state, kept_S)
        _window_times(load_EW, state, time_DW)
        _top3(time_DW, top_3W, id_3W)
        if not improved:
            break
    return state.expert_S, done


@nb.njit(**_OPTIONS)
def _swap_pass(
    load_EW: Array, state: State, device_S: Array, time_DW: Array, top_3W: Array, id_3W: Array, work: int
) -> int:
    """Go once through the slots and make the best swap of each that helps; return the terms priced."""
    done = 0
    num_windows = time_DW.shape[1]
    is_full_D = np.zeros(state.load_D.size, dtype=np.uint8)
    for a in range(device_S.size):
        if done >= work:
            break
        i = device_S[a]
        is_full_D[:] = 0
        is_full_D[id_3W[0]] = 1
        best, partner = top_3W[0].sum() * (1.0 - LEAST_GAIN), -1
        for b in range(device_S.size):
            j = device_S[b]
            x, y = state.expert_S[a], state.expert_S[b]
            # A swap that leaves every window's fullest device alone cannot help.
            if i == j or x == y or not (is_full_D[i] or is_full_D[j]):
                continue
            if (x != EMPTY and state.held_ED[x, j] > 0) or (y != EMPTY and state.held_ED[y, i] > 0):
                continue
            done += num_windows
            value = _swapped_value(load_EW, state, time_DW, top_3W, id_3W, (i, j, x, y), best)
            if value < best:
                best, partner = value, b
        if partner >= 0:
            _exchange(state, device_S, a, partner)
            _window_times(load_EW, state, time_DW)
            _top3(time_DW, top_3W, id_3W)
    return done
