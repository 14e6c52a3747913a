"""How fast an all-to-all can be at all, from counting alone: no circuits of this region are faster.

Shape letters: S servers.
"""

from __future__ import annotations

import numpy as np

from placement.planning.fabric.completion import FloatArray
from placement.planning.fabric.region import FabricRegion

__all__ = ["counting_bound", "links_bound"]

HALVINGS = 60
"""Halvings of the interval that the bound lies in; more than a double can tell apart."""

MOST_RATIO = 1e6
"""How many times the links' bound is looked for; beyond it some pair has no way to its peer at all."""

STEP_BACK = 1e-12
"""Relative step back from a bound for the rounding of sums."""


def links_bound(demand_SS: FloatArray, region: FabricRegion) -> float:
    """Return the time in which the busiest server moves its bytes over all of its links, seconds.

    A fat-tree that never blocks takes exactly this long.
    """
    busiest = max(float(demand_SS.sum(axis=axis).max()) for axis in (0, 1))
    return busiest / (region.ports * region.bytes_per_s)


def counting_bound(demand_SS: FloatArray, region: FabricRegion) -> float:
    """Return a lower bound that knows that circuits are whole, seconds.

    Each server may choose its circuits as if its peers always agreed. In a time T the first circuit to a peer
    carries at most B T of its bytes, the last one what is left: the best ``ocs_ports`` of these pieces go
    over circuits, and the rest must fit the packet ports. The least such T is found by halving, from below.
    """
    low = (1 - STEP_BACK) * links_bound(demand_SS, region)
    if low == 0 or _fits(demand_SS, region, low):
        return low
    high = 2 * low
    most = low * MOST_RATIO
    while not _fits(demand_SS, region, high):
        if high > most:
            return high
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _fits(demand_SS, region, middle) else (middle, high)
    return low


def _fits(demand_SS: FloatArray, region: FabricRegion, time_s: float) -> bool:
    """Return whether every server alone could be done in a time."""
    carried = region.bytes_per_s * time_s
    through_packets = region.eps_ports * carried * (1 + STEP_BACK)
    circuit = np.arange(region.ocs_ports)
    for rows_SS in (demand_SS, demand_SS.T):
        pieces = np.clip(rows_SS[:, :, None] - carried * circuit, 0.0, carried).reshape(len(rows_SS), -1)
        best_S = -np.sort(-pieces, axis=1)[:, : region.ocs_ports].sum(axis=1)
        if (rows_SS.sum(axis=1) - best_S > through_packets).any():
            return False
    return True
