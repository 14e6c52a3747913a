"""The database: SQLite in a file by default, PostgreSQL where several machines share the state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

__all__ = ["Database", "open_database"]


class Database:
    """An engine with the two ways to use it.

    Parameters
    ----------
    engine
        As `open_database` makes it.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    @property
    def is_sqlite(self) -> bool:
        """Whether it is SQLite: reads are then cheap enough for the event loop."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Give a connection for reading one consistent state."""
        raise NotImplementedError

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Give a connection in a transaction that is committed at the end; writers of SQLite wait in line."""
        raise NotImplementedError

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def open_database(url: str, *, upgrade: bool = True) -> Database:
    """Connect, and bring the schema up to date.

    Parameters
    ----------
    url
        ``sqlite:////path/state.db`` or ``postgresql+psycopg://...``.
    upgrade
        Whether to run the migrations that are missing (one process at a time does); otherwise an old schema
        is an error.

    Raises
    ------
    ServiceError
        If it cannot be reached, is newer than this release, or is old and not to be upgraded.
    """
    raise NotImplementedError
