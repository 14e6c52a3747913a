"""What is kept for how long: finished jobs with their events, load windows, and artifacts that nothing names.

The foreign keys decide what is named. A request that is about to name an artifact has just used it
(`ArtifactStore.touch`, `ArtifactFiles.keep`), and what was used lately is left alone, so that the two never
race.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from dataclasses import dataclass, replace
from functools import partial

import anyio.to_thread
import sqlalchemy as sa

from placement.errors import ServiceError
from service.artifacts import ArtifactFiles
from service.errors import UnavailableError
from service.state.database import Database
from service.state.records import TERMINAL
from service.state.tables import artifacts, deployment_versions, deployments, jobs, load_windows, workers

__all__ = ["GRACE_S", "Removed", "compact", "keep_house", "remove_old"]

_log = logging.getLogger(__name__)

GRACE_S = 3600.0
"""An artifact that was used in the last hour may be about to be named."""
DAY_S = 86400.0
FIRST_AFTER_S = 600.0
BATCH = 200
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What went.

    Parameters
    ----------
    artifacts
        Digests of the artifacts.
    artifact_bytes
        What those took.
    orphans
        Files that no artifact named: a crash came between storing and naming them.
    """

    jobs: int = 0
    windows: int = 0
    workers: int = 0
    artifacts: tuple[str, ...] = ()
    artifact_bytes: int = 0
    orphans: int = 0


def remove_old(
    database: Database, files: ArtifactFiles, *, older_than_s: float, dry_run: bool = False
) -> Removed:
    """Remove what ended, came or was used longer ago than `older_than_s`, and is named by nothing that stays.

    Parameters
    ----------
    dry_run
        Only tell what would go.
    """
    before = time.time() - older_than_s
    removed = _find_rows(database, before) if dry_run else _remove_rows(database, before)
    orphans = _orphans(database, files) - set(removed.artifacts)
    if dry_run:
        return replace(removed, orphans=sum(files.age_s(digest) >= GRACE_S for digest in orphans))
    for digest in removed.artifacts:
        files.remove_unused(digest, unused_s=GRACE_S)
    gone = sum(files.remove_unused(digest, unused_s=GRACE_S) for digest in orphans)
    files.drop_copies(unused_s=max(older_than_s, GRACE_S))
    return replace(removed, orphans=gone)


def compact(database: Database) -> None:
    """Give the room of removed rows back to the disk; SQLite's writers wait meanwhile.

    Raises
    ------
    UnavailableError
        If others keep the database busy.
    """
    if not database.is_sqlite:
        return  # PostgreSQL does so by itself
    connection = database.engine.raw_connection()
    try:
        cursor = connection.cursor()
        cursor.execute("VACUUM")
        cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        cursor.close()
    except database.engine.dialect.loaded_dbapi.OperationalError as exc:
        raise UnavailableError(f"the database could not be compacted: {exc}; try again later") from exc
    finally:
        connection.close()


async def keep_house(database: Database, files: ArtifactFiles, retention_days: float) -> None:
    """Remove what is old once a day, for as long as the server runs."""
    step = partial(remove_old, database, files, older_than_s=retention_days * DAY_S)
    await asyncio.sleep(FIRST_AFTER_S)
    while True:
        try:
            removed = await anyio.to_thread.run_sync(step, abandon_on_cancel=True)
            _log.info(
                "removed %d jobs, %d windows, %d artifacts",
                removed.jobs,
                removed.windows,
                len(removed.artifacts),
            )
        except (ServiceError, OSError, sa.exc.SQLAlchemyError) as exc:
            _log.warning("old state could not be removed: %s", " ".join(str(exc).split()))
        await asyncio.sleep(DAY_S)


def _remove_rows(database: Database, before: float) -> Removed:
    """Remove in many short transactions: others want to write, too."""
    removed = Removed()
    while True:
        with database.write() as connection:
            some = _remove_some(connection, before)
        if not (some.jobs or some.windows or some.artifacts):
            return removed
        removed = _sum(removed, some)


def _find_rows(database: Database, before: float) -> Removed:
    """Return what `_remove_rows` would remove."""
    with database.read() as connection:
        artifacts_ = {row.digest: row.size_bytes for row in connection.execute(_free(connection, before))}
        return Removed(
            jobs=_count(connection, jobs, _is_old_job(before)),
            windows=_count(connection, load_windows, load_windows.c.received_at < before),
            workers=_count(connection, workers, workers.c.seen_at < before),
            artifacts=tuple(artifacts_),
            artifact_bytes=sum(artifacts_.values()),
        )


def _count(connection: sa.Connection, table: sa.Table, which: sa.ColumnElement[bool]) -> int:
    return int(connection.scalar(sa.select(sa.func.count()).select_from(table).where(which)) or 0)


def _remove_some(connection: sa.Connection, before: float) -> Removed:
    num_jobs = _remove_batch(connection, jobs, _is_old_job(before))
    num_windows = _remove_batch(connection, load_windows, load_windows.c.received_at < before)
    gone = {} if num_jobs or num_windows else _remove_artifacts(connection, before)
    dead = sa.delete(workers).where(workers.c.seen_at < before)
    return Removed(
        jobs=num_jobs,
        windows=num_windows,
        workers=connection.execute(dead).rowcount,
        artifacts=tuple(gone),
        artifact_bytes=sum(gone.values()),
    )


def _sum(first: Removed, second: Removed) -> Removed:
    return Removed(
        jobs=first.jobs + second.jobs,
        windows=first.windows + second.windows,
        workers=first.workers + second.workers,
        artifacts=first.artifacts + second.artifacts,
        artifact_bytes=first.artifact_bytes + second.artifact_bytes,
    )


def _is_old_job(before: float) -> sa.ColumnElement[bool]:
    """Return the condition of finished jobs but those that versions of a deployment came from."""
    named = sa.select(deployment_versions.c.job_id).where(deployment_versions.c.job_id.is_not(None))
    return sa.and_(
        jobs.c.status.in_([status.value for status in TERMINAL]),
        jobs.c.ended_at < before,
        jobs.c.id.not_in(named),
    )


def _remove_batch(connection: sa.Connection, table: sa.Table, which: sa.ColumnElement[bool]) -> int:
    """Remove some rows; events go along with their jobs."""
    some = sa.select(table.c.number).where(which).limit(BATCH)
    return connection.execute(sa.delete(table).where(table.c.number.in_(some))).rowcount


def _free(connection: sa.Connection, before: float) -> sa.Select[tuple[str, int]]:
    """Return the query for artifacts that were not used lately, and that nothing that stays names."""
    naming = [jobs.c.trace_digest, jobs.c.start_digest, jobs.c.incumbent_digest, jobs.c.placement_digest]
    stays = sa.not_(sa.func.coalesce(_is_old_job(before), sa.false()))
    by_jobs = [sa.select(column).where(column.is_not(None), stays) for column in naming]
    by_versions = sa.select(deployment_versions.c.placement_digest)
    return sa.select(artifacts.c.digest, artifacts.c.size_bytes).where(
        artifacts.c.used_at < _unused_since(before),
        artifacts.c.digest.not_in(sa.union_all(*by_jobs, by_versions)),
        artifacts.c.digest.not_in(_named_in_documents(connection)),
    )


def _unused_since(before: float) -> float:
    return min(before, time.time() - GRACE_S)


def _remove_artifacts(connection: sa.Connection, before: float) -> dict[str, int]:
    """Remove the rows of some artifacts that nothing names; return their digests and sizes."""
    found = connection.execute(_free(connection, before).limit(BATCH)).all()
    return {row.digest: row.size_bytes for row in found if _remove_artifact(connection, row.digest, before)}


def _named_in_documents(connection: sa.Connection) -> set[str]:
    """Return the artifacts that deployments name in what callers gave."""
    rows = connection.execute(sa.select(deployments.c.spec, deployments.c.refresh))
    return {digest for row in rows for digest in _DIGEST.findall(json.dumps(list(row)))}


def _remove_artifact(connection: sa.Connection, digest: str, before: float) -> bool:
    statement = sa.delete(artifacts).where(
        artifacts.c.digest == digest, artifacts.c.used_at < _unused_since(before)
    )
    try:
        with connection.begin_nested():
            return connection.execute(statement).rowcount == 1
    except sa.exc.IntegrityError:
        return False  # somebody has just named it


def _orphans(database: Database, files: ArtifactFiles) -> set[str]:
    # In this order: what is stored after the look is not looked at.
    stored = set(files.digests())
    with database.read() as connection:
        return stored - set(connection.scalars(sa.select(artifacts.c.digest)))
