"""Servers for the tests of the API's core: one without tokens, one with a token of each scope."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.service.api.guarded import Guarded, make_keys, scratch_of
from tests.service.server import Server, eventually


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without tokens; its tests change no settings."""
    with Server(tmp_path_factory.mktemp("open") / "data", role="api") as server:
        yield server


@pytest.fixture
def client(open_server: Server) -> Iterator[httpx.Client]:
    """A client of the server without tokens; afterwards the scratch folder is empty, whatever went wrong."""
    with open_server.client() as opened:
        yield opened
    eventually(lambda: not scratch_of(open_server), 10.0, what="the scratch folder is empty")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A server with tokens; none of their secrets may be in its log or its files when all tests are over."""
    folder = tmp_path_factory.mktemp("guarded") / "data"
    keys = make_keys(folder)
    with Server(folder, role="api", env={"MOE_PLACEMENT_LOG_FORMAT": "json"}) as server:
        yield Guarded(server=server, keys=keys)
        keys.assert_kept_secret(server.log)


@pytest.fixture
def lone_server(tmp_path: Path) -> Iterator[Server]:
    """A server without tokens for one test."""
    with Server(tmp_path / "data", role="api") as server:
        yield server
