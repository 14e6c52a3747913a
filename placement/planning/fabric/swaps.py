"""Swaps of experts on given circuits, all of a layer priced exactly at once.

When expert a on server p and expert b on server q change places, only what is sent to p and q changes, and a
token that selects both sends what it sent. A token that selects a stops sending to p where a was its only
expert there, and begins to send to q where it had none: four counts by home give every swap's demand.

Shape letters: T tokens, E experts, D devices, S servers, N swaps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.planning.fabric.completion import FloatArray, IntArray, all_to_all_time, server_times
from placement.planning.fabric.region import FabricRegion
from placement.planning.fabric.traffic import LayerTraffic

__all__ = ["LayerCost", "improve_placement"]

LEAST_GAIN = 1e-9
"""Relative gain below which a swap is not made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """What a layer takes in one step: its all-to-alls and its fullest device.

    Parameters
    ----------
    region
        Links.
    paired
        Whether a pair's two directions share its links, as in MixNet's Algorithm 1.
    all_to_alls, computes
        How often each occurs: 2 and 1 in inference; 4 and 3 in training, where going back computes twice.
    """

    region: FabricRegion
    paired: bool = False
    all_to_alls: int = 4
    computes: int = 3

    def routed(self, demand: FloatArray) -> FloatArray:
        """Return dispatched bytes as the links see them, ``[..., servers, servers]``."""
        return demand + np.swapaxes(demand, -1, -2) if self.paired else demand

    def __call__(self, layer: LayerTraffic, device_E: IntArray, circuits_SS: IntArray) -> float:
        """Return the seconds of a layer for a placement on circuits."""
        exchange_s = all_to_all_time(circuits_SS, self.routed(layer.demand(device_E)), self.region)
        return self.all_to_alls * exchange_s + self.computes * float(layer.compute_D(device_E).max())


def improve_placement(
    layer: LayerTraffic,
    device_E: IntArray,
    circuits_SS: IntArray,
    cost: LayerCost,
    *,
    max_swaps: int = 200,
) -> IntArray:
    """Return a placement of one layer that no swap of two experts makes faster on these circuits.

    Parameters
    ----------
    device_E
        Device of each expert to start from, ``[experts]``.
    circuits_SS
        Circuits that are up.
    max_swaps
        Swaps after which to stop.
    """
    device_E = device_E.copy()
    current_s = cost(layer, device_E, circuits_SS)
    for _ in range(max_swaps):
        first_N, second_N = _pairs(device_E)
        if not first_N.size:
            break
        demand_NSS = _demand_after(layer, device_E, first_N, second_N)
        exchange_N = server_times(circuits_SS, cost.routed(demand_NSS), cost.region).max(axis=1)
        compute_N = _fullest_after(layer, device_E, first_N, second_N)
        time_N = cost.all_to_alls * exchange_N + cost.computes * compute_N
        best = int(time_N.argmin())
        if not time_N[best] < current_s * (1 - LEAST_GAIN):
            break
        swapped = [first_N[best], second_N[best]]
        device_E[swapped] = device_E[swapped[::-1]]
        current_s = float(time_N[best])
    return device_E


def _pairs(device_E: IntArray) -> tuple[IntArray, IntArray]:
    first_N, second_N = np.triu_indices(device_E.size, 1)
    apart = device_E[first_N] != device_E[second_N]
    return first_N[apart], second_N[apart]


def _demand_after(
    layer: LayerTraffic, device_E: IntArray, first_N: IntArray, second_N: IntArray
) -> FloatArray:
    """Return the demand after each swap, ``[swaps, servers, servers]``."""
    server_E = layer.server_D[device_E]
    held_TS = layer.held_TS(device_E)
    leaving_TE = layer.has_TE * (held_TS[:, server_E] == 1)
    size, experts = layer.num_servers, device_E.size
    begun_SES, ended_SEE = np.zeros((size, experts, size)), np.zeros((size, experts, experts))
    first_S = np.searchsorted(layer.home_T, np.arange(size + 1))
    for home in range(size):
        here = slice(first_S[home], first_S[home + 1])
        weighted_ET = layer.has_TE[here].T * layer.bytes_T[here]
        begun_SES[home] = weighted_ET @ (held_TS[here] == 0)
        # Tokens that select another expert as well, on the other side of the swap, send as before.
        ended_SEE[home] = (leaving_TE[here].T * layer.bytes_T[here]) @ layer.has_TE[here]
    alone_SE = layer.by_home(leaving_TE > 0)
    demand_NSS = np.repeat(layer.demand(device_E)[None], first_N.size, axis=0)
    swap = np.arange(first_N.size)
    for goes_N, comes_N in ((first_N, second_N), (second_N, first_N)):
        server_N = server_E[goes_N]
        ended_NS = (alone_SE[:, goes_N] - ended_SEE[:, goes_N, comes_N]).T
        begun_NS = begun_SES[:, comes_N, server_N].T
        changes_N1 = (server_E[first_N] != server_E[second_N])[:, None]
        demand_NSS[swap, :, server_N] += np.where(changes_N1, begun_NS - ended_NS, 0.0)
    # Sums of differences leave specks below zero.
    demand_NSS = np.maximum(demand_NSS, 0.0)
    demand_NSS[:, np.arange(size), np.arange(size)] = 0.0
    return demand_NSS


def _fullest_after(
    layer: LayerTraffic, device_E: IntArray, first_N: IntArray, second_N: IntArray
) -> FloatArray:
    """Return the seconds of the fullest device after each swap, ``[swaps]``."""
    compute_ND = np.repeat(layer.compute_D(device_E)[None], first_N.size, axis=0)
    swap = np.arange(first_N.size)
    for goes_N, comes_N in ((first_N, second_N), (second_N, first_N)):
        device_N = device_E[goes_N]
        compute_ND[swap, device_N] += layer.compute_DE[device_N, comes_N] - layer.compute_DE[device_N, goes_N]
    return np.asarray(compute_ND.max(axis=1))
