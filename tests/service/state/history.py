"""States of earlier releases as SQL text, with a row in every table; run as a program to write that of today.

``python -m tests.service.state.history FOLDER`` writes ``schema-NNNN.sqlite.sql`` and
``schema-NNNN.postgresql.sql``: once for each schema that is released, never again after.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa

from service.state.database import open_database
from service.state.migrations import HEAD
from service.state.tables import METADATA
from tests.service.postgres import Cluster, find_binaries

__all__ = ["FOLDER", "ROWS_0001", "restore_postgresql", "restore_sqlite"]

FOLDER = Path(__file__).parents[2] / "data" / "service"
TRACE = "sha256:" + "1" * 64
PLACEMENT = "sha256:" + "2" * 64
INCUMBENT = {"objective": 0.00123, "lower_bound": 0.00117, "gap": 0.049, "solver": "search", "elapsed_s": 1.5}
RESULT = {"objective": {"name": "step-time", "value": 0.00123, "unit": "s"}, "placement_id": PLACEMENT}
JOB: dict[str, Any] = {
    "kind": "solve",
    "priority": 0,
    "caller": "local",
    "spec": {"topology": "h100:2x8", "options": {"seed": 7}},
    "cpus": 1,
    "trace_digest": TRACE,
    "request_hash": "0" * 64,
    "created_at": 1000.5,
    "attempt": 0,
    "lost": 0,
    "beat": 0,
    "stop_requested": False,
    "event_seq": 0,
}

ROWS_0001: dict[str, list[dict[str, Any]]] = {
    "artifacts": [
        {
            "digest": digest,
            "kind": kind,
            "size_bytes": 3_000_000_000,
            "format": form,
            "summary": {"layers": 6},
        }
        | {"created_at": 999.25, "created_by": "local", "used_at": 999.25}
        for digest, kind, form in ((TRACE, "trace", "npz"), (PLACEMENT, "placement", "moe-placement/1"))
    ],
    "jobs": [
        JOB | {"number": 1, "id": "s-00000000000000000000000001", "idempotency_key": "key"},
        JOB
        | {"number": 2, "id": "s-00000000000000000000000002", "status": "running", "attempt": 2, "lost": 1}
        | {"started_at": 1001.5, "worker": "w-1", "beat": 17, "stop_requested": True, "event_seq": 2}
        | {"incumbent": INCUMBENT, "incumbent_digest": PLACEMENT, "start_digest": PLACEMENT},
        JOB
        | {"number": 3, "id": "s-00000000000000000000000003", "status": "succeeded", "attempt": 1}
        | {"started_at": 1001.5, "ended_at": 1002.5, "event_seq": 1, "deployment": "prod", "result": RESULT}
        | {"placement_digest": PLACEMENT, "incumbent": INCUMBENT, "incumbent_digest": PLACEMENT},
        JOB
        | {"number": 4, "id": "e-00000000000000000000000004", "kind": "evaluation", "status": "failed"}
        | {"error": {"code": "invalid", "message": "größer"}, "priority": -5, "caller": "t1"},
    ],
    "events": [
        {"job_id": "s-00000000000000000000000002", "seq": 1, "kind": "progress", "data": {"phase": "started"}}
        | {"at": 1001.5},
        {
            "job_id": "s-00000000000000000000000002",
            "seq": 2,
            "kind": "incumbent",
            "data": INCUMBENT,
            "at": 1002.0,
        },
        {"job_id": "s-00000000000000000000000003", "seq": 1, "kind": "done", "at": 1002.5}
        | {"data": {"status": "succeeded", "result": RESULT, "error": None}},
    ],
    "workers": [
        {"id": "w-1", "host": "a", "boot_id": "b", "pid": 12, "pid_started": 5.0, "cpus": 2}
        | {"started_at": 1000.0, "beat": 3, "seen_at": 1001.0}
    ],
    "deployments": [
        {"name": "prod", "spec": {"topology": "h100:2x8"}, "revision": 4, "version": 1, "drift": {"tv": 0.25}}
        | {"refresh": {"state": "idle"}, "created_at": 1000.0, "updated_at": 1003.0}
    ],
    "deployment_versions": [
        {"deployment": "prod", "version": 1, "placement_digest": PLACEMENT, "cause": "manual", "by": "local"}
        | {
            "job_id": "s-00000000000000000000000003",
            "why": 'it\'s "better"\nby far',
            "predicted": {"gain": 0.1},
        }
        | {"promoted_at": 1003.0}
    ],
    "load_windows": [
        {
            "number": 1,
            "deployment": "prod",
            "window": 5_000_000_000,
            "rank": 0,
            "version": 1,
            "tokens": 4096.0,
        }
        | {"load": b"x\x9cc\x00\x01\xff'\"", "received_at": 1004.0}
    ],
    "tokens": [
        {"id": "t1", "name": "ann", "hash": "f" * 64, "scopes": ["read"], "limits": {}, "created_at": 1000.0}
    ],
    "audit": [
        {
            "number": 1,
            "at": 1000.0,
            "who": "local",
            "action": "token.create",
            "target": "t1",
            "detail": {"a": 1},
        }
    ],
    "counters": [{"name": "solves", "labels": "status=succeeded", "value": 1.5}],
}
"""What the first schema's state holds."""
ROWS_0001["jobs"][0]["status"] = "queued"


def restore_sqlite(schema: str, path: Path) -> str:
    """Make a file of an earlier schema; return its URL."""
    text = (FOLDER / f"schema-{schema}.sqlite.sql").read_text(encoding="utf-8")
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(text)
    return f"sqlite:///{path}"


def restore_postgresql(schema: str, url: str) -> None:
    """Fill an empty database with an earlier schema."""
    text = (FOLDER / f"schema-{schema}.postgresql.sql").read_text(encoding="utf-8")
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(text.encode())


def write_today(folder: Path) -> None:
    """Write both texts of today's schema."""
    binaries = find_binaries()
    assert binaries is not None, "PostgreSQL is not installed"
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "state.db"
        _fill(f"sqlite:///{path}")
        with closing(sqlite3.connect(path)) as connection:
            text = "\n".join(connection.iterdump()) + "\n"
        (folder / f"schema-{HEAD}.sqlite.sql").write_text(text, encoding="utf-8")
    with Cluster(binaries) as cluster:
        _fill(cluster.create("state"))
        command = [str(binaries / "pg_dump"), "--inserts", "--no-owner", "--no-privileges"]
        where = ["--host=127.0.0.1", f"--port={cluster.port}", "--username=postgres", "state"]
        done = subprocess.run([*command, *where], capture_output=True, text=True, check=True)
        # What begins with a backslash is for psql alone.
        kept = [line for line in done.stdout.splitlines() if line and not line.startswith(("--", "\\"))]
        (folder / f"schema-{HEAD}.postgresql.sql").write_text("\n".join(kept) + "\n", encoding="utf-8")


def _fill(url: str) -> None:
    with closing(open_database(url)) as database, database.write() as connection:
        for table in METADATA.sorted_tables:
            for row in ROWS_0001[table.name]:
                connection.execute(table.insert().values(row))
        if not database.is_sqlite:
            for name in ("jobs", "load_windows", "audit"):  # the numbers above were given, not counted
                last = f"(SELECT max(number) FROM {name})"
                connection.execute(
                    sa.text(f"SELECT setval(pg_get_serial_sequence('{name}', 'number'), {last})")
                )


if __name__ == "__main__":
    write_today(Path(sys.argv[1]))
