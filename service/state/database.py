"""The database: SQLite in a file by default, PostgreSQL where several machines share the state."""

from __future__ import annotations

import sqlite3
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import sqlalchemy as sa

from placement.errors import ServiceError
from service.errors import UnavailableError
from service.state.engines import BEGIN, postgresql_engine, prepare, sqlite_engine

__all__ = ["Database", "open_database"]

WANTED = "give sqlite:////path/to/state.db or postgresql+psycopg://user:password@host/name"

_WRITE_LOCKS: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
"""One for each database file: threads of this process wait here instead of polling the file's own lock."""


class Database:
    """An engine with the two ways to use it.

    Parameters
    ----------
    engine
        As `open_database` makes it.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self._closed = False
        self._readers: sa.Engine = engine
        self._writers: sa.Engine = engine
        self._turn: AbstractContextManager[object] = nullcontext()
        if self.is_sqlite:
            self._writers = engine.execution_options(**{BEGIN: "BEGIN IMMEDIATE"})
            self._turn = _WRITE_LOCKS[str(Path(engine.url.database or "").resolve())]
        else:
            self._readers = engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )

    @property
    def is_sqlite(self) -> bool:
        """Whether it is SQLite: reads are then cheap enough for the event loop."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Give a connection for reading one consistent state.

        Raises
        ------
        UnavailableError
            If the database cannot be reached.
        """
        with self._open(), self._readers.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Give a connection in a transaction that is committed at the end; writers of SQLite wait in line.

        Raises
        ------
        UnavailableError
            If the database cannot be reached, stays locked by another process, or its disk is full.
        """
        with self._open(), self._turn, self._writers.begin() as connection:
            yield connection

    @contextmanager
    def _open(self) -> Iterator[None]:
        if self._closed:
            raise UnavailableError("the database is closed: the process is on its way out")
        pool = self.engine.pool
        try:
            yield
        except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as exc:
            if _is_own_fault(exc):
                raise
            raise UnavailableError(f"the database cannot be used now: {_reason(exc)}") from exc
        finally:
            self._drop(pool)

    def _drop(self, pool: sa.Pool) -> None:
        if self._closed:  # meanwhile: nobody else takes care of the connection that came back
            pool.dispose()

    def close(self) -> None:
        """Close every connection; those in use are closed as they come back."""
        self._closed = True
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
    parsed = _parsed(url)
    shown = parsed.render_as_string(hide_password=True)
    try:
        prepare(parsed, may_upgrade=upgrade)
    except (sa.exc.DBAPIError, OSError) as exc:
        raise ServiceError(f"{shown}: the database cannot be opened: {_reason(exc)}") from exc
    except ServiceError as exc:
        raise ServiceError(f"{shown}: {exc}") from exc
    is_sqlite = parsed.get_backend_name() == "sqlite"
    return Database(sqlite_engine(parsed) if is_sqlite else postgresql_engine(parsed))


def _parsed(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        raise ServiceError(f"the database's URL is none: {WANTED}") from None  # it may hold a password
    if parsed.drivername in {"postgresql", "postgres"}:
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in {"sqlite", "postgresql+psycopg"}:
        raise ServiceError(f"no database of kind {parsed.drivername!r} can be used: {WANTED}")
    if parsed.drivername == "sqlite" and parsed.database in {None, "", ":memory:"}:
        raise ServiceError(f"the state needs a file that other processes can open: {WANTED}")
    return parsed


def _is_own_fault(exc: sa.exc.SQLAlchemyError) -> bool:
    """Return whether a statement is wrong, which SQLite's driver takes for an operational error too."""
    code = getattr(getattr(exc, "orig", None), "sqlite_errorcode", None)
    return code is not None and code & 0xFF == sqlite3.SQLITE_ERROR


def _reason(exc: BaseException) -> str:
    """Return the driver's own words, without SQLAlchemy's statement and links."""
    return " ".join(str(getattr(exc, "orig", None) or exc).split())
