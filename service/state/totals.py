"""What is counted of finished jobs, in the transaction that ends them: exact over all processes and restarts.

A histogram is one counter for each bucket, of what lies in that bucket alone, and one for the sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from service.state.counters import label_text
from service.state.records import JobKind, Outcome

__all__ = ["GAP_BUCKETS", "JOBS_FAILED", "JOBS_FINISHED", "SECONDS_BUCKETS", "SOLVE_GAP", "SOLVE_SECONDS"]
__all__ += ["finished_totals", "histogram_of", "observed"]

JOBS_FINISHED = "jobs_finished"
JOBS_FAILED = "jobs_failed"
SOLVE_SECONDS = "solve_seconds"
SOLVE_GAP = "solve_gap"

SECONDS_BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3600.0, math.inf)
GAP_BUCKETS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, math.inf)

_BUCKETS = {SOLVE_SECONDS: SECONDS_BUCKETS, SOLVE_GAP: GAP_BUCKETS}

Amounts = dict[tuple[str, str], float]


def finished_totals(kind: str, outcome: Outcome, *, started_at: float | None, ended_at: float) -> Amounts:
    """Return what the end of a job adds to the counters."""
    found: Amounts = {(JOBS_FINISHED, label_text(kind=kind, status=outcome.status.value)): 1.0}
    if outcome.error is not None:
        found[JOBS_FAILED, label_text(code=str(outcome.error.get("code", "internal")))] = 1.0
    if kind == JobKind.SOLVE and started_at is not None:
        found |= observed(SOLVE_SECONDS, max(0.0, ended_at - started_at))
        gap = _gap_of(outcome)
        if gap is not None:
            found |= observed(SOLVE_GAP, gap)
    return found


def observed(name: str, value: float) -> Amounts:
    """Return what one observation adds to a histogram."""
    bucket = next(bound for bound in _BUCKETS[name] if value <= bound)
    return {(f"{name}_bucket", label_text(le=_bound_text(bucket))): 1.0, (f"{name}_sum", ""): value}


def histogram_of(name: str, totals: Mapping[tuple[str, str], float]) -> tuple[list[tuple[str, float]], float]:
    """Return the cumulated buckets of a histogram, by their upper bound, and the sum of what was observed."""
    cumulated, so_far = [], 0.0
    for bound in map(_bound_text, _BUCKETS[name]):
        so_far += totals.get((f"{name}_bucket", label_text(le=bound)), 0.0)
        cumulated.append((bound, so_far))
    return cumulated, totals.get((f"{name}_sum", ""), 0.0)


def _bound_text(bound: float) -> str:
    return "+Inf" if math.isinf(bound) else f"{bound:g}"


def _gap_of(outcome: Outcome) -> float | None:
    objective = (outcome.result or {}).get("objective")
    gap = objective.get("gap") if isinstance(objective, dict) else None
    return float(gap) if isinstance(gap, int | float) and math.isfinite(gap) else None
