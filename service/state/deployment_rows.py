"""The rows of deployments and their versions: read, locked, compared, written, within a transaction."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from service.deployments.records import Cause, Deployment, NewVersion, RefreshState, Version
from service.errors import NotFoundError, PreconditionError
from service.state.tables import deployment_versions as versions_table
from service.state.tables import deployments, load_windows

__all__ = [
    "ANY",
    "Anything",
    "Expected",
    "append",
    "as_deployment",
    "as_version",
    "expect",
    "get",
    "locked",
    "observe",
    "there",
    "update",
    "version_of",
    "watch_of",
]


class Anything:
    """The type of `ANY`."""


ANY = Anything()
"""Expect nothing: change whatever stands there."""

Expected = int | None | Anything


def locked(connection: sa.Connection, name: str) -> Deployment | None:
    """Return a deployment that nobody else changes until the end of the transaction."""
    statement = sa.select(deployments).where(deployments.c.name == name).with_for_update()
    row = connection.execute(statement).one_or_none()
    return None if row is None else as_deployment(row)


def there(connection: sa.Connection, name: str) -> Deployment:
    """Return a locked deployment; raises `NotFoundError` if there is none."""
    found = locked(connection, name)
    if found is None:
        raise NotFoundError(f"there is no deployment {name!r}; make it with PUT /v1/deployments/{name}")
    return found


def get(connection: sa.Connection, name: str) -> Deployment:
    """Return a deployment; raises `NotFoundError` if there is none."""
    row = connection.execute(sa.select(deployments).where(deployments.c.name == name)).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no deployment {name!r}; make it with PUT /v1/deployments/{name}")
    return as_deployment(row)


def expect(what: str, name: str, stands: int | None, expected: Expected) -> None:
    """Compare what stands there with what a change was made for; raises `PreconditionError`."""
    if isinstance(expected, Anything) or stands == expected:
        return
    now = f"has {name} {stands}" if stands is not None else f"has no {name} yet"
    wanted = f"{name} {expected}" if expected is not None else "none"
    raise PreconditionError(
        f"{what} {now}, the request was made for {wanted}: somebody else was faster; read it again",
        current=stands,
    )


def update(connection: sa.Connection, name: str, **values: Any) -> None:
    """Write some columns of a deployment."""
    connection.execute(sa.update(deployments).where(deployments.c.name == name).values(**values))


def append(connection: sa.Connection, name: str, new: NewVersion, number: int) -> Version:
    """Write a version under its number."""
    values: dict[str, Any] = {
        "deployment": name,
        "version": number,
        "placement_digest": new.digest,
        "job_id": new.job_id,
        "cause": str(new.cause),
        "by": new.by,
        "why": new.why,
        "of_version": new.of_version,
        "predicted": new.predicted,
        "promoted_at": time.time(),
    }
    connection.execute(sa.insert(versions_table).values(values))
    return Version(**{**values, "cause": new.cause, "observed": None})


def watch_of(connection: sa.Connection, name: str, version: int, before: int | None) -> dict[str, Any]:
    """Say from which part of a window on a new version is observed."""
    newest = sa.select(sa.func.max(load_windows.c.number)).where(load_windows.c.deployment == name)
    return {"version": version, "previous": before, "after": connection.scalar(newest) or 0}


def observe(connection: sa.Connection, name: str, version: int, observed: Mapping[str, Any]) -> None:
    """Write what was observed of a version."""
    connection.execute(
        sa.update(versions_table)
        .where(versions_table.c.deployment == name, versions_table.c.version == version)
        .values(observed=dict(observed))
    )


def version_of(connection: sa.Connection, name: str, version: int) -> Version | None:
    """Return a version."""
    statement = sa.select(versions_table).where(
        versions_table.c.deployment == name, versions_table.c.version == version
    )
    row = connection.execute(statement).one_or_none()
    return None if row is None else as_version(row)


def as_version(row: sa.Row[Any]) -> Version:
    """Return the version of a row."""
    values = dict(row._mapping)
    return Version(**{**values, "cause": Cause(values["cause"])})


def as_deployment(row: sa.Row[Any]) -> Deployment:
    """Return the deployment of a row."""
    values = dict(row._mapping)
    return Deployment(**{**values, "refresh": RefreshState.of(values["refresh"])})
