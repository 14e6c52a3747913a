"""What deployments count, for the metrics: names and labels of the counters."""

from __future__ import annotations

from service.deployments.records import Cause
from service.state.counters import label_text

__all__ = ["PROMOTIONS", "REFRESHES", "WINDOWS", "promotion", "refresh", "windows"]

PROMOTIONS = "deployment_promotions_total"
"""Placements promoted, by deployment and cause (manual, automatic, rollback)."""

REFRESHES = "deployment_refreshes_total"
"""Automatic refreshes, by deployment and outcome (promoted, refused, failed, superseded, rolled-back)."""

WINDOWS = "deployment_window_parts_total"
"""Parts of load windows stored, by deployment."""

Amounts = dict[tuple[str, str], float]


def promotion(deployment: str, cause: Cause) -> Amounts:
    """Count a promotion."""
    return {(PROMOTIONS, label_text(deployment=deployment, cause=str(cause))): 1.0}


def refresh(deployment: str, outcome: str) -> Amounts:
    """Count the end of an automatic refresh."""
    return {(REFRESHES, label_text(deployment=deployment, outcome=outcome)): 1.0}


def windows(deployment: str, parts: int) -> Amounts:
    """Count stored parts of windows."""
    return {(WINDOWS, label_text(deployment=deployment)): float(parts)}
