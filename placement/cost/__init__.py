"""The only place that computes an objective: a placement's predicted cost on given traffic."""

from placement.cost.breakdown import CostBreakdown, Metrics
from placement.cost.model import CostModel

__all__ = ["CostBreakdown", "CostModel", "Metrics"]
