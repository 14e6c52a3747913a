"""/metrics: what is counted is exact, over all processes where it says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.state.database import Database, open_database
from service.state.jobs import JobStore
from service.state.records import JobKind, JobStatus, NewJob, Outcome
from service.state.tables import deployments
from service.state.totals import SOLVE_GAP, SOLVE_SECONDS, histogram_of, observed
from tests.service.server import Server

Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def running(tmp_path: Path, database_url: str) -> Iterator[tuple[Server, Database]]:
    """A server, and its database."""
    yield from _running(tmp_path, database_url)


@pytest.fixture
def running_on_sqlite(tmp_path: Path, sqlite_url: str) -> Iterator[tuple[Server, Database]]:
    """A server, and its database, where its kind does not matter."""
    yield from _running(tmp_path, sqlite_url)


def _running(tmp_path: Path, database_url: str) -> Iterator[tuple[Server, Database]]:
    with Server(tmp_path / "data", role="api", database_url=database_url) as server:
        database = open_database(database_url)
        yield server, database
        database.close()


def scrape(server: Server) -> Figures:
    """Return all figures, by name and labels."""
    answer = httpx.get(f"{server.base_url}/metrics", trust_env=False)
    assert answer.status_code == 200, answer.text
    return {
        (sample.name.removeprefix("moe_placement_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def figure(figures: Figures, name: str, **labels: str) -> float:
    """Return one figure; one that was never counted is 0."""
    return figures.get((name, frozenset(labels.items())), 0.0)


def run(database: Database, outcome: Outcome, kind: JobKind = JobKind.SOLVE) -> None:
    """Run a job to its end."""
    store = JobStore(database)
    store.submit([NewJob(kind=kind, caller="local", spec={}, request_hash="0" * 64)])
    claim = store.claim("w", cpus=1)
    assert claim is not None
    assert store.finish(claim, outcome)


def test_jobs_are_counted_exactly(running: tuple[Server, Database]) -> None:
    """By kind and status, with seconds and gap of solves, whichever process ran them."""
    server, database = running
    done = Outcome(status=JobStatus.SUCCEEDED, result={"objective": {"gap": 0.02}})
    failed = Outcome(status=JobStatus.FAILED, error={"code": "infeasible", "message": "no"})
    for outcome in (done, done, failed):
        run(database, outcome)
    run(database, Outcome(status=JobStatus.SUCCEEDED, result={}), JobKind.EVALUATION)
    store = JobStore(database)
    (waiting,) = store.submit([NewJob(kind=JobKind.SOLVE, caller="a", spec={}, request_hash="0" * 64)])
    found = scrape(server)
    assert figure(found, "jobs_finished_total", kind="solve", status="succeeded") == 2
    assert figure(found, "jobs_finished_total", kind="solve", status="failed") == 1
    assert figure(found, "jobs_finished_total", kind="evaluation", status="succeeded") == 1
    assert figure(found, "jobs_failed_total", code="infeasible") == 1
    assert figure(found, "solve_seconds_count") == 3
    assert figure(found, "solve_gap_count") == 2
    assert figure(found, "solve_gap_sum") == pytest.approx(0.04)
    assert figure(found, "solve_gap_bucket", le="0.01") == 0
    assert figure(found, "solve_gap_bucket", le="0.03") == 2
    assert figure(found, "jobs", status="queued") == 1
    assert figure(found, "jobs", status="running") == 0
    assert figure(found, "database_up") == 1
    store.request_stop(waiting.job.id)
    found = scrape(server)
    assert figure(found, "jobs_finished_total", kind="solve", status="stopped") == 1
    assert figure(found, "jobs", status="queued") == 0


def test_requests_are_counted_by_template(running_on_sqlite: tuple[Server, Database]) -> None:
    """Paths of callers never become labels."""
    server, _ = running_on_sqlite
    with server.client() as client:
        for number in range(5):
            assert client.get(f"/v1/solves/s-{number}").status_code == 404
        assert client.delete("/health/live").status_code == 405
        assert client.get("/nothing/here").status_code == 404
    found = scrape(server)
    names = {dict(labels).get("route") for name, labels in found if name == "requests_total"}
    (route,) = {name for name in names if name and name.startswith("/v1/solves/{")}
    assert figure(found, "requests_total", method="GET", route=route, status="404") == 5
    assert figure(found, "request_seconds_count", method="GET", route=route) == 5
    assert "/nothing/here" not in names


def test_deployments_are_told(running: tuple[Server, Database]) -> None:
    """Version, drift and balance of each."""
    server, database = running
    drift = {"excess": 0.25, "balance": 1.5, "shift": None}
    about = {"created_at": 0.0, "updated_at": 0.0, "revision": 1, "spec": {}}
    with database.write() as connection:
        connection.execute(deployments.insert().values(name="d", version=3, drift=drift, **about))
        connection.execute(deployments.insert().values(name="new", **about))
    found = scrape(server)
    assert figure(found, "deployment_version", deployment="d") == 3
    assert figure(found, "deployment_drift", deployment="d") == 0.25
    assert figure(found, "deployment_balance", deployment="d") == 1.5
    assert ("deployment_shift", frozenset({("deployment", "d")})) not in found
    assert figure(found, "deployment_version", deployment="new") == 0


def test_a_database_that_is_away_is_told(running_on_sqlite: tuple[Server, Database]) -> None:
    """The process's own figures come anyway."""
    server, database = running_on_sqlite
    with database.write() as connection:
        connection.exec_driver_sql("ALTER TABLE counters RENAME TO elsewhere")
    found = scrape(server)
    assert figure(found, "database_up") == 0
    assert figure(found, "database_errors_total") >= 1
    assert figure(found, "requests_total", method="GET", route="/metrics", status="200") >= 0
    with database.write() as connection:
        connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO counters")
    assert figure(scrape(server), "database_up") == 1


def test_histograms_cumulate() -> None:
    """By hand: 0.05 s, 2 s and an hour and a half."""
    totals: dict[tuple[str, str], float] = {}
    for seconds in (0.05, 2.0, 5400.0):
        for key, amount in observed(SOLVE_SECONDS, seconds).items():
            totals[key] = totals.get(key, 0.0) + amount
    buckets, total = histogram_of(SOLVE_SECONDS, totals)
    assert dict(buckets)["0.1"] == 1
    assert dict(buckets)["3"] == 2
    assert dict(buckets)["3600"] == 2
    assert dict(buckets)["+Inf"] == 3
    assert total == pytest.approx(5402.05)
    assert histogram_of(SOLVE_GAP, {}) == (
        [(bound, 0.0) for bound, _ in histogram_of(SOLVE_GAP, {})[0]],
        0.0,
    )
