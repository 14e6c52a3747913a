"""The curve of a solve: best objective and lower bound over time, from its recorded events."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from placement.report.figures.solve import incumbents_figure
from placement.report.numbers import Scale, number, percent, plural
from placement.solution import relative_gap
from service.state.records import Event, Job, JobStatus
from service.views.figures import figure_entry

__all__ = ["solve_figure"]

TITLE = "Best objective and lower bound"
MOST_POINTS = 1000
"""Incumbents that are drawn; of more the first, the last, and evenly spaced ones between."""

_LABELS = {"step-time": "predicted step time", "balance": "balance", "traffic": "traffic"}


def solve_figure(job: Job, events: Sequence[Event]) -> dict[str, Any]:
    """Return title, caption and figure of a solve; before the first placement the caption says how it stands.

    Parameters
    ----------
    events
        All events of the job, in order. Of an attempt that was lost nothing is drawn.
    """
    points = _points(events)
    if not points:
        return figure_entry(TITLE, _waiting(job), None)
    points = _with_result(points, job)
    drawn = _thinned(points)
    last = points[-1]
    unit = next((str(point["unit"]) for point in reversed(points) if point.get("unit")), "")
    scale = Scale.of(max(point["objective"] for point in drawn), unit)
    name = str(last.get("name") or (job.spec.get("options") or {}).get("objective") or "objective")
    figure = incumbents_figure(
        elapsed_s=[point["elapsed_s"] for point in drawn],
        objective=[point["objective"] for point in drawn],
        lower_bound=[point["lower_bound"] for point in drawn],
        solver=[str(point.get("solver") or "solver") for point in drawn],
        label=_LABELS.get(name, name),
        scale=scale,
    )
    return figure_entry(TITLE, _caption(points, scale), figure)


def _points(events: Sequence[Event]) -> list[Mapping[str, Any]]:
    """Return the incumbents of the last attempt that can be drawn."""
    points: list[Mapping[str, Any]] = []
    for event in events:
        if event.kind == "progress" and event.data.get("phase") == "started":
            points = []
        elif event.kind == "incumbent" and _is_complete(event.data):
            points.append(event.data)
    return points


def _is_complete(data: Mapping[str, Any]) -> bool:
    values = [data.get(name) for name in ("elapsed_s", "objective", "lower_bound")]
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _with_result(points: list[Mapping[str, Any]], job: Job) -> list[Mapping[str, Any]]:
    """Add the end: the proof may go on after the last improvement."""
    result = job.result or {}
    found = result.get("objective")
    if not isinstance(found, Mapping):
        return points
    last = points[-1]
    end = {
        **last,
        "objective": found.get("value"),
        "lower_bound": found.get("lower_bound"),
        "solver": result.get("solver") or last.get("solver"),
        "elapsed_s": result.get("elapsed_s"),
    }
    return [*points, end] if _is_complete(end) and end["elapsed_s"] > last["elapsed_s"] else points


def _thinned(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if len(points) <= MOST_POINTS:
        return list(points)
    return [points[round(i * (len(points) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


def _caption(points: Sequence[Mapping[str, Any]], scale: Scale) -> str:
    last = points[-1]
    gap = relative_gap(last["objective"], last["lower_bound"])
    unit = f" {scale.unit}" if scale.unit else ""
    return (
        f"After {number(last['elapsed_s'], digits=3)} s the best placement is at "
        f"{scale.text(last['objective'])}{unit}, and no other can be more than {percent(gap)} "
        f"better ({plural(len(points), 'point')}). Lower is better; the best possible lies between the lines."
    )


def _waiting(job: Job) -> str:
    if job.status is JobStatus.QUEUED:
        return "The solve is queued; its curve begins with the first placement that it finds."
    if job.is_final:
        return "The solve ended before it found a placement: there is nothing to draw."
    return "The solve is reading its trace; its curve begins with the first placement that it finds."
