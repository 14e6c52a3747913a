"""Search for the assignment of experts in a zebra group whose simulated step is shortest.

Each layer has options: which experts attention devices hold, and the time of either side. The steady-state
program, Algorithm 1, and a rounding of the ideal share give starts; a local search moves layers to the next
option, alone and in pairs, and every step is judged by the simulation. Few combinations are all tried.

Shape letters: L MoE layers, E experts, G devices of a group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from placement._arrays import FloatArray, IntArray
from placement.planning.hetero.assignment import GroupTimes, contiguous_assignment, placed, spread
from placement.planning.hetero.asymmetric import AsymmetricOffload, asymmetric_offload
from placement.planning.hetero.program import fluid_bound_s, steady_state
from placement.planning.hetero.zebra import fastest_schedule

__all__ = ["ALGORITHM_1", "ALGORITHM_1_MEANT", "NEAR", "NO_OFFLOAD", "GroupAnswer", "algorithm_1", "search"]

ALGORITHM_1 = "Algorithm 1"
ALGORITHM_1_MEANT = "Algorithm 1, n1 and n2 as meant"
NO_OFFLOAD = "no offloading"

MOST_COUNTS = 33
"""Numbers of experts on attention devices that are tried per layer."""

ALL_COMBINATIONS = 300
"""So many combinations of options are tried without search."""

WORK = 800_000
"""Simulated tasks that a search may take."""

NEAR = 1e-3
"""Gap to the bound at which a search ends."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupAnswer:
    """An assignment for one group and number of micro-batches.

    Parameters
    ----------
    times
        Group, job and micro-batches.
    device_LE
        Device of each expert in the group, ``[layers, experts]``, attention devices first.
    makespan_s, lag
        Simulated seconds of a step, and how far attention runs ahead of its own experts.
    source
        What found it.
    lower_bound_s
        No assignment of this group and number of micro-batches is faster.
    candidates
        Makespan of everything that was compared.
    """

    times: GroupTimes
    device_LE: IntArray
    makespan_s: float
    lag: int
    source: str
    lower_bound_s: float
    candidates: dict[str, float]

    @property
    def own_count_L(self) -> tuple[int, ...]:
        """Experts on attention devices, ``[layers]``."""
        held = (self.device_LE < self.times.group.num_attention).sum(axis=1)
        return tuple(int(count) for count in held)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Option:
    """Experts of one layer on attention devices, and the time of either side."""

    own: tuple[int, ...]
    own_s: float
    experts_s: float


def algorithm_1(times: GroupTimes, *, as_printed: bool) -> AsymmetricOffload:
    """Return what Algorithm 1 answers for a group.

    Room for experts is that of a device of either side, over all layers.
    """
    group, job = times.group, times.job
    M, N, n = group.num_attention, group.num_expert_devices, job.num_experts
    if not group.whole_classes:
        return AsymmetricOffload(offload_L=None, reason="it knows one class per side")
    if M % N and N % M:
        return AsymmetricOffload(offload_L=None, reason=f"neither of {M} and {N} divides the other")
    room_G, acquired = group.room_G(job), max(1, N // M)
    per_device = job.num_layers * n // N
    return asymmetric_offload(
        num_layers=job.num_layers,
        num_experts=n,
        num_attention=M,
        num_expert_devices=N,
        attention_s=times.attention_s,
        attention_expert_s=n * float(times.unit_G[0]) / N,
        expert_s=n * float(times.unit_G[M]) / N,
        least_offload=max(0, per_device - int(room_G[M])),
        most_offload=int(room_G[0]) // acquired * (acquired * M // N),
        as_printed=as_printed,
    )


def search(times: GroupTimes) -> GroupAnswer | None:
    """Return the best assignment found, never slower than Algorithm 1's; None where nothing fits."""
    group, job = times.group, times.job
    room_G = group.room_G(job)
    if not group.attention_fits(job) or room_G.sum() < job.num_layers * job.num_experts:
        return None
    found: dict[str, IntArray] = {}
    offloads = {
        NO_OFFLOAD: _nothing(times),
        ALGORITHM_1: algorithm_1(times, as_printed=True).offload_L,
        ALGORITHM_1_MEANT: algorithm_1(times, as_printed=False).offload_L,
    }
    for name, offload_L in offloads.items():
        if offload_L is not None:
            found[name] = contiguous_assignment(times, offload_L)
    program = steady_state(times)
    found["search"] = _LayerSearch(times=times, bound_s=program.bound_s).run(
        [program.own_count_L, *_counts(times, offloads)]
    )
    scored = {
        name: (*_price(times, device_LE), device_LE)
        for name, device_LE in found.items()
        if (np.bincount(device_LE.ravel(), minlength=group.num_devices) <= room_G).all()
    }
    source = min(scored, key=lambda name: scored[name][0])
    makespan, lag, device_LE = scored[source]
    return GroupAnswer(
        times=times,
        device_LE=device_LE,
        makespan_s=makespan,
        lag=lag,
        source=source,
        lower_bound_s=min(program.bound_s, makespan),
        candidates={name: score[0] for name, score in scored.items()},
    )


def _nothing(times: GroupTimes) -> tuple[int, ...] | None:
    divides = times.job.num_experts % times.group.num_expert_devices == 0
    return (0,) * times.job.num_layers if divides else None


def _counts(
    times: GroupTimes, offloads: dict[str, tuple[int, ...] | None]
) -> Iterator[tuple[int, ...] | None]:
    for offload_L in offloads.values():
        if offload_L is not None:
            yield tuple(count * times.group.num_expert_devices for count in offload_L)


def _price(times: GroupTimes, device_LE: IntArray) -> tuple[float, int]:
    stages = times.stages(*times.side_times(device_LE))
    return fastest_schedule(stages, num_micro_batches=times.num_micro_batches)


@dataclass(kw_only=True, eq=False)
class _LayerSearch:
    """The choice of one option for each layer."""

    times: GroupTimes
    bound_s: float
    known: dict[tuple[int, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        job, group = self.times.job, self.times.group
        room_G = group.room_G(job)
        self.own_room = int(room_G[: group.num_attention].sum())
        self.least = job.num_layers * job.num_experts - int(room_G[group.num_attention :].sum())
        cache: dict[bytes, list[_Option]] = {}
        self.options_L = []
        for load_E in job.load_LE:
            key = load_E.tobytes()
            if key not in cache:
                cache[key] = _options(self.times, load_E, room_G)
            self.options_L.append(cache[key])
        fronts = {id(options): _front(options) for options in cache.values()}
        self.front_L = [fronts[id(options)] for options in self.options_L]
        self.most_steps = sum(map(len, self.options_L))
        tasks = 5 * 2 * len(self.options_L) * (2 if job.backward else 1) * self.times.num_micro_batches
        self.budget = max(30, WORK // tasks)

    def run(self, starts: Sequence[tuple[int, ...] | None]) -> IntArray:
        """Return the device of every expert under the best choice."""
        if math.prod(len(options) for options in self.options_L) <= ALL_COMBINATIONS:
            ranges = (range(len(options)) for options in self.options_L)
            best = min(itertools.product(*ranges), key=self._value)
        else:
            points = {self._fitted(self._nearest(start)) for start in starts if start is not None}
            points.add(self._fitted(self._rounded()))
            points |= {self._fitted(self._on_front(point)) for point in points}
            best = self._climbed(min(sorted(points), key=self._value))
        chosen = [options[at].own for options, at in zip(self.options_L, best, strict=True)]
        return placed(self.times, self._within(chosen))

    def _within(self, own_L: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Move single experts, the lightest first, until either side's memory holds its own."""
        chosen = [set(own) for own in own_L]
        count = sum(map(len, chosen))
        lightest = sorted(
            (float(load), layer, expert)
            for layer, load_E in enumerate(self.times.job.load_LE)
            for expert, load in enumerate(load_E)
        )
        for _, layer, expert in lightest:
            if count < self.least and expert not in chosen[layer]:
                chosen[layer].add(expert)
                count += 1
            elif count > self.own_room and expert in chosen[layer]:
                chosen[layer].discard(expert)
                count -= 1
        return [tuple(sorted(own)) for own in chosen]

    def _value(self, point: tuple[int, ...]) -> float:
        if point not in self.known:
            chosen = [options[at] for options, at in zip(self.options_L, point, strict=True)]
            count = sum(len(option.own) for option in chosen)
            if not self.least <= count <= self.own_room:
                # Farther outside is worse, so that the search finds its way back in.
                outside = max(self.least - count, count - self.own_room)
                self.known[point] = 1e30 * outside
                return self.known[point]
            stages = self.times.stages([o.own_s for o in chosen], [o.experts_s for o in chosen])
            self.known[point] = fastest_schedule(stages, num_micro_batches=self.times.num_micro_batches)[0]
        return self.known[point]

    def _nearest(self, count_L: Sequence[int]) -> tuple[int, ...]:
        """Return the options with the numbers of experts nearest to those given."""
        return tuple(
            min(range(len(options)), key=lambda at: (abs(len(options[at].own) - count), at))
            for options, count in zip(self.options_L, count_L, strict=True)
        )

    def _on_front(self, point: Sequence[int]) -> tuple[int, ...]:
        """Return the nearest options that no other beats."""
        chosen = []
        for front, at in zip(self.front_L, point, strict=True):
            apart = [(abs(i - at), i) for i in front]
            chosen.append(min(apart)[1])
        return tuple(chosen)

    def _rounded(self) -> tuple[int, ...]:
        """Return options that follow the ideal share of the load, layer by layer, errors carried over."""
        times = self.times
        bare_s = (
            times.num_micro_batches
            * times.stages([0.0] * len(self.options_L), [0.0] * len(self.options_L)).attention_work_s
        )
        spare_s = fluid_bound_s(times) - bare_s
        target_s = spare_s / (times.num_micro_batches * times.job.passes * len(self.options_L))
        carried, point = 0.0, []
        for options in self.options_L:
            wanted = target_s + carried
            at = min(range(len(options)), key=lambda at: (abs(options[at].own_s - wanted), at))
            carried = wanted - options[at].own_s
            point.append(at)
        return tuple(point)

    def _fitted(self, point: tuple[int, ...]) -> tuple[int, ...]:
        """Return the point moved until either side's memory holds its experts."""
        at = list(point)
        for layer in itertools.islice(itertools.cycle(range(len(at))), 2 * self.most_steps):
            count = sum(len(options[i].own) for options, i in zip(self.options_L, at, strict=True))
            if self.least <= count <= self.own_room:
                break
            sign = 1 if count < self.least else -1
            options, held = self.options_L[layer], len(self.options_L[layer][at[layer]].own)
            further = [i for i, option in enumerate(options) if sign * (len(option.own) - held) > 0]
            at[layer] = min(further, key=lambda i: sign * len(options[i].own), default=at[layer])
        return tuple(at)

    def _climbed(self, point: tuple[int, ...]) -> tuple[int, ...]:
        best = self._value(point)
        improved = True
        enough = self.bound_s * (1 + NEAR)
        while improved and best > enough and len(self.known) < self.budget:
            improved = False
            for near in self._neighbours(point):
                if len(self.known) >= self.budget:
                    break
                value = self._value(near)
                if value < best * (1 - 1e-12):
                    point, best, improved = near, value, True
                    break
        return point

    def _neighbours(self, point: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        for layer, at in enumerate(point):
            for near in (*self._next(layer, at, 1), *self._next(layer, at, -1)):
                yield (*point[:layer], near, *point[layer + 1 :])
        for apart in (1, 2, len(point) - 1):
            for layer in range(len(point) - apart):
                for sign in (1, -1):
                    yield from self._exchanged(point, layer, layer + apart, sign)

    def _exchanged(self, point: tuple[int, ...], up: int, down: int, sign: int) -> Iterator[tuple[int, ...]]:
        """Yield the point with one layer a step on and another a step back, if both can."""
        more, less = self._next(up, point[up], sign), self._next(down, point[down], -sign)
        if up != down and more and less:
            at = list(point)
            at[up], at[down] = more[0], less[0]
            yield tuple(at)

    def _next(self, layer: int, at: int, sign: int) -> tuple[int, ...]:
        """Return the next option that no other beats, and the next of all, in one direction."""
        front = [i for i in self.front_L[layer] if sign * (i - at) > 0]
        best = min(front, key=lambda i: sign * i, default=None)
        beside = at + sign if 0 <= at + sign < len(self.options_L[layer]) else None
        return tuple(dict.fromkeys(i for i in (best, beside) if i is not None))


def _front(options: Sequence[_Option]) -> list[int]:
    """Return the options that no other beats on both sides, by rising time of attention devices."""
    front: list[int] = []
    least = math.inf
    for at, option in enumerate(options):
        if option.experts_s < least:
            # Of options with one time of attention devices the last to improve is the best.
            if front and options[front[-1]].own_s == option.own_s:
                front.pop()
            front.append(at)
            least = option.experts_s
    return front


def _options(times: GroupTimes, load_E: FloatArray, room_G: IntArray) -> list[_Option]:
    """Return the ways to split a layer's experts between the sides, by rising time of attention devices."""
    n, M = load_E.size, times.group.num_attention
    most, least = min(n, int(room_G[:M].sum())), max(0, n - int(room_G[M:].sum()))
    order = sorted(range(n), key=lambda e: (-load_E[e], e))
    counts = np.unique(np.linspace(least, most, min(most - least + 1, MOST_COUNTS)).round().astype(np.int64))
    options: dict[tuple[int, float], _Option] = {}
    for count in (int(k) for k in counts):
        for own in dict.fromkeys(_picks(order, count)):
            option = _option(times, load_E, room_G, own)
            same = options.get((count, option.own_s))
            if same is None or option.experts_s < same.experts_s:
                options[count, option.own_s] = option
    return sorted(options.values(), key=lambda o: (o.own_s, len(o.own), o.experts_s))


def _picks(order: list[int], count: int) -> Iterator[tuple[int, ...]]:
    """Yield the lightest, the heaviest, and evenly chosen experts."""
    n = len(order)
    yield tuple(sorted(order[n - count :]))
    yield tuple(sorted(order[:count]))
    yield tuple(sorted(order[place * n // count] for place in range(count)))


def _option(times: GroupTimes, load_E: FloatArray, room_G: IntArray, own: tuple[int, ...]) -> _Option:
    M, unit_G = times.group.num_attention, times.unit_G
    order = sorted(range(load_E.size), key=lambda e: (-load_E[e], e))
    attends_G = np.arange(unit_G.size) < M
    mine, seconds = set(own), []
    for inside, experts in (
        (attends_G, [e for e in order if e in mine]),
        (~attends_G, [e for e in order if e not in mine]),
    ):
        unit = np.where(inside, unit_G, np.inf)
        chosen = spread(experts, load_E=load_E, unit_G=unit, limit_G=room_G, room_G=room_G)
        busy_G = np.zeros(unit_G.size)
        for expert, device in chosen.items():
            busy_G[device] += load_E[expert] * unit_G[device]
        seconds.append(float(busy_G.max()))
    return _Option(own=own, own_s=seconds[0], experts_s=seconds[1])
