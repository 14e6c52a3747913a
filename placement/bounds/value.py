"""A lower bound as a value, and how two of them combine.

Shape letters: L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.cost import CostBreakdown
from placement.errors import InputError
from placement.problem import Objective, PlacementProblem, Risk

__all__ = ["LowerBound", "layer_gaps", "tighter"]

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


def layer_gaps(problem: PlacementProblem, breakdown: CostBreakdown, bound: LowerBound) -> FloatArray:
    """Return each layer's gap, (its mean over windows - its bound) / its mean, ``[layers]``.

    Parameters
    ----------
    breakdown
        Evaluation of some placement.
    bound
        Bound on the same problem.

    Raises
    ------
    InputError
        For the traffic objective, which evaluations do not take apart by layers.
    """
    if problem.objective is Objective.TRAFFIC:
        raise InputError("an evaluation counts traffic over all layers; there are no gaps of single layers")
    if problem.objective is Objective.BALANCE:
        mean_L = breakdown.balance_WL.mean(axis=0)
    else:
        mean_L = (breakdown.experts_WL + breakdown.dispatch_WL + breakdown.combine_WL).mean(axis=0)
    above_L = np.maximum(mean_L - bound.layer_L, 0.0)
    return np.asarray(np.divide(above_L, mean_L, out=np.zeros_like(mean_L), where=mean_L > 0))
