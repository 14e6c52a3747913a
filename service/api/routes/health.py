"""``/health/live``, ``/health/ready`` and ``/v1/status``: does it live, can it work, what does it do."""

from __future__ import annotations

import time
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from placement import __version__
from service.api.context import Context, context_of
from service.api.health import health_of
from service.api.metrics import StateSnapshot, read_snapshot
from service.api.security import Caller, Scope, require

__all__ = ["router"]

router = APIRouter(tags=["health"])


class Live(BaseModel):
    """The process answers."""

    status: str = Field(examples=["live"])


class Ready(BaseModel):
    """Whether requests can be served now."""

    status: str = Field(examples=["ready"], description="`ready` or `not-ready`.")
    reasons: dict[str, str] = Field(
        default_factory=dict, description="What is wrong, by part: server, worker, database, artifacts."
    )


class Status(BaseModel):
    """What the service does at the moment."""

    version: str
    role: str
    started_at: float
    now: float
    queued: int
    running: int
    oldest_queued_s: float = Field(description="Age of the job that waits longest.")
    workers: int = Field(description="Worker processes that are alive, on all machines.")
    worker_cpus: int = Field(description="Threads that these may use together.")
    artifacts: dict[str, int] = Field(description="Stored artifacts by kind.")
    artifact_bytes: dict[str, int]
    disk_free_bytes: int
    scopes: list[str] = Field(description="What the caller may do; everything where there are no tokens.")


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", summary="Does the process answer?", response_model=Live)
async def live() -> Any:
    """Say that the process lives, whatever else is wrong: restart it when this fails."""
    return JSONResponse({"status": "live"})


@router.head("/health/ready", include_in_schema=False)
@router.get(
    "/health/ready",
    summary="Can it serve requests now?",
    response_model=Ready,
    responses={503: {"model": Ready, "description": "Not now; the reasons are told."}},
)
async def ready(request: Request) -> Any:
    """Look at database, artifacts, disk and worker; send no requests here while this says 503."""
    reasons = await health_of(request.app).problems()
    status = "not-ready" if reasons else "ready"
    return JSONResponse({"status": status, "reasons": reasons}, 503 if reasons else 200)


@router.get("/v1/status", summary="Queue, workers and store at a glance", response_model=Status)
async def status(
    request: Request,
    context: Annotated[Context, Depends(context_of)],
    caller: Annotated[Caller, Depends(require(Scope.READ))],
) -> Any:
    """Return what the dashboard shows at its top, and what its reader may do."""
    snapshot = await anyio.to_thread.run_sync(read_snapshot, context.database)
    scopes = [scope for scope in Scope if scope in caller.scopes]
    return {**_status(snapshot, context, health_of(request.app).started_at), "scopes": scopes}


def _status(snapshot: StateSnapshot, context: Context, started_at: float) -> dict[str, Any]:
    queued_at = snapshot.queued_at
    return {
        "version": __version__,
        "role": context.settings.role,
        "started_at": started_at,
        "now": time.time(),
        "queued": snapshot.counts["queued"],
        "running": snapshot.counts["running"],
        "oldest_queued_s": 0.0 if queued_at is None else max(0.0, snapshot.at - queued_at),
        "workers": len(snapshot.worker_cpus),
        "worker_cpus": sum(snapshot.worker_cpus),
        "artifacts": {kind: number for kind, (number, _) in snapshot.artifacts.items()},
        "artifact_bytes": {kind: size for kind, (_, size) in snapshot.artifacts.items()},
        "disk_free_bytes": context.files.free_bytes,
    }
