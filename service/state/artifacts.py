"""What is known of the stored bytes: one row an artifact, kept until nothing names it any more."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from service.errors import UnavailableError
from service.state.database import Database
from service.state.records import Artifact
from service.state.tables import artifacts

__all__ = ["FRESH_S", "ArtifactStore"]

FRESH_S = 600.0
"""How long a use counts as recent, so that not every request writes; far below what retention spares."""

_COLUMNS = [column for column in artifacts.c if column.name != "used_at"]
_ONE = sa.select(*_COLUMNS).where(artifacts.c.digest == sa.bindparam("digest"))
_KIND = "SELECT kind FROM artifacts WHERE digest = ?"


class ArtifactStore:
    """The rows of the artifacts; their bytes are in `service.artifacts.ArtifactFiles`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        *,
        digest: str,
        kind: str,
        size_bytes: int,
        format: str,
        summary: dict[str, Any],
        created_by: str,
    ) -> Artifact:
        """Name bytes that were kept; one that is known stays as it was first named, and counts as used now.

        Parameters
        ----------
        digest
            Digest of the bytes, which are stored already.
        kind
            ``trace`` or ``placement``.
        format
            Format of the file.
        summary
            What it holds.
        created_by
            Id of the caller.
        """
        now = time.time()
        values = {
            "digest": digest,
            "kind": kind,
            "size_bytes": size_bytes,
            "format": format,
            "summary": summary,
            "created_at": now,
            "created_by": created_by,
            "used_at": now,
        }
        insert = sqlite.insert if self._database.is_sqlite else postgresql.insert
        statement = insert(artifacts).values(values)
        with self._database.write() as connection:
            row = connection.execute(
                statement.on_conflict_do_update(
                    index_elements=["digest"], set_={"used_at": statement.excluded.used_at}
                ).returning(*_COLUMNS)
            ).one()
        return _artifact(row)

    def get(self, digest: str) -> Artifact | None:
        """Return an artifact."""
        with self._database.read() as connection:
            row = connection.execute(_ONE, {"digest": digest}).one_or_none()
        return None if row is None else _artifact(row)

    def kind_of(self, digest: str) -> str | None:
        """Return an artifact's kind; on SQLite past the statement machinery, for requests that are many."""
        if not self._database.is_sqlite:
            found = self.get(digest)
            return None if found is None else found.kind
        try:
            lent = self._database.engine.raw_connection()
            try:
                row = lent.driver_connection.execute(_KIND, (digest,)).fetchone()  # type: ignore[union-attr]
            finally:
                lent.close()
        except sqlite3.Error as exc:
            raise UnavailableError(f"the database cannot be read now: {exc}") from exc
        return None if row is None else str(row[0])

    def page(
        self, *, kind: str | None = None, before: tuple[float, str] | None = None, limit: int = 50
    ) -> list[Artifact]:
        """Return artifacts, newest first.

        Parameters
        ----------
        before
            ``(created_at, digest)`` of the last one of the page before.
        """
        order = sa.tuple_(artifacts.c.created_at, artifacts.c.digest)
        statement = sa.select(*_COLUMNS).order_by(artifacts.c.created_at.desc(), artifacts.c.digest.desc())
        if kind is not None:
            statement = statement.where(artifacts.c.kind == kind)
        if before is not None:
            statement = statement.where(order < sa.tuple_(*(sa.literal(part) for part in before)))
        with self._database.read() as connection:
            return [_artifact(row) for row in connection.execute(statement.limit(limit))]

    def touch(self, digests: Iterable[str]) -> frozenset[str]:
        """Note that artifacts are used now, and return those that are known.

        Retention leaves them alone for long enough to name them in a job or a deployment.
        """
        wanted, now = sorted(set(digests)), time.time()
        if not wanted:
            return frozenset()
        named = artifacts.c.digest.in_(wanted)
        with self._database.read() as connection:
            used_at = {
                row.digest: row.used_at
                for row in connection.execute(sa.select(artifacts.c.digest, artifacts.c.used_at).where(named))
            }
        if all(abs(now - at) < FRESH_S for at in used_at.values()):
            return frozenset(used_at)
        with self._database.write() as connection:
            touched = sa.update(artifacts).where(named).values(used_at=now).returning(artifacts.c.digest)
            return frozenset(connection.scalars(touched))


def _artifact(row: sa.Row[Any]) -> Artifact:
    return Artifact(**row._mapping)
