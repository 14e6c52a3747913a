"""Jobs to queue and artifacts for them to name."""

from __future__ import annotations

from typing import Any

from service.state.artifacts import ArtifactStore
from service.state.database import Database
from service.state.records import JobKind, NewJob

__all__ = ["PLACEMENT", "TRACE", "add_artifacts", "new_job"]

TRACE = "sha256:" + "a" * 64
PLACEMENT = "sha256:" + "b" * 64


def new_job(caller: str = "ann", **values: Any) -> NewJob:
    """Return a solve to queue."""
    spec = {"topology": "h100:2x8", "options": {"seed": 1, "time_limit": None}}
    return NewJob(
        **{"kind": JobKind.SOLVE, "caller": caller, "spec": spec, "request_hash": "0" * 64, **values}
    )


def add_artifacts(database: Database) -> None:
    """Name a trace and a placement."""
    store = ArtifactStore(database)
    for digest, kind in ((TRACE, "trace"), (PLACEMENT, "placement")):
        store.add(digest=digest, kind=kind, size_bytes=1, format="npz", summary={}, created_by="ann")
