"""Two API processes on one database, of each kind: what most tests of solves talk to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from service.state.database import open_database
from tests.service.server import Server
from tests.service.solves.solve_site import Player, Site


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Servers without a worker; the tests play it."""
    folder: Path = tmp_path_factory.mktemp("site")
    if request.param == "sqlite":
        url = f"sqlite:///{folder / 'state.db'}"
    else:
        url = request.getfixturevalue("cluster").create(f"site_{uuid4().hex}")
    first = Server(folder / "data", role="api", database_url=url)
    second = Server(folder / "data", role="api", database_url=url)
    with first, second, first.client() as client, second.client() as other:
        database = open_database(url)
        yield Site(servers=(first, second), clients=(client, other), folder=folder, player=Player(database))
        database.close()
