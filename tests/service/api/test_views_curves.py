"""What the curves of solves and deployments are drawn from, without a server."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from placement.formats.files import placement_from_document
from placement.plan import Placement
from service.deployments.records import Cause, Deployment, RefreshState, StoredPart, Version
from service.deployments.resolve import facts_of
from service.deployments.spec import DeploymentSpec
from service.state.records import Event, Job, JobKind, JobStatus
from service.views import health, solves
from service.views.figures import json_of
from service.views.health import History, health_entry
from service.views.solves import solve_figure
from tests.service.deployments.deployed import EXPERTS, LAYERS, SPEC, placement_of

JOB = Job(
    number=1, id="s-1", kind=JobKind.SOLVE, status=JobStatus.RUNNING, priority=0, caller="local",
    deployment=None, spec={"options": {"objective": "step-time"}}, cpus=1, trace_digest=None,
    start_digest=None, request_hash="", created_at=0.0, started_at=1.0, ended_at=None, attempt=1, lost=0,
    worker=None, stop_requested=False, event_seq=0, incumbent=None, incumbent_digest=None, result=None,
    placement_digest=None, error=None,
)  # fmt: skip
STARTED = {"phase": "started"}


def events(*told: dict[str, Any]) -> list[Event]:
    """Return events: incumbents, and progress where a phase is told."""
    return [
        Event(
            job_id="s-1", seq=i, kind="progress" if "phase" in data else "incumbent", data=data, at=float(i)
        )
        for i, data in enumerate(told, start=1)
    ]


def incumbent(elapsed_s: float, objective: float, **more: Any) -> dict[str, Any]:
    """Return an incumbent as it is told."""
    given = {"lower_bound": 0.001, "solver": "search", "name": "step-time", "unit": "s"}
    return {**given, "elapsed_s": elapsed_s, "objective": objective, **more}


def as_read(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry as a page reads it."""
    found: dict[str, Any] = json.loads(json_of(entry))
    return found


def objectives(entry: dict[str, Any]) -> list[float]:
    """Return the best objectives of a drawn curve."""
    found: list[float] = as_read(entry)["figure"]["data"][0]["y"]
    return found


def test_a_lost_attempt_is_not_drawn() -> None:
    """Its seconds are of another clock."""
    told = events(STARTED, incumbent(9.0, 0.005), STARTED, incumbent(1.0, 0.004))
    found = solve_figure(JOB, told)
    assert objectives(found) == [4.0]
    assert as_read(found)["figure"]["layout"]["yaxis"]["title"]["text"] == "predicted step time (ms)"
    assert "75.0" in found["caption"]


def test_what_is_no_number_is_left_out() -> None:
    """An incumbent without an objective or a bound has no place in the figure."""
    told = events(
        incumbent(1.0, 0.004), incumbent(2.0, float("inf")), incumbent(3.0, 0.003, lower_bound=None)
    )
    assert objectives(solve_figure(JOB, told)) == [4.0]
    assert solve_figure(JOB, events(incumbent(1.0, float("nan"))))["figure"] is None


def test_many_incumbents_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """First and last stay."""
    monkeypatch.setattr(solves, "MOST_POINTS", 3)
    told = events(*(incumbent(float(i), 0.02 - i / 1000) for i in range(1, 11)))
    assert objectives(solve_figure(JOB, told)) == pytest.approx([19.0, 15.0, 10.0], abs=1.01)


def test_names_from_events_do_nothing() -> None:
    """A solver's name is shown as it is, whatever plotly would make of it."""
    found = as_read(solve_figure(JOB, events(incumbent(1.0, 0.004, solver="<a href='//x'>%{y}</a>"))))
    names = [trace["name"] for trace in found["figure"]["data"]]
    assert all("<" not in name for name in names)


def part(window: int, *, version: int | None = None) -> StoredPart:
    """Return a window of even loads that came at the second of its number."""
    load = np.full((LAYERS, EXPERTS), 10, dtype="<i8")
    return StoredPart(
        window=window, rank=0, version=version, tokens=1.0, load=zlib.compress(load.tobytes()), number=window
    )


def version_of(number: int, promoted_at: float) -> Version:
    """Return a promoted version."""
    return Version(
        deployment="d", version=number, placement_digest="sha256:x", job_id=None, cause=Cause.MANUAL, by="me",
        why="test", of_version=None, predicted={"balance": 1.25}, observed=None, promoted_at=promoted_at,
    )  # fmt: skip


def history(*parts: StoredPart) -> History:
    """Return a deployment with version 2 promoted at second 3, version 1 at second 1."""
    spec = DeploymentSpec.model_validate(SPEC).model_dump(mode="json")
    deployment = Deployment(
        name="d", spec={**spec, "facts": facts_of(spec)}, revision=3, version=2, drift=None,
        refresh=RefreshState(), created_at=0.0, updated_at=0.0,
    )  # fmt: skip
    return History(
        deployment=deployment,
        versions=[version_of(2, 3.0), version_of(1, 1.0)],
        parts=parts,
        arrived_at={one.number: float(one.number) for one in parts},
    )


def placement(digest: str) -> Placement:
    """Return the placement with experts in order."""
    return placement_from_document(json.loads(placement_of()), source=digest)


def versions_drawn(found: dict[str, Any]) -> list[list[int]]:
    """Return window and version of every point."""
    points: list[list[int]] = as_read(found)["figure"]["data"][0]["customdata"]
    return points


def test_windows_belong_to_the_version_that_ran() -> None:
    """As the rank says, else by the time of arrival; before the first promotion there is nothing to draw."""
    found = health_entry(history(part(0), part(1), part(2), part(4), part(5, version=1)), placement)
    assert versions_drawn(found) == [[1, 1], [2, 1], [4, 2], [5, 1]]


def test_an_unknown_version_is_not_believed() -> None:
    """A rank may say anything."""
    assert versions_drawn(health_entry(history(part(4, version=77)), placement)) == [[4, 2]]


def test_the_caption_says_how_it_does_against_its_promise() -> None:
    """Mean over the current version's windows, the prediction, and the drift of this version alone."""
    given = history(part(4), part(5))
    assert health_entry(given, placement)["caption"] == (
        "Version 2 runs at a balance of 1.000, mean of 2 windows; 1.250 was predicted. "
        "1 would be perfectly even."
    )
    drift = {"version": 2, "reference": 1.5, "windows": 2, "excess": -1 / 3}
    drifted = replace(given, deployment=replace(given.deployment, drift=drift))
    assert "33.3\N{NO-BREAK SPACE}% below what can be expected" in health_entry(drifted, placement)["caption"]
    stale = replace(given, deployment=replace(given.deployment, drift={**drift, "version": 1}))
    assert "Drift" not in health_entry(stale, placement)["caption"]


def test_only_the_latest_windows_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a deployment keeps."""
    monkeypatch.setattr(health, "MOST_WINDOWS", 2)
    assert versions_drawn(health_entry(history(part(3), part(4), part(5)), placement)) == [[4, 2], [5, 2]]
