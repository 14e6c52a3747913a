"""What goes wrong over HTTP, each with a stable code: problem details of RFC 9457."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from placement.errors import ServiceError

__all__ = [
    "ConflictError",
    "ForbiddenError",
    "InvalidError",
    "NotFoundError",
    "PreconditionError",
    "ProblemError",
    "QueueFullError",
    "SlowBodyError",
    "TooLargeError",
    "TooManyRequestsError",
    "UnauthorizedError",
    "UnavailableError",
    "UnsupportedMediaError",
]


class ProblemError(ServiceError):
    """A request that cannot be served.

    Parameters
    ----------
    detail
        What is wrong, where, and how to mend it: one line.
    extensions
        Further members of the problem document (``retry_after``, ``errors``).
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code = "internal"

    def __init__(self, detail: str, **extensions: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extensions = extensions

    def document(self, *, instance: str | None = None) -> dict[str, Any]:
        """Return the problem document."""
        found = {
            "type": f"urn:moe-placement:problem:{self.code}",
            "title": self.status.phrase,
            "status": int(self.status),
            "code": self.code,
            "detail": " ".join(self.detail.split()),
            **self.extensions,
        }
        return found if instance is None else {**found, "instance": instance}


class InvalidError(ProblemError):
    """The request is malformed or asks for what makes no sense."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "invalid"


class UnauthorizedError(ProblemError):
    """No token, or one that is unknown, expired or revoked."""

    status = HTTPStatus.UNAUTHORIZED
    code = "unauthorized"


class ForbiddenError(ProblemError):
    """The token lacks the scope, or the request came from where it must not."""

    status = HTTPStatus.FORBIDDEN
    code = "forbidden"


class NotFoundError(ProblemError):
    """There is no such thing, or it has no placement yet."""

    status = HTTPStatus.NOT_FOUND
    code = "not-found"


class ConflictError(ProblemError):
    """The request does not fit to the present state."""

    status = HTTPStatus.CONFLICT
    code = "conflict"


class PreconditionError(ProblemError):
    """If-Match named another state: somebody else was faster."""

    status = HTTPStatus.PRECONDITION_FAILED
    code = "precondition-failed"


class SlowBodyError(ProblemError):
    """The rest of a body did not come in time."""

    status = HTTPStatus.REQUEST_TIMEOUT
    code = "request-timeout"


class TooLargeError(ProblemError):
    """More bytes than allowed, as sent or once decompressed."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "too-large"


class UnsupportedMediaError(ProblemError):
    """The body is of no type that is taken here."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    code = "unsupported-media-type"


class TooManyRequestsError(ProblemError):
    """The token's rate is spent."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "too-many-requests"


class QueueFullError(TooManyRequestsError):
    """The queue holds as many jobs as it may."""

    code = "queue-full"


class UnavailableError(ProblemError):
    """The database or the artifact store cannot be reached, or the disk is full."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "unavailable"
