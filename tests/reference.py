"""The cost definitions once more, in plain loops: slow, obvious, sharing nothing with the code under test.

A placement is given row by row: `row` lists the expert of each slot (-1 empty), `device` the device of each
slot. Under the even split a replicated expert's load is split evenly and a token reads it where it already
goes, else on the first replica in slot order; `Picks` spells out the other splits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from placement.plan import Placement
from placement.problem import PlacementProblem, Semantics
from placement.profile import RoutingProfile

Seconds = Callable[[float], float]


def holders(row: Sequence[int], device: Sequence[int]) -> dict[int, list[int]]:
    """Devices of each expert's replicas, in slot order."""
    where: dict[int, list[int]] = {}
    for expert, its_device in zip(row, device, strict=True):
        if expert >= 0:
            where.setdefault(int(expert), []).append(int(its_device))
    return where


def layers_of(placement: Placement) -> list[dict[int, list[int]]]:
    """Return the holders of every layer."""
    device = placement.device_of_slot_S.tolist()
    return [holders(row, device) for row in placement.physical_to_logical_map_LS.tolist()]


def visited(experts: Sequence[int], where: dict[int, list[int]]) -> set[int]:
    """Devices that a token goes to: those of single copies first, then replicas in the token's own order."""
    going = {where[e][0] for e in experts if len(where[e]) == 1}
    for expert in experts:
        if len(where[expert]) > 1 and not going & set(where[expert]):
            going.add(where[expert][0])
    return going


def device_loads(load_E: Sequence[float], where: dict[int, list[int]], num_devices: int) -> list[float]:
    """Token-expert pairs on each device."""
    load = [0.0] * num_devices
    for expert, devices in where.items():
        for device in devices:
            load[device] += float(load_E[expert]) / len(devices)
    return load


def over_mean(load: Sequence[float]) -> float:
    """Fullest / mean; 1 without load."""
    mean = sum(load) / len(load)
    return max(load) / mean if mean > 0 else 1.0


@dataclass(frozen=True)
class Token:
    """One sampled token: its experts by layer, window (the last is the tail), home and weight."""

    experts: list[list[int]]
    window: int
    home: int
    weight: float
    index: int


def tokens_of(profile: RoutingProfile) -> list[Token]:
    """Return the sampled tokens; each stands for its window's real tokens over its sampled ones."""
    assert profile.experts_TLK is not None
    assert profile.window_of_token_T is not None
    windows = profile.window_of_token_T.tolist()
    real = [*profile.window_tokens_W.tolist(), float(profile.tail_tokens)]
    homes = [-1] * len(windows) if profile.home_T is None else profile.home_T.tolist()
    batch = Counter[tuple[int, int]]()
    tokens = []
    for experts, window, home in zip(profile.experts_TLK.tolist(), windows, homes, strict=True):
        weight = real[window] / windows.count(window)
        tokens.append(Token(experts, window, home, weight, batch[window, home]))
        batch[window, home] += 1
    return tokens


class Picks:
    """Which replica a token's expert is read from, as probabilities by device, under the uneven splits.

    `split` is ``hash``, ``nearest`` or ``lp``.
    """

    def __init__(
        self, split: str, profile: RoutingProfile, placement: Placement, node_D: Sequence[int]
    ) -> None:
        self.split, self.profile, self.node_D = split, profile, node_D
        self.where_L = layers_of(placement)
        self.num_devices = placement.num_devices
        self.tokens = tokens_of(profile) if profile.num_sampled_tokens else []
        self._poured: dict[tuple[int, int], dict[int, dict[int, float]]] = {}

    def of(self, token: Token, layer: int, expert: int) -> dict[int, float]:
        """Return the probability of each device that holds an expert."""
        devices = self.where_L[layer][expert]
        if self.split == "hash":
            return {devices[token.index * 2654435769 % 2**32 % len(devices)]: 1.0}
        if self.split == "nearest" and token.home >= 0:
            return {self._nearest(devices, token.home): 1.0}
        if self.split == "lp" and token.window < self.profile.num_windows:
            return self.poured(token.window, layer)[expert]
        return {device: 1.0 / len(devices) for device in devices}

    def _nearest(self, devices: list[int], home: int) -> int:
        if home in devices:
            return home
        near = [device for device in devices if self.node_D[device] == self.node_D[home]] or devices
        return near[home % len(near)]

    def shares(self, window: int, layer: int) -> dict[int, dict[int, float]]:
        """Return each expert's realised share of load on each device."""
        where = self.where_L[layer]
        if self.split == "lp":
            return self.poured(window, layer)
        counted: dict[int, Counter[int]] = {expert: Counter() for expert in where}
        for token in self.tokens:
            for expert in token.experts[layer] if token.window == window else ():
                counted[expert].update(self.of(token, layer, expert))
        return {
            expert: {device: count[device] / count.total() for device in where[expert]}
            if count
            else dict.fromkeys(where[expert], 1.0 / len(where[expert]))
            for expert, count in counted.items()
        }

    def poured(self, window: int, layer: int) -> dict[int, dict[int, float]]:
        """Return the shares of the linear programme: experts in turn pour their load over their devices."""
        if (window, layer) not in self._poured:
            load_E = self.profile.load_WLE[window, layer].tolist()
            self._poured[window, layer] = pour(load_E, self.where_L[layer], self.num_devices)
        return self._poured[window, layer]


def pour(
    load_E: Sequence[float], where: dict[int, list[int]], num_devices: int
) -> dict[int, dict[int, float]]:
    """Split loads so that the fullest device is as light as can be, from the even split."""
    flow = {e: {d: load_E[e] / len(where[e]) for d in where[e]} for e in sorted(where)}
    for _ in range(5000):
        moved = 0.0
        for expert, its in flow.items():
            others = {d: sum(f.get(d, 0.0) for e, f in flow.items() if e != expert) for d in its}
            floors = sorted(others.values())
            # The water stands on the lowest floors, as many as it covers.
            surface = min(
                level
                for n in range(1, len(floors) + 1)
                if (level := (load_E[expert] + sum(floors[:n])) / n) >= floors[n - 1]
                and (n == len(floors) or level <= floors[n])
            )
            for device, floor in others.items():
                moved = max(moved, abs(its[device] - max(0.0, surface - floor)))
                its[device] = max(0.0, surface - floor)
        if moved <= 1e-13 * sum(load_E):
            break
    return {
        e: {d: f / load_E[e] if load_E[e] else 1.0 / len(its) for d, f in its.items()}
        for e, its in flow.items()
    }


def split_loads(
    load_E: Sequence[float], shares: dict[int, dict[int, float]], num_devices: int
) -> list[float]:
    """Token-expert pairs on each device under realised shares."""
    load = [0.0] * num_devices
    for expert, its in shares.items():
        for device, share in its.items():
            load[device] += float(load_E[expert]) * share
    return load


def touches(
    picks: Picks, token: Token, layer: int, target: Callable[[int], int]
) -> dict[int, tuple[int, float]]:
    """Return, by target, one of its devices and the probability that the token goes there."""
    missed: dict[int, tuple[int, float]] = {}
    for expert in token.experts[layer]:
        part: dict[int, float] = {}
        for device, probability in picks.of(token, layer, expert).items():
            part[target(device)] = part.get(target(device), 0.0) + probability
            missed.setdefault(target(device), (device, 1.0))
        for group, probability in part.items():
            missed[group] = missed[group][0], missed[group][1] * (1.0 - probability)
    return {group: (device, 1.0 - miss) for group, (device, miss) in missed.items()}


def metrics(
    profile: RoutingProfile, placement: Placement, node_D: Sequence[int], *, split: str = "even"
) -> dict[str, float]:
    """Every quality figure of a placement, by the names of `placement.cost.Metrics`."""
    where_L = layers_of(placement)
    picks = None if split == "even" else Picks(split, profile, placement, node_D)
    num_devices = placement.num_devices
    ratios, floors, summed = [], [], []
    for layer, where in enumerate(where_L):
        total = np.zeros(num_devices)
        for window in range(profile.num_windows):
            load_E = profile.load_WLE[window, layer].tolist()
            load = device_loads(load_E, where, num_devices)
            if picks is not None:
                load = split_loads(load_E, picks.shares(window, layer), num_devices)
            total += load
            ratios.append(over_mean(load))
            mean = sum(load_E) / num_devices
            hottest = max(load_E[e] / len(where[e]) for e in where)
            floors.append(max(1.0, hottest / mean) if mean > 0 else 1.0)
        summed.append(over_mean(total.tolist()))
    found = {
        "balance": float(np.mean(ratios)),
        "balance_p95": float(np.quantile(ratios, 0.95)),
        "balance_floor": float(np.mean(floors)),
        "mean_traffic_balance": float(np.mean(summed)),
        "worst_layer_balance": max(summed),
    }
    if profile.num_sampled_tokens:
        found |= _per_token(profile, where_L, node_D, picks)
    return found


def _per_token(
    profile: RoutingProfile,
    where_L: list[dict[int, list[int]]],
    node_D: Sequence[int],
    picks: Picks | None,
) -> dict[str, float]:
    tokens = tokens_of(profile)
    weight = sum(token.weight for token in tokens)
    devices = nodes = hops = 0.0
    for token in tokens:
        for layer, (experts, where) in enumerate(zip(token.experts, where_L, strict=True)):
            if picks is not None:
                for count, target in (("devices", lambda d: d), ("nodes", lambda d: node_D[d])):
                    touched = sum(p for _, p in touches(picks, token, layer, target).values())
                    devices += token.weight * touched * (count == "devices")
                    nodes += token.weight * touched * (count == "nodes")
                continue
            going = visited(experts, where)
            devices += token.weight * len(going)
            nodes += token.weight * len({node_D[d] for d in going})
        hops += token.weight * sum(left != here for layer, left, here in path(token, where_L) if layer)
    layers = len(where_L)
    found = {"fanout": devices / weight / layers, "hops": hops / weight / max(layers - 1, 1)}
    if max(node_D) > 0:
        found["node_fanout"] = nodes / weight / layers
    return found


def path(token: Token, where_L: list[dict[int, list[int]]]) -> Iterator[tuple[int, int, int]]:
    """Follow a stay-put token: layer, device before it (-1 unknown) and in it."""
    here = token.home
    for layer, where in enumerate(where_L):
        devices = where[token.experts[layer][0]]
        target = here if here in devices else devices[0]
        yield layer, here, target
        here = target


@dataclass(frozen=True, kw_only=True)
class RefLink:
    """One tier: the group that each device lies in, and how slow each device is against the best.

    Parameters
    ----------
    dispatch, combine
        Time of a phase against what the fullest group (or device) receives.
    flat
        Whether every token is charged wherever it lives (linear costs).
    per_device
        Whether a pair travels to its device directly.
    """

    group_D: Sequence[int]
    slowness_D: Sequence[float]
    dispatch: Seconds
    combine: Seconds
    flat: bool = False
    per_device: bool = False

    def target(self, device: int) -> int:
        """Return what receives a token that needs a device: its group, or the device itself."""
        return device if self.per_device else self.group_D[device]

    def charge(self, home: int, device: int) -> float:
        """Return what a token adds to what receives it."""
        if self.flat:
            return 1.0
        group = self.group_D[device]
        members = [d for d, g in enumerate(self.group_D) if g == group]
        outside = 1.0 - len(members) / len(self.group_D) if home < 0 else float(home not in members)
        if self.per_device:
            return outside * self.slowness_D[device]
        return outside * max(self.slowness_D[d] for d in members) / len(members)


def volumes(
    profile: RoutingProfile,
    placement: Placement,
    link: RefLink,
    semantics: str,
    picks: Picks | None = None,
) -> list[list[dict[int, float]]]:
    """Volume that each group (or device) receives, by window and layer."""
    where_L = layers_of(placement)
    received = [[dict[int, float]() for _ in where_L] for _ in range(profile.num_windows)]

    def add(window: int, layer: int, target: int, amount: float) -> None:
        if window < profile.num_windows:
            into = received[window][layer]
            into[target] = into.get(target, 0.0) + amount

    by_pairs = semantics == "dispatch-nodedup"
    if semantics == "allgather":
        for window, layer in np.ndindex(profile.num_windows, profile.num_layers):
            for device in {link.target(d): d for d in range(placement.num_devices)}.values():
                amount = float(profile.window_tokens_W[window]) * link.charge(-1, device)
                add(window, layer, link.target(device), amount)
        return received
    if by_pairs and profile.home_T is None:
        for window, layer in np.ndindex(profile.num_windows, profile.num_layers):
            load_E = profile.load_WLE[window, layer].tolist()
            load = device_loads(load_E, where_L[layer], placement.num_devices)
            if picks is not None:
                load = split_loads(load_E, picks.shares(window, layer), placement.num_devices)
            for device, pairs in enumerate(load):
                add(window, layer, link.target(device), pairs * link.charge(-1, device))
        return received
    for token in tokens_of(profile):
        if semantics == "stay-put":
            for layer, before, here in path(token, where_L):
                if before >= 0 and link.target(before) != link.target(here):
                    add(token.window, layer, link.target(here), token.weight * link.charge(before, here))
            continue
        for layer, (experts, where) in enumerate(zip(token.experts, where_L, strict=True)):
            if by_pairs:
                for expert in experts:
                    even = dict.fromkeys(where[expert], 1.0 / len(where[expert]))
                    chances = even if picks is None else picks.of(token, layer, expert)
                    for device, chance in chances.items():
                        add(
                            token.window,
                            layer,
                            device,
                            token.weight * chance * link.charge(token.home, device),
                        )
                continue
            if picks is not None:
                for group, (device, chance) in touches(picks, token, layer, link.target).items():
                    amount = token.weight * chance * link.charge(token.home, device)
                    add(token.window, layer, group, amount)
                continue
            for group, device in {link.target(d): d for d in visited(experts, where)}.items():
                add(token.window, layer, group, token.weight * link.charge(token.home, device))
    return received


def step_parts(
    profile: RoutingProfile,
    placement: Placement,
    *,
    expert_seconds: Sequence[Seconds],
    links: Sequence[RefLink],
    semantics: str = "dispatch",
    split: str = "even",
    node_D: Sequence[int] = (),
) -> np.ndarray:
    """Experts, dispatch and combine by window and layer, ``[3, windows, layers]``.

    `expert_seconds` is the time of one expert against its tokens, for each device; `node_D` is needed for the
    uneven splits.
    """
    where_L = layers_of(placement)
    parts = np.zeros((3, profile.num_windows, profile.num_layers))
    picks = None if split == "even" else Picks(split, profile, placement, node_D)
    received = [volumes(profile, placement, link, semantics, picks) for link in links]
    for window, layer in np.ndindex(profile.num_windows, profile.num_layers):
        seconds = [0.0] * placement.num_devices
        shares = {} if picks is None else picks.shares(window, layer)
        for expert, devices in where_L[layer].items():
            even = dict.fromkeys(devices, 1.0 / len(devices))
            for device, share in shares.get(expert, even).items():
                tokens = float(profile.load_WLE[window, layer, expert]) * share
                seconds[device] += expert_seconds[device](tokens)
        parts[0, window, layer] = max(seconds)
        for phase in (1, 2):
            if semantics == "stay-put" and (phase == 2 or (layer == 0 and profile.home_T is None)):
                continue
            for link, volume in zip(links, received, strict=True):
                fullest = max(volume[window][layer].values(), default=0.0)
                seconds_of = link.dispatch if phase == 1 else link.combine
                parts[phase, window, layer] = max(parts[phase, window, layer], seconds_of(fullest))
    return parts


OVERLAP = 0.25


def expert_seconds(problem: PlacementProblem) -> list[Seconds]:
    """The roofline of one expert, for each device."""
    model = problem.model
    assert model is not None

    def roofline(device: int) -> Seconds:
        kind = problem.topology.kind_of(device)
        token_s = model.flops_per_pair / kind.achieved_flops
        read_s = model.bytes_per_expert() / (kind.memory_bandwidth * 0.8)
        first = min(1.0, read_s / token_s / 2)
        return lambda tokens: read_s * tokens / first if tokens < first else max(read_s, tokens * token_s)

    return [roofline(device) for device in range(problem.num_devices)]


def reference_links(problem: PlacementProblem) -> list[RefLink]:
    """Latency and bytes over bandwidth of each tier: 1 byte per element out, 2 back, a quarter hidden."""
    model = problem.model
    assert model is not None
    inner = [range(problem.num_devices), *(tier.group_D.tolist() for tier in problem.topology.tiers)]

    def seconds(tier: int, element_bytes: int) -> Seconds:
        latency_s = problem.topology.tiers[tier].latency_s
        best = float(problem.topology.tiers[tier].bandwidth_D.max())
        token_bytes = element_bytes * model.hidden_size
        return lambda volume: (1 - OVERLAP) * (latency_s + volume * token_bytes / best)

    return [
        RefLink(
            group_D=inner[index],
            slowness_D=(tier.bandwidth_D.max() / tier.bandwidth_D).tolist(),
            dispatch=seconds(index, 1),
            combine=seconds(index, 2),
            per_device=problem.semantics is Semantics.DISPATCH_NODEDUP,
        )
        for index, tier in enumerate(problem.topology.tiers)
    ]
