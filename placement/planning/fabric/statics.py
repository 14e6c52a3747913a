"""Fabrics to compare with, of the same ports per server: switched trees, and circuits that never change.

Shape letters: S servers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placement.errors import InputError
from placement.planning.fabric.bounds import links_bound
from placement.planning.fabric.completion import FloatArray, IntArray
from placement.planning.fabric.greedy import balanced_greedy
from placement.planning.fabric.region import FabricRegion
from placement.planning.fabric.search import improve_circuits

__all__ = ["fat_tree_time", "oversubscribed_time", "relayed_time", "static_circuits"]


def fat_tree_time(demand_SS: FloatArray, region: FabricRegion) -> float:
    """Return the time over a fat-tree that never blocks, all ports of a server on it, seconds.

    A rail-optimised tree takes as long: bytes for another rail change GPU inside the server first, on links
    that are much faster.
    """
    return links_bound(demand_SS, region)


def oversubscribed_time(demand_SS: FloatArray, region: FabricRegion, *, oversubscription: float) -> float:
    """Return the time over a tree whose servers share uplinks that are too few by a factor, seconds.

    Every byte between servers crosses the uplinks; what neighbours on one leaf would save is left out.
    """
    if not oversubscription >= 1:
        raise InputError(f"oversubscription is {oversubscription}; it must be 1 or more")
    return oversubscription * links_bound(demand_SS, region)


def static_circuits(mean_SS: FloatArray, region: FabricRegion) -> IntArray:
    """Return circuits that are set once for a mean demand, after TopoOpt: no packet ports at all.

    Every port of a server ends a circuit. A ring joins all servers, so that whoever has no circuit to a peer
    is relayed; the other circuits follow the demand.
    """
    size = region.num_servers
    ring_SS = np.zeros((size, size), dtype=np.int64)
    if region.ports < 2:
        raise InputError(f"servers with {region.ports} port cannot form a ring")
    for server in range(size):
        following = (server + 1) % size
        ring_SS[server, following] = ring_SS[following, server] = 1
    spare = region.ports - int(ring_SS.sum(axis=1).max())
    if spare == 0:
        return ring_SS
    rest_SS = mean_SS / (1 + ring_SS)
    # With packet ports as the measure of what stays without a circuit, as if relays took one link's share.
    searching = replace(region, ocs_ports=spare, eps_ports=1)
    return ring_SS + improve_circuits(balanced_greedy(rest_SS, ocs_ports=spare), rest_SS, searching)


def relayed_time(circuits_SS: IntArray, demand_SS: FloatArray, region: FabricRegion) -> float:
    """Return the time where bytes of servers without a circuit hop over others, seconds.

    Bytes take all shortest paths in equal shares of paths, counted with parallel circuits; the fullest link
    decides. Infinite where the circuits do not join two servers that talk.
    """
    load_SS = np.zeros(demand_SS.shape)
    for source in range(region.num_servers):
        if demand_SS[source].any() and not _add_paths(load_SS, circuits_SS, demand_SS[source], source):
            return float("inf")
    used = circuits_SS > 0
    fullest = float((load_SS[used] / circuits_SS[used]).max()) if used.any() else 0.0
    return fullest / region.bytes_per_s


def _add_paths(load_SS: FloatArray, circuits_SS: IntArray, bytes_S: FloatArray, source: int) -> bool:
    """Add what one source sends to the links' loads; return whether all is reached."""
    hops_S = np.full(bytes_S.size, -1)
    paths_S = np.zeros(bytes_S.size)
    hops_S[source], paths_S[source] = 0, 1.0
    levels = [np.array([source])]
    while levels[-1].size:
        reached_S = paths_S * (hops_S == len(levels) - 1) @ circuits_SS
        new = np.nonzero((reached_S > 0) & (hops_S < 0))[0]
        hops_S[new], paths_S[new] = len(levels), reached_S[new]
        levels.append(new)
    if (bytes_S[hops_S < 0] > 0).any():
        return False
    passing_S = bytes_S.copy()
    # From the farthest servers back: what enters a server comes from those one hop nearer, by paths.
    for level in range(len(levels) - 2, 0, -1):
        nearer, here = levels[level - 1], levels[level]
        share = circuits_SS[np.ix_(nearer, here)] * paths_S[nearer][:, None] / paths_S[here]
        moved = share * passing_S[here]
        load_SS[np.ix_(nearer, here)] += moved
        passing_S[nearer] += moved.sum(axis=1)
    return True
