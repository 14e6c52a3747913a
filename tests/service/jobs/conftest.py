"""A place for jobs on each kind of database."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.state.database import Database
from tests.service.jobs.worker_support import Shop


@pytest.fixture
def shop(tmp_path: Path, database_url: str, database: Database) -> Shop:
    """An empty queue and artifact store."""
    return Shop(tmp_path / "data", database_url, database)
