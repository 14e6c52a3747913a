"""First homes of experts: whole gating groups on nodes, or clusters of experts that fire together.

Shape letters: E experts, G expert groups, N nodes, T tokens, K top-k, P partitions, M sets of groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["cluster_experts", "group_homes"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

MOST_PARTITIONS = 3000
"""Ways to put groups on nodes that are all tried: 8 groups on 4 nodes are 105, 12 on 6 are 10,395."""

PARTITION_NODES = 100_000


def _partitions(items: tuple[int, ...], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield the ways to split items into sets of a size, without regard to the sets' order."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for others in itertools.combinations(rest, size - 1):
        left = tuple(item for item in rest if item not in others)
        for tail in _partitions(left, size):
            yield [(first, *others), *tail]


def _num_partitions(num_groups: int, num_nodes: int) -> float:
    size, ways, left = num_groups // num_nodes, 1.0, num_groups
    while left and ways <= MOST_PARTITIONS:
        for i in range(1, size):
            ways *= (left - i) / i
        left -= size
    return ways


def group_homes(
    experts_TK: IntArray | None, load_E: FloatArray, num_groups: int, num_nodes: int
) -> list[IntArray]:
    """Put whole groups on nodes, equally many on each: for fewest node visits, and for even loads.

    Parameters
    ----------
    experts_TK
        Experts of sampled tokens; None where only loads are known.

    Returns
    -------
    list of IntArray
        Homes ``[experts]``, best first by visits; the last is the one with the most even loads.
    """
    from placement.solvers.balance.kernels import partition_equal

    group_size = load_E.size // num_groups
    load_G = load_E.reshape(num_groups, group_size).sum(axis=1)
    even_G = partition_equal(load_G / load_G.max(), num_nodes, PARTITION_NODES)
    found = [np.repeat(even_G, group_size)]
    if experts_TK is not None and _num_partitions(num_groups, num_nodes) <= MOST_PARTITIONS:
        found.insert(
            0, np.repeat(_fewest_visits(experts_TK // group_size, num_groups, num_nodes), group_size)
        )
    return found


def _fewest_visits(group_TK: IntArray, num_groups: int, num_nodes: int) -> IntArray:
    """Try every way to put groups on nodes; a token's groups are a set of bits."""
    set_T = np.bitwise_or.reduce(np.int64(1) << group_TK, axis=1)
    set_M, count_M = np.unique(set_T, return_counts=True)
    ways = list(_partitions(tuple(range(num_groups)), num_groups // num_nodes))
    bits_PN = np.array([[sum(1 << group for group in part) for part in way] for way in ways], dtype=np.int64)
    visits_P = [int(((set_M[:, None] & bits_N) != 0).sum(axis=1) @ count_M) for bits_N in bits_PN]
    best = ways[int(np.argmin(visits_P))]
    node_G = np.empty(num_groups, dtype=np.int64)
    for node, part in enumerate(best):
        node_G[list(part)] = node
    return node_G


def cluster_experts(experts_TK: IntArray, num_experts: int, homes_N: IntArray) -> IntArray:
    """Grow one cluster per node from the experts that most often share a token.

    Parameters
    ----------
    homes_N
        Experts that each node is to take.
    """
    chosen_TE = np.zeros((len(experts_TK), num_experts), dtype=np.float32)
    np.put_along_axis(chosen_TE, experts_TK, 1.0, axis=1)
    together_EE = chosen_TE.T @ chosen_TE
    seen_E = np.maximum(np.diag(together_EE), 1.0)
    # How much more often than their popularity alone explains.
    affinity_EE = together_EE / np.sqrt(np.outer(seen_E, seen_E))
    node_E = np.full(num_experts, -1, dtype=np.int64)
    for node, room in enumerate(homes_N):
        pull_E = np.zeros(num_experts, dtype=np.float32)
        for taken in range(int(room)):
            if taken == 0:
                pull_E[:] = affinity_EE[:, node_E < 0].sum(axis=1)
            expert = int(np.where(node_E < 0, pull_E, -np.inf).argmax())
            if taken == 0:
                pull_E[:] = 0.0
            node_E[expert] = node
            pull_E += affinity_EE[expert]
    return node_E
