"""Databases for the tests of the service: each test gets its own, on SQLite and on a private PostgreSQL."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from service.state.database import Database, open_database
from tests.service.postgres import Cluster, find_binaries

REQUIRE = "MOE_PLACEMENT_REQUIRE_POSTGRES"
"""Set to 1 where a missing PostgreSQL is a failure rather than a reason to skip."""
TEMPLATE = "template_state"


@pytest.fixture(scope="session")
def postgres_binaries() -> Path:
    """Folder of PostgreSQL's programs."""
    found = find_binaries()
    if found is None:
        reason = "PostgreSQL is not installed: no initdb in PATH or /usr/lib/postgresql"
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def cluster(postgres_binaries: Path) -> Iterator[Cluster]:
    """The PostgreSQL of this test process, without waiting for the disk; who kills it starts it again."""
    with Cluster(postgres_binaries) as running:
        open_database(running.create(TEMPLATE)).close()
        yield running


@pytest.fixture
def durable_cluster(postgres_binaries: Path) -> Iterator[Cluster]:
    """A PostgreSQL of the test's own with durable commits, to be killed and started again."""
    with Cluster(postgres_binaries, durable=True) as running:
        yield running


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty state to copy."""
    path = tmp_path_factory.mktemp("template") / "state.db"
    open_database(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """URL of an empty state in a file of the test's folder."""
    path = tmp_path / "state.db"
    shutil.copy(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture
def postgresql_url(cluster: Cluster) -> Iterator[str]:
    """URL of an empty state on PostgreSQL."""
    name = f"state_{uuid4().hex}"
    yield cluster.create(name, template=TEMPLATE)
    cluster.drop(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """URL of an empty state, once on each kind of database."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An empty state, opened."""
    opened = open_database(database_url)
    yield opened
    opened.close()
