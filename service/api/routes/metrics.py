"""``/metrics``: what Prometheus scrapes."""

from __future__ import annotations

import asyncio
from typing import Annotated

import anyio.to_thread
import sqlalchemy as sa
from fastapi import APIRouter, Depends, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from placement.errors import ServiceError
from service.api.context import Context, context_of
from service.api.metrics import Families, StateSnapshot, metrics_of, read_snapshot, state_families
from service.api.security import Caller, Scope, require

__all__ = ["router"]

router = APIRouter(tags=["health"])

PATIENCE_S = 5.0


@router.get(
    "/metrics",
    summary="Figures for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(
    request: Request,
    context: Annotated[Context, Depends(context_of)],
    _: Annotated[Caller, Depends(require(Scope.READ))],
) -> Response:
    """Return this process's figures, and those of the state that all processes share.

    With tokens it needs one with scope read: give Prometheus a file with it.
    """
    snapshot = await _snapshot(context)
    own = generate_latest(metrics_of(request.app).registry)
    shared = generate_latest(Families(state_families(snapshot)))
    return Response(own + shared, media_type=CONTENT_TYPE_LATEST)


async def _snapshot(context: Context) -> StateSnapshot | None:
    """Return the state; None where the database does not answer: this process's figures are told anyway."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await anyio.to_thread.run_sync(read_snapshot, context.database, abandon_on_cancel=True)
    except (TimeoutError, ServiceError, sa.exc.SQLAlchemyError, OSError):
        return None
