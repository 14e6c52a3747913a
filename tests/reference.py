"""The cost definitions once more, in plain loops: slow, obvious, sharing nothing with the code under test.

A placement is given row by row: `row` lists the expert of each slot (-1 empty), `device` the device of each
slot. A replicated expert's load is split evenly; a token reads it where it already goes, else on the first
replica in slot order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from placement.plan import Placement
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


def tokens_of(profile: RoutingProfile) -> list[Token]:
    """Return the sampled tokens; each stands for its window's real tokens over its sampled ones."""
    assert profile.experts_TLK is not None
    assert profile.window_of_token_T is not None
    windows = profile.window_of_token_T.tolist()
    real = [*profile.window_tokens_W.tolist(), float(profile.tail_tokens)]
    homes = [-1] * len(windows) if profile.home_T is None else profile.home_T.tolist()
    return [
        Token(experts, window, home, real[window] / windows.count(window))
        for experts, window, home in zip(profile.experts_TLK.tolist(), windows, homes, strict=True)
    ]


def metrics(profile: RoutingProfile, placement: Placement, node_D: Sequence[int]) -> dict[str, float]:
    """Every quality figure of a placement, by the names of `placement.cost.Metrics`."""
    where_L = layers_of(placement)
    num_devices = placement.num_devices
    ratios, floors, summed = [], [], []
    for layer, where in enumerate(where_L):
        for window in range(profile.num_windows):
            load_E = profile.load_WLE[window, layer].tolist()
            ratios.append(over_mean(device_loads(load_E, where, num_devices)))
            mean = sum(load_E) / num_devices
            hottest = max(load_E[e] / len(where[e]) for e in where)
            floors.append(max(1.0, hottest / mean) if mean > 0 else 1.0)
        total_E = profile.load_WLE[:, layer].sum(axis=0).tolist()
        summed.append(over_mean(device_loads(total_E, where, num_devices)))
    found = {
        "balance": float(np.mean(ratios)),
        "balance_p95": float(np.quantile(ratios, 0.95)),
        "balance_floor": float(np.mean(floors)),
        "mean_traffic_balance": float(np.mean(summed)),
        "worst_layer_balance": max(summed),
    }
    if profile.num_sampled_tokens:
        found |= _per_token(profile, where_L, node_D)
    return found


def _per_token(
    profile: RoutingProfile, where_L: list[dict[int, list[int]]], node_D: Sequence[int]
) -> dict[str, float]:
    tokens = tokens_of(profile)
    weight = sum(token.weight for token in tokens)
    devices = nodes = hops = 0.0
    for token in tokens:
        for experts, where in zip(token.experts, where_L, strict=True):
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
    profile: RoutingProfile, placement: Placement, link: RefLink, semantics: str
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
            load = device_loads(
                profile.load_WLE[window, layer].tolist(), where_L[layer], placement.num_devices
            )
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
                    for device in where[expert]:
                        amount = token.weight / len(where[expert]) * link.charge(token.home, device)
                        add(token.window, layer, device, amount)
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
) -> np.ndarray:
    """Experts, dispatch and combine by window and layer, ``[3, windows, layers]``.

    `expert_seconds` is the time of one expert against its tokens, for each device.
    """
    where_L = layers_of(placement)
    parts = np.zeros((3, profile.num_windows, profile.num_layers))
    received = [volumes(profile, placement, link, semantics) for link in links]
    for window, layer in np.ndindex(profile.num_windows, profile.num_layers):
        seconds = [0.0] * placement.num_devices
        for expert, devices in where_L[layer].items():
            tokens = float(profile.load_WLE[window, layer, expert]) / len(devices)
            for device in devices:
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
