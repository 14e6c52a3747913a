"""Lower bounds on the objective that no placement can beat, computed without any solver."""

from placement.bounds.combined import lower_bound
from placement.bounds.value import LowerBound, layer_gaps, tighter

__all__ = ["LowerBound", "layer_gaps", "lower_bound", "tighter"]
