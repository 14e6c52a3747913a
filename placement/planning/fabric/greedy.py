"""Greedy circuits: MixNet's Algorithm 1 as printed, as its code does it, and one that counts packet ports.

All three give circuits one by one to a pair until no pair that asks has ports left at both ends. The print
leaves ties open: here the larger demand goes first, then the pair whose servers have more ports left.

Shape letters: S servers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from placement.planning.fabric.completion import FloatArray, IntArray

__all__ = ["balanced_greedy", "code_greedy", "published_greedy"]

CODE_DIVISOR = 100.0
"""A pair that has C circuits weighs its demand / (100 C) in MixNet's code: new pairs come first."""

Weight = Callable[[FloatArray, FloatArray], FloatArray]
"""Weight of every pair from its demand and circuits."""


def _as_printed(demand_SS: FloatArray, circuits_SS: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(demand_SS > 0, demand_SS / circuits_SS, 0.0)


def _as_coded(demand_SS: FloatArray, circuits_SS: FloatArray) -> FloatArray:
    return np.where(circuits_SS > 0, demand_SS / (CODE_DIVISOR * np.maximum(circuits_SS, 1.0)), demand_SS)


def _balanced(demand_SS: FloatArray, circuits_SS: FloatArray) -> FloatArray:
    return demand_SS / (circuits_SS + 1.0)


def published_greedy(demand_SS: FloatArray, *, ocs_ports: int) -> IntArray:
    """Give circuits to the pair that would take longest, MixNet (arXiv 2501.03905), Algorithm 1.

    A pair without circuits takes for ever, so that all pairs with demand come first. A pair whose ports are
    used up is passed over.
    """
    return _allocate(demand_SS, _as_printed, ocs_ports=ocs_ports)


def code_greedy(demand_SS: FloatArray, *, ocs_ports: int) -> IntArray:
    """Give circuits as MixNet's published code does: by demand / (100 circuits), new pairs by demand."""
    return _allocate(demand_SS, _as_coded, ocs_ports=ocs_ports)


def balanced_greedy(demand_SS: FloatArray, *, ocs_ports: int) -> IntArray:
    """Give circuits by demand / (circuits + 1): a heavy pair gets several before a light one has any.

    What is left without circuits goes through the packet switches, where the split is optimal.
    """
    return _allocate(demand_SS, _balanced, ocs_ports=ocs_ports)


def _allocate(demand_SS: FloatArray, weight: Weight, *, ocs_ports: int) -> IntArray:
    size = len(demand_SS)
    first_P, second_P = np.triu_indices(size, 1)
    demand_P = np.maximum(demand_SS, demand_SS.T)[first_P, second_P]
    circuits_P = np.zeros(demand_P.size)
    free_S = np.full(size, ocs_ports)
    open_P = demand_P > 0
    while open_P.any():
        weight_P = np.where(open_P, weight(demand_P, circuits_P), -1.0)
        heaviest = np.nonzero(weight_P == weight_P.max())[0]
        heaviest = heaviest[demand_P[heaviest] == demand_P[heaviest].max()]
        pair = int(heaviest[(free_S[first_P] + free_S[second_P])[heaviest].argmax()])
        circuits_P[pair] += 1
        free_S[[first_P[pair], second_P[pair]]] -= 1
        open_P &= (free_S[first_P] > 0) & (free_S[second_P] > 0)
    circuits_SS = np.zeros((size, size), dtype=np.int64)
    circuits_SS[first_P, second_P] = circuits_P
    return circuits_SS + circuits_SS.T
