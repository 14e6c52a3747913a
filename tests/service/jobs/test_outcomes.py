"""How a job ends: what was found stands, whichever attempt found it."""

from __future__ import annotations

from typing import Any

import pytest

from service.jobs.outcomes import outcome_of
from service.jobs.runner import Ended, How
from service.state.records import Job, JobKind, JobStatus

EARLIER, OWN = "sha256:" + "a" * 64, "sha256:" + "b" * 64


def job(*, objective: float | None) -> Job:
    """Return a job in its second attempt, with what the first had found."""
    incumbent = None if objective is None else {"objective": objective, "name": "balance", "solver": "search"}
    empty: dict[str, Any] = dict.fromkeys(Job.__dataclass_fields__)
    found = {"incumbent": incumbent, "incumbent_digest": None if incumbent is None else EARLIER}
    return Job(**{**empty, "kind": JobKind.SOLVE, "status": JobStatus.RUNNING, **found})


def result(objective: float, termination: str) -> dict[str, Any]:
    """Return the message of a process that had found something."""
    return {"digest": OWN, "result": {"objective": {"value": objective}, "termination": termination}}


@pytest.mark.parametrize("ended", [Ended(how=How.STOPPED), Ended(how=How.LOST, code="no-placement")])
def test_stopped_before_it_found_anything(ended: Ended) -> None:
    """The second attempt was still reading: the incumbent of the first stands."""
    outcome = outcome_of(ended, job=job(objective=1.5), is_stopped=True)
    assert (outcome.status, outcome.placement_digest) == (JobStatus.STOPPED, EARLIER)
    assert outcome.result is not None
    assert outcome.result["objective"]["value"] == 1.5
    assert outcome.result["placement_id"] == EARLIER


def test_stopped_without_any_incumbent() -> None:
    """There is nothing to stand."""
    outcome = outcome_of(Ended(how=How.STOPPED), job=job(objective=None), is_stopped=True)
    assert (outcome.status, outcome.placement_digest, outcome.result) == (JobStatus.STOPPED, None, None)


@pytest.mark.parametrize(("own", "kept"), [(2.0, EARLIER), (1.0, OWN)])
def test_the_better_of_two_attempts_stands(own: float, kept: str) -> None:
    """An attempt that was cut short may have come less far than the one before."""
    ended = Ended(how=How.RESULT, message=result(own, "stopped"))
    outcome = outcome_of(ended, job=job(objective=1.5), is_stopped=True)
    assert (outcome.status, outcome.placement_digest) == (JobStatus.STOPPED, kept)


def test_past_the_limit() -> None:
    """The same where the service's limit cuts it short; the error says so."""
    outcome = outcome_of(Ended(how=How.TIMED_OUT), job=job(objective=1.5), is_stopped=False)
    assert (outcome.status, outcome.placement_digest) == (JobStatus.TIMED_OUT, EARLIER)
    assert outcome.error is not None
    assert outcome.error["code"] == "timed-out"


def test_a_solve_that_came_to_its_end_speaks_for_itself() -> None:
    """What converged is not second-guessed, and a failure has no placement."""
    ended = Ended(how=How.RESULT, message=result(2.0, "converged"))
    assert outcome_of(ended, job=job(objective=1.5), is_stopped=False).placement_digest == OWN
    ended = Ended(how=How.OUT_OF_MEMORY, code="out-of-memory", why="too much")
    outcome = outcome_of(ended, job=job(objective=1.5), is_stopped=False)
    assert (outcome.status, outcome.placement_digest) == (JobStatus.FAILED, None)
