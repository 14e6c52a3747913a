"""Slow and plain: the same answers from linear programs and from trying everything."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from placement.planning.fabric import FabricRegion
from placement.planning.fabric.completion import all_to_all_time
from placement.planning.fabric.swaps import LayerCost
from placement.planning.fabric.traffic import LayerTraffic
from placement.solvers.milp import MilpBuilder, solve_milp

__all__ = [
    "best_joint",
    "best_of_everything",
    "every_circuits",
    "every_placement",
    "layer_of",
    "lp_time",
    "token_demand",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def lp_time(circuits_SS: IntArray, demand_SS: FloatArray, region: FabricRegion) -> float:
    """Return the shortest time for circuits as a linear program of the time and every pair's split."""
    size, scale = region.num_servers, float(demand_SS.max())
    builder = MilpBuilder()
    time = builder.add_variables(1, objective=1.0)
    split = builder.add_variables((size, size), upper=demand_SS / scale)
    for i, j in itertools.product(range(size), repeat=2):
        builder.add_rows(
            (np.array([time[0], split[i, j]]), [float(circuits_SS[i, j]), 1.0]), lower=demand_SS[i, j] / scale
        )
    for server in range(size):
        for packets in (split[server], split[:, server]):
            builder.add_rows(
                (np.array([*packets, time[0]]), [1.0] * size + [-float(region.eps_ports)]), upper=0.0
            )
    result = solve_milp(builder.build(), in_process=True, relative_gap=0.0)
    return result.objective * scale / region.bytes_per_s


def every_circuits(region: FabricRegion) -> Iterator[IntArray]:
    """Yield all circuits that a tiny region can switch."""
    pairs = list(itertools.combinations(range(region.num_servers), 2))
    for counts in itertools.product(range(region.ocs_ports + 1), repeat=len(pairs)):
        circuits_SS = np.zeros((region.num_servers, region.num_servers), dtype=np.int64)
        for (i, j), count in zip(pairs, counts, strict=True):
            circuits_SS[i, j] = circuits_SS[j, i] = count
        if circuits_SS.sum(axis=1).max() <= region.ocs_ports:
            yield circuits_SS


def best_of_everything(demand_SS: FloatArray, region: FabricRegion) -> float:
    """Return the time of the best circuits, by trying all."""
    return min(all_to_all_time(circuits_SS, demand_SS, region) for circuits_SS in every_circuits(region))


def every_placement(num_experts: int, num_devices: int) -> Iterator[IntArray]:
    """Yield all placements with equally many experts on every device."""
    each = num_experts // num_devices
    for device_E in itertools.product(range(num_devices), repeat=num_experts):
        if all(device_E.count(device) == each for device in range(num_devices)):
            yield np.array(device_E)


def token_demand(
    experts_TK: IntArray, home_T: IntArray, device_E: IntArray, server_D: IntArray, bytes_T: FloatArray
) -> FloatArray:
    """Return dispatched bytes, token by token."""
    size = int(server_D.max()) + 1
    demand_SS = np.zeros((size, size))
    for experts_K, home, num_bytes in zip(experts_TK, home_T, bytes_T, strict=True):
        for server in {int(server_D[device_E[expert]]) for expert in experts_K} - {int(home)}:
            demand_SS[home, server] += num_bytes
    return demand_SS


def layer_of(
    experts_TK: IntArray, home_T: IntArray, server_D: IntArray, *, num_experts: int, seconds_per_pair: float
) -> LayerTraffic:
    """Return a layer whose tokens are a megabyte each."""
    has_TE = np.zeros((len(experts_TK), num_experts))
    has_TE[np.arange(len(experts_TK))[:, None], experts_TK] = 1.0
    order = np.argsort(home_T, kind="stable")
    return LayerTraffic(
        has_TE=has_TE[order],
        home_T=home_T[order],
        bytes_T=np.full(len(home_T), 1e6),
        compute_DE=np.tile(seconds_per_pair * has_TE.sum(axis=0), (server_D.size, 1)),
        server_D=server_D,
    )


def best_joint(layer: LayerTraffic, cost: LayerCost) -> float:
    """Return the time of the best placement with the best circuits, by trying all of both."""
    experts, devices = layer.has_TE.shape[1], layer.server_D.size
    circuits = list(every_circuits(cost.region))
    return min(
        cost(layer, device_E, circuits_SS)
        for device_E in every_placement(experts, devices)
        for circuits_SS in circuits
    )
