"""Processes killed at random moments under load: what was acknowledged is kept, and done once."""

from __future__ import annotations

from pathlib import Path

from tests.service.chaos.engine import run_on_postgres, run_on_sqlite
from tests.service.postgres import Cluster

SECONDS = 10.0
"""``python -m benchmarks.chaos`` runs as long as is wanted."""
SEED = 7


def test_nothing_acknowledged_is_lost_on_sqlite(tmp_path: Path) -> None:
    """Worker, API and whole servers are killed; every accepted job ends once, every byte is there."""
    run = run_on_sqlite(tmp_path, seconds=SECONDS, seed=SEED)
    assert not run.ledger.violations, run.report()
    assert run.ledger.jobs, run.report()
    assert run.lost, run.report()


def test_nothing_acknowledged_is_lost_on_postgresql(durable_cluster: Cluster, tmp_path: Path) -> None:
    """The same on several machines, and the database is killed too."""
    run = run_on_postgres(tmp_path, durable_cluster, seconds=SECONDS, seed=SEED)
    assert not run.ledger.violations, run.report()
    assert run.ledger.jobs, run.report()
    assert run.lost, run.report()
