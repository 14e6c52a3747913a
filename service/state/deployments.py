"""Deployments, the versions of their placements, and the state of their refresh.

Whoever changes a deployment locks its row first, so that all that belongs together changes together, and
compares what it has read before with what stands there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from service.deployments.records import Cause, Current, Deployment, NewVersion, RefreshState, Version
from service.state.audit import AuditLog
from service.state.counters import Amounts, add_counters
from service.state.current import CurrentReader
from service.state.database import Database
from service.state.deployment_rows import (
    ANY,
    Expected,
    append,
    as_deployment,
    as_version,
    expect,
    get,
    locked,
    observe,
    there,
    update,
    version_of,
    watch_of,
)
from service.state.tables import deployment_versions as versions_table
from service.state.tables import deployments, load_windows
from service.state.windows import WindowStore

__all__ = ["ANY", "DeploymentStore", "Expected"]


class DeploymentStore:
    """Deployments and the versions of their placements.

    Parameters
    ----------
    database
        Where they are kept; `windows` are their load windows.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._audit = AuditLog(database)
        self._reader = CurrentReader(database)
        self.windows = WindowStore(database)

    def put(
        self,
        name: str,
        spec: Mapping[str, Any],
        *,
        by: str,
        expected: Expected = ANY,
        check: Callable[[Deployment], None] = lambda _: None,
        request_id: str | None = None,
    ) -> tuple[Deployment, bool]:
        """Create a deployment, or change its spec; return it, and whether it is new.

        Parameters
        ----------
        expected
            Revision that must stand; None for a deployment that must not exist yet.
        check
            Called with the deployment that is to be changed; what it raises stops the change.

        Raises
        ------
        PreconditionError
            If another revision stands.
        """
        try:
            return self._put(name, spec, by, expected, check, request_id)
        except IntegrityError:
            # Two have created it at the same time, and the other one was faster: now it is there.
            return self._put(name, spec, by, expected, check, request_id)

    def _put(
        self,
        name: str,
        spec: Mapping[str, Any],
        by: str,
        expected: Expected,
        check: Callable[[Deployment], None],
        request_id: str | None,
    ) -> tuple[Deployment, bool]:
        now = time.time()
        with self._database.write() as connection:
            found = locked(connection, name)
            expect(f"deployment {name}", "revision", None if found is None else found.revision, expected)
            if found is None:
                values = {
                    "name": name,
                    "spec": dict(spec),
                    "revision": 1,
                    "created_at": now,
                    "updated_at": now,
                }
                connection.execute(sa.insert(deployments).values(values))
            else:
                check(found)
                update(connection, name, spec=dict(spec), revision=found.revision + 1, updated_at=now)
                if found.spec.get("facts") != spec.get("facts"):
                    # Windows of another model say nothing about this one.
                    connection.execute(sa.delete(load_windows).where(load_windows.c.deployment == name))
            action = "deployment.create" if found is None else "deployment.change"
            self._audit.record(
                who=by,
                action=action,
                target=name,
                request_id=request_id,
                detail={"policy": spec.get("policy")},
                connection=connection,
            )
            return get(connection, name), found is None

    def get(self, name: str) -> Deployment:
        """Return a deployment.

        Raises
        ------
        NotFoundError
            If there is none of that name.
        """
        with self._database.read() as connection:
            return get(connection, name)

    def page(self, *, after: str = "", limit: int = 100) -> list[Deployment]:
        """Return deployments in order of their names, behind a name."""
        statement = (
            sa.select(deployments).where(deployments.c.name > after).order_by(deployments.c.name).limit(limit)
        )
        with self._database.read() as connection:
            return [as_deployment(row) for row in connection.execute(statement)]

    def remove(
        self, name: str, *, by: str, expected: Expected = ANY, request_id: str | None = None
    ) -> Deployment:
        """Remove a deployment with its history and windows; return what it was.

        Raises
        ------
        NotFoundError, PreconditionError
            If there is none of that name, or another revision stands.
        """
        with self._database.write() as connection:
            found = there(connection, name)
            expect(f"deployment {name}", "revision", found.revision, expected)
            connection.execute(sa.delete(deployments).where(deployments.c.name == name))
            self._audit.record(
                who=by,
                action="deployment.remove",
                target=name,
                request_id=request_id,
                detail={"version": found.version},
                connection=connection,
            )
            return found

    def current(self, name: str) -> Current | None:
        """Return what is current in one read by primary key, on SQLite cheap enough for an event loop."""
        return self._reader.read(name)

    def heads(self, names: Sequence[str]) -> dict[str, int]:
        """Return the revisions of deployments, for who waits for a change."""
        columns = deployments.c.name, deployments.c.revision
        with self._database.read() as connection:
            rows = connection.execute(sa.select(*columns).where(deployments.c.name.in_(names)))
            return {row.name: row.revision for row in rows}

    def promote(
        self,
        name: str,
        new: NewVersion,
        *,
        expected: Expected = ANY,
        state: RefreshState | None = None,
        observed: Mapping[int, Mapping[str, Any]] | None = None,
        counters: Amounts | None = None,
        request_id: str | None = None,
    ) -> Version:
        """Make a placement the current one; the one that runs already stays the version that it is.

        Parameters
        ----------
        expected
            Version that must be current; None if there must be none yet.
        state
            The controller's state after it, based on the serial that it has read: its promotion counts only
            while nobody else has changed the deployment.
        observed
            What was observed of other versions, written in the same transaction.
        counters
            What to count in the same transaction.

        Raises
        ------
        NotFoundError
            If there is no such deployment.
        PreconditionError
            If another version is current, or the controller's state outdated.
        """
        with self._database.write() as connection:
            found = there(connection, name)
            expect(f"the placement of {name}", "version", found.version, expected)
            if state is not None:
                expect(f"the refresh of {name}", "state", found.refresh.serial, state.serial)
            for version, values in (observed or {}).items():
                observe(connection, name, version, values)
            running = None if found.version is None else version_of(connection, name, found.version)
            if running is not None and running.placement_digest == new.digest:
                return running
            made = append(connection, name, new, (found.version or 0) + 1)
            after = replace(
                found.refresh if state is None else state,
                serial=found.refresh.serial + 1,
                owner=found.refresh.owner,
                beat=found.refresh.beat,
                watch=watch_of(connection, name, made.version, found.version),
            )
            update(
                connection,
                name,
                version=made.version,
                revision=found.revision + 1,
                refresh=after.to_dict(),
                updated_at=made.promoted_at,
            )
            add_counters(connection, counters or {})
            self._audit_promotion(connection, made, found.version, request_id)
            return made

    def _audit_promotion(
        self, connection: sa.Connection, made: Version, before: int | None, request_id: str | None
    ) -> None:
        action = "deployment.rollback" if made.cause is Cause.ROLLBACK else "deployment.promote"
        detail = {
            "version": made.version,
            "from_version": before,
            "of_version": made.of_version,
            "cause": str(made.cause),
            "why": made.why,
            "placement_id": made.placement_digest,
            "solve_id": made.job_id,
        }
        self._audit.record(
            who=made.by,
            action=action,
            target=made.deployment,
            request_id=request_id,
            detail=detail,
            connection=connection,
        )

    def version(self, name: str, version: int) -> Version | None:
        """Return a version of a deployment's placement."""
        with self._database.read() as connection:
            return version_of(connection, name, version)

    def versions(self, name: str, *, before: int | None = None, limit: int = 100) -> list[Version]:
        """Return versions, newest first, with numbers below `before`."""
        statement = sa.select(versions_table).where(versions_table.c.deployment == name)
        if before is not None:
            statement = statement.where(versions_table.c.version < before)
        statement = statement.order_by(versions_table.c.version.desc()).limit(limit)
        with self._database.read() as connection:
            return [as_version(row) for row in connection.execute(statement)]

    # -- the controllers' part -------------------------------------------------------------------------------

    def states(self) -> dict[str, RefreshState]:
        """Return the state of every deployment's refresh."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(deployments.c.name, deployments.c.refresh))
            return {name: RefreshState.of(values) for name, values in rows}

    def take(self, name: str, owner: str, *, seen: tuple[str | None, int]) -> RefreshState | None:
        """Take the lease of a deployment if it still stands as seen (owner, beat); None if it does not."""
        with self._database.write() as connection:
            found = locked(connection, name)
            if found is None or (found.refresh.owner, found.refresh.beat) != seen:
                return None
            taken = replace(found.refresh, owner=owner, beat=found.refresh.beat + 1)
            update(connection, name, refresh=taken.to_dict())
            return taken

    def renew(self, name: str, owner: str) -> bool:
        """Give a sign of life; False if the lease is somebody else's by now."""
        with self._database.write() as connection:
            found = locked(connection, name)
            if found is None or found.refresh.owner != owner:
                return False
            state = replace(found.refresh, beat=found.refresh.beat + 1)
            update(connection, name, refresh=state.to_dict())
            return True

    def release(self, name: str, owner: str) -> None:
        """Give the lease back, if it is still one's own."""
        with self._database.write() as connection:
            found = locked(connection, name)
            if found is not None and found.refresh.owner == owner:
                state = replace(found.refresh, owner=None, beat=found.refresh.beat + 1)
                update(connection, name, refresh=state.to_dict())

    def save(
        self,
        name: str,
        state: RefreshState,
        *,
        drift: Mapping[str, Any] | None = None,
        observed: Mapping[int, Mapping[str, Any]] | None = None,
        counters: Amounts | None = None,
        audit: tuple[str, Mapping[str, Any]] | None = None,
    ) -> RefreshState | None:
        """Write the controller's state if the serial and the owner that it is based on still stand.

        Parameters
        ----------
        drift, observed, counters
            What to write in the same transaction: the drift, what was observed of versions, what to count.
        audit
            Action and detail of an entry of the audit log.

        Returns
        -------
        RefreshState
            As written, with its new serial; None, and nothing written, if the deployment has changed.
        """
        with self._database.write() as connection:
            found = locked(connection, name)
            if found is None or (found.refresh.serial, found.refresh.owner) != (state.serial, state.owner):
                return None
            written = replace(state, serial=state.serial + 1, beat=found.refresh.beat)
            values: dict[str, Any] = {"refresh": written.to_dict()}
            if drift is not None:
                values["drift"] = dict(drift)
            update(connection, name, **values)
            for version, seen in (observed or {}).items():
                observe(connection, name, version, seen)
            add_counters(connection, counters or {})
            if audit is not None:
                action, detail = audit
                self._audit.record(
                    who="controller", action=action, target=name, detail=detail, connection=connection
                )
            return written
