"""Controllers that are killed at every point of a refresh: another one goes on, and nothing happens twice."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service.deployments.records import Cause, Phase
from service.state.counters import read_counters
from tests.service.deployments.desk import APART, AUTO, NAME, Desk

ROOT = Path(__file__).parents[3]


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """SQLite alone: every step is the same transaction on both."""
    return sqlite_url


def killed(desk: Desk, point: str) -> None:
    """Run a controller that kills itself at a point, and wait until it has."""
    environment = {**desk.settings.environment(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.service.deployments.killed_controller", point]
    done = subprocess.run(command, env=environment, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_controller_may_be_killed_at_any_point(drifted: Desk) -> None:
    """One after the other dies at the next point of the same refresh: it is one solve."""
    for point in ("take:before", "take:after", "save:before", "save:after"):
        killed(drifted, point)
    assert drifted.deployment.refresh.phase is Phase.STARTING
    for point in ("submit:before", "submit:after", "save:before", "save:after"):
        killed(drifted, point)
    assert drifted.deployment.refresh.phase is Phase.SOLVING
    assert len(drifted.refreshes()) == 1


def test_a_promotion_survives_its_controller(drifted: Desk) -> None:
    """Killed before it promotes, after it, and with the lease in its hands: it is promoted once."""
    drifted.step()
    drifted.finish(APART)
    for point in ("promote:before", "promote:after"):
        killed(drifted, point)
    drifted.post(2)
    killed(drifted, "release:before")
    drifted.post(1)
    drifted.until(lambda: drifted.deployment.refresh.watch is None)
    found = drifted.deployment
    assert (found.version, found.refresh.number, found.refresh.phase) == (2, 1, Phase.IDLE)
    assert len(drifted.refreshes()) == 1
    newest = drifted.store.versions(NAME)[0]
    assert newest.cause is Cause.AUTOMATIC
    assert newest.observed is not None
    assert newest.observed["complete"]
    with drifted.database.read() as connection:
        counted = read_counters(connection)
    assert counted["deployment_promotions_total", f"cause=automatic,deployment={NAME}"] == 1


def test_a_rollback_survives_its_controller(drifted: Desk) -> None:
    """Killed before it takes a version back, and after: it is taken back once."""
    drifted.refreshed(APART)
    drifted.put(policy={**AUTO, "drift_threshold": 1000})
    drifted.traffic.turn((1, 5))
    drifted.post(2)
    for point in ("promote:before", "promote:after"):
        killed(drifted, point)
    drifted.post(2)
    drifted.until(lambda: drifted.deployment.refresh.watch is None)
    assert [found.cause for found in drifted.store.versions(NAME)] == [
        Cause.ROLLBACK,
        Cause.AUTOMATIC,
        Cause.MANUAL,
    ]
