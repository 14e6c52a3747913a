"""A place for jobs on each kind of database."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.state.database import Database
from tests.service.jobs.worker_support import Shop
from tests.service.server import tiny_trace


@pytest.fixture
def shop(tmp_path: Path, database_url: str, database: Database) -> Shop:
    """An empty queue and artifact store."""
    return Shop(tmp_path / "data", database_url, database)


@pytest.fixture
def trace(shop: Shop, tmp_path: Path) -> str:
    """A small trace that some solvers can work on for as long as they like."""
    return shop.keep(tiny_trace(tmp_path / "trace.npz", tokens=4096, layers=8, experts=64))
