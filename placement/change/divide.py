"""Shares a budget of moves between layers where it buys most: an exact knapsack over the layers' curves.

Shape letters: L layers, M numbers of moves of one layer, B numbers of moves over all layers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["BudgetTable", "divide_budget"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class BudgetTable:
    """The least sum of layer values for every budget, by dynamic programming over layers.

    Parameters
    ----------
    value_LM
        Value of each layer with exactly so many moves, ``[layers, moves]``; infinite where unknown. Every
        layer knows its value for at least one number of moves.
    budget
        Largest budget to prepare for.
    """

    def __init__(self, value_LM: FloatArray, budget: int) -> None:
        num_layers, width = value_LM.shape
        size = min(budget, num_layers * (width - 1)) + 1
        total_B = np.zeros(size)
        self._choice_LB = np.zeros((num_layers, size), dtype=np.int32)
        for value_M, choice_B in zip(value_LM, self._choice_LB, strict=True):
            total_B = _add_layer(total_B, value_M, choice_B)
        self.total_B = total_B

    def moves_L(self, budget: int) -> IntArray:
        """Return the moves of each layer that minimise the sum within a budget, as few as that takes.

        Raises
        ------
        ValueError
            If the layers need more moves than that.
        """
        budget = min(budget, self.total_B.size - 1)
        left = int(np.argmin(self.total_B[: budget + 1]))
        if not np.isfinite(self.total_B[left]):
            raise ValueError(f"the layers have no placement within {budget} moves")
        moves = np.zeros(self._choice_LB.shape[0], dtype=np.int64)
        for layer in range(moves.size - 1, -1, -1):
            moves[layer] = self._choice_LB[layer, left]
            left -= int(moves[layer])
        return moves


def _add_layer(total_B: FloatArray, value_M: FloatArray, choice_B: npt.NDArray[np.int32]) -> FloatArray:
    """Add one layer to the table: the least of total + value over how the moves are shared."""
    after_B = np.full(total_B.size, np.inf)
    best = np.inf
    for moves in np.nonzero(np.isfinite(value_M[: total_B.size]))[0]:
        if value_M[moves] >= best:
            continue  # more moves and no better: never worth it
        best = float(value_M[moves])
        sum_B = total_B[: total_B.size - moves] + best
        better = sum_B < after_B[moves:]
        after_B[moves:][better] = sum_B[better]
        choice_B[moves:][better] = moves
    return after_B


def divide_budget(value_LM: FloatArray, budget: int) -> IntArray:
    """Return the moves of each layer that minimise the summed value within a budget, ``[layers]``.

    Raises
    ------
    ValueError
        If the layers need more moves than that.
    """
    return BudgetTable(value_LM, budget).moves_L(budget)
