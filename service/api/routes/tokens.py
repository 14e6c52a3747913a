"""``/v1/tokens``: bearer tokens, for administrators."""

from __future__ import annotations

import re
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from service.api.bodies import read_body
from service.api.context import Context, context_of
from service.api.describe import json_body, problems
from service.api.logs import REQUEST_ID
from service.api.security import Caller, Scope, require
from service.api.stored import in_thread
from service.errors import NotFoundError
from service.state.tokens import Issued, Limits

__all__ = ["router"]

router = APIRouter(prefix="/v1/tokens", tags=["administration"])

MOST_BODY_BYTES = 1 << 14
MOST_LIFE_S = 10 * 366 * 86400.0
_ID = re.compile(r"[0-9a-z]{1,32}", re.ASCII)
_EXAMPLE = {"name": "launchers", "scopes": ["read"], "limits": {"requests_per_minute": 6000}}

Administrator = Annotated[Caller, Depends(require(Scope.ADMIN))]
Process = Annotated[Context, Depends(context_of)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TokenLimits(_Strict):
    """What one token may use; null leaves it to the settings of the service."""

    requests_per_minute: int | None = Field(default=None, ge=1, le=10_000_000)
    max_upload_bytes: int | None = Field(default=None, ge=1, le=1 << 50)
    max_queued: int | None = Field(default=None, ge=1, le=10_000_000)


class TokenRequest(_Strict):
    """Body of ``POST /v1/tokens``."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")
    scopes: list[Literal["read", "submit", "admin"]] = Field(min_length=1, max_length=3)
    limits: TokenLimits = TokenLimits()
    expires_in_s: float | None = Field(default=None, gt=0, le=MOST_LIFE_S)


class RotateRequest(_Strict):
    """Body of ``POST /v1/tokens/{id}/rotate``."""

    grace_s: float = Field(default=3600.0, ge=0, le=30 * 86400.0)


class TokenDocument(BaseModel):
    """A token, without its secret."""

    id: str
    name: str
    scopes: list[str]
    limits: TokenLimits
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    previous_until: float | None


class IssuedDocument(TokenDocument):
    """A token with its secret."""

    token: str = Field(description="What to send; it is shown this once.")


def _shown(issued: Issued) -> dict[str, Any]:
    return {**issued.token.as_dict(), "token": issued.text}


def _check_id(token_id: str) -> str:
    if _ID.fullmatch(token_id) is None:
        raise _unknown(token_id)
    return token_id


def _unknown(token_id: str) -> NotFoundError:
    return NotFoundError(f"there is no token {token_id[:40].encode('ascii', 'replace').decode()!r}")


@router.get("", responses=problems(), response_model=dict[str, list[TokenDocument]])
async def list_tokens(caller: Administrator, context: Process) -> dict[str, Any]:
    """List all tokens, revoked ones too."""
    return {"items": [token.as_dict() for token in await in_thread(context.tokens.list)]}


@router.post(
    "",
    status_code=201,
    response_model=IssuedDocument,
    responses=problems(413, 415),
    openapi_extra=json_body(TokenRequest, launchers=_EXAMPLE),
)
async def create_token(
    request: Request, response: Response, caller: Administrator, context: Process
) -> dict[str, Any]:
    """Make a token; its secret is in this answer and nowhere else."""
    asked = await read_body(request, TokenRequest, most_bytes=MOST_BODY_BYTES)
    issued = await in_thread(
        context.tokens.create,
        asked.name,
        [Scope(scope) for scope in asked.scopes],
        limits=Limits(**asked.limits.model_dump()),
        expires_at=None if asked.expires_in_s is None else time.time() + asked.expires_in_s,
        by=caller.id,
        request_id=REQUEST_ID.get(),
    )
    response.headers["Location"] = f"/v1/tokens/{issued.token.id}"
    return _shown(issued)


@router.get("/{token_id}", response_model=TokenDocument, responses=problems(404))
async def get_token(token_id: str, caller: Administrator, context: Process) -> dict[str, Any]:
    """Return what is known of a token."""
    found = await in_thread(context.tokens.get, _check_id(token_id))
    if found is None:
        raise _unknown(token_id)
    return found.as_dict()


@router.post(
    "/{token_id}/rotate",
    response_model=IssuedDocument,
    responses=problems(404, 413, 415),
    openapi_extra=json_body(RotateRequest, soon={"grace_s": 600}),
)
async def rotate_token(
    token_id: str, request: Request, caller: Administrator, context: Process
) -> dict[str, Any]:
    """Give a token a new secret; the old one is taken until its grace is over."""
    asked = await read_body(request, RotateRequest, most_bytes=MOST_BODY_BYTES)
    issued = await in_thread(
        context.tokens.rotate,
        _check_id(token_id),
        grace_s=asked.grace_s,
        by=caller.id,
        request_id=REQUEST_ID.get(),
    )
    if issued is None:
        raise _unknown(token_id)
    return _shown(issued)


@router.delete("/{token_id}", response_model=TokenDocument, responses=problems(404))
async def revoke_token(token_id: str, caller: Administrator, context: Process) -> dict[str, Any]:
    """Revoke a token: from now on nothing is done for it, whichever process is asked."""
    revoked = await in_thread(
        context.tokens.revoke, _check_id(token_id), by=caller.id, request_id=REQUEST_ID.get()
    )
    if revoked is None:
        raise _unknown(token_id)
    return revoked.as_dict()
