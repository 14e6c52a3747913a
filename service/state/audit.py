"""The audit log: who changed what, in the transaction that changed it where there is one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from service.state.database import Database
from service.state.tables import audit

__all__ = ["AuditEntry", "AuditLog"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One change.

    Parameters
    ----------
    who
        Id of the caller, ``local`` without tokens, or the name of a part of the service.
    action
        What was done: ``token.create``, ``deployment.promote``, ...
    target
        To what.
    """

    number: int
    at: float
    who: str
    action: str
    target: str
    request_id: str | None
    detail: dict[str, Any] | None


class AuditLog:
    """The entries, in order."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(
        self,
        *,
        who: str,
        action: str,
        target: str,
        request_id: str | None = None,
        detail: Mapping[str, Any] | None = None,
        connection: sa.Connection | None = None,
    ) -> None:
        """Note a change.

        Parameters
        ----------
        connection
            The transaction that makes the change; without one the entry gets its own.
        """
        statement = sa.insert(audit).values(
            at=time.time(),
            who=_cut(who, 64),
            action=_cut(action, 64),
            target=_cut(target, 255),
            request_id=None if request_id is None else _cut(request_id, 64),
            detail=None if detail is None else dict(detail),
        )
        if connection is not None:
            connection.execute(statement)
            return
        with self._database.write() as own:
            own.execute(statement)

    def page(
        self, *, before: int | None = None, limit: int = 50, target: str | None = None
    ) -> list[AuditEntry]:
        """Return entries, newest first, whose number is below `before`."""
        statement = sa.select(audit).order_by(audit.c.number.desc()).limit(limit)
        if before is not None:
            statement = statement.where(audit.c.number < before)
        if target is not None:
            statement = statement.where(audit.c.target == target)
        with self._database.read() as connection:
            return [AuditEntry(**row._mapping) for row in connection.execute(statement)]


def _cut(text: str, most: int) -> str:
    """Keep what a column holds; PostgreSQL takes neither longer text nor NUL."""
    kept = text.replace("\x00", "")
    return kept if len(kept) <= most else f"{kept[: most - 3]}..."
