"""``/v1/audit``: who changed what, for administrators."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel

from service.api.context import Context, context_of
from service.api.describe import problems
from service.api.security import Caller, Scope, require
from service.api.stored import in_thread

__all__ = ["router"]

router = APIRouter(prefix="/v1/audit", tags=["administration"])


class AuditDocument(BaseModel):
    """One change."""

    number: int
    at: float
    who: str
    action: str
    target: str
    request_id: str | None
    detail: dict[str, Any] | None


class AuditPage(BaseModel):
    """Changes, newest first."""

    items: list[AuditDocument]
    next_cursor: str | None


@router.get("", response_model=AuditPage, responses=problems())
async def list_changes(
    caller: Annotated[Caller, Depends(require(Scope.ADMIN))],
    context: Annotated[Context, Depends(context_of)],
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: Annotated[str | None, Query(pattern=r"^[0-9]{1,18}$")] = None,
    target: Annotated[str | None, Query(min_length=1, max_length=255, pattern=r"^[^\x00]+$")] = None,
) -> dict[str, Any]:
    """List changes, newest first: of tokens, artifacts and deployments."""
    before = None if cursor is None else int(cursor)
    found = await in_thread(context.audit.page, before=before, limit=limit + 1, target=target)
    more = len(found) > limit
    return {
        "items": [asdict(entry) for entry in found[:limit]],
        "next_cursor": str(found[limit - 1].number) if more else None,
    }
