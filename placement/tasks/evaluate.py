"""What a placement costs on a trace, as ``evaluate`` reports it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from placement.cost import CostBreakdown
    from placement.problem import PlacementProblem
    from placement.tasks.problem import TraceOrigin

__all__ = ["evaluation_report"]


def evaluation_report(
    problem: PlacementProblem, breakdown: CostBreakdown, origin: TraceOrigin
) -> dict[str, Any]:
    """Return the JSON form of an evaluation."""
    return {
        "objective": {
            "name": str(problem.objective),
            "value": breakdown.objective,
            "unit": breakdown.unit,
        },
        **breakdown.metrics.as_dict(),
        "windows": problem.profile.num_windows,
        "devices": problem.num_devices,
        "trace": origin.digest,
        "breakdown": breakdown.summary(),
    }
