"""The wall clock jumps by days while a solve runs: leases, streams and limits do not notice."""

from __future__ import annotations

import shutil
import struct
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from service.state.database import Database, open_database
from service.state.tables import jobs
from tests.service.server import BYTE16, LINEAR, Server, eventually, listen, upload

DAY_S = 86_400.0


@pytest.fixture
def shim(tmp_path: Path) -> dict[str, str]:
    """Variables of a process whose clock follows `jump`."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to build the clock shim with")
    library = tmp_path / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    jump(tmp_path, 0.0)
    return {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(tmp_path / "offset")}


def jump(folder: Path, seconds: float) -> None:
    """Set the clock to so many seconds from the true time."""
    with (folder / "offset").open("r+b" if (folder / "offset").exists() else "wb") as file:
        file.write(struct.pack("d", seconds))


def _beats(database: Database, job_id: str) -> int:
    """Return how many signs of life a running job has had."""
    with database.read() as connection:
        return int(connection.execute(sa.select(jobs.c.beat).where(jobs.c.id == job_id)).scalar_one())


def _has_beats(database: Database, job_id: str, enough: int) -> bool:
    return _beats(database, job_id) >= enough


def test_a_jumping_clock_takes_no_lease_away(shim: dict[str, str], tmp_path: Path) -> None:
    """Ten days on, ten back, and home again: the job runs on in its first attempt, until it is stopped."""
    env = {**shim, "MOE_PLACEMENT_LEASE_SECONDS": "2"}
    with Server(tmp_path / "data", env=env) as server, server.client() as client:
        body: dict[str, Any] = {"trace_id": upload(client, BYTE16), "topology": "h100:1x4"}
        body["options"] = {"solver": "search", "window": 512, "time_limit": 100.0, "calibration": LINEAR}
        job = client.post("/v1/solves", json=body).raise_for_status().json()
        path = f"/v1/solves/{job['id']}"
        eventually(lambda: client.get(path).json()["status"] == "running", 20)
        database = open_database(server.database, upgrade=False)
        try:
            for days in (10, -10, 0):
                jump(tmp_path, days * DAY_S)
                enough = _beats(database, job["id"]) + 3
                eventually(partial(_has_beats, database, job["id"], enough), 30)
                assert client.get("/health/ready").is_success
        finally:
            database.close()
        client.delete(path).raise_for_status()
        told = list(listen(client, job["id"]))
        found = client.get(path).json()
        assert [event.id for event in told] == list(range(1, len(told) + 1))
        assert [event.data["attempt"] for event in told if event.data.get("phase") == "started"] == [1]
        assert found["status"] in ("stopped", "succeeded"), found
