"""What the OpenAPI document says beyond the code: problems, examples, bodies that are read by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from service.api.examples import PLACEMENT_ID, SOLVE_ID, TRACE_ID

__all__ = [
    "PLACEMENT_ID",
    "PROBLEM_TYPE",
    "SOLVE_ID",
    "TRACE_ID",
    "ProblemDocument",
    "describe",
    "events_answer",
    "json_answer",
    "json_body",
    "operation_id",
    "problems",
]

PROBLEM_TYPE = "application/problem+json"
SUMMARY = (
    "Decides on which GPU every expert of a Mixture-of-Experts model lives, and proves how good that is."
)
TAGS = {
    "traces": "What a model's router did, uploaded once and named by the digest of its bytes.",
    "solves": "Jobs that search for a placement: queued, watched, stopped, fetched.",
    "evaluations": "What a placement costs on a trace.",
    "placements": "Placement files, ours or those of an engine.",
    "deployments": "Running models: their current placement, their load, their history.",
    "administration": "Tokens and the audit log.",
    "health": "Whether the service lives, is ready, and how it does.",
}


class ProblemDocument(BaseModel):
    """A problem (RFC 9457)."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int = Field(ge=400, le=599)
    code: str = Field(description="Stable name of what is wrong.")
    detail: str = Field(description="What is wrong, where, and how to mend it: one line.")
    instance: str | None = Field(default=None, description="The request.")


_MEANINGS: Mapping[int, tuple[str, str, str]] = {
    400: ("invalid", "Bad Request", "The request is malformed."),
    401: ("unauthorized", "Unauthorized", "No token, or one that is unknown, expired or revoked."),
    403: ("forbidden", "Forbidden", "The token lacks the scope."),
    404: ("not-found", "Not Found", "There is no such thing."),
    405: ("method-not-allowed", "Method Not Allowed", "The resource knows no such method."),
    408: ("request-timeout", "Request Timeout", "The body did not come in time."),
    409: ("conflict", "Conflict", "The request does not fit to the present state."),
    412: ("precondition-failed", "Precondition Failed", "Somebody else was faster."),
    413: ("too-large", "Content Too Large", "More bytes than are taken."),
    415: ("unsupported-media-type", "Unsupported Media Type", "The body is of a type that is not taken."),
    422: ("invalid", "Unprocessable Content", "The request makes no sense."),
    429: ("too-many-requests", "Too Many Requests", "The rate is spent, or the queue is full."),
    500: ("internal", "Internal Server Error", "The service failed; its log says why."),
    503: ("unavailable", "Service Unavailable", "The database or the store of files cannot be reached."),
}
_EVERYWHERE = (400, 401, 403, 408, 413, 422, 429, 500, 503)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the entries of `responses` for these problems, and for those that every route may meet."""
    return {status: _problem(status) for status in sorted({*_EVERYWHERE, *statuses})}


def _problem(status: int) -> dict[str, Any]:
    code, title, meaning = _MEANINGS[status]
    example = {
        "type": f"urn:moe-placement:problem:{code}",
        "title": title,
        "status": status,
        "code": code,
        "detail": meaning[:1].lower() + meaning[1:].rstrip("."),
    }
    content = {"schema": _reference(ProblemDocument), "example": example}
    return {"description": meaning, "content": {PROBLEM_TYPE: content}}


def json_body(model: type[BaseModel], **examples: Any) -> dict[str, Any]:
    """Return the `openapi_extra` of a route that reads its body by hand.

    Parameters
    ----------
    examples
        Bodies by name.
    """
    _BODIES[model.__name__] = model
    content = {
        "schema": _reference(model),
        "examples": {name: {"value": value} for name, value in examples.items()},
    }
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def json_answer(description: str, answers: Mapping[type[BaseModel], Any]) -> dict[str, Any]:
    """Return the entry of `responses` for JSON that is written by hand.

    Parameters
    ----------
    answers
        What it may be, each with an example.
    """
    _BODIES.update({model.__name__: model for model in answers})
    schemas = [_reference(model) for model in answers]
    content = {
        "schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas},
        "examples": {model.__name__: {"value": example} for model, example in answers.items()},
    }
    return {"description": description, "content": {"application/json": content}}


def events_answer(description: str, example: str) -> dict[str, Any]:
    """Return the entry of `responses` for server-sent events; the schema is that of one event."""
    kinds = {"type": "string", "enum": ["progress", "incumbent", "done"]}
    number = {"type": "string", "pattern": "^[0-9]+$", "description": "Number of the event."}
    schema = {
        "type": "object",
        "properties": {
            "event": kinds,
            "id": number,
            "data": {"type": "string", "contentMediaType": "application/json"},
        },
    }
    content = {"schema": schema, "example": example}
    return {"description": description, "content": {"text/event-stream": content}}


_BODIES: dict[str, type[BaseModel]] = {"ProblemDocument": ProblemDocument}
"""Models that the document needs though no function names them."""


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def operation_id(route: APIRoute) -> str:
    """Return the id of an operation: its function's name, which stays when its path changes."""
    return route.name


def describe(app: FastAPI) -> None:
    """Make an app's OpenAPI document complete: tags, models that are used by hand, one form of problems."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=SUMMARY,
        description=app.description,
        routes=app.routes,
        tags=[{"name": name, "description": text} for name, text in TAGS.items()],
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for model in _BODIES.values():
        whole = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(whole.pop("$defs", {}))
        schemas[model.__name__] = whole
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete(operation["responses"], is_open=path.startswith("/health/"))
    # FastAPI's own form of a refused request is not the one that is answered.
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    return document


def _complete(answers: dict[str, Any], *, is_open: bool) -> None:
    """Add the problems that every route may meet, in our own form."""
    refused = answers.get("422", {}).get("content", {})
    if PROBLEM_TYPE not in refused:
        answers.pop("422", None)
    if not is_open:
        for status in _EVERYWHERE:
            answers.setdefault(str(status), _problem(status))
