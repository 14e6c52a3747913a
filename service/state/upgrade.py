"""The schema of a database, and how to bring it up to date; loads alembic only when there is work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from placement.errors import ServiceError
from service.state import migrations
from service.state.tables import METADATA

if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationContext

__all__ = ["is_current", "revision_of", "upgrade"]

FOLDER = Path(migrations.__file__).parent
VERSION_TABLE = "alembic_version"
ADVISORY_LOCK = 0x6D6F65_706C  # "moepl"; any number that nobody else in the database uses


def revision_of(connection: sa.Connection) -> str | None:
    """Return the schema's revision, None in an empty database."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    found: str | None = connection.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
    return found


def is_current(connection: sa.Connection) -> bool:
    """Return whether the schema is this release's.

    Raises
    ------
    ServiceError
        If it is newer.
    """
    revision = revision_of(connection)
    if revision is not None and revision not in migrations.REVISIONS:
        raise ServiceError(
            f"the database has schema {revision}, newer than {migrations.HEAD} of this release: "
            "install the release that wrote it, or restore the backup from before its upgrade"
        )
    return revision == migrations.HEAD


def upgrade(connection: sa.Connection) -> None:
    """Run the migrations that are missing, all of them in the connection's transaction or none."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ADVISORY_LOCK)))
    if is_current(connection):  # somebody else was faster
        return
    _run(connection)
    broken = (
        connection.exec_driver_sql("PRAGMA foreign_key_check").first() if _is_sqlite(connection) else None
    )
    if broken is not None:
        raise ServiceError(f"the upgrade would leave rows of {broken[0]} that name what is not there")


def _is_sqlite(connection: sa.Connection) -> bool:
    return connection.dialect.name == "sqlite"


def _run(connection: sa.Connection) -> None:
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(FOLDER))

    def steps(revision: Any, context: MigrationContext) -> Any:
        return script._upgrade_revs("head", revision)

    with EnvironmentContext(Config(), script, fn=steps) as environment:
        environment.configure(connection=connection, target_metadata=METADATA, version_table=VERSION_TABLE)
        environment.run_migrations()
