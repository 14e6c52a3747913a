"""The probes tell the truth: not ready while something is missing, ready again once it is back."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.postgres import Cluster
from tests.service.server import Server, eventually, pause_between_transactions


@pytest.fixture
def own_cluster(postgres_binaries: Path) -> Iterator[Cluster]:
    """A PostgreSQL of the test's own, to be stopped."""
    with Cluster(postgres_binaries) as running:
        yield running


def reasons(client: httpx.Client) -> dict[str, Any]:
    """Return why the server is not ready; nothing when it is. The process must live in any case."""
    assert client.get("/health/live").status_code == 200
    answer = client.get("/health/ready")
    found: dict[str, Any] = answer.json()["reasons"]
    assert answer.status_code == (503 if found else 200)
    assert answer.json()["status"] == ("not-ready" if found else "ready")
    return found


def test_a_database_that_stops_and_comes_back(tmp_path: Path, own_cluster: Cluster) -> None:
    """The server survives it and says how it stands."""
    url = own_cluster.create("state")
    with (
        Server(tmp_path / "data", role="api", database_url=url) as server,
        server.client() as client,
    ):
        assert reasons(client) == {}
        own_cluster.stop()
        found = eventually(lambda: reasons(client))
        assert found.keys() == {"database"}
        assert "127.0.0.1" not in found["database"]
        assert client.get("/v1/status").status_code == 503
        own_cluster.start()
        eventually(lambda: reasons(client) == {}, what="ready again")
        assert client.get("/v1/status").status_code == 200
        assert "not ready" in server.log
        assert "ready again" in server.log


def test_a_database_that_hangs_is_answered_for_in_time(
    tmp_path: Path, postgresql_url: str, cluster: Cluster
) -> None:
    """A probe must not hang with it, nor pile up waiting threads."""
    name = postgresql_url.rpartition("/")[2]
    with (
        Server(tmp_path / "data", role="api", database_url=postgresql_url) as server,
        server.client() as client,
    ):
        assert reasons(client) == {}
        with cluster.connect(name) as holder, holder.transaction():
            holder.execute("LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE")
            began_s = time.monotonic()
            assert [reasons(client).keys() for _ in range(3)] == [{"database"}] * 3
            assert time.monotonic() - began_s < 15
        eventually(lambda: reasons(client) == {}, what="ready again")


def test_a_schema_of_another_release_is_not_ready(
    tmp_path: Path, postgresql_url: str, cluster: Cluster
) -> None:
    """A server that was forgotten during an upgrade takes no more requests."""
    name = postgresql_url.rpartition("/")[2]
    with (
        Server(tmp_path / "data", role="api", database_url=postgresql_url) as server,
        server.client() as client,
    ):
        assert reasons(client) == {}
        with cluster.connect(name) as connection:
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
        assert reasons(client).keys() == {"database"}


def test_a_file_that_is_gone_is_not_ready(tmp_path: Path) -> None:
    """Open connections to a removed SQLite file still work, and lead nowhere."""
    with Server(tmp_path / "data", role="api") as server, server.client() as client:
        path = tmp_path / "data" / "state.db"
        path.rename(tmp_path / "aside")
        assert reasons(client).keys() == {"database"}
        (tmp_path / "aside").rename(path)
        assert reasons(client) == {}


def test_a_store_that_cannot_be_written_is_not_ready(tmp_path: Path) -> None:
    """Uploads and results would have nowhere to go."""
    with Server(tmp_path / "data", role="api") as server, server.client() as client:
        scratch = tmp_path / "data" / "scratch"
        shutil.rmtree(scratch)
        assert reasons(client).keys() == {"artifacts"}
        scratch.mkdir(mode=0o700)
        assert reasons(client) == {}


def test_a_full_disk_is_not_ready(tmp_path: Path) -> None:
    """Told before the last byte is gone."""
    env = {"MOE_PLACEMENT_LEAST_FREE_BYTES": str(1 << 60)}
    server = Server(tmp_path / "data", role="api", env=env)
    server.launch()
    try:
        with server.client() as client:
            eventually(lambda: answers(client))
            found = reasons(client)
            assert found.keys() == {"artifacts"}
            assert "full" in found["artifacts"]
    finally:
        server.kill()


def answers(client: httpx.Client) -> bool:
    """Tell whether somebody listens."""
    try:
        return client.get("/health/live").status_code == 200
    except httpx.TransportError:
        return False


def test_a_worker_that_dies_or_hangs_is_told(tmp_path: Path) -> None:
    """Role all: what is queued would wait for ever."""
    env = {"MOE_PLACEMENT_LEASE_SECONDS": "1"}
    with Server(tmp_path / "data", env=env) as server, server.client() as client:
        (first,) = server.worker_pids
        os.kill(first, signal.SIGKILL)
        eventually(lambda: reasons(client).keys() == {"worker"}, what="the dead worker is told")
        eventually(lambda: reasons(client) == {}, what="ready again")
        (second,) = server.worker_pids
        pause_between_transactions(second, server.database)
        eventually(lambda: reasons(client).keys() == {"worker"}, what="the hanging worker is told")
        os.kill(second, signal.SIGCONT)
        eventually(lambda: reasons(client) == {}, what="ready again")


def test_probes_need_no_token(tmp_path: Path) -> None:
    """Whoever starts containers has none; what they say is no secret."""
    with Server(tmp_path / "data", role="api") as server:
        for path in ("/health/live", "/health/ready"):
            answer = httpx.get(server.base_url + path, trust_env=False)
            assert answer.status_code == 200
