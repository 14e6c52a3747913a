"""From how a process ended to how its job ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from service.jobs.runner import Ended, How
from service.state.job_rows import last_incumbent
from service.state.records import Job, JobStatus, Outcome

__all__ = ["failed", "outcome_of"]

UNHEEDED = "the solver did not end in time when it was stopped; its last incumbent stands"
EARLIER = "it was cut short before this attempt had found better; what an earlier attempt had found stands"


def outcome_of(ended: Ended, *, job: Job, is_stopped: bool) -> Outcome:
    """Return the outcome of a job.

    Parameters
    ----------
    job
        The job as it was claimed: what an earlier attempt had found stands where this one was cut short
        before it had found better.
    is_stopped
        Whether a caller asked it to stop.
    """
    outcome = _own_outcome(ended, is_stopped)
    if outcome.status is JobStatus.FAILED or not _was_cut(outcome) or not _is_better(job, outcome):
        return outcome
    earlier = last_incumbent(job, note=EARLIER)
    return replace(outcome, result=earlier.result, placement_digest=earlier.placement_digest)


def _own_outcome(ended: Ended, is_stopped: bool) -> Outcome:
    """Return the outcome of this attempt alone."""
    if ended.how is How.RESULT:
        return _standing(ended, _status_of_result(ended, is_stopped))
    if ended.how is How.STOPPED:
        return _standing(ended, JobStatus.STOPPED, note=UNHEEDED)
    if ended.how is How.TIMED_OUT:
        message = "the job ran past the time that one may take here; what it had found by then stands"
        outcome = _standing(ended, JobStatus.TIMED_OUT)
        return replace(outcome, error={"code": "timed-out", "message": message})
    if ended.code == "no-placement":
        if is_stopped:
            return Outcome(status=JobStatus.STOPPED)
        return Outcome(status=JobStatus.TIMED_OUT, error={"code": ended.code, "message": ended.why})
    return failed(ended.code or "internal", ended.why or "the job's process was lost")


def _was_cut(outcome: Outcome) -> bool:
    return outcome.result is None or outcome.result.get("termination") == "stopped"


def _is_better(job: Job, outcome: Outcome) -> bool:
    """Whether what an earlier attempt had found is better than this one's, or all that there is."""
    if job.incumbent is None or job.incumbent_digest is None:
        return False
    if outcome.result is None or outcome.placement_digest is None:
        return True
    return bool(job.incumbent["objective"] < outcome.result["objective"]["value"])


def failed(code: str, message: str) -> Outcome:
    """Return the outcome of a job that failed."""
    return Outcome(status=JobStatus.FAILED, error={"code": code, "message": message})


def _status_of_result(ended: Ended, is_stopped: bool) -> JobStatus:
    result: dict[str, Any] = (ended.message or {}).get("result", {})
    was_cut = result.get("termination") == "stopped"
    return JobStatus.STOPPED if is_stopped and was_cut else JobStatus.SUCCEEDED


def _standing(ended: Ended, status: JobStatus, *, note: str | None = None) -> Outcome:
    """Return an outcome with what the process had told last."""
    if ended.message is None:
        return Outcome(status=status)
    result = dict(ended.message["result"])
    if note is not None:
        result["notes"] = [*result.get("notes", []), note]
    return Outcome(status=status, result=result, placement_digest=ended.message.get("digest"))
