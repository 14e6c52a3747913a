"""Compiled counting of one layer's tokens: loads and pairs of experts.

Counts are integers that only ever grow by one, so their sums do not depend on the order, the blocks or the
threads. Pairs are counted in tables of two bytes a cell, which stay in the cache, and are added to the
totals block by block. Shape letters: T tokens, K top-k, E experts, L MoE layers, P pieces, G groups.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

__all__ = [
    "MOST_TOKENS",
    "count_coactivation",
    "count_first_transitions",
    "count_groups",
    "count_loads",
    "count_transitions",
    "turn",
]

Array = npt.NDArray[Any]

MOST_TOKENS = (1 << 16) - 1
"""Tokens between two flushes: a token adds to a cell at most once, so that two bytes a cell are exact."""

_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False}

_TILE = 64


@nb.njit(**_OPTIONS)
def turn(ids_TLK: Array, out_LTK: Array) -> None:
    """Copy ids token by token into ids layer by layer, in tiles that stay in the cache."""
    num_tokens, num_layers, top_k = ids_TLK.shape
    for start in range(0, num_tokens, _TILE):
        stop = min(start + _TILE, num_tokens)
        for layer in range(num_layers):
            for token in range(start, stop):
                for k in range(top_k):
                    out_LTK[layer, token, k] = ids_TLK[token, layer, k]


@nb.njit(inline="always")
def _add_loads(ids_TK: Array, token: int, lanes: Array, top_k: int) -> None:
    # Histograms side by side: an expert met twice in a row does not wait for its first count to be stored.
    whole = top_k // 4 * 4
    for k in range(0, whole, 4):
        lanes[0][ids_TK[token, k]] += 1
        lanes[1][ids_TK[token, k + 1]] += 1
        lanes[2][ids_TK[token, k + 2]] += 1
        lanes[3][ids_TK[token, k + 3]] += 1
    for k in range(whole, top_k):
        lanes[k % 4][ids_TK[token, k]] += 1


@nb.njit(inline="always")
def _add_row(count_E: Array, total_E: Array) -> None:
    for expert in range(count_E.size):
        total_E[expert] += count_E[expert]


@nb.njit(inline="always")
def _joined(lanes: Array) -> Array:
    """Add the histograms up into the first."""
    total_E = lanes[0]
    for expert in range(total_E.size):
        total_E[expert] += lanes[1, expert] + lanes[2, expert] + lanes[3, expert]
    return total_E


@nb.njit(**_OPTIONS)
def count_loads(
    ids_TK: Array,
    layer: int,
    stop_P: Array,
    window_P: Array,
    time_P: Array,
    load_WLE: Array,
    time_load_BLE: Array,
    rest_LE: Array,
) -> None:
    """Add the loads of consecutive pieces of the tokens, each to its window and to its stretch of time.

    Parameters
    ----------
    ids_TK
        Expert ids of one layer.
    layer
        Which layer it is.
    stop_P
        Where each piece ends.
    window_P, time_P
        Rows of `load_WLE` and `time_load_BLE` that each piece adds to; -1 for none.
    load_WLE, time_load_BLE
        Counts to add to.
    rest_LE
        What no row of `time_load_BLE` takes.
    """
    top_k = ids_TK.shape[1]
    num_experts = rest_LE.shape[1]
    lanes = np.zeros((4, num_experts), dtype=np.uint32)
    start = 0
    for piece in range(stop_P.size):
        stop = stop_P[piece]
        lanes[:] = 0
        if top_k == 8:
            for token in range(start, stop):
                _add_loads(ids_TK, token, lanes, 8)
        else:
            for token in range(start, stop):
                _add_loads(ids_TK, token, lanes, top_k)
        total = _joined(lanes)
        if window_P[piece] >= 0:
            _add_row(total, load_WLE[window_P[piece], layer])
        if time_P[piece] >= 0:
            _add_row(total, time_load_BLE[time_P[piece], layer])
        else:
            _add_row(total, rest_LE[layer])
        start = stop


@nb.njit(**_OPTIONS)
def count_groups(ids_TK: Array, layer: int, order_T: Array, stop_G: Array, load_GLE: Array) -> None:
    """Add the loads of groups of tokens to a row each.

    Parameters
    ----------
    ids_TK
        Expert ids of one layer.
    layer
        Which layer it is.
    order_T
        Tokens that belong to a group, group by group.
    stop_G
        Where each group ends in `order_T`.
    load_GLE
        Counts to add to.
    """
    top_k = ids_TK.shape[1]
    lanes = np.zeros((4, load_GLE.shape[2]), dtype=np.uint32)
    start = 0
    for group in range(stop_G.size):
        stop = stop_G[group]
        if stop > start:
            lanes[:] = 0
            if top_k == 8:
                for place in range(start, stop):
                    _add_loads(ids_TK, order_T[place], lanes, 8)
            else:
                for place in range(start, stop):
                    _add_loads(ids_TK, order_T[place], lanes, top_k)
            _add_row(_joined(lanes), load_GLE[group, layer])
        start = stop


@nb.njit(inline="always")
def _add_transitions(
    from_TK: Array, to_TK: Array, start: int, stop: int, table_EE: Array, top_k: int
) -> None:
    for token in range(start, stop):
        for j in range(top_k):
            row = table_EE[from_TK[token, j]]
            for k in range(top_k):
                row[to_TK[token, k]] += 1


@nb.njit(inline="always")
def _add_coactivation(ids_TK: Array, start: int, stop: int, table_EE: Array, top_k: int) -> None:
    for token in range(start, stop):
        for j in range(top_k - 1):
            row = table_EE[ids_TK[token, j]]
            for k in range(j + 1, top_k):
                row[ids_TK[token, k]] += 1


@nb.njit(inline="always")
def _flush(table_EE: Array, count_EE: Array) -> None:
    for expert in range(table_EE.shape[0]):
        _add_row(table_EE[expert], count_EE[expert])


@nb.njit(**_OPTIONS)
def count_transitions(from_TK: Array, to_TK: Array, table_EE: Array, count_EE: Array) -> None:
    """Add tokens by an expert of one layer and one of the next, all pairs.

    Parameters
    ----------
    from_TK, to_TK
        Expert ids of the two layers.
    table_EE
        Room for two bytes a cell, overwritten.
    count_EE
        Counts to add to.
    """
    num_tokens, top_k = from_TK.shape
    for start in range(0, num_tokens, MOST_TOKENS):
        stop = min(start + MOST_TOKENS, num_tokens)
        table_EE[:] = 0
        if top_k == 8:
            _add_transitions(from_TK, to_TK, start, stop, table_EE, 8)
        else:
            _add_transitions(from_TK, to_TK, start, stop, table_EE, top_k)
        _flush(table_EE, count_EE)


@nb.njit(**_OPTIONS)
def count_first_transitions(from_TK: Array, to_TK: Array, count_EE: Array) -> None:
    """Add tokens by their first expert in one layer and in the next."""
    for token in range(from_TK.shape[0]):
        # A plain 1 would turn counts of eight bytes into floats.
        count_EE[from_TK[token, 0], to_TK[token, 0]] += np.uint64(1)


@nb.njit(**_OPTIONS)
def count_coactivation(ids_TK: Array, table_EE: Array, count_EE: Array) -> None:
    """Add tokens by two of their experts, the one chosen first as the row; see `count_transitions`."""
    num_tokens, top_k = ids_TK.shape
    for start in range(0, num_tokens, MOST_TOKENS):
        stop = min(start + MOST_TOKENS, num_tokens)
        table_EE[:] = 0
        if top_k == 8:
            _add_coactivation(ids_TK, start, stop, table_EE, 8)
        else:
            _add_coactivation(ids_TK, start, stop, table_EE, top_k)
        _flush(table_EE, count_EE)
