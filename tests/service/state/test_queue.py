"""The queue, call by call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sqlalchemy as sa

from service.errors import NotFoundError, QueueFullError
from service.state.counters import read_counters
from service.state.database import Database
from service.state.jobs import MOST_ATTEMPTS, Head, JobStore
from service.state.records import Claim, JobKind, JobStatus, NewEvent, Outcome
from service.state.tables import artifacts
from tests.service.state.samples import PLACEMENT, TRACE, add_artifacts, new_job

INCUMBENT = {"objective": 1.5, "lower_bound": 1.0, "gap": 1 / 3, "solver": "search", "elapsed_s": 2.0}


@pytest.fixture
def store(database: Database) -> JobStore:
    add_artifacts(database)
    return JobStore(database, clock=lambda: 1000.0)


def claimed(store: JobStore, worker: str = "w1", cpus: int = 8) -> Claim:
    """Return a claim, which must be there."""
    claim = store.claim(worker, cpus=cpus)
    assert claim is not None
    return claim


def retired(store: JobStore, job_id: str) -> JobStatus | None:
    """Take a job from its worker as a watcher who has seen its present beat."""
    return store.retire(next(lease for lease in store.leases() if lease.job_id == job_id))


def test_a_job_comes_back_as_it_was_queued(store: JobStore) -> None:
    """Every field, and what is not there yet is None."""
    new = new_job(trace_digest=TRACE, start_digest=PLACEMENT, priority=3, cpus=2, deployment="prod")
    (answer,) = store.submit([new])
    assert answer.created
    assert not answer.conflict
    assert store.get(answer.job.id) == answer.job
    assert answer.job.id.startswith("s-")
    assert (answer.job.spec, answer.job.deployment, answer.job.created_at) == (new.spec, "prod", 1000.0)
    assert store.get("s-unknown") is None
    assert store.submit([]) == []


def test_ids_tell_the_kind(store: JobStore) -> None:
    """``s-``, ``e-`` and ``c-``."""
    answers = store.submit([new_job(kind=kind) for kind in JobKind])
    assert [answer.job.id[:2] for answer in answers] == ["s-", "e-", "c-"]


def test_a_key_makes_one_job(store: JobStore) -> None:
    """The same key is the same job, with another request a conflict; callers and kinds have their own."""
    (first,) = store.submit([new_job(idempotency_key="k")])
    again, other = store.submit(
        [new_job(idempotency_key="k"), new_job(idempotency_key="k", request_hash="1" * 64)]
    )
    assert (again.created, again.conflict, again.job) == (False, False, first.job)
    assert (other.created, other.conflict, other.job) == (False, True, first.job)
    elsewhere = store.submit(
        [new_job("bob", idempotency_key="k"), new_job(kind=JobKind.CHECK, idempotency_key="k")]
    )
    assert all(answer.created for answer in elsewhere)


def test_a_key_twice_in_one_batch_makes_one_job(store: JobStore) -> None:
    """The first one wins."""
    one, two, three = store.submit(
        [
            new_job(idempotency_key="k", priority=1),
            new_job(idempotency_key="k", priority=1),
            new_job(idempotency_key="k", request_hash="1" * 64),
        ]
    )
    assert [answer.created for answer in (one, two, three)] == [True, False, False]
    assert one.job == two.job == three.job
    assert three.conflict


def test_a_full_queue_takes_all_or_nothing(store: JobStore) -> None:
    """A batch that does not fit leaves nothing; known keys are answered even then."""
    store.submit([new_job(idempotency_key="k"), new_job()], max_queued=2)
    with pytest.raises(QueueFullError, match="at most 2 jobs"):
        store.submit([new_job()], max_queued=2)
    assert store.counts()[JobStatus.QUEUED] == 2
    assert not store.submit([new_job(idempotency_key="k")], max_queued=2)[0].created
    claimed(store)
    assert store.submit([new_job()], max_queued=2)[0].created


def test_a_job_without_its_trace_is_not_queued(store: JobStore) -> None:
    """Nor those that came with it."""
    with pytest.raises(NotFoundError, match="upload it again"):
        store.submit([new_job(), new_job(trace_digest="sha256:" + "f" * 64)])
    assert store.counts()[JobStatus.QUEUED] == 0


def test_what_a_job_names_cannot_be_deleted(store: JobStore, database: Database) -> None:
    """The database itself holds it."""
    store.submit([new_job(trace_digest=TRACE)])
    with pytest.raises(sa.exc.IntegrityError), database.write() as connection:
        connection.execute(artifacts.delete().where(artifacts.c.digest == TRACE))


def test_callers_take_turns(store: JobStore) -> None:
    """Many jobs of one caller do not keep the others waiting; priority goes first."""
    store.submit([new_job("ann")] * 4 + [new_job("bob")] * 2 + [new_job("cy", priority=-1)])
    store.submit([new_job("dan", priority=1)])
    order = [claimed(store).job.caller for _ in range(8)]
    assert order == ["dan", "ann", "bob", "ann", "bob", "ann", "ann", "cy"]


def test_only_what_fits_is_claimed(store: JobStore) -> None:
    """A wide job waits for room; narrow ones of any caller and priority pass."""
    wide, narrow = store.submit([new_job("ann", priority=5, cpus=4), new_job("bob", cpus=2)])
    assert store.claim("w1", cpus=1) is None
    assert claimed(store, cpus=3).job.id == narrow.job.id
    assert store.claim("w1", cpus=3) is None
    assert claimed(store, cpus=4).job.id == wide.job.id


def test_kinds_are_chosen(store: JobStore) -> None:
    """What is short need not wait behind what is long."""
    solve, check = store.submit([new_job(priority=9), new_job(kind=JobKind.CHECK)])
    assert store.claim("w1", cpus=8, kinds=[JobKind.EVALUATION]) is None
    claim = store.claim("w1", cpus=8, kinds=[JobKind.CHECK, JobKind.EVALUATION])
    assert claim is not None
    assert claim.job.id == check.job.id
    assert claimed(store).job.id == solve.job.id


def test_a_life_in_events(store: JobStore) -> None:
    """From the claim to the last event, which tells how it ended."""
    store.submit([new_job(trace_digest=TRACE)])
    claim = claimed(store)
    assert (claim.job.status, claim.job.worker, claim.attempt) == (JobStatus.RUNNING, "w1", 1)
    news = [NewEvent(kind="progress", data={"phase": "reading"}), NewEvent(kind="incumbent", data=INCUMBENT)]
    assert store.record(claim, news, incumbent=INCUMBENT, incumbent_digest=PLACEMENT)
    assert store.record(claim, [])
    result = {"objective": {"value": 1.5}, "placement_id": PLACEMENT}
    outcome = Outcome(
        status=JobStatus.SUCCEEDED,
        result=result,
        placement_digest=PLACEMENT,
        counters={("solves", "status=succeeded"): 1, ("solve_seconds", ""): 2.5},
    )
    assert store.finish(claim, outcome)
    job = store.get(claim.job.id)
    assert job is not None
    assert (job.status, job.result, job.placement_digest, job.worker) == (
        JobStatus.SUCCEEDED,
        result,
        PLACEMENT,
        None,
    )
    assert job.incumbent == INCUMBENT
    assert [(event.seq, event.kind, event.data) for event in store.events(job.id)] == [
        (1, "progress", {"phase": "started", "attempt": 1}),
        (2, "progress", {"phase": "reading"}),
        (3, "incumbent", INCUMBENT),
        (4, "done", {"status": "succeeded", "result": result, "error": None}),
    ]
    assert [event.seq for event in store.events(job.id, after=1, limit=2)] == [2, 3]
    assert store.heads([job.id, "s-unknown"]) == {job.id: Head(event_seq=4, status=JobStatus.SUCCEEDED)}


def test_who_lost_the_lease_changes_nothing(store: JobStore, database: Database) -> None:
    """Neither events nor results nor counters of a worker that was taken for lost."""
    store.submit([new_job()])
    late = claimed(store, "w1")
    assert retired(store, late.job.id) is JobStatus.QUEUED
    now = claimed(store, "w1")  # the same worker again: only the attempt differs
    before = store.get(late.job.id)
    assert not store.record(late, [NewEvent(kind="progress", data={})], incumbent=INCUMBENT)
    assert not store.finish(late, Outcome(status=JobStatus.SUCCEEDED, counters={("solves", ""): 1}))
    assert not store.release(late)
    assert store.beat([late, now]).lost == frozenset()  # one job: its present lease stands
    assert store.beat([late]).lost == {late.job.id}
    assert store.get(late.job.id) == before
    with database.read() as connection:
        assert read_counters(connection) == {}


def test_a_lost_worker_costs_one_attempt_and_the_second_the_job(store: JobStore) -> None:
    """It goes on from its incumbent once, then fails with a code."""
    store.submit([new_job()])
    claim = claimed(store)
    store.record(claim, [], incumbent=INCUMBENT, incumbent_digest=PLACEMENT)
    assert retired(store, claim.job.id) is JobStatus.QUEUED
    again = claimed(store, "w2")
    assert (again.attempt, again.job.lost, again.job.incumbent_digest) == (2, 1, PLACEMENT)
    assert retired(store, claim.job.id) is JobStatus.FAILED
    job = store.get(claim.job.id)
    assert job is not None
    assert job.error is not None
    assert (job.error["code"], job.lost, job.ended_at) == ("worker-lost", MOST_ATTEMPTS, 1000.0)
    phases = [event.data.get("phase") for event in store.events(job.id)]
    assert phases == ["started", "requeued", "started", None]


def test_a_beat_saves_the_lease(store: JobStore) -> None:
    """Who watches acts on what it has seen: one sign of life since, and nothing happens; nor twice."""
    store.submit([new_job(), new_job()])
    claim = claimed(store)
    (seen,) = store.leases()
    store.beat([claim])
    assert store.retire(seen) is None
    (seen,) = store.leases()
    store.record(claim, [])
    assert store.retire(seen) is None
    (seen,) = store.leases()
    assert store.retire(seen) is JobStatus.QUEUED
    assert store.retire(seen) is None
    assert store.retire(replace(seen, worker="w9")) is None


def test_releases_do_not_count_as_lost(store: JobStore) -> None:
    """A worker may shut down as often as it likes."""
    store.submit([new_job()])
    for attempt in range(1, MOST_ATTEMPTS + 3):
        claim = claimed(store)
        assert (claim.attempt, claim.job.lost) == (attempt, 0)
        assert store.release(claim)
        assert not store.release(claim)
    assert store.counts()[JobStatus.QUEUED] == 1


def test_stop_before_the_start(store: JobStore) -> None:
    """A queued job ends at once, without placement, and is never claimed."""
    (answer,) = store.submit([new_job()])
    job = store.request_stop(answer.job.id)
    assert job is not None
    assert (job.status, job.placement_digest, job.ended_at) == (JobStatus.STOPPED, None, 1000.0)
    assert [event.kind for event in store.events(job.id)] == ["done"]
    assert store.claim("w1", cpus=8) is None
    assert store.request_stop(job.id) == job


@pytest.mark.parametrize("how", ["retire", "release"])
def test_stop_of_a_job_whose_worker_goes(store: JobStore, how: str) -> None:
    """It is not tried again: the incumbent stands."""
    store.submit([new_job()])
    claim = claimed(store)
    store.record(claim, [], incumbent=INCUMBENT, incumbent_digest=PLACEMENT)
    asked = store.request_stop(claim.job.id)
    assert asked is not None
    assert (asked.status, asked.stop_requested) == (JobStatus.RUNNING, True)
    assert store.look([claim]).stop == store.beat([claim]).stop == {claim.job.id}
    if how == "retire":
        assert retired(store, claim.job.id) is JobStatus.STOPPED
    else:
        assert store.release(claim)
    job = store.get(claim.job.id)
    assert job is not None
    assert (job.status, job.placement_digest) == (JobStatus.STOPPED, PLACEMENT)
    assert job.result is not None
    assert job.result["placement_id"] == PLACEMENT
    assert job.result["objective"]["value"] == INCUMBENT["objective"]
    assert store.events(job.id)[-1].data["result"] == job.result


def test_stop_of_a_job_that_waits_to_go_on(store: JobStore) -> None:
    """What it had found stands."""
    store.submit([new_job()])
    claim = claimed(store)
    store.record(claim, [], incumbent=INCUMBENT, incumbent_digest=PLACEMENT)
    store.release(claim)
    job = store.request_stop(claim.job.id)
    assert job is not None
    assert (job.status, job.placement_digest) == (JobStatus.STOPPED, PLACEMENT)


def test_a_finished_job_does_not_change(store: JobStore) -> None:
    """Neither by a second end nor by a stop."""
    store.submit([new_job()])
    claim = claimed(store)
    store.finish(claim, Outcome(status=JobStatus.FAILED, error={"code": "internal", "message": "..."}))
    before = store.get(claim.job.id)
    assert not store.finish(claim, Outcome(status=JobStatus.SUCCEEDED))
    assert not store.record(claim, [NewEvent(kind="progress", data={})])
    assert store.request_stop(claim.job.id) == before


def test_an_end_with_an_unknown_placement_changes_nothing(store: JobStore) -> None:
    """Status, event and counters come together or not at all."""
    store.submit([new_job()])
    claim = claimed(store)
    before = store.get(claim.job.id)
    with pytest.raises(sa.exc.IntegrityError):
        store.finish(claim, Outcome(status=JobStatus.SUCCEEDED, placement_digest="sha256:" + "f" * 64))
    assert store.get(claim.job.id) == before
    assert len(store.events(claim.job.id)) == 1


def test_pages_go_back_in_time(store: JobStore) -> None:
    """Newest first, each job on one page, by kind, status, caller and deployment."""
    store.submit([new_job("ann"), new_job("bob"), new_job("ann", deployment="prod")])
    store.submit([new_job(kind=JobKind.CHECK)])
    first = store.page(limit=2)
    rest = store.page(limit=2, before=first[-1].number)
    assert [job.number for job in first + rest] == sorted((job.number for job in first + rest), reverse=True)
    assert len({job.id for job in first + rest}) == 3
    assert [job.caller for job in store.page(caller="bob")] == ["bob"]
    assert [job.deployment for job in store.page(deployment="prod")] == ["prod"]
    assert store.page(status=JobStatus.RUNNING) == []
    assert len(store.page(kind=JobKind.CHECK, status=JobStatus.QUEUED)) == 1


def test_counts_name_every_status(store: JobStore) -> None:
    """Zero where there is none."""
    assert store.counts() == dict.fromkeys(JobStatus, 0)
    store.submit([new_job()] * 3)
    claimed(store)
    assert store.counts() == dict.fromkeys(JobStatus, 0) | {JobStatus.QUEUED: 2, JobStatus.RUNNING: 1}


def test_no_number_that_is_none_leaves(store: JobStore) -> None:
    """NaN and infinities are null in what is kept."""
    store.submit([new_job()])
    claim = claimed(store)
    store.record(claim, [NewEvent(kind="incumbent", data={"gap": float("inf"), "x": float("nan")})])
    assert store.events(claim.job.id)[-1].data == {"gap": None, "x": None}
