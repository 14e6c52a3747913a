"""Circuits and placement together: the placement decides the traffic, the circuits what traffic costs.

From every starting placement, and from what suits links that never block, circuits are allocated for the
demand, experts are swapped as long as that is faster on these circuits, and so on in turn until nothing is
gained. Only gains are kept, so the result is never slower than any starting placement with circuits allocated
for it afterwards.

Shape letters: L layers, E experts, S servers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from placement.errors import InputError
from placement.planning.fabric.allocation import Allocation, Effort, allocate_circuits
from placement.planning.fabric.completion import IntArray
from placement.planning.fabric.swaps import LayerCost, improve_placement
from placement.planning.fabric.traffic import LayerTraffic, RegionTraffic

__all__ = ["JointLayer", "JointPlan", "plan_jointly", "plan_layer", "time_on"]

MAX_TURNS = 8
"""Turns of circuits and placement after which to stop; two or three are usual."""

QUICK = Effort(nodes=0)
"""While taking turns the search suffices; the program runs on what comes out."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JointLayer:
    """A placement of one layer with its circuits.

    Parameters
    ----------
    device_E
        Device of each expert, ``[experts]``.
    allocation
        Circuits for its demand.
    time_s
        All-to-alls and fullest device of one step, seconds.
    """

    device_E: IntArray
    allocation: Allocation
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JointPlan:
    """The joint answer and what it is compared with.

    Parameters
    ----------
    layers
        Placement and circuits, one after the other for each layer.
    separate
        Every starting placement with circuits allocated for it afterwards, by name.
    """

    layers: tuple[JointLayer, ...]
    separate: Mapping[str, tuple[JointLayer, ...]]

    @property
    def time_s(self) -> float:
        """Time of all layers in one step, seconds."""
        return _total(self.layers)

    @property
    def best_separate(self) -> str:
        """Name of the starting placement that is fastest with circuits of its own."""
        return min(self.separate, key=lambda name: _total(self.separate[name]))

    @property
    def separate_s(self) -> float:
        """Time of the best starting placement with circuits of its own, seconds."""
        return _total(self.separate[self.best_separate])

    @property
    def device_LE(self) -> IntArray:
        """Device of each expert, ``[layers, experts]``."""
        return np.stack([layer.device_E for layer in self.layers])


def time_on(traffic: RegionTraffic, layers: tuple[JointLayer, ...], cost: LayerCost) -> float:
    """Return the time of placements and circuits on other traffic than they were made for, seconds."""
    pairs = zip(traffic.layers, layers, strict=True)
    return sum(cost(tokens, layer.device_E, layer.allocation.circuits_SS) for tokens, layer in pairs)


def plan_jointly(
    traffic: RegionTraffic, starts: Mapping[str, IntArray], cost: LayerCost, *, effort: Effort | None = None
) -> JointPlan:
    """Choose placement and circuits together, layer by layer.

    Parameters
    ----------
    traffic
        Tokens to plan for.
    starts
        Placements to start from, device of each expert ``[layers, experts]``, by name.
    cost
        What a layer takes.
    effort
        Effort of the allocation of circuits.

    Raises
    ------
    InputError
        If there is no placement to start from.
    """
    if not starts:
        raise InputError("planning placement and circuits together needs a placement to start from")
    planned = [
        plan_layer(layer, {name: device_LE[index] for name, device_LE in starts.items()}, cost, effort=effort)
        for index, layer in enumerate(traffic.layers)
    ]
    return JointPlan(
        layers=tuple(joint for joint, _ in planned),
        separate={name: tuple(separate[name] for _, separate in planned) for name in starts},
    )


def plan_layer(
    layer: LayerTraffic, starts: Mapping[str, IntArray], cost: LayerCost, *, effort: Effort | None = None
) -> tuple[JointLayer, dict[str, JointLayer]]:
    """Plan one layer; return the joint answer, and every start with circuits allocated afterwards."""
    separate = {name: _with_circuits(layer, device_E, cost, effort) for name, device_E in starts.items()}
    balanced = [
        _with_circuits(layer, _balanced(layer, device_E, cost), cost, QUICK) for device_E in starts.values()
    ]
    turned = [_take_turns(layer, start, cost) for start in (*separate.values(), *balanced)]
    fastest = min(turned, key=lambda answer: answer.time_s)
    kept_SS = fastest.allocation.circuits_SS
    finished = _with_circuits(layer, fastest.device_E, cost, effort, start_SS=kept_SS)
    best = min((*separate.values(), finished), key=lambda answer: answer.time_s)
    return best, separate


def _balanced(layer: LayerTraffic, device_E: IntArray, cost: LayerCost) -> IntArray:
    """Return a placement for links that never block, as if circuits could follow any demand."""
    region = cost.region
    free = replace(region, eps_ports=region.ports)
    nothing_SS = np.zeros((region.num_servers, region.num_servers), dtype=np.int64)
    return improve_placement(layer, device_E, nothing_SS, replace(cost, region=free))


def _with_circuits(
    layer: LayerTraffic,
    device_E: IntArray,
    cost: LayerCost,
    effort: Effort | None,
    *,
    start_SS: IntArray | None = None,
) -> JointLayer:
    demand_SS = cost.routed(layer.demand(device_E))
    allocation = allocate_circuits(demand_SS, cost.region, effort=effort, start_SS=start_SS)
    return JointLayer(
        device_E=device_E,
        allocation=allocation,
        time_s=cost(layer, device_E, allocation.circuits_SS),
    )


def _take_turns(layer: LayerTraffic, start: JointLayer, cost: LayerCost) -> JointLayer:
    best = start
    for _ in range(MAX_TURNS):
        circuits_SS = best.allocation.circuits_SS
        device_E = improve_placement(layer, best.device_E, circuits_SS, cost)
        answer = _with_circuits(layer, device_E, cost, QUICK, start_SS=circuits_SS)
        if not answer.time_s < best.time_s:
            break
        best = answer
    return best


def _total(layers: tuple[JointLayer, ...]) -> float:
    return sum(layer.time_s for layer in layers)
