"""The database: its transactions, what it refuses, and how it says so."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest
import sqlalchemy as sa

from placement.errors import ServiceError
from service.errors import UnavailableError
from service.state import engines
from service.state.database import Database, open_database
from service.state.tables import counters
from tests.service.postgres import Cluster


def value(connection: sa.Connection) -> float:
    """Return the only counter."""
    return float(connection.execute(sa.select(counters.c.value)).scalar_one())


def count_up(database: Database) -> None:
    """Read the counter and write the next number."""
    with database.write() as connection:
        found = connection.execute(sa.select(counters.c.value).with_for_update()).scalar_one()
        connection.execute(counters.update().values(value=found + 1))


@pytest.fixture
def counting(database: Database) -> Database:
    with database.write() as connection:
        connection.execute(counters.insert().values(name="n", labels="", value=0.0))
    return database


def test_writers_wait_in_line(counting: Database) -> None:
    """No step of many threads is lost."""
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(count_up, counting) for _ in range(80)]:
            done.result()
    with counting.read() as connection:
        assert value(connection) == 80


def test_a_failure_leaves_nothing(counting: Database) -> None:
    """What a transaction wrote before it failed is undone."""

    def fail() -> None:
        with counting.write() as connection:
            connection.execute(counters.update().values(value=7.0))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with counting.read() as connection:
        assert value(connection) == 0


def test_reads_see_one_state(counting: Database) -> None:
    """Whatever is written while they last, and they keep nobody from writing."""
    with counting.read() as connection:
        assert value(connection) == 0
        count_up(counting)
        assert value(connection) == 0
    with counting.read() as connection:
        assert value(connection) == 1


def test_reads_write_nothing(counting: Database) -> None:
    """What is changed in a read is not kept, or refused."""
    with suppress(sa.exc.InternalError), counting.read() as connection:
        connection.execute(counters.update().values(value=9.0))
    with counting.read() as connection:
        assert value(connection) == 0


def test_a_closed_database_says_so(database: Database) -> None:
    """Also to a reader that was in the middle, whose connection is closed as it ends."""
    with database.read() as connection:
        database.close()
        connection.execute(sa.select(counters)).all()
    with pytest.raises(UnavailableError, match="closed"), database.read():
        pass
    with pytest.raises(UnavailableError, match="closed"), database.write():
        pass
    database.close()


def test_a_wrong_statement_is_not_an_outage(database: Database) -> None:
    """Neither kind of database is said to be unavailable because of our own fault."""
    with pytest.raises(sa.exc.DBAPIError), database.read() as connection:
        connection.exec_driver_sql("SELECT nothing FROM nowhere")


def test_commits_are_on_disk(sqlite_url: str) -> None:
    """Write-ahead log, full synchronisation, foreign keys: on every connection."""
    with closing(open_database(sqlite_url)) as database, database.read() as first, database.read() as second:
        for connection in (first, second):
            found = [
                connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
                for name in ("journal_mode", "synchronous", "foreign_keys")
            ]
            assert found == ["wal", 2, 1]


def test_a_full_disk_is_an_outage(sqlite_url: str) -> None:
    """It is said in one line, and nothing of the transaction stays."""
    rows = [{"name": f"n{number}", "labels": "x" * 255, "value": 0.0} for number in range(2000)]

    def fill(database: Database) -> None:
        with database.write() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
            connection.execute(counters.insert(), rows)

    with closing(open_database(sqlite_url)) as database:
        with pytest.raises(UnavailableError, match="full"):
            fill(database)
        with database.read() as connection:
            assert connection.execute(sa.select(counters)).first() is None


def test_a_locked_file_is_an_outage(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once another process keeps it for too long; its readers go on."""
    monkeypatch.setattr(engines, "BUSY_TIMEOUT_S", 0.05)
    path = sqlite_url.removeprefix("sqlite:///")
    with closing(open_database(sqlite_url)) as database, closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UnavailableError, match="locked"), database.write():
            pass
        with database.read() as connection:
            assert connection.execute(sa.select(counters)).first() is None
        other.rollback()
        with database.write() as connection:
            connection.execute(counters.insert().values(name="n", labels="", value=0.0))


def test_the_file_is_its_owners(tmp_path: Path) -> None:
    """It holds hashes of tokens: whatever the mask says, nobody else reads it; folders are made."""
    path = tmp_path / "new" / "folder" / "state.db"
    mask = os.umask(0)
    try:
        open_database(f"sqlite:///{path}").close()
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("mysql://root:secret@localhost/x", "no database of kind 'mysql'"),
        ("postgresql+asyncpg://root:secret@localhost/x", "no database of kind"),
        ("/var/lib/state.db", "URL is none"),
        ("postgresql+psycopg://root:secret@localhost:port/x", "URL is none"),
        ("", "URL is none"),
    ],
)
def test_other_databases_are_refused(url: str, message: str) -> None:
    """In one line that says which there are, without any password."""
    with pytest.raises(ServiceError, match=message) as caught:
        open_database(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "sqlite:////path" in str(caught.value)


def test_an_unreachable_server_is_named_without_its_password(unused_tcp_port: int) -> None:
    """The URL is in the message, the password is not."""
    with pytest.raises(ServiceError, match=rf"127.0.0.1:{unused_tcp_port}/state.*cannot be opened") as caught:
        open_database(f"postgresql://ann:secret@127.0.0.1:{unused_tcp_port}/state")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def unused_tcp_port() -> int:
    """Port of the machine that no server has: below those that are given out."""
    return 1


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    """It is named, and stays as it was."""
    path = tmp_path / "state.db"
    path.write_bytes(b"not a database at all, but long enough to be looked at " * 4)
    before = path.read_bytes()
    with pytest.raises(ServiceError, match=r"state\.db.*not a database"):
        open_database(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_short_urls_of_postgresql_are_taken(postgresql_url: str) -> None:
    """``postgresql://`` as most hosts hand it out."""
    url = postgresql_url.replace("postgresql+psycopg://", "postgresql://")
    with closing(open_database(url, upgrade=False)) as database:
        assert not database.is_sqlite


def test_a_server_that_comes_back_is_used_again(cluster: Cluster, postgresql_url: str) -> None:
    """Connections that a restart has cut are replaced without an error."""
    with closing(open_database(postgresql_url)) as database:
        with database.read() as connection:
            connection.execute(sa.select(counters)).all()
        cluster.stop()
        with pytest.raises(UnavailableError), database.read():
            pass
        cluster.start()
        with database.write() as connection:
            connection.execute(counters.insert().values(name="n", labels="", value=1.0))
        cluster.kill()
        cluster.start()
        with database.read() as connection:
            assert value(connection) == 1


def test_a_start_with_a_current_schema_is_light(database_url: str) -> None:
    """Neither alembic nor anything for arrays or the web is loaded."""
    code = (
        "import sys; from service.state.database import open_database; "
        "from service.state import jobs, workers; open_database(sys.argv[1]).close(); "
        "print(*sorted({'alembic', 'mako', 'numpy', 'fastapi', 'pydantic'} & set(sys.modules)))"
    )
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", code, database_url]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_threads_of_two_openings_share_the_line(sqlite_url: str) -> None:
    """Two `Database` objects on one file wait for each other, however the path is written."""
    other = sqlite_url.replace("/state.db", "/../" + Path(sqlite_url).parent.name + "/state.db")
    with closing(open_database(sqlite_url)) as first, closing(open_database(other)) as second:
        inside = threading.Event()
        order = []

        def late() -> None:
            inside.wait()
            with second.write():
                order.append("second")

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(late)
            with first.write():
                inside.set()
                order.append("first")
            done.result()
        assert order == ["first", "second"]
