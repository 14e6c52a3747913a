"""Every failure as a problem document (RFC 9457), whoever raised it; what is inside stays inside."""

from __future__ import annotations

import errno
import math
from http import HTTPStatus
from typing import Any

import orjson
import sqlalchemy as sa
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match

from placement.errors import InfeasibleError, InputError, ServiceError
from service.api.logs import REQUEST_ID
from service.errors import (
    InvalidError,
    NotFoundError,
    ProblemError,
    TooManyRequestsError,
    UnauthorizedError,
    UnavailableError,
)

__all__ = ["CLIENT_GONE", "Problem", "ProblemResponse", "install_problems"]

CLIENT_GONE = 499
"""Status in the log of a request whose caller went away; nobody receives it."""
RETRY_AFTER_S = 5
MOST_ERRORS = 20
MOST_MESSAGE = 500
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_CODES = {
    400: "invalid",
    401: "unauthorized",
    403: "forbidden",
    404: "not-found",
    405: "method-not-allowed",
    408: "request-timeout",
    409: "conflict",
    412: "precondition-failed",
    413: "too-large",
    415: "unsupported-media-type",
    422: "invalid",
    429: "too-many-requests",
    503: "unavailable",
}

_log = structlog.get_logger("service.api")


class Problem(BaseModel):
    """A problem document (RFC 9457); some have further members."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int = Field(ge=400, le=599)
    code: str = Field(description="Stable name of what is wrong.")
    detail: str = Field(description="What is wrong, where, and how to mend it: one line.")
    instance: str | None = Field(default=None, description="The request, by its id.")


class InfeasibleProblemError(InvalidError):
    """No placement can satisfy what the request asks for."""

    code = "infeasible"


class ProblemResponse(Response):
    """A problem document with its headers."""

    media_type = "application/problem+json"

    def __init__(self, problem: ProblemError) -> None:
        request_id = REQUEST_ID.get()
        instance = None if request_id is None else f"urn:moe-placement:request:{request_id}"
        super().__init__(
            orjson.dumps(problem.document(instance=instance), default=str),
            status_code=int(problem.status),
            headers=_headers(problem),
        )


def install_problems(app: FastAPI) -> None:
    """Give an application the handlers of all failures."""
    app.add_exception_handler(ProblemError, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnect, _on_gone)
    app.add_exception_handler(InputError, _on_input)
    app.add_exception_handler(InfeasibleError, _on_infeasible)
    app.add_exception_handler(ServiceError, _on_service)
    app.add_exception_handler(sa.exc.StatementError, _on_database)
    app.add_exception_handler(sa.exc.TimeoutError, _on_database)
    app.add_exception_handler(OSError, _on_system)
    app.add_exception_handler(Exception, _on_bug)


def _headers(problem: ProblemError) -> dict[str, str]:
    retry_s = problem.extensions.get("retry_after")
    headers: dict[str, str] = {}
    if isinstance(problem, UnauthorizedError):
        headers["www-authenticate"] = 'Bearer realm="moe-placement"'
    if retry_s is not None or isinstance(problem, (TooManyRequestsError, UnavailableError)):
        headers["retry-after"] = str(max(1, math.ceil(RETRY_AFTER_S if retry_s is None else float(retry_s))))
    return headers


async def _on_problem(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, ProblemError)
    if isinstance(exc, UnavailableError):
        _log.error("unavailable", detail=exc.detail)
        if exc.__cause__ is not None:
            # The driver's words name hosts and users; they are for the log.
            exc = UnavailableError(exc.detail.partition(":")[0] + "; try again in a while", **exc.extensions)
    return ProblemResponse(exc)


async def _on_validation(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    errors = [_error(error) for error in exc.errors()[:MOST_ERRORS]]
    first = f"{errors[0]['where']}: {errors[0]['what']}"
    more = len(exc.errors()) - 1
    return ProblemResponse(InvalidError(first + (f" (and {more} more)" if more else ""), errors=errors))


def _error(error: dict[str, Any]) -> dict[str, str]:
    """Return one error of a validation as where and what, without what was sent."""
    if error["type"] == "json_invalid":
        position = error["loc"][-1]
        return {"where": "body", "what": f"is no JSON: {error['ctx']['error']} at character {position}"}
    where = ".".join(_printable(part) for part in error["loc"])
    what = _printable(error["msg"])
    if error["loc"] == ("body",) and error["type"] in {"model_attributes_type", "dict_type"}:
        what = "must be a JSON object, sent with Content-Type: application/json"
    return {"where": where, "what": what}


def _printable(part: object) -> str:
    text = str(part).encode("utf-8", "replace").decode()
    return text if len(text) <= MOST_MESSAGE else text[:MOST_MESSAGE] + "..."


async def _on_http(request: Request, exc: Exception) -> Response:
    """Translate the framework's own refusals; it wraps what goes wrong while a body is read."""
    assert isinstance(exc, HTTPException)
    cause = exc.__cause__
    if isinstance(cause, ProblemError):
        return await _on_problem(request, cause)
    if isinstance(cause, ClientDisconnect):
        return await _on_gone(request, cause)
    if exc.status_code == HTTPStatus.BAD_REQUEST and isinstance(cause, (ValueError, RecursionError)):
        kind = "is nested too deeply" if isinstance(cause, RecursionError) else "is no UTF-8"
        return ProblemResponse(InvalidError(f"body: {kind}"))
    if exc.status_code == HTTPStatus.NOT_FOUND and exc.detail == "Not Found":
        return ProblemResponse(NotFoundError(f"there is nothing at {request.scope['path'][:200]}; see /docs"))
    problem = ProblemError(str(exc.detail))
    problem.status = HTTPStatus(exc.status_code)
    problem.code = _CODES.get(exc.status_code, "http")
    if exc.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(_methods_of(request))
        problem.detail = f"{request.method} is not possible here; possible: {allowed}"
        exc.headers = {"Allow": allowed}
    response = ProblemResponse(problem)
    response.headers.update(exc.headers or {})
    return response


def _methods_of(request: Request) -> list[str]:
    """Return what is possible at a path: the framework names the methods of the first route alone."""
    found = set()
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            found.add(method)
    return sorted(found)


async def _on_gone(request: Request, exc: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _on_input(request: Request, exc: Exception) -> Response:
    return ProblemResponse(InvalidError(str(exc)))


async def _on_infeasible(request: Request, exc: Exception) -> Response:
    return ProblemResponse(InfeasibleProblemError(str(exc)))


async def _on_service(request: Request, exc: Exception) -> Response:
    _log.error("unavailable", detail=str(exc), exc_info=exc)
    return ProblemResponse(UnavailableError("a part of the service failed; its log says more"))


async def _on_database(request: Request, exc: Exception) -> Response:
    """Translate what reaches us from the database without the words of `Database`."""
    original = getattr(exc, "orig", None)
    if isinstance(exc, sa.exc.DataError) or isinstance(original, (TypeError, UnicodeError)):
        _log.warning("unstorable", detail=str(original or exc))
        return ProblemResponse(InvalidError("the request holds a text or number that cannot be stored"))
    if isinstance(exc, (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)):
        _log.error("unavailable", detail=str(original or exc))
        return ProblemResponse(UnavailableError("the database cannot be used now; try again in a while"))
    raise exc


async def _on_system(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, OSError)
    if exc.errno not in _FULL:
        raise exc
    _log.error("disk full", detail=str(exc))
    return ProblemResponse(UnavailableError("the disk of the service is full; make room, then try again"))


async def _on_bug(request: Request, exc: Exception) -> Response:
    """Answer for a failure that nobody expected; the server logs it with its traceback."""
    return ProblemResponse(ProblemError("the service failed; its log says more under this request's id"))
