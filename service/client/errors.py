"""What goes wrong on the caller's side, beside the problems that the service answers with."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from placement.errors import InfeasibleError, InputError, NoPlacementFoundError, ServiceError
from service import errors as answered
from service.errors import ProblemError

__all__ = [
    "AnswerError",
    "InfeasibleSolveError",
    "InvalidSolveError",
    "JobFailedError",
    "NoPlacementYetError",
    "UnreachableError",
    "job_error",
    "problem_error",
]

_KINDS: dict[str, type[ProblemError]] = {
    kind.code: kind
    for name in answered.__all__
    if name != "ProblemError" and issubclass(kind := getattr(answered, name), ProblemError)
}
_BY_STATUS = {kind.status: kind for kind in reversed(_KINDS.values())}

CALLERS_FAULT = frozenset({400, 404, 413, 415, 422})
"""Answers that say that the input was wrong, as far as the exit code goes."""


class UnreachableError(ServiceError):
    """The service could not be reached, or did not answer in time.

    Parameters
    ----------
    sent
        Whether the request may have been received all the same.
    silent
        Whether it was received, and then nothing came.
    """

    def __init__(self, message: str, *, sent: bool, silent: bool = False) -> None:
        super().__init__(message)
        self.sent = sent
        self.silent = silent


class AnswerError(ServiceError):
    """What answered is not this service, or not one of this version."""


class JobFailedError(ServiceError):
    """A solve or an evaluation ended without a result.

    Parameters
    ----------
    code
        Stable code of the service: ``invalid``, ``infeasible``, ``no-placement``, ``out-of-memory``, ...
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class InvalidSolveError(JobFailedError, InputError):
    """Trace, topology, model and options do not fit together."""

    exit_code = 2


class InfeasibleSolveError(JobFailedError, InfeasibleError):
    """No placement satisfies the constraints."""

    exit_code = 3


class NoPlacementYetError(JobFailedError, NoPlacementFoundError):
    """It ended before any placement was found."""

    exit_code = 4


_JOB_ERRORS: dict[str, type[JobFailedError]] = {
    "invalid": InvalidSolveError,
    "infeasible": InfeasibleSolveError,
    "no-placement": NoPlacementYetError,
    "timed-out": NoPlacementYetError,
}


_REASONS = {code: kind.exit_code for code, kind in _JOB_ERRORS.items()}


def job_error(job_id: str, error: Mapping[str, Any] | None) -> JobFailedError:
    """Return the error that the failure of a job means."""
    code = str((error or {}).get("code", "no-placement"))
    message = str((error or {}).get("message", "it ended before any placement was found"))
    return _JOB_ERRORS.get(code, JobFailedError)(f"{job_id}: {message}", code=code)


def problem_error(status: int, document: object, *, where: str) -> ProblemError:
    """Return the error that an answer means, as the class that the service itself raised.

    Parameters
    ----------
    document
        The problem document; anything else where a proxy answered in the service's place.
    where
        What was asked, for the message of an answer that says nothing.
    """
    told = document if isinstance(document, Mapping) else {}
    code = told.get("code")
    kind = _KINDS.get(code) if isinstance(code, str) else None
    kind = kind or _BY_STATUS.get(_known(status), ProblemError)
    detail = told.get("detail") or told.get("title") or f"{where} was answered with {status}"
    extensions = {key: value for key, value in told.items() if key.isidentifier() and key not in _OWN}
    error = kind(str(detail), **extensions)
    error.status = _known(status)
    if isinstance(code, str):
        error.code = code
    if status in CALLERS_FAULT:
        error.exit_code = _REASONS.get(str(told.get("reason")), 2)
    return error


_OWN = frozenset({"type", "title", "status", "code", "detail", "instance", "self"})


def _known(status: int) -> HTTPStatus:
    try:
        return HTTPStatus(status)
    except ValueError:
        return HTTPStatus.INTERNAL_SERVER_ERROR
