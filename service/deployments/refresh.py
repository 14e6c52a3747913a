"""The rules of a refresh: what it solves, when it may start, and whether its placement is worth a change.

No clock, no database: what the controller knows goes in, what it is to do comes out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.deployments.records import Deployment, RefreshState
from service.schemas import SolveOptions, SolveRequest
from service.state.records import JobKind, NewJob

__all__ = ["CONTROLLER", "Wait", "cool_down", "holds_back", "refusal", "restarted", "solve_of"]

CONTROLLER = "controller"
"""Caller of the solves, and who promotes."""

_SHAPE = frozenset({"layers", "experts", "top_k"})
# Load windows know no tokens, so that what goes by tokens cannot be asked of them.
_SEMANTICS = {"stay-put": "dispatch"}
_SPLITS = {"nearest": "even", "hash": "even"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Why nothing starts yet, and after how many seconds to look again; None for new windows alone."""

    why: str
    seconds: float | None = None


def solve_of(deployment: Deployment, *, max_threads: int) -> NewJob:
    """Return the solve of a refresh: always the same job for the same plan, so that it is queued once.

    The problem is that of balance, with the deployment's slots, starting from the placement that ran when the
    plan was made.
    """
    plan, policy = deployment.refresh.plan or {}, deployment.spec["policy"]
    request = _request(deployment.spec, plan, max_threads)
    spec = request.model_dump(mode="json", exclude={"validate_only", "priority"})
    text = json.dumps({"spec": spec, "refresh": plan["number"]}, sort_keys=True)
    return NewJob(
        kind=JobKind.SOLVE,
        caller=CONTROLLER,
        spec=spec,
        request_hash=hashlib.sha256(text.encode()).hexdigest(),
        trace_digest=plan["trace_digest"],
        start_digest=plan["start_digest"],
        cpus=min(policy["solve"]["threads"], max_threads),
        # A deployment that was removed and made again counts its refreshes from 1 again.
        idempotency_key=f"{deployment.name}/{deployment.created_at!r}/{plan['number']}",
        deployment=deployment.name,
    )


def _request(spec: Mapping[str, Any], plan: Mapping[str, Any], max_threads: int) -> SolveRequest:
    options, policy = spec["options"], spec["policy"]
    sized = isinstance(spec["model"], str) or not set(spec["model"]) <= _SHAPE
    return SolveRequest(
        trace_id=plan["trace_digest"],
        topology=spec["topology"],
        model=spec["model"] if sized else None,
        start_placement_id=plan["start_digest"],
        options=SolveOptions(
            semantics=_SEMANTICS.get(options["semantics"], options["semantics"]),
            objective="balance",
            replica_split=_SPLITS.get(options["replica_split"], options["replica_split"]),
            calibration=options["calibration"],
            source_format="sglang-counts",
            spare_slots=options["spare_slots"],
            fill_memory=options["fill_memory"],
            solver=policy["solve"]["solver"],
            time_limit=policy["solve"]["time_limit"],
            threads=min(policy["solve"]["threads"], max_threads),
            seed=policy["solve"]["seed"],
            max_moves=policy["max_moves"],
        ),
    )


def cool_down(now: float, newest: int) -> dict[str, Any]:
    """Return the beginning of a cool-down: the time, and the last part of a window by then."""
    return {"began": now, "after": newest}


def holds_back(deployment: Deployment, evaluation: Mapping[str, Any], now: float) -> Wait | None:
    """Say what keeps a refresh from starting; None if it may start now.

    The cool-down is counted twice, so that a clock that jumps does no harm: in seconds since its beginning
    (where the clock was set back to before it, the controller begins it anew, so that it lasts at most once
    as long again), and in windows since its beginning (where the clock was set forward, `min_windows` new
    complete windows must have come all the same).
    """
    policy, state = deployment.spec["policy"], deployment.refresh
    drift = evaluation["drift"]
    if policy["mode"] != "auto":
        return Wait(why="the policy is manual")
    if drift is None or not drift["due"]:
        return Wait(why="no drift beyond the threshold")
    if state.watch is not None:
        return Wait(why=f"version {state.watch['version']} is still being observed")
    if evaluation["fresh"] < policy["min_windows"]:
        return Wait(why=f"{evaluation['fresh']} of {policy['min_windows']} windows since the last change")
    if state.cool_down is not None:
        left_s = policy["cool_down_seconds"] - max(0.0, now - state.cool_down["began"])
        if left_s > 0:
            return Wait(why=f"cooling down for {left_s:.0f} s more", seconds=left_s)
    return None


def refusal(policy: Mapping[str, Any], judged: Mapping[str, Any]) -> str | None:
    """Say why a new placement is not worth a change; None if it is."""
    gain, moves = judged["gain"], judged["moves"]
    told = f"{moves} moves gain {gain:.2%} in balance on {judged['judge_windows']} windows not fitted"
    if moves == 0:
        return "the solve found no better placement than the running one"
    if policy["max_moves"] is not None and moves > policy["max_moves"]:
        return f"{moves} moves, more than the {policy['max_moves']} allowed"
    if gain < policy["min_gain"] or gain <= 0:
        return f"{told}, less than the {policy['min_gain']:.2%} that are worth a change"
    for limit, key, unit in (
        ("max_pay_back_steps", "pay_back_steps", "steps"),
        ("max_pay_back_seconds", "pay_back_s", "s"),
    ):
        most, found = policy[limit], judged[key]
        if most is None:
            continue
        if found is None or not math.isfinite(found):
            return f"{told}, but save no time that could pay for the transfer"
        if found > most:
            return f"{told}, but pay back after {found:,.0f} {unit}, not within {most:,.0f} {unit}"
    return None


def restarted(state: RefreshState, now: float) -> dict[str, Any] | None:
    """Return a cool-down that begins now, where the clock says that its beginning is yet to come."""
    if state.cool_down is not None and now < state.cool_down["began"]:
        return {**state.cool_down, "began": now}
    return None
