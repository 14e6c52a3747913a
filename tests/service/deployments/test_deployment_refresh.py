"""Automatic refreshes on both databases: promoted, observed, taken back, by one controller at a time."""

from __future__ import annotations

import pytest

from service.deployments.records import Cause, Phase
from service.state.audit import AuditLog
from service.state.counters import read_counters
from tests.service.deployments.desk import APART, AUTO, NAME, Desk


def test_a_refresh_is_promoted_and_observed(drifted: Desk) -> None:
    """Solved on every other window, judged on the rest, then observed against what ran before."""
    drifted.step()
    found = drifted.deployment
    assert (found.refresh.phase, found.refresh.number) == (Phase.SOLVING, 1)
    assert found.drift is not None
    assert found.drift["due"]
    assert found.drift["excess"] > 0.3
    job = drifted.finish(APART)
    assert job.deployment == NAME
    assert job.spec["start_placement_id"] == drifted.store.versions(NAME)[0].placement_digest
    drifted.step()
    made = drifted.store.versions(NAME)[0]
    assert (made.version, made.cause, made.by, made.job_id) == (2, Cause.AUTOMATIC, "controller", job.id)
    assert made.predicted is not None
    assert made.predicted["gain"] > 0.3
    assert (made.predicted["fit_windows"], made.predicted["judge_windows"]) == (2, 2)
    assert made.predicted["moves"] == 4
    assert "4 moves gain" in made.why
    drifted.post(1)
    drifted.step()
    observed = drifted.store.versions(NAME)[0].observed
    assert observed is not None
    assert (observed["windows"], observed["complete"]) == (1, False)
    drifted.post(1)
    drifted.step()
    observed = drifted.store.versions(NAME)[0].observed
    assert observed is not None
    assert observed["complete"]
    assert observed["gain"] == pytest.approx(made.predicted["gain"], abs=0.05)
    assert observed["balance"] < observed["previous_balance"]
    assert drifted.deployment.refresh.watch is None
    drifted.post(4)
    drifted.step(2)
    assert drifted.deployment.version == 2
    assert len(drifted.refreshes()) == 1
    with drifted.database.read() as connection:
        counted = read_counters(connection)
    assert counted["deployment_refreshes_total", f"deployment={NAME},outcome=promoted"] == 1
    assert counted["deployment_promotions_total", f"cause=automatic,deployment={NAME}"] == 1
    assert counted["deployment_window_parts_total", f"deployment={NAME}"] == 10


def test_a_bad_promotion_is_taken_back(drifted: Desk) -> None:
    """Traffic turns against the new placement: it is worse than the one before on its first windows."""
    drifted.refreshed(APART)
    assert drifted.deployment.version == 2
    drifted.traffic.turn((0, 4))  # apart before, and together since
    drifted.put(policy={**AUTO, "drift_threshold": 1000})
    drifted.traffic.turn((1, 5))
    drifted.post(2)
    drifted.step()
    back, bad = drifted.store.versions(NAME)[:2]
    assert (back.cause, back.of_version, back.by) == (Cause.ROLLBACK, 1, "controller")
    assert back.placement_digest == drifted.store.versions(NAME)[2].placement_digest
    assert "version 2 was promoted automatically and is worse than version 1" in back.why
    assert bad.observed is not None
    assert bad.observed["gain"] < -0.1
    assert drifted.last["outcome"] == "rolled-back"
    entry = AuditLog(drifted.database).page(target=NAME)[0]
    assert (entry.who, entry.action) == ("controller", "deployment.rollback")
    drifted.post(4)
    drifted.step(3)
    assert drifted.deployment.version == 3
    with drifted.database.read() as connection:
        counted = read_counters(connection)
    assert counted["deployment_refreshes_total", f"deployment={NAME},outcome=rolled-back"] == 1


def test_only_the_owner_of_a_lease_works(drifted: Desk) -> None:
    """A second controller waits until the first one's count has stood still for long enough."""
    other = Desk(drifted.database, drifted.data_dir)
    try:
        state = drifted.deployment.refresh
        assert drifted.store.take(NAME, "dead", seen=(state.owner, state.beat)) is not None
        drifted.step(3)
        assert drifted.deployment.drift is None
        drifted.until(lambda: drifted.deployment.drift is not None)
        other.step()
        drifted.step()
        assert len(drifted.refreshes()) == 1
        assert drifted.deployment.drift is not None
    finally:
        other.close()
