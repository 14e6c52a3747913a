"""What must be true when the dust has settled: read from the database, the files, and over HTTP."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import httpx
import sqlalchemy as sa

from service.artifacts import ArtifactFiles, digest_of
from service.state import tables
from service.state.database import Database
from service.state.records import TERMINAL
from tests.service.chaos.callers import DEPLOYMENT
from tests.service.chaos.ledger import Ledger
from tests.service.server import listen

__all__ = ["check_all", "unfinished"]

FINAL = {str(status) for status in TERMINAL}


def _rows(database: Database, table: sa.Table, *order: Any) -> list[dict[str, Any]]:
    with database.read() as connection:
        return [dict(row) for row in connection.execute(sa.select(table).order_by(*order)).mappings()]


def unfinished(database: Database, ledger: Ledger) -> list[str]:
    """Return accepted jobs that have not ended."""
    with database.read() as connection:
        found = connection.execute(sa.select(tables.jobs.c.id, tables.jobs.c.status)).all()
    status = {row.id: row.status for row in found}
    return [job_id for job_id in ledger.jobs.values() if status.get(job_id) not in FINAL]


def check_all(database: Database, files: ArtifactFiles, client: httpx.Client, ledger: Ledger) -> None:
    """Note everything that is not as it must be as a violation."""
    _check_jobs(database, ledger)
    _check_events(database, ledger)
    _check_streams(client, ledger)
    _check_files(database, files, ledger)
    _check_placements(client, ledger)
    _check_promotions(client, database, ledger)


def _check_jobs(database: Database, ledger: Ledger) -> None:
    """Every accepted job is there and has ended as it may; nothing was queued twice."""
    jobs = _rows(database, tables.jobs, tables.jobs.c.number)
    by_id = {job["id"]: job for job in jobs}
    keys = [job["idempotency_key"] for job in jobs if job["idempotency_key"]]
    if len(keys) != len(set(keys)):
        ledger.violate("an idempotency key was queued twice")
    for key, job_id in ledger.jobs.items():
        job = by_id.get(job_id)
        if job is None:
            ledger.violate(f"{key}: the accepted job {job_id} is gone")
            continue
        ledger.count(f"jobs {job['status']}")
        if job["status"] == "failed":
            _check_failure(job, ledger)
        elif job["status"] not in FINAL:
            ledger.violate(f"{key}: {job_id} is still {job['status']} (attempt {job['attempt']})")
        elif job["status"] == "stopped" and job_id not in ledger.stopped and not job["stop_requested"]:
            ledger.violate(f"{job_id} was stopped by nobody")


def _check_failure(job: dict[str, Any], ledger: Ledger) -> None:
    code = (job["error"] or {}).get("code")
    ledger.count(f"jobs failed: {code}")
    if code == "worker-lost" and job["lost"] < 2:
        ledger.violate(f"{job['id']} failed as lost after {job['lost']} losses: it had a try left")
    elif code not in ("worker-lost", "out-of-memory"):
        # A solve that was killed cannot be told from one that broke: how many there are is checked later.
        ledger.count("jobs broken")
        ledger.count(f"broken: {job['error']}")


def _check_events(database: Database, ledger: Ledger) -> None:
    """Events of a job count 1, 2, ...; exactly one is ``done``, the last; one start an attempt."""
    events = _rows(database, tables.events, tables.events.c.job_id, tables.events.c.seq)
    of_job: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        of_job[event["job_id"]].append(event)
    for job in _rows(database, tables.jobs, tables.jobs.c.number):
        kinds = [event["kind"] for event in of_job[job["id"]]]
        numbers = [event["seq"] for event in of_job[job["id"]]]
        if numbers != list(range(1, job["event_seq"] + 1)):
            ledger.violate(f"{job['id']}: events {numbers}, the last should be {job['event_seq']}")
        if job["status"] in FINAL and (kinds.count("done") != 1 or kinds[-1] != "done"):
            ledger.violate(f"{job['id']} is {job['status']} with events {kinds}")
        started = sum(event["data"].get("phase") == "started" for event in of_job[job["id"]])
        if started != job["attempt"]:
            ledger.violate(f"{job['id']}: started {started} times in {job['attempt']} attempts")


def _check_streams(client: httpx.Client, ledger: Ledger, *, sample: int = 20) -> None:
    """A stream from the start, and one resumed in the middle, tell the same as the database."""
    for job_id in itertools.islice(ledger.jobs.values(), sample):
        told = [event.id for event in listen(client, job_id)]
        if told != list(range(1, len(told) + 1)):
            ledger.violate(f"{job_id}: a stream told events {told}")
        middle = len(told) // 2
        resumed = [event.id for event in listen(client, job_id, after=middle)]
        if resumed != told[middle:]:
            ledger.violate(f"{job_id}: a stream resumed after {middle} told {resumed} of {told}")


def _check_files(database: Database, files: ArtifactFiles, ledger: Ledger) -> None:
    """Bytes of every acknowledged upload, and of every placement that a job names, are whole."""
    known = {row["digest"]: row for row in _rows(database, tables.artifacts, tables.artifacts.c.digest)}
    named = set(ledger.uploads)
    for job in _rows(database, tables.jobs, tables.jobs.c.number):
        named |= {job[column] for column in ("placement_digest", "trace_digest", "incumbent_digest")}
    for digest in sorted(named - {None}):
        if digest not in known:
            ledger.violate(f"artifact {digest} was acknowledged and is not in the database")
            continue
        content = files.read(digest)
        if digest_of(content) != digest or len(content) != known[digest]["size_bytes"]:
            ledger.violate(f"artifact {digest} is damaged: {len(content)} bytes")
    ledger.count("artifacts verified", len(named - {None}))


def _check_placements(client: httpx.Client, ledger: Ledger) -> None:
    """Whatever succeeded has a placement to fetch, with the bytes that its id says."""
    for job_id in ledger.jobs.values():
        found = client.get(f"/v1/solves/{job_id}").json()
        if found["status"] != "succeeded":
            continue
        content = client.get(f"/v1/solves/{job_id}/placement").content
        if digest_of(content) != found["result"]["placement_id"]:
            ledger.violate(f"{job_id}: its placement is not {found['result']['placement_id']}")
        ledger.count("placements fetched")


def _check_promotions(client: httpx.Client, database: Database, ledger: Ledger) -> None:
    """Versions count 1, 2, ...; every acknowledged promotion is among them, in the order of the answers."""
    table = tables.deployment_versions
    history = _rows(database, table, table.c.deployment, table.c.version)
    numbers = [row["version"] for row in history]
    if numbers != list(range(1, len(numbers) + 1)):
        ledger.violate(f"versions of the deployment: {numbers}")
    by_version = {row["version"]: row for row in history}
    for promotion in ledger.promotions:
        row = by_version.get(promotion.version)
        said = None if row is None else (row["why"], row["placement_digest"])
        if said != (promotion.why, promotion.placement_id):
            ledger.violate(f"{promotion} was acknowledged; the history has {said}")
    versions = [promotion.version for promotion in ledger.promotions]
    if versions != sorted(versions):
        ledger.violate(f"promotions were acknowledged in the order {versions}")
    if versions:
        current = client.get(f"/v1/deployments/{DEPLOYMENT}/placement")
        if digest_of(current.content) != history[-1]["placement_digest"]:
            ledger.violate("the deployment does not serve its last version")
    ledger.count("promotions verified", len(versions))
