"""Load windows: what ranks counted, part by part, the latest windows of every deployment."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from service.deployments import counting
from service.deployments.records import Added, LoadPart, StoredPart
from service.errors import ConflictError, NotFoundError
from service.state.counters import add_counters
from service.state.database import Database
from service.state.tables import deployments, load_windows

__all__ = ["KEPT_WINDOWS", "WindowStore"]

KEPT_WINDOWS = 64
"""Windows of a deployment that are kept unless more are asked for; older ones go as new ones come."""

MOST_NAMED = 500
"""Values in one statement: SQLite and PostgreSQL take more, but not any number."""


class WindowStore:
    """The load windows of all deployments."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        name: str,
        parts: Sequence[LoadPart],
        *,
        facts: dict[str, Any] | None = None,
        keep: int = KEPT_WINDOWS,
    ) -> Added:
        """Store parts in one transaction; what is known already is left as it is.

        Parameters
        ----------
        facts
            Facts of the spec that the parts were checked against; they must still stand.
        keep
            Windows to keep: the latest ones by arrival.

        Raises
        ------
        NotFoundError
            If there is no such deployment.
        ConflictError
            If a part is known with other content, or the deployment is of another model by now: nothing is
            stored.
        """
        with self._database.write() as connection:
            row = _locked(connection, name)
            if facts is not None and row.spec.get("facts") != facts:
                raise ConflictError(f"the spec of deployment {name} has just changed; send the windows again")
            fresh = _fresh(parts, _known(connection, name, parts), name)
            if fresh:
                now = time.time()
                rows = [
                    {
                        "deployment": name,
                        "window": part.window,
                        "rank": part.rank,
                        "version": part.version,
                        "tokens": part.tokens,
                        "load": part.load,
                        "received_at": now,
                    }
                    for part in fresh
                ]
                connection.execute(sa.insert(load_windows), rows)
                add_counters(connection, counting.windows(name, len(rows)))
                _trim(connection, name, keep)
            return Added(
                stored=len(fresh), known=len(parts) - len(fresh), version=row.version, revision=row.revision
            )

    def recent(self, name: str) -> list[StoredPart]:
        """Return all parts that are kept, in order of arrival."""
        columns = [column for column in load_windows.c if column.name not in ("deployment", "received_at")]
        statement = (
            sa.select(*columns).where(load_windows.c.deployment == name).order_by(load_windows.c.number)
        )
        with self._database.read() as connection:
            return [StoredPart(**row._mapping) for row in connection.execute(statement)]

    def arrivals(self, name: str) -> dict[int, float]:
        """Return when each part came, in seconds since the epoch, by its number."""
        columns = load_windows.c.number, load_windows.c.received_at
        with self._database.read() as connection:
            rows = connection.execute(sa.select(*columns).where(load_windows.c.deployment == name))
            return {row.number: row.received_at for row in rows}

    def newest(self) -> int:
        """Return the number of the last part of any deployment: the cheapest question of all."""
        with self._database.read() as connection:
            return connection.scalar(sa.select(sa.func.max(load_windows.c.number))) or 0

    def newest_of_each(self) -> dict[str, int]:
        """Return the number of the last part of every deployment that has any."""
        statement = sa.select(
            load_windows.c.deployment, sa.func.max(load_windows.c.number).label("number")
        ).group_by(load_windows.c.deployment)
        with self._database.read() as connection:
            return {row.deployment: row.number for row in connection.execute(statement)}


def _locked(connection: sa.Connection, name: str) -> Any:
    """Lock the deployment, so that parts are numbered in the order in which they become visible."""
    columns = deployments.c.spec, deployments.c.version, deployments.c.revision
    statement = sa.select(*columns).where(deployments.c.name == name).with_for_update()
    row = connection.execute(statement).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no deployment {name!r}; make it with PUT /v1/deployments/{name}")
    return row


Known = dict[tuple[int, int], tuple[float, bytes]]


def _known(connection: sa.Connection, name: str, parts: Sequence[LoadPart]) -> Known:
    """Return the parts of these windows and ranks that are stored already."""
    table = load_windows.c
    windows = sorted({part.window for part in parts})
    ranks = {part.rank for part in parts}
    found: Known = {}
    for first in range(0, len(windows), MOST_NAMED):
        statement = sa.select(table.window, table.rank, table.tokens, table.load).where(
            table.deployment == name, table.window.in_(windows[first : first + MOST_NAMED])
        )
        if len(ranks) == 1:
            statement = statement.where(table.rank == next(iter(ranks)))
        for window, rank, tokens, load in connection.execute(statement):
            found[window, rank] = tokens, load
    return found


def _fresh(parts: Iterable[LoadPart], known: Known, name: str) -> list[LoadPart]:
    fresh = []
    for part in parts:
        key = part.window, part.rank
        if key not in known:
            known[key] = part.tokens, part.load
            fresh.append(part)
        elif not _same(known[key], part):
            raise ConflictError(
                f"window {part.window} of rank {part.rank} of deployment {name} is known with other content; "
                "number windows on without repeating, also after a restart (by the clock, for instance)"
            )
    return fresh


def _same(stored: tuple[float, bytes], part: LoadPart) -> bool:
    tokens, load = stored
    # Two releases of zlib may compress the same counts differently.
    return tokens == part.tokens and (
        load == part.load or zlib.decompress(load) == zlib.decompress(part.load)
    )


def _trim(connection: sa.Connection, name: str, keep: int) -> None:
    """Drop the windows whose last part came before those of the latest `keep` windows."""
    table = load_windows.c
    last = sa.func.max(table.number)
    old = (
        sa.select(table.window)
        .where(table.deployment == name)
        .group_by(table.window)
        .order_by(last.desc())
        .offset(keep)
    )
    # SQLite wants a limit with an offset; the dialect writes LIMIT -1.
    windows = list(connection.scalars(old))
    for first in range(0, len(windows), MOST_NAMED):
        some = windows[first : first + MOST_NAMED]
        connection.execute(sa.delete(load_windows).where(table.deployment == name, table.window.in_(some)))
