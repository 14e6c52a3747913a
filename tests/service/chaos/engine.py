"""Load, losses at random moments, and the reckoning: one run of chaos."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.artifacts import ArtifactFiles
from service.state.database import open_database
from tests.service.chaos.callers import (
    DEPLOYMENT,
    TOPOLOGY,
    Caller,
    start_callers,
    upload_traces,
    wait_for,
)
from tests.service.chaos.checks import check_all, unfinished
from tests.service.chaos.cluster import Cluster, postgres_cluster, sqlite_cluster
from tests.service.chaos.ledger import Ledger
from tests.service.postgres import Cluster as PostgresCluster
from tests.service.server import TINY_MODEL

__all__ = ["Run", "run_chaos", "run_on_postgres", "run_on_sqlite"]

Tell = Callable[[str], None]

DRAIN_S = 120.0
FIRST_LOSS_S = 2.0
BETWEEN_LOSSES_S = (0.5, 3.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What came of it."""

    ledger: Ledger
    lost: dict[str, int]
    seconds: float

    def report(self) -> str:
        """Return a page for a person."""
        lines = [
            f"{len(self.ledger.jobs)} jobs, {len(self.ledger.uploads)} uploads and "
            f"{len(self.ledger.promotions)} promotions acknowledged in {self.seconds:.0f} s",
            *(f"  lost: {name} {times} times" for name, times in sorted(self.lost.items())),
            *(f"  {name}: {times}" for name, times in sorted(self.ledger.tally.items())),
            f"{len(self.ledger.violations)} violations",
            *(f"  {violation}" for violation in self.ledger.violations),
        ]
        return "\n".join(lines)


def run_on_sqlite(folder: Path, *, seconds: float, seed: int, tell: Tell = lambda _: None) -> Run:
    """Run with all servers on one machine and one data directory."""
    cluster = sqlite_cluster(folder, Ledger(), seed=seed)
    return run_chaos(cluster, folder, seconds=seconds, seed=seed, tell=tell)


def run_on_postgres(
    folder: Path, postgres: PostgresCluster, *, seconds: float, seed: int, tell: Tell = lambda _: None
) -> Run:
    """Run with servers as on several machines; the database server is lost now and then too."""
    cluster = postgres_cluster(folder, Ledger(), seed=seed, url=postgres.create("chaos"), database=postgres)
    return run_chaos(cluster, folder, seconds=seconds, seed=seed, tell=tell)


def run_chaos(cluster: Cluster, folder: Path, *, seconds: float, seed: int, tell: Tell) -> Run:
    """Start the cluster, load it, lose parts of it for some seconds, and check what is left."""
    ledger, over = cluster.ledger, threading.Event()
    began_s = time.monotonic()
    callers: list[threading.Thread] = []
    try:
        cluster.start()
        trace_id = _prepare(cluster, ledger, folder)
        callers = start_callers(cluster.urls, ledger, over, trace_id=trace_id, folder=folder, seed=seed)
        _lose(cluster, seconds, tell)
        cluster.settle()
        over.set()
        for thread in callers:
            thread.join(30)
        tell(f"{len(ledger.jobs)} jobs accepted; waiting for their end")
        _reckon(cluster)
        cluster.stop()
    finally:
        over.set()
        cluster.kill()
        for thread in callers:
            thread.join(30)
    return Run(ledger=ledger, lost=cluster.lost, seconds=time.monotonic() - began_s)


def _prepare(cluster: Cluster, ledger: Ledger, folder: Path) -> str:
    """Upload the trace that all solves use, and make the deployment."""
    with Caller(cluster.urls, ledger, threading.Event(), seed=0) as caller:
        trace_id = upload_traces(caller, folder, 0)
        spec = {"topology": TOPOLOGY, "model": TINY_MODEL}
        response = caller.ask("PUT", f"/v1/deployments/{DEPLOYMENT}", json=spec)
        assert response.is_success, response.text
    return trace_id


def _lose(cluster: Cluster, seconds: float, tell: Tell) -> None:
    until_s = time.monotonic() + seconds
    time.sleep(FIRST_LOSS_S)
    while time.monotonic() < until_s:
        cluster.lose_something()
        tell(f"{until_s - time.monotonic():.0f} s left; lost {cluster.lost}")
        time.sleep(cluster.random.uniform(*BETWEEN_LOSSES_S))


def _reckon(cluster: Cluster) -> None:
    """Wait for the end of all jobs, then compare what was acknowledged with what is there."""
    ledger = cluster.ledger
    database = open_database(cluster.servers[0].database, upgrade=False)
    files = ArtifactFiles(cluster.servers[0].data_dir, url=cluster.artifact_url)
    api = next(server for server in cluster.servers if server.role != "worker")
    try:
        if not wait_for(lambda: not unfinished(database, ledger), DRAIN_S):
            ledger.violate(f"not ended {DRAIN_S} s after the last loss: {unfinished(database, ledger)}")
        with api.client() as client:
            check_all(database, files, client, ledger)
    finally:
        database.close()
    broken = ledger.tally["jobs broken"]
    if broken > cluster.lost.get("solve killed", 0):
        ledger.violate(f"{broken} jobs broke, though only {cluster.lost.get('solve killed', 0)} were killed")
