"""What every route can reach: settings, stores and the watcher of one server process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request

from service.artifacts import ArtifactFiles
from service.settings import Settings
from service.state.database import Database
from service.state.jobs import JobStore

if TYPE_CHECKING:
    from service.api.watch import Watcher
    from service.state.artifacts import ArtifactStore
    from service.state.audit import AuditLog
    from service.state.deployments import DeploymentStore
    from service.state.tokens import TokenStore

__all__ = ["Context", "context_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """One server process."""

    settings: Settings
    database: Database
    files: ArtifactFiles
    artifacts: ArtifactStore
    jobs: JobStore
    deployments: DeploymentStore
    tokens: TokenStore
    audit: AuditLog
    watcher: Watcher


async def context_of(request: Request) -> Context:
    """Return the process that serves a request; for `Depends` (async: a plain function costs a thread)."""
    context: Context = request.app.state.context
    return context
