"""Routing as chance would have it: tokens' experts shuffled within a layer, every expert's load kept.

Shape letters: T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["partner_shuffles"]

ExpertArray = npt.NDArray[np.unsignedinteger[Any]]

_MOVES = 6
"""Times that a choice has moved to another token, on average, before shuffles begin."""
_MOST_ROUNDS = 64
"""Rounds for each of a token's choices, where hardly any trade is possible."""


def partner_shuffles(
    experts_TK: ExpertArray, *, num_shuffles: int, rng: np.random.Generator
) -> Iterator[ExpertArray]:
    """Yield a layer's routing with other partners: loads are kept, and tokens' experts stay distinct.

    In a round all tokens are paired at random, and each pair trades one expert for one, unless a token would
    then hold an expert twice. These trades are symmetric, so every routing with these loads becomes equally
    likely (the swap chain of Besag and Clifford, 1989, for tables with fixed margins).

    Parameters
    ----------
    experts_TK
        Expert ids, a token's distinct.
    num_shuffles
        How many routings to yield, each shuffled on from the one before.
    rng
        Source of chance.
    """
    ids_TK = experts_TK.copy()
    moved = rounds = 0
    while moved < _MOVES * ids_TK.size and rounds < _MOST_ROUNDS * ids_TK.shape[1]:
        moved += 2 * _trade(ids_TK, rng)
        rounds += 1
    # From here on the number of rounds is fixed: ending after a success would favour what is easily reached.
    for _ in range(num_shuffles):
        for _ in range(1 + rounds // 2):
            _trade(ids_TK, rng)
        yield ids_TK.copy()


def _trade(ids_TK: ExpertArray, rng: np.random.Generator) -> int:
    """Let tokens trade in pairs, in place; return how many pairs did."""
    num_tokens, top_k = ids_TK.shape
    half = num_tokens // 2
    order_T = rng.permutation(num_tokens)
    one, two = order_T[:half], order_T[half : 2 * half]
    place_one, place_two = rng.integers(top_k, size=(2, half))
    given, taken = ids_TK[one, place_one], ids_TK[two, place_two]
    twice = (ids_TK[one] == taken[:, np.newaxis]) | (ids_TK[two] == given[:, np.newaxis])
    allowed = ~twice.any(axis=1)
    ids_TK[one[allowed], place_one[allowed]] = taken[allowed]
    ids_TK[two[allowed], place_two[allowed]] = given[allowed]
    return int(np.count_nonzero(allowed))
