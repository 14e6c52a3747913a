"""Lower bounds on the objective that no placement can beat, computed without any solver."""

from placement.bounds.combined import lower_bound
from placement.bounds.inside import most_inside
from placement.bounds.value import LowerBound, tighter

__all__ = ["LowerBound", "lower_bound", "most_inside", "tighter"]
