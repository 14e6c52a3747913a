"""What the controller does step by step: it refuses, waits, promotes and takes back by the rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from service.deployments.records import Cause, Phase
from service.deployments.refresh import cool_down, holds_back, refusal, restarted, solve_of
from service.state.audit import AuditLog
from tests.service.deployments.deployed import SIZED
from tests.service.deployments.desk import APART, AUTO, NAME, ROW, Desk, swapped


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """SQLite alone: what depends on the database is tested elsewhere."""
    return sqlite_url


def test_manual_deployments_are_measured_alone(drifted: Desk) -> None:
    """Drift is known, nothing starts."""
    drifted.put(policy={**AUTO, "mode": "manual"})
    drifted.step(3)
    drift = drifted.deployment.drift
    assert drift is not None
    assert drift["due"]
    assert drift["holds_back"] == "the policy is manual"
    assert drifted.refreshes() == []


@pytest.mark.parametrize("why", ["policy", "by hand"])
def test_what_is_not_taken_back(drifted: Desk, why: str) -> None:
    """A policy without rollback, and what a person has promoted."""
    if why == "policy":
        drifted.put(policy={**AUTO, "rollback": False, "drift_threshold": 1000})
        drifted.put(policy={**AUTO, "rollback": False})
        drifted.refreshed(APART)
    else:
        drifted.promote(APART)
    drifted.put(policy={**AUTO, "rollback": why == "by hand", "drift_threshold": 1000})
    drifted.traffic.turn((1, 5))
    drifted.post(2)
    drifted.step(2)
    newest = drifted.store.versions(NAME)[0]
    assert newest.version == 2
    assert newest.observed is not None
    assert newest.observed["gain"] < 0


def test_a_placement_that_gains_too_little_is_refused(drifted: Desk) -> None:
    """And what it could attain is expected from now on, so that the same traffic starts nothing again."""
    drifted.step()
    drifted.finish(swapped((2, 6)))
    drifted.step()
    assert drifted.last["outcome"] == "refused"
    assert "less than the 2.00%" in drifted.last["why"]
    found = drifted.deployment
    assert (found.version, found.refresh.phase) == (1, Phase.IDLE)
    assert found.refresh.attainable is not None
    drifted.post(4)
    drifted.step(2)
    drift = drifted.deployment.drift
    assert drift is not None
    assert (drift["reference_of"], drift["due"]) == ("attainable", False)
    assert len(drifted.refreshes()) == 1
    assert "deployment.refresh-refused" in [
        one.action for one in AuditLog(drifted.database).page(target=NAME)
    ]


def test_a_solve_that_was_cut_short_proves_nothing(drifted: Desk) -> None:
    """It found no better placement, but with more time it might have: the next refresh tries again."""
    drifted.step()
    drifted.finish(ROW, termination="stopped")
    drifted.step()
    assert drifted.last["why"] == "the solve found no better placement than the running one"
    assert drifted.deployment.refresh.attainable is None
    drifted.post(3)
    drifted.step()
    assert len(drifted.refreshes()) == 1
    drifted.post(1)
    drifted.step()
    assert len(drifted.refreshes()) == 2


def test_more_moves_than_allowed_are_refused(drifted: Desk) -> None:
    """The solve is told the budget, and its placement is counted all the same."""
    drifted.put(policy={**AUTO, "max_moves": 3})
    drifted.step()
    job = drifted.finish(APART)
    assert job.spec["options"]["max_moves"] == 3
    drifted.step()
    assert (drifted.last["outcome"], drifted.last["why"]) == ("refused", "4 moves, more than the 3 allowed")
    assert drifted.deployment.version == 1


@pytest.mark.parametrize(("steps", "outcome"), [(1e-6, "refused"), (1e12, "promoted")])
def test_a_transfer_must_pay_back(drifted: Desk, steps: float, outcome: str) -> None:
    """Bytes over links against seconds saved per step."""
    drifted.put(model=SIZED, policy={**AUTO, "max_pay_back_steps": steps})
    drifted.post(4)
    drifted.refreshed(APART)
    judged = drifted.last["judged"]
    assert drifted.last["outcome"] == outcome
    assert judged["bytes"] == 4 * 3 * 1024 * 2048 * 2
    assert judged["pay_back_steps"] == pytest.approx(judged["transfer_s"] / judged["saved_per_step_s"])
    if outcome == "refused":
        assert "pay back after" in drifted.last["why"]


def test_refreshes_cool_down(drifted: Desk) -> None:
    """After one ended nothing starts for the time that the policy gives, then the next one does."""
    drifted.put(policy={**AUTO, "cool_down_seconds": 3600})
    drifted.step()
    drifted.finish(None)
    drifted.step()
    assert drifted.last["outcome"] == "failed"
    assert "infeasible" not in drifted.last["why"]
    assert "no placement" in drifted.last["why"]
    drifted.post(4)
    drifted.step()
    drift = drifted.deployment.drift
    assert drift is not None
    assert drift["holds_back"].startswith("cooling down for 3")
    assert len(drifted.refreshes()) == 1
    drifted.put(policy=AUTO)
    drifted.post(1)
    drifted.step()
    assert len(drifted.refreshes()) == 2


def test_a_promotion_by_hand_ends_a_refresh(drifted: Desk) -> None:
    """What was solved from another placement is not promoted."""
    drifted.step()
    drifted.promote(swapped((3, 8)))
    drifted.finish(APART)
    drifted.step()
    assert drifted.last["outcome"] == "superseded"
    assert [found.cause for found in drifted.store.versions(NAME)] == [Cause.MANUAL, Cause.MANUAL]


def test_a_policy_that_turns_manual_ends_a_refresh(drifted: Desk) -> None:
    """Nobody wants it promoted any more."""
    drifted.step()
    drifted.put(policy={**AUTO, "mode": "manual"})
    drifted.finish(APART)
    drifted.step()
    assert drifted.last["outcome"] == "superseded"
    assert drifted.deployment.version == 1


def test_windows_that_say_nothing_are_told(desk: Desk) -> None:
    """A layer that routed no token cannot be balanced; the next windows can."""
    desk.put(policy=AUTO)
    desk.promote(ROW)
    load_LE = desk.traffic.load_LE()
    load_LE[1] = 0
    desk.post_load(load_LE)
    desk.step()
    assert desk.deployment.drift is not None
    assert "layer 1 routed no token" in desk.deployment.drift["problem"]
    desk.post(1)
    desk.step()
    assert desk.deployment.drift["balance"] > 1


# -- the rules alone -----------------------------------------------------------------------------------------

DUE: dict[str, Any] = {"drift": {"due": True}, "fresh": 100}


def test_the_same_plan_is_the_same_solve(desk: Desk) -> None:
    """One idempotency key and one hash for a plan; other ones for the next plan."""
    desk.put(
        policy={**AUTO, "solve": {"threads": 8}}, options={"semantics": "stay-put", "replica_split": "hash"}
    )
    found = desk.deployment
    plan = {"trace_digest": "sha256:" + "0" * 64, "start_digest": "sha256:" + "1" * 64, "number": 1}
    first = replace(found, refresh=replace(found.refresh, plan=plan))
    again = replace(found, refresh=replace(found.refresh, plan={**plan, "number": 2}))
    one, same, other = (solve_of(it, max_threads=2) for it in (first, first, again))
    assert one == same
    assert one.idempotency_key != other.idempotency_key
    assert one.request_hash != other.request_hash
    assert one.cpus == 2
    options = one.spec["options"]
    assert (options["semantics"], options["replica_split"], options["objective"]) == (
        "dispatch",
        "even",
        "balance",
    )


def test_a_clock_that_jumps_does_no_harm(desk: Desk) -> None:
    """Set back, a cool-down begins anew; set forward, new windows must have come all the same."""
    desk.put(policy={**AUTO, "cool_down_seconds": 100})
    found = desk.deployment
    cooling = replace(found, refresh=replace(found.refresh, cool_down=cool_down(1000.0, 7)))
    waiting = holds_back(cooling, DUE, 1040.0)
    assert waiting is not None
    assert waiting.seconds == pytest.approx(60)
    assert holds_back(cooling, DUE, 1101.0) is None
    set_back = holds_back(cooling, DUE, 10.0)
    assert set_back is not None
    assert set_back.seconds == 100
    assert restarted(cooling.refresh, 10.0) == {"began": 10.0, "after": 7}
    assert restarted(cooling.refresh, 1001.0) is None
    set_forward = holds_back(cooling, {**DUE, "fresh": 3}, 1e9)
    assert set_forward is not None
    assert set_forward.why == "3 of 4 windows since the last change"


def test_a_watched_version_is_left_alone(desk: Desk) -> None:
    """Nothing starts before it is known what the last promotion was worth."""
    desk.put(policy=AUTO)
    found = desk.deployment
    watched = replace(found, refresh=replace(found.refresh, watch={"version": 3}))
    waiting = holds_back(watched, DUE, 0.0)
    assert waiting is not None
    assert waiting.why == "version 3 is still being observed"
    assert holds_back(found, DUE, 0.0) is None
    assert holds_back(found, {**DUE, "drift": None}, 0.0) is not None


JUDGED: dict[str, Any] = {
    "gain": 0.1,
    "moves": 5,
    "judge_windows": 4,
    "pay_back_steps": 50.0,
    "pay_back_s": 2.0,
}
LIMITS: dict[str, Any] = {
    "max_moves": None,
    "min_gain": 0.02,
    "max_pay_back_steps": None,
    "max_pay_back_seconds": None,
}


@pytest.mark.parametrize(
    ("limits", "judged", "told"),
    [
        ({}, {}, None),
        ({"max_moves": 5}, {}, None),
        ({"max_moves": 4}, {}, "5 moves, more than the 4 allowed"),
        ({}, {"moves": 0}, "no better placement"),
        ({"min_gain": 0.1}, {}, None),
        ({"min_gain": 0.11}, {}, "less than the 11.00%"),
        ({"min_gain": 0.0}, {"gain": 0.0}, "less than"),
        ({"max_pay_back_steps": 50}, {}, None),
        ({"max_pay_back_steps": 49}, {}, "pay back after 50 steps"),
        ({"max_pay_back_seconds": 1}, {}, "pay back after 2 s"),
        ({"max_pay_back_steps": 49}, {"pay_back_steps": None}, "save no time"),
    ],
)
def test_what_is_worth_a_change(limits: dict[str, Any], judged: dict[str, Any], told: str | None) -> None:
    """Every limit of the policy, at its edge and beyond."""
    why = refusal({**LIMITS, **limits}, {**JUDGED, **judged})
    assert why is None if told is None else told in (why or "")
