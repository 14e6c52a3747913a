"""One queue and several processes: they share the work, race, and are killed."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from service.errors import UnavailableError
from service.state import tables
from service.state.counters import read_counters
from service.state.database import Database, open_database
from service.state.jobs import JobStore
from service.state.records import JobStatus, NewEvent, Outcome
from tests.service.postgres import Cluster
from tests.service.server import eventually
from tests.service.state.actors import BATCH, WORKED, lines, said, start
from tests.service.state.samples import new_job


def check_integrity(database: Database) -> None:
    """Events without gaps as their jobs count them, one end for each job that has one, counters to match."""
    with database.read() as connection:
        if database.is_sqlite:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalars().all() == ["ok"]
            assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
        rows = connection.execute(sa.select(tables.jobs)).all()
        events: dict[str, list[str]] = {row.id: [] for row in rows}
        for event in connection.execute(sa.select(tables.events).order_by("job_id", "seq")):
            events[event.job_id].append(event.kind)
            assert event.seq == len(events[event.job_id])
        counters = read_counters(connection)
    for row in rows:
        assert row.event_seq == len(events[row.id])
        is_over = row.status == JobStatus.SUCCEEDED
        assert events[row.id].count("done") == is_over
        assert (row.worker is not None) == (row.status == JobStatus.RUNNING)
        assert not is_over or events[row.id][-1] == "done"
    assert counters.get(WORKED, 0) == sum(row.status == JobStatus.SUCCEEDED for row in rows)


def test_every_job_is_claimed_once(database: Database, database_url: str) -> None:
    """By three processes at once."""
    store = JobStore(database)
    queued = [answer.job.id for answer in store.submit([new_job(f"c{n % 7}") for n in range(120)])]
    with start("work", database_url, many=3) as actors:
        taken = [job_id for actor in actors for job_id in said(actor)]
    assert sorted(taken) == sorted(queued)
    assert store.counts()[JobStatus.SUCCEEDED] == len(queued)
    check_integrity(database)


def test_a_race_for_a_key_has_one_winner(database: Database, database_url: str) -> None:
    """Two processes submit the same keys: each is one job, which both are told."""
    keys = [f"k{number}" for number in range(60)]
    with start("submit", database_url, *keys, many=2) as actors:
        answers = [[line.split() for line in said(actor)] for actor in actors]
    jobs = [{key: job_id for key, job_id, _ in own} for own in answers]
    assert jobs[0] == jobs[1]
    wins = Counter(key for own in answers for key, _, created in own if created == "True")
    assert wins == dict.fromkeys(keys, 1)
    assert JobStore(database).counts()[JobStatus.QUEUED] == len(keys)


def check_acknowledged(database: Database, told: list[str]) -> None:
    """What was said to be queued or finished is, and batches are whole."""
    finished = {line.split()[1] for line in told if line.startswith("finished ")}
    queued = [line.split()[1:] for line in told if line.startswith("queued ")]
    with database.read() as connection:
        rows = connection.execute(sa.select(tables.jobs)).all()
    status = {row.id: row.status for row in rows}
    assert all(job_id in status for batch in queued for job_id in batch if len(batch) == BATCH)
    assert all(status[job_id] == JobStatus.SUCCEEDED for job_id in finished)
    batches = Counter(row.idempotency_key.rpartition("-")[0] for row in rows if row.idempotency_key)
    assert set(batches.values()) <= {BATCH}


def test_killed_processes_lose_nothing_that_they_were_told(database: Database, database_url: str) -> None:
    """``kill -9`` in the middle of transactions, twice."""
    told = []
    for count in (25, 60):
        with start("rush", database_url, f"r{count}", many=2) as actors:
            told += lines(actors[0], count)
            for actor in actors:
                actor.kill()
            told += [line for actor in actors for line in said(actor)]
    check_acknowledged(database, told)
    check_integrity(database)
    store = JobStore(database)
    for lease in store.leases():
        assert store.retire(lease) is JobStatus.QUEUED
    assert store.counts()[JobStatus.RUNNING] == 0


def test_a_killed_postgresql_keeps_what_it_acknowledged(durable_cluster: Cluster) -> None:
    """The server dies under its clients; once it is back, the same pool of connections serves on."""
    url = durable_cluster.create("state")
    database = open_database(url)
    store = JobStore(database)
    try:
        with start("rush", url, many=2) as actors:
            told = lines(actors[0], 40)
            store.counts()
            durable_cluster.kill()
            told += [line for actor in actors for line in said(actor)]
        with pytest.raises(UnavailableError, match="cannot be used now"):
            store.counts()
        durable_cluster.start()
        eventually(lambda: store.submit([new_job()]))
        check_acknowledged(database, told)
        check_integrity(database)
    finally:
        database.close()


def test_two_watchers_take_a_job_once(database: Database) -> None:
    """Of many who saw the same beat one wins."""
    store = JobStore(database)
    store.submit([new_job()] * 10)
    for _ in range(10):
        store.claim("w1", cpus=8)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(store.retire, store.leases() * 4))
    assert Counter(answers) == {JobStatus.QUEUED: 10, None: 30}


def test_an_end_and_a_watcher_do_not_both_win(database: Database) -> None:
    """A job that ends while it is taken from its worker either has ended or waits, and says so to both."""
    store = JobStore(database)
    store.submit([new_job()] * 20)
    claims = [claim for _ in range(20) if (claim := store.claim("w1", cpus=8)) is not None]
    seen = {lease.job_id: lease for lease in store.leases()}
    outcome = Outcome(status=JobStatus.SUCCEEDED, counters={WORKED: 1.0})
    with ThreadPoolExecutor(4) as pool:
        ends = [pool.submit(store.finish, claim, outcome) for claim in claims]
        takes = [pool.submit(store.retire, seen[claim.job.id]) for claim in reversed(claims)]
    for claim, end, take in zip(claims, ends, reversed(takes), strict=True):
        job = store.get(claim.job.id)
        assert job is not None
        assert (end.result(), take.result()) in {(True, None), (False, JobStatus.QUEUED)}
        assert job.status is (JobStatus.SUCCEEDED if end.result() else JobStatus.QUEUED)
    check_integrity(database)


def test_listeners_see_events_in_order_while_they_are_written(database: Database) -> None:
    """Somebody who reads after the last number seen misses none."""
    store = JobStore(database)
    store.submit([new_job()])
    claim = store.claim("w1", cpus=8)
    assert claim is not None

    def write(number: int) -> None:
        store.record(claim, [NewEvent(kind="progress", data={"n": number})] * 2)

    seen: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(write, number) for number in range(60)]
        while len(seen) < 1 + 2 * len(writes):
            seen += [event.seq for event in store.events(claim.job.id, after=len(seen))]
            assert seen == list(range(1, len(seen) + 1))
    assert all(done.exception() is None for done in writes)
