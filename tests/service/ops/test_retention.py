"""Retention: what is old and unnamed goes, all else stays, and a request that names something never loses."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from service.artifacts import ArtifactFiles, digest_of
from service.state.artifacts import ArtifactStore
from service.state.database import Database
from service.state.jobs import JobStore
from service.state.records import JobKind, JobStatus, NewEvent, NewJob, Outcome
from service.state.retention import GRACE_S, compact, remove_old
from service.state.tables import artifacts, deployment_versions, deployments, events, jobs, load_windows

DAY_S = 86400.0


class House:
    """A state with some contents that can be made old."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.files = ArtifactFiles(folder)
        self.artifacts = ArtifactStore(database)
        self.jobs = JobStore(database)

    def artifact(self, content: bytes, kind: str = "trace") -> str:
        """Store and name some bytes."""
        digest = self.files.put(content)
        self.artifacts.add(
            digest=digest, kind=kind, size_bytes=len(content), format="npz", summary={}, created_by="local"
        )
        return digest

    def finished(self, *, trace: str, placement: str | None = None, **given: Any) -> str:
        """Run a job to its end."""
        new = NewJob(kind=JobKind.SOLVE, caller="local", spec={}, request_hash="0" * 64, trace_digest=trace)
        (submitted,) = self.jobs.submit([new])
        claim = self.jobs.claim("worker", cpus=1)
        assert claim is not None
        self.jobs.record(claim, [NewEvent(kind="progress", data={})])
        outcome = Outcome(status=JobStatus.SUCCEEDED, result={}, placement_digest=placement, **given)
        assert self.jobs.finish(claim, outcome)
        return submitted.job.id

    def make_old(self, *, but: frozenset[str] = frozenset(), days: float = 100.0) -> None:
        """Let time pass for all but some jobs and artifacts."""
        then = time.time() - days * DAY_S
        with self.database.write() as connection:
            connection.execute(jobs.update().where(jobs.c.id.not_in(but)).values(ended_at=then))
            connection.execute(artifacts.update().where(artifacts.c.digest.not_in(but)).values(used_at=then))
            connection.execute(load_windows.update().values(received_at=then))
        for digest in self.files.digests():
            if digest not in but:
                os.utime(self.files.local(digest), (then, then))

    def count(self, table: sa.Table) -> int:
        """Return how many rows there are."""
        with self.database.read() as connection:
            return int(connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0)

    def deploy(self, digest: str, job_id: str | None = None) -> None:
        """Make a placement the current one of a deployment."""
        about = {"created_at": 0.0, "updated_at": 0.0, "revision": 1, "version": 1}
        version = {"version": 1, "cause": "manual", "by": "local", "why": "", "promoted_at": 0.0}
        with self.database.write() as connection:
            connection.execute(deployments.insert().values(name="d", spec={}, **about))
            connection.execute(
                deployment_versions.insert().values(
                    deployment="d", placement_digest=digest, job_id=job_id, **version
                )
            )


@pytest.fixture
def house(database: Database, tmp_path: Path) -> House:
    return House(database, tmp_path / "data")


def remove(house: House, **options: Any) -> Any:
    """Remove what is older than thirty days."""
    return remove_old(house.database, house.files, older_than_s=30 * DAY_S, **options)


def test_old_jobs_go_with_their_events_and_artifacts(house: House) -> None:
    """And the files with the rows."""
    trace, placement = house.artifact(b"trace"), house.artifact(b"placement", "placement")
    house.finished(trace=trace, placement=placement)
    house.make_old()
    removed = remove(house)
    assert (removed.jobs, set(removed.artifacts)) == (1, {trace, placement})
    assert removed.artifact_bytes == len(b"trace") + len(b"placement")
    assert (house.count(jobs), house.count(events), house.count(artifacts)) == (0, 0, 0)
    assert list(house.files.digests()) == []


def test_what_is_named_stays(house: House) -> None:
    """By a job that is young, queued or running, or by a version of a deployment, however old."""
    by_young, by_queued, by_version = (house.artifact(bytes([number])) for number in range(3))
    unnamed = house.artifact(b"nobody's")
    young = house.finished(trace=by_young)
    new = NewJob(kind=JobKind.SOLVE, caller="local", spec={}, request_hash="0" * 64, trace_digest=by_queued)
    house.jobs.submit([new])
    house.deploy(by_version)
    house.make_old(but=frozenset({young}))
    assert remove(house).artifacts == (unnamed,)
    assert set(house.files.digests()) == {by_young, by_queued, by_version}
    assert house.count(jobs) == 2


def test_the_solve_behind_a_version_stays(house: House) -> None:
    """A deployment's history names where its placements came from."""
    trace, placement = house.artifact(b"trace"), house.artifact(b"placement", "placement")
    job_id = house.finished(trace=trace, placement=placement)
    house.finished(trace=trace)
    house.deploy(placement, job_id)
    house.make_old()
    assert remove(house).jobs == 1
    assert house.jobs.get(job_id) is not None
    assert set(house.files.digests()) == {trace, placement}


def test_what_a_deployment_was_given_stays(house: House) -> None:
    """An artifact that only a deployment's description names."""
    digest = house.artifact(b"in a document")
    about = {"created_at": 0.0, "updated_at": 0.0, "revision": 1}
    with house.database.write() as connection:
        refresh = {"plan": {"trace": digest}}
        connection.execute(deployments.insert().values(name="d", spec={}, refresh=refresh, **about))
    house.make_old()
    assert remove(house).artifacts == ()


def test_what_was_just_used_stays_even_with_no_time_to_keep(house: House) -> None:
    """Somebody is about to name it."""
    digest = house.artifact(b"fresh")
    assert remove_old(house.database, house.files, older_than_s=0.0).artifacts == ()
    assert house.files.read(digest) == b"fresh"


def test_a_request_that_touches_first_wins(house: House) -> None:
    """A job that names an old artifact, after touching it, finds it whatever retention does meanwhile."""
    digest = house.artifact(b"old")
    house.make_old()
    assert house.artifacts.touch([digest]) == {digest}
    assert remove(house).artifacts == ()
    house.finished(trace=digest)
    assert house.files.read(digest) == b"old"


def test_an_upload_while_its_row_is_removed_keeps_its_bytes(house: House) -> None:
    """Bytes that are kept again between the removal of the row and of the file stay for the new row."""
    digest = house.artifact(b"again")
    house.make_old()
    house.files.put(b"again")
    assert remove(house).artifacts == (digest,)
    assert house.artifact(b"again") == digest
    assert house.files.read(digest) == b"again"


def test_files_without_a_name_go_once_they_are_old(house: House) -> None:
    """A crash came between storing and naming."""
    digest = house.files.put(b"orphan")
    assert remove(house).orphans == 0
    then = time.time() - 2 * GRACE_S
    os.utime(house.files.local(digest), (then, then))
    assert remove(house).orphans == 1
    assert list(house.files.digests()) == []


def test_windows_go(house: House) -> None:
    """Old load windows of deployments that live on."""
    house.deploy(house.artifact(b"placement", "placement"))
    part = {"deployment": "d", "rank": 0, "tokens": 1.0, "load": b"", "received_at": 0.0}
    with house.database.write() as connection:
        rows = [{"window": number, **part} for number in range(500)]
        connection.execute(load_windows.insert(), rows)
    assert remove(house).windows == 500
    assert house.count(load_windows) == 0


def test_a_dry_run_tells_and_changes_nothing(house: House) -> None:
    """It says exactly what the real one then does."""
    house.finished(trace=house.artifact(b"trace"))
    house.make_old()
    told = remove(house, dry_run=True)
    assert (house.count(jobs), house.count(artifacts)) == (1, 1)
    assert list(house.files.digests()) == [digest_of(b"trace")]
    assert remove(house) == told


def test_compacting_makes_the_file_small(sqlite_url: str, tmp_path: Path) -> None:
    """SQLite keeps the room of removed rows until it is told."""
    from service.state.database import open_database

    database = open_database(sqlite_url)
    house = House(database, tmp_path / "data")
    trace = house.artifact(b"trace")
    for _ in range(20):
        house.finished(trace=trace, counters={})
    with database.write() as connection:
        connection.execute(jobs.update().values(spec={"filler": "x" * 50_000}))
    compact(database)
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    before = path.stat().st_size
    house.make_old()
    remove(house)
    compact(database)
    assert path.stat().st_size < before / 2
    database.close()
