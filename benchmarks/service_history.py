"""A history of solves as a service has it after months: rows written straight into the database."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa

from service.ids import new_id
from service.state import tables
from service.state.database import Database

__all__ = ["write_history"]

EVENTS_EACH = 8
BATCH = 1000


def write_history(database: Database, solves: int) -> None:
    """Write solves that have succeeded, with events and placements."""
    for first in range(0, solves, BATCH):
        numbers = range(first, min(first + BATCH, solves))
        with database.write() as connection:
            connection.execute(sa.insert(tables.artifacts), [_artifact(number) for number in numbers])
            jobs = [_job(number) for number in numbers]
            connection.execute(sa.insert(tables.jobs), jobs)
            connection.execute(
                sa.insert(tables.events), [event for job in jobs for event in _events(str(job["id"]))]
            )


def _digest(number: int) -> str:
    return f"sha256:{number:064x}"


def _artifact(number: int) -> dict[str, Any]:
    now = time.time()
    return {
        "digest": _digest(number),
        "kind": "placement",
        "size_bytes": 80_000,
        "format": "moe-placement/1",
        "summary": {"num_layers": 58, "num_experts": 256, "num_devices": 32},
        "created_at": now,
        "created_by": "local",
        "used_at": now,
    }


def _job(number: int) -> dict[str, Any]:
    now = time.time()
    objective = {"name": "step-time", "value": 0.01, "unit": "s", "lower_bound": 0.009, "gap": 0.1}
    return {
        "id": new_id("s"),
        "kind": "solve",
        "status": "succeeded",
        "priority": 0,
        "caller": "local",
        "spec": {"topology": "h100:4x8", "options": {"solver": "auto", "time_limit": 60.0}},
        "cpus": 1,
        "start_digest": _digest(number),
        "request_hash": f"{number:064x}",
        "created_at": now,
        "started_at": now,
        "ended_at": now,
        "attempt": 1,
        "lost": 0,
        "beat": 30,
        "stop_requested": False,
        "event_seq": EVENTS_EACH,
        "result": {"objective": objective, "metrics": {}, "notes": [], "elapsed_s": 60.0},
        "placement_digest": _digest(number),
    }


def _events(job_id: str) -> list[dict[str, Any]]:
    kinds = ["progress", *["incumbent"] * (EVENTS_EACH - 2), "done"]
    return [
        {
            "job_id": job_id,
            "seq": seq,
            "kind": kind,
            "data": {"objective": 0.01, "lower_bound": 0.009, "gap": 0.1, "solver": "search"},
            "at": time.time(),
        }
        for seq, kind in enumerate(kinds, start=1)
    ]
