"""Compiled drawing of tokens' classes and experts.

Shape letters: T tokens, L MoE layers, C classes, E experts, K top-k.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

__all__ = ["alias_tables", "draw_tokens"]

Array = npt.NDArray[Any]

_PATIENCE = 64
"""Draws per choice before an expert is looked for among those left."""


@nb.njit(cache=True)
def alias_tables(weight_RE: Array) -> tuple[Array, Array]:
    """Return Walker's tables of each row: a draw takes one step, however many experts there are."""
    rows, size = weight_RE.shape
    keep_RE = np.ones((rows, size), dtype=np.float32)
    other_RE = np.zeros((rows, size), dtype=np.uint16)
    scaled = np.empty(size)
    small = np.empty(size, dtype=np.int64)
    large = np.empty(size, dtype=np.int64)
    for row in range(rows):
        total = 0.0
        for e in range(size):
            total += weight_RE[row, e]
        num_small = num_large = 0
        for e in range(size):
            scaled[e] = weight_RE[row, e] * size / total
            other_RE[row, e] = e
            if scaled[e] < 1.0:
                small[num_small] = e
                num_small += 1
            else:
                large[num_large] = e
                num_large += 1
        while num_small and num_large:
            num_small -= 1
            poor, rich = small[num_small], large[num_large - 1]
            keep_RE[row, poor] = scaled[poor]
            other_RE[row, poor] = rich
            scaled[rich] -= 1.0 - scaled[poor]
            if scaled[rich] < 1.0:
                num_large -= 1
                small[num_small] = rich
                num_small += 1
    return keep_RE, other_RE


@nb.njit(cache=True)
def _draw(rng: Any, keep_E: Array, other_E: Array) -> int:
    place = rng.random() * keep_E.size
    expert = min(int(place), keep_E.size - 1)
    return expert if place - expert < keep_E[expert] else int(other_E[expert])


@nb.njit(cache=True)
def _search(sum_C: Array, value: float) -> int:
    low, high = 0, sum_C.size - 1
    while low < high:
        middle = (low + high) // 2
        if sum_C[middle] <= value:
            low = middle + 1
        else:
            high = middle
    return low


@nb.njit(cache=True)
def _rest(rng: Any, weight_E: Array, chosen_K: Array, count: int) -> int:
    """Draw among the experts that are not chosen yet."""
    total = 0.0
    for e in range(weight_E.size):
        total += weight_E[e]
    for k in range(count):
        total -= weight_E[chosen_K[k]]
    left = rng.random() * max(total, 0.0)
    last = -1
    for e in range(weight_E.size):
        taken = False
        for k in range(count):
            taken = taken or chosen_K[k] == e
        if not taken:
            last = e
            left -= weight_E[e]
            if left <= 0.0:
                return e
    return last


@nb.njit(cache=True)
def draw_tokens(
    rng: Any,
    first_C: Array,
    follow_LCC: Array,
    weight_LCE: Array,
    keep_LCE: Array,
    other_LCE: Array,
    out_TLK: Array,
) -> None:
    """Draw a chain of classes and, in each, experts without replacement, one after the other.

    Parameters
    ----------
    rng
        NumPy generator.
    first_C
        Running sums of the classes' probabilities in the first layer.
    follow_LCC
        Running sums of the next class's probabilities, by layer and class.
    weight_LCE, keep_LCE, other_LCE
        Weights of the experts, and their `alias_tables`.
    out_TLK
        Expert ids, overwritten.
    """
    num_tokens, num_layers, top_k = out_TLK.shape
    for token in range(num_tokens):
        group = _search(first_C, rng.random())
        for layer in range(num_layers):
            if layer:
                group = _search(follow_LCC[layer - 1, group], rng.random())
            chosen_K = out_TLK[token, layer]
            keep_E, other_E = keep_LCE[layer, group], other_LCE[layer, group]
            for k in range(top_k):
                expert = -1
                for _ in range(_PATIENCE):
                    expert = _draw(rng, keep_E, other_E)
                    fresh = True
                    for j in range(k):
                        fresh = fresh and chosen_K[j] != expert
                    if fresh:
                        break
                    expert = -1
                if expert < 0:
                    expert = _rest(rng, weight_LCE[layer, group], chosen_K, k)
                chosen_K[k] = expert
