"""Upgrades: from the first release's state on, whole or not at all, by one process at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from placement.errors import ServiceError
from service.state import migrations, upgrade
from service.state.database import Database, open_database
from service.state.jobs import JobStore
from service.state.records import JobKind, JobStatus, Outcome
from service.state.tables import METADATA
from service.state.workers import WorkerStore
from tests.service.postgres import Cluster
from tests.service.state.actors import said, start
from tests.service.state.history import ROWS_0001, restore_postgresql, restore_sqlite
from tests.service.state.samples import new_job

Empty = Callable[[], str]

SECOND = '''"""What a later release may do: a table rebuilt, a column renamed, a value computed."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.batch_alter_table("jobs") as table:
        table.add_column(sa.Column("colour", sa.String(8), nullable=False, server_default="blue"))
        table.alter_column("cpus", new_column_name="threads")
    op.execute("UPDATE jobs SET colour = 'red' WHERE status = 'running'")
    {then}
'''


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Empty]:
    """Make URLs of databases with nothing in them."""
    made: list[str] = []
    cluster: Cluster | None = None
    if request.param == "postgresql":
        cluster = request.getfixturevalue("cluster")

    def make() -> str:
        name = f"empty_{uuid4().hex}"
        if cluster is None:
            return f"sqlite:///{tmp_path / name}.db"
        made.append(name)
        return cluster.create(name)

    yield make
    for name in made:
        assert cluster is not None
        cluster.drop(name)


@pytest.fixture
def first_release(empty: Empty) -> str:
    """State of the first release with a row in every table."""
    url = empty()
    if url.startswith("sqlite"):
        return restore_sqlite("0001", Path(url.removeprefix("sqlite:///")))
    restore_postgresql("0001", url)
    return url


@pytest.fixture
def later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Pretend to be a release with one more migration."""

    def pretend(then: str) -> None:
        folder = tmp_path / "migrations"
        shutil.copytree(upgrade.FOLDER, folder)
        (folder / "versions" / "0002_later.py").write_text(SECOND.format(then=then), encoding="utf-8")
        monkeypatch.setattr(upgrade, "FOLDER", folder)
        monkeypatch.setattr(migrations, "REVISIONS", (*migrations.REVISIONS, "0002"))
        monkeypatch.setattr(migrations, "HEAD", "0002")

    return pretend


def rows_of(database: Database, table: str) -> list[dict[str, Any]]:
    """Return all rows as they are, in order of their keys."""
    with database.read() as connection:
        found = sa.Table(table, sa.MetaData(), autoload_with=connection)
        return [
            dict(row) for row in connection.execute(sa.select(found).order_by(*found.primary_key)).mappings()
        ]


def plain(url: str) -> sa.Connection:
    """Return a connection past our own way to open."""
    return sa.create_engine(url, poolclass=sa.NullPool).connect()


def set_revision(url: str, revision: str) -> None:
    """Say that a database has a schema."""
    with closing(open_database(url)) as database, database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :r"), {"r": revision})


def test_the_list_of_revisions_is_the_history() -> None:
    """In order, one after the other, ending with what this release works with."""
    script = ScriptDirectory(str(upgrade.FOLDER))
    history = [revision.revision for revision in script.walk_revisions()]
    assert tuple(reversed(history)) == migrations.REVISIONS
    assert script.get_heads() == [migrations.HEAD]


@pytest.mark.parametrize("origin", ["nothing", "first release"])
def test_migrations_make_the_tables(empty: Empty, origin: str, request: pytest.FixtureRequest) -> None:
    """What they lead to, from nothing or from the first release, is what the code describes."""
    url = empty() if origin == "nothing" else request.getfixturevalue("first_release")
    with closing(open_database(url)) as database, database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, METADATA) == []
        names = set(sa.inspect(connection).get_table_names())
    assert names == {*METADATA.tables, upgrade.VERSION_TABLE}


def test_the_first_releases_state_is_read(first_release: str) -> None:
    """Every row of every table, after all upgrades since."""
    with closing(open_database(first_release)) as database, database.read() as connection:
        for table in METADATA.sorted_tables:
            wanted = ROWS_0001[table.name]
            found = connection.execute(sa.select(table).order_by(*table.primary_key)).mappings().all()
            assert [
                {name: row[name] for name in want} for row, want in zip(found, wanted, strict=True)
            ] == wanted


def test_the_first_releases_jobs_go_on(first_release: str) -> None:
    """What waited is claimed, what ran is watched, keys are known, numbers count on."""
    with closing(open_database(first_release)) as database:
        store = JobStore(database)
        (lease,) = store.leases()
        assert (lease.worker, lease.attempt, lease.beat) == ("w-1", 2, 17)
        assert store.retire(lease) is JobStatus.STOPPED
        stopped = store.get(lease.job_id)
        assert stopped is not None
        assert stopped.placement_digest == stopped.incumbent_digest is not None
        claim = store.claim("w-2", cpus=1)
        assert claim is not None
        assert claim.job.spec == ROWS_0001["jobs"][0]["spec"]
        assert store.finish(claim, Outcome(status=JobStatus.SUCCEEDED))
        again, new = store.submit(
            [
                new_job(claim.job.caller, request_hash=claim.job.request_hash, idempotency_key=key)
                for key in ("key", "another")
            ]
        )
        assert (again.created, again.job.id, again.conflict) == (False, claim.job.id, False)
        assert new.created
        assert new.job.number > max(row["number"] for row in ROWS_0001["jobs"])
        assert [worker.id for worker in WorkerStore(database).list()] == ["w-1"]
        assert [job.status for job in store.page(kind=JobKind.EVALUATION)] == [JobStatus.FAILED]


def test_an_upgrade_keeps_what_points_to_a_rebuilt_table(
    first_release: str, later: Callable[[str], None]
) -> None:
    """Rows are carried over, and none goes with the table that was replaced."""
    later("pass")
    with closing(open_database(first_release)) as database:
        jobs = rows_of(database, "jobs")
        assert [row["threads"] for row in jobs] == [1] * len(ROWS_0001["jobs"])
        assert [row["colour"] for row in jobs] == ["blue", "red", "blue", "blue"]
        assert len(rows_of(database, "events")) == len(ROWS_0001["events"])
        assert rows_of(database, "alembic_version") == [{"version_num": "0002"}]


def test_an_upgrade_that_fails_changes_nothing(first_release: str, later: Callable[[str], None]) -> None:
    """Not even its first steps stay."""
    later("op.execute('UPDATE nowhere SET x = 1')")
    with pytest.raises(ServiceError, match="nowhere"):
        open_database(first_release)
    with plain(first_release) as connection:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == "0001"
        assert "colour" not in {column["name"] for column in sa.inspect(connection).get_columns("jobs")}
        assert connection.execute(sa.text("SELECT count(*) FROM events")).scalar() == len(ROWS_0001["events"])


def test_an_upgrade_that_breaks_references_is_refused(
    first_release: str, later: Callable[[str], None]
) -> None:
    """Constraints are checked at its end, also where they could not be during it."""
    later('op.execute("DELETE FROM artifacts")')
    with pytest.raises(ServiceError, match=r"artifacts|name what is not there"):
        open_database(first_release)
    with plain(first_release) as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM artifacts")).scalar() == 2


def test_a_newer_database_is_refused(database_url: str) -> None:
    """In one line that says what to do; it stays as it is."""
    set_revision(database_url, "9999")
    for may_upgrade in (True, False):
        with pytest.raises(
            ServiceError, match=r"schema 9999, newer than .* of this release: install"
        ) as caught:
            open_database(database_url, upgrade=may_upgrade)
        assert "\n" not in str(caught.value)
    with plain(database_url) as connection:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == "9999"


def test_an_old_database_is_refused_where_it_must_not_be_upgraded(
    empty: Empty, first_release: str, later: Callable[[str], None]
) -> None:
    """Neither is an empty one filled, nor a missing file made."""
    nothing = empty()
    later("pass")
    for url in (nothing, first_release):
        with pytest.raises(ServiceError, match="empty or of an older release"):
            open_database(url, upgrade=False)
    if nothing.startswith("sqlite"):
        assert not Path(nothing.removeprefix("sqlite:///")).exists()


def test_a_database_of_somebody_else_is_left_alone(empty: Empty) -> None:
    """A table in the way is named, and no other is made."""
    url = empty()
    with plain(url) as connection:
        connection.execute(sa.text("CREATE TABLE tokens (x integer)"))
        connection.commit()
    with pytest.raises(ServiceError, match=r"tokens.*already exists") as caught:
        open_database(url)
    assert "\n" not in str(caught.value)
    with plain(url) as connection:
        assert sa.inspect(connection).get_table_names() == ["tokens"]


def test_processes_that_start_together_upgrade_once(empty: Empty) -> None:
    """All of them find the schema, whoever was first."""
    url = empty()
    with start("open", url, many=3) as actors:
        assert [said(actor) for actor in actors] == [["opened"]] * 3
    with closing(open_database(url, upgrade=False)) as database:
        assert rows_of(database, "alembic_version") == [{"version_num": migrations.HEAD}]


def test_a_restored_copy_gets_its_log_back(sqlite_url: str) -> None:
    """A backup by ``VACUUM INTO`` comes without the write-ahead log."""
    path = sqlite_url.removeprefix("sqlite:///")
    with plain(sqlite_url) as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode=DELETE").scalar() == "delete"
    with closing(open_database(f"sqlite:///{path}")) as database, database.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
