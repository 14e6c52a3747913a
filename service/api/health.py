"""Whether this server can do its work now: looked at when asked, and answered within a time limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import sqlalchemy as sa
import structlog

from placement.errors import ServiceError
from service.state.workers import WorkerStore, boot_id

if TYPE_CHECKING:
    from fastapi import FastAPI

    from service.api.context import Context
    from service.supervisor import Supervisor

__all__ = ["Health", "health_of"]

PATIENCE_S = 2.0
SILENT_LEASES = 2
"""A worker that gave no sign for so many leases hangs: one may be missed under load."""

_log = structlog.get_logger("service.health")

Check = Callable[[], str | None]


class Health:
    """The checks behind the probes.

    Parameters
    ----------
    context
        The process.
    """

    supervisor: Supervisor | None = None
    """Keeper of the worker beside it; None where none belongs to this process."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.started_at = time.time()
        self._checks: dict[str, Check] = {
            "database": self._database,
            "artifacts": self._artifacts,
            "worker": self._worker,
        }
        self._beat: tuple[int, int] | None = None
        self._beat_since_s = 0.0
        self._running: dict[str, asyncio.Task[str | None]] = {}
        self._limiter = anyio.CapacityLimiter(len(self._checks))
        self._told: dict[str, str] = {}

    async def problems(self) -> dict[str, str]:
        """Return what is wrong, by the part that it is wrong with; nothing when ready."""
        found = {
            name: text for name, text in (("server", self._ending()), ("worker", self._worker())) if text
        }
        answers = await asyncio.gather(*(self._ask(name) for name in self._checks))
        found |= {name: text for name, text in zip(self._checks, answers, strict=True) if text}
        self._tell(found)
        return found

    def _tell(self, found: dict[str, str]) -> None:
        """Log what has changed since the last look."""
        for name in found.keys() - self._told.keys():
            _log.warning("not ready", part=name, why=found[name])
        for name in self._told.keys() - found.keys():
            _log.info("ready again", part=name)
        self._told = found

    async def _ask(self, name: str) -> str | None:
        """Run a check in a thread; one that hangs is asked once, however many probes come."""
        task = self._running.get(name)
        if task is None or task.done():
            task = asyncio.create_task(self._in_thread(self._checks[name]))
            self._running[name] = task
        done, _ = await asyncio.wait({task}, timeout=PATIENCE_S)
        return task.result() if done else f"no answer within {PATIENCE_S:g} s"

    async def _in_thread(self, check: Check) -> str | None:
        # Not the common threads: requests that fill those must not make the server look ill.
        return await anyio.to_thread.run_sync(check, limiter=self._limiter, abandon_on_cancel=True)

    def _ending(self) -> str | None:
        return "shutting down" if self._context.watcher.closed else None

    def _worker(self) -> str | None:
        """Look whether the worker beside the server is there, and has counted on since the last look."""
        if self.supervisor is None:
            return None
        pid = self.supervisor.pid
        if pid is None:
            return f"the worker process is not running (restarted {self.supervisor.num_restarts} times)"
        try:
            workers = WorkerStore(self._context.database).list()
        except (ServiceError, sa.exc.SQLAlchemyError, OSError):
            return None  # the database's fault, and told as such
        beat = next((row.beat for row in workers if (row.pid, row.boot_id) == (pid, boot_id())), None)
        if beat is None:
            return "the worker process has not begun its work yet"
        now_s = time.monotonic()
        if self._beat != (pid, beat):
            self._beat, self._beat_since_s = (pid, beat), now_s
        silent_s = now_s - self._beat_since_s
        patience_s = SILENT_LEASES * self._context.settings.lease_seconds
        return None if silent_s < patience_s else f"the worker gave no sign of life for {silent_s:.0f} s"

    def _database(self) -> str | None:
        from service.state.upgrade import is_current

        database = self._context.database
        file = Path(database.engine.url.database or "")
        if database.is_sqlite and not file.is_file():
            # Open connections would go on with a file that nobody can reach any more.
            return f"{file} is gone"
        try:
            with database.read() as connection:
                return None if is_current(connection) else "its schema is of another release"
        except (ServiceError, sa.exc.SQLAlchemyError, OSError) as exc:
            return self._hidden("it cannot be used now", exc)

    def _artifacts(self) -> str | None:
        try:
            free = self._context.files.free_bytes
            if free < self._context.settings.least_free_bytes:
                return f"the disk is full: {free >> 20} MiB are left"
            self._context.files.check()
        except (ServiceError, OSError) as exc:
            return self._hidden("the store cannot be written now", exc)
        return None

    def _hidden(self, text: str, exc: Exception) -> str:
        """Log what hosts and users an error names; probes come from anybody."""
        _log.debug(text, exc_info=exc)
        return f"{text} ({type(exc).__name__}); the log says more"


def health_of(app: FastAPI) -> Health:
    """Return the checks of an application."""
    found: Any = getattr(app.state, "health", None)
    if found is None:
        found = app.state.health = Health(app.state.context)
    health: Health = found
    return health
