"""What a submission says beside its body, read by hand: thousands may come in a few seconds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic import BaseModel

from service.api.describe import json_body
from service.api.security import Caller, Scope, require
from service.errors import InvalidError

__all__ = ["SubmitParameters", "described_submission"]

MOST_WAIT_S = 300.0
DEFAULT_WAIT_S = 30.0
MOST_KEY = 255
_KEY = re.compile(r"[\x21-\x7e]{1,255}")

_PARAMETERS = [
    {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "Text of the caller's choice: the same request with the same key is queued once.",
        "schema": {"type": "string", "minLength": 1, "maxLength": MOST_KEY, "pattern": r"^[\x21-\x7e]+$"},
    },
    {
        "name": "wait",
        "in": "query",
        "description": "Most seconds to wait for the end of what is short: a check, an evaluation.",
        "schema": {"type": "number", "default": DEFAULT_WAIT_S, "minimum": 0, "maximum": MOST_WAIT_S},
    },
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitParameters:
    """Who submits, under which key, and how long they wait."""

    caller: Caller
    key: str | None
    wait_s: float

    @classmethod
    async def of(cls, request: Request) -> SubmitParameters:
        """Read them.

        Raises
        ------
        InvalidError
            If key or time are malformed.
        ProblemError
            If the caller may not submit.
        """
        caller = await require(Scope.SUBMIT)(request)
        return cls(caller=caller, key=_key_of(request), wait_s=_wait_of(request))


def described_submission(model: type[BaseModel], **examples: Any) -> dict[str, Any]:
    """Return the `openapi_extra` of a route that submits."""
    return {**json_body(model, **examples), "parameters": _PARAMETERS, "security": [{"bearer": []}]}


def _key_of(request: Request) -> str | None:
    given = [value for name, value in request.scope["headers"] if name == b"idempotency-key"]
    if not given:
        return None
    key: str = given[0].decode("latin-1")
    if len(given) > 1 or _KEY.fullmatch(key) is None:
        raise InvalidError(f"Idempotency-Key: must be 1 to {MOST_KEY} visible ASCII characters, given once")
    return key


def _wait_of(request: Request) -> float:
    if not request.scope["query_string"]:
        return DEFAULT_WAIT_S
    try:
        wait_s = float(request.query_params.get("wait", DEFAULT_WAIT_S))
    except ValueError:
        wait_s = -1.0
    if not 0 <= wait_s <= MOST_WAIT_S:
        raise InvalidError(f"wait: must be a number of seconds from 0 to {MOST_WAIT_S:g}")
    return wait_s
