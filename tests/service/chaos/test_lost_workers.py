"""Workers that are killed, and workers that only seem to be: the job ends once, from what it had."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx

from tests.service.server import (
    BYTE16,
    LINEAR,
    Server,
    eventually,
    listen,
    pause_between_transactions,
    upload,
)

LEASE_S = 2.0


def _long_solve(client: httpx.Client) -> str:
    body: dict[str, Any] = {"trace_id": upload(client, BYTE16), "topology": "h100:1x4"}
    body["options"] = {"solver": "search", "window": 512, "time_limit": 6.0, "calibration": LINEAR}
    job_id: str = client.post("/v1/solves", json=body).raise_for_status().json()["id"]
    return job_id


def _ends_once(client: httpx.Client, job_id: str) -> list[dict[str, Any]]:
    """Follow the job to its end; return its events."""
    events = list(listen(client, job_id))
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    assert [event.kind for event in events].count("done") == 1
    assert events[-1].kind == "done"
    assert client.get(f"/v1/solves/{job_id}").json()["status"] == "succeeded", events[-1]
    return [event.data for event in events]


def _attempts(events: list[dict[str, Any]]) -> list[int]:
    return [data["attempt"] for data in events if data.get("phase") == "started"]


def test_a_killed_worker_is_noticed_at_once(tmp_path: Path) -> None:
    """Its job goes on with the next worker, long before the lease is over; the solve's process is gone."""
    env = {"MOE_PLACEMENT_LEASE_SECONDS": "600"}
    with Server(tmp_path / "data", env=env) as server, server.client() as client:
        job_id = _long_solve(client)
        child = eventually(lambda: server.child_pids)[0]
        os.kill(server.worker_pids[0], signal.SIGKILL)
        eventually(lambda: child not in server.child_pids, 5, what="the solve ended with its worker")
        assert _attempts(_ends_once(client, job_id)) == [1, 2]


def test_a_paused_worker_cannot_write_after_its_lease(tmp_path: Path) -> None:
    """Another one takes the job; the first one wakes up, kills its solve and writes nothing."""
    env = {"MOE_PLACEMENT_LEASE_SECONDS": str(LEASE_S)}
    data_dir = tmp_path / "data"
    with (
        Server(data_dir, env=env) as server,
        Server(data_dir, role="worker", env=env) as other,
        server.client() as client,
    ):
        job_id = _long_solve(client)
        first, second = eventually(
            lambda: (server, other) if server.child_pids else (other, server) if other.child_pids else None
        )
        (child,), (paused,) = first.child_pids, first.worker_pids
        pause_between_transactions(paused, server.database)
        try:
            eventually(lambda: second.child_pids, 20, what="the other worker took the job")
        finally:
            os.kill(paused, signal.SIGCONT)
        eventually(lambda: child not in first.child_pids, 10, what="the first solve was killed")
        assert _attempts(_ends_once(client, job_id)) == [1, 2]


def test_a_killed_server_goes_on_where_it_was(tmp_path: Path) -> None:
    """All processes are killed in the middle of a solve; after the restart it is solved, once."""
    data_dir = tmp_path / "data"
    with Server(data_dir) as server, server.client() as client:
        job_id = _long_solve(client)
        eventually(lambda: server.child_pids)
        server.kill()
        server.start()
        assert _attempts(_ends_once(client, job_id)) == [1, 2]
