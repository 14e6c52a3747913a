"""Engines for the two databases, and how each is brought up to date, by one process at a time."""

from __future__ import annotations

import fcntl
import os
import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import sqlalchemy as sa

from placement.errors import ServiceError
from service.state.upgrade import is_current, upgrade

__all__ = ["BEGIN", "postgresql_engine", "prepare", "sqlite_engine"]

BEGIN = "begin"
"""Execution option: how a transaction of SQLite begins."""
BUSY_TIMEOUT_S = 10.0
RETRY_S = (0.0005, 0.0015)
CONNECT_TIMEOUT_S = 10
OLDEST_SQLITE = (3, 35)
"""The first with RETURNING."""

COMMON: dict[str, Any] = {
    "hide_parameters": True,  # some are hashes of tokens: they stay out of messages
    "json_serializer": lambda value: orjson.dumps(value).decode(),
    "json_deserializer": orjson.loads,
}
ONE_CONNECTION: dict[str, Any] = {"poolclass": sa.NullPool}


def sqlite_engine(url: sa.URL, *, foreign_keys: bool = True, pool: dict[str, Any] | None = None) -> sa.Engine:
    """Return an engine whose transactions begin as they say and are on disk once committed."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise ServiceError(f"SQLite {sqlite3.sqlite_version} is too old: use a Python with 3.35 or newer")
    # Without the driver's own transactions (isolation_level), which begin too late and never for reads.
    arguments = {"timeout": BUSY_TIMEOUT_S, "isolation_level": None, "check_same_thread": False}
    pool = {"pool_size": 8, "max_overflow": 56} if pool is None else pool
    engine = sa.create_engine(url, connect_args=arguments, **COMMON, **pool)

    def configure(connection: sqlite3.Connection, record: object) -> None:
        connection.execute(f"PRAGMA foreign_keys={'ON' if foreign_keys else 'OFF'}").close()
        connection.execute("PRAGMA synchronous=FULL").close()

    sa.event.listen(engine, "connect", configure)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _begin(connection: sa.Connection) -> None:
    statement = connection.get_execution_options().get(BEGIN, "BEGIN")
    if statement == "BEGIN":
        connection.exec_driver_sql(statement)
    else:
        _begin_in_turn(connection, statement)


def _begin_in_turn(connection: sa.Connection, statement: str) -> None:
    """Begin as soon as no other process writes, or give up after a while.

    SQLite itself looks after ever longer pauses: a process that writes now and then would starve beside one
    that writes all the time.
    """
    raw: Any = connection.connection.dbapi_connection
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    raw.execute("PRAGMA busy_timeout=0").close()
    try:
        while _is_busy(raw, statement) and time.monotonic() < deadline:
            time.sleep(random.uniform(*RETRY_S))
        if not raw.in_transaction:
            connection.exec_driver_sql(statement)  # fails once more, and says why in the usual way
    finally:
        raw.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000:.0f}").close()


def _is_busy(raw: sqlite3.Connection, statement: str) -> bool:
    try:
        raw.execute(statement).close()
    except sqlite3.OperationalError as exc:
        return exc.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
    return False


def postgresql_engine(url: sa.URL, *, pool: dict[str, Any] | None = None) -> sa.Engine:
    """Return an engine that notices connections which a restart of the server has cut."""
    arguments = {"connect_timeout": CONNECT_TIMEOUT_S, "application_name": "moe-placement", **url.query}
    pool = {"pool_size": 24, "max_overflow": 8, "pool_pre_ping": True} if pool is None else pool
    return sa.create_engine(url, connect_args=arguments, **COMMON, **pool)


def prepare(url: sa.URL, *, may_upgrade: bool) -> None:
    """Bring the schema up to date if it is not.

    Raises
    ------
    ServiceError
        If it is newer than this release, or old and not to be upgraded.
    """
    is_ready, bring_up = (
        (_is_ready_sqlite, _upgrade_sqlite)
        if url.get_backend_name() == "sqlite"
        else (_is_ready_postgresql, _upgrade_postgresql)
    )
    if is_ready(url):
        return
    if not may_upgrade:
        raise ServiceError(
            "the database is empty or of an older release: start a server with upgrades allowed once"
        )
    bring_up(url)


def _is_ready_sqlite(url: sa.URL) -> bool:
    path = Path(url.database or "")
    if not path.is_file() or path.stat().st_size == 0:
        return False  # and not made by looking
    with _passing(sqlite_engine(url, pool=ONE_CONNECTION)) as connection:
        is_wal = connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        return is_current(connection) and is_wal


def _upgrade_sqlite(url: sa.URL) -> None:
    path = Path(url.database or "")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        _set_wal(path)
        # Tables are rebuilt by dropping the old one, which must not take the rows that point to it along.
        engine = sqlite_engine(url, foreign_keys=False, pool=ONE_CONNECTION)
        with _passing(engine.execution_options(**{BEGIN: "BEGIN IMMEDIATE"})) as connection:
            upgrade(connection)
            connection.commit()


def _set_wal(path: Path) -> None:
    """Let readers go on while somebody writes; the file remembers it."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=WAL").close()
    except sqlite3.DatabaseError as exc:
        raise ServiceError(str(exc)) from exc
    finally:
        connection.close()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock of a database's upgrade, which is freed even when the process is killed."""
    descriptor = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_ready_postgresql(url: sa.URL) -> bool:
    with _passing(postgresql_engine(url, pool=ONE_CONNECTION)) as connection:
        return is_current(connection)


def _upgrade_postgresql(url: sa.URL) -> None:
    with _passing(postgresql_engine(url, pool=ONE_CONNECTION)) as connection:
        upgrade(connection)
        connection.commit()


@contextmanager
def _passing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Give the only connection of an engine that is not used again."""
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()
