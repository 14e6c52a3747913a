"""A lower bound as a value, and how two of them combine.

Shape letters: L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.problem import Objective, PlacementProblem, Risk

__all__ = ["LowerBound", "tighter"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowerBound:
    """A lower bound on the objective.

    Parameters
    ----------
    value
        The bound, in the objective's unit.
    layer_L
        Each layer's share, ``[layers]``: a bound on that layer's term of the objective; they combine to
        `value`, or less, as the layers of the objective do.
    """

    value: float
    layer_L: FloatArray


def tighter(problem: PlacementProblem, first: LowerBound, second: LowerBound) -> LowerBound:
    """Combine two bounds on the same objective: the higher one in every layer and in all.

    Where the objective is a sum (or mean) over layers of means over windows, the higher bounds of the
    layers add up as well.
    """
    layer_L = np.maximum(first.layer_L, second.layer_L)
    value = max(first.value, second.value)
    if problem.risk is Risk.MEAN:
        summed = layer_L.sum() if problem.objective is Objective.STEP_TIME else layer_L.mean()
        value = max(value, float(summed))
    return LowerBound(value=value, layer_L=layer_L)
