"""A deployment with a controller at hand, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.state.database import Database
from tests.service.deployments.desk import AUTO, ROW, Desk


@pytest.fixture
def desk(database: Database, tmp_path: Path) -> Iterator[Desk]:
    """A deployment with a controller that steps when it is told to, on both databases."""
    found = Desk(database, tmp_path / "data")
    yield found
    found.close()


@pytest.fixture
def drifted(desk: Desk) -> Desk:
    """One whose two hottest experts have come to lie on one device."""
    desk.put(policy=AUTO)
    desk.promote(ROW)
    desk.traffic.turn((0, 1))
    desk.post(4)
    return desk
