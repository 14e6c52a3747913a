"""The queue against a plain model of it, in any order of calls, from holders of old leases too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from service.state import tables
from service.state.counters import read_counters
from service.state.database import Database
from service.state.jobs import MOST_ATTEMPTS, JobStore, Lease
from service.state.records import TERMINAL, Claim, JobStatus, NewEvent, Outcome
from tests.service.state.samples import PLACEMENT, add_artifacts, new_job

FINISHED = ("finished", "")
KEYS = st.none() | st.sampled_from(["k1", "k2", "k3"])
HASHES = st.sampled_from(["0" * 64, "1" * 64])
ENDS = st.sampled_from(sorted(TERMINAL))


@dataclass
class Plain:
    """What a job should be."""

    caller: str
    priority: int
    cpus: int
    number: int
    request_hash: str
    status: JobStatus = JobStatus.QUEUED
    attempt: int = 0
    lost: int = 0
    worker: str | None = None
    stop: bool = False
    beats: int = 0
    has_incumbent: bool = False
    told: list[str] = field(default_factory=list)

    def holds(self, claim: Claim) -> bool:
        """Return whether a lease stands."""
        return self.status is JobStatus.RUNNING and (self.attempt, self.worker) == (
            claim.attempt,
            claim.worker,
        )

    def end(self, status: JobStatus) -> None:
        """Reach a final status."""
        self.status, self.worker = status, None
        self.told.append(f"done {status}")

    def requeue(self) -> None:
        """Wait again."""
        self.status, self.worker = JobStatus.QUEUED, None
        self.told.append("requeued")


class Queue(RuleBasedStateMachine):
    """Every call on the store, followed on the model."""

    claims = Bundle("claims")
    leases = Bundle("leases")

    def __init__(self, database: Database) -> None:
        super().__init__()
        with database.write() as connection:
            for table in reversed(tables.METADATA.sorted_tables):
                connection.execute(table.delete())
        add_artifacts(database)
        self.database = database
        self.jumps = 0
        self.store = JobStore(database, clock=self.clock)
        self.plain: dict[str, Plain] = {}
        self.keys: dict[tuple[str, str], str] = {}
        self.finished = 0
        self.held: list[Claim] = []

    def clock(self) -> float:
        """Jump to and fro: nothing may depend on it."""
        self.jumps += 1
        return 1e9 + (1e6 if self.jumps % 2 else -1e6) * self.jumps

    @rule(
        batch=st.lists(
            st.tuples(
                st.sampled_from(["ann", "bob", "cy"]), st.integers(-1, 1), st.integers(1, 3), KEYS, HASHES
            ),
            max_size=4,
        )
    )
    def submit(self, batch: Sequence[tuple[str, int, int, str | None, str]]) -> None:
        """Queue some, each key once."""
        answers = self.store.submit(
            [
                new_job(caller, priority=priority, cpus=cpus, idempotency_key=key, request_hash=request_hash)
                for caller, priority, cpus, key, request_hash in batch
            ]
        )
        for (caller, priority, cpus, key, request_hash), answer in zip(batch, answers, strict=True):
            known = None if key is None else self.keys.get((caller, key))
            assert answer.created == (known is None)
            if known is not None:
                assert answer.job.id == known
                assert answer.conflict == (self.plain[known].request_hash != request_hash)
                continue
            self.plain[answer.job.id] = Plain(caller, priority, cpus, answer.job.number, request_hash)
            if key is not None:
                self.keys[caller, key] = answer.job.id

    @rule(target=claims, worker=st.sampled_from(["w1", "w1", "w2"]), cpus=st.integers(0, 3))
    def claim(self, worker: str, cpus: int) -> object:
        """Take the best one that fits."""
        busy = Counter(job.caller for job in self.plain.values() if job.status is JobStatus.RUNNING)
        line = sorted(
            (-job.priority, busy[job.caller], job.number, job_id)
            for job_id, job in self.plain.items()
            if job.status is JobStatus.QUEUED and job.cpus <= cpus
        )
        claim = self.store.claim(worker, cpus=cpus)
        assert (None if claim is None else claim.job.id) == (line[0][3] if line else None)
        if claim is None:
            return multiple()
        job = self.plain[claim.job.id]
        job.status, job.worker, job.attempt, job.beats = (
            JobStatus.RUNNING,
            worker,
            job.attempt + 1,
            job.beats + 1,
        )
        job.told.append("started")
        assert claim.attempt == claim.job.attempt == job.attempt
        self.held.append(claim)
        return claim

    @rule(held=st.lists(claims, max_size=4, unique_by=id))
    def beat(self, held: list[Claim]) -> None:
        """Renew leases, also old ones."""
        one_each = list({claim.job.id: claim for claim in held}.values())
        own = {claim.job.id for claim in one_each if self.plain[claim.job.id].holds(claim)}
        seen = self.store.look(one_each)
        told = self.store.beat(one_each)
        assert seen == told
        assert told.lost == {claim.job.id for claim in one_each} - own
        assert told.stop == {job_id for job_id in own if self.plain[job_id].stop}
        for job_id in own:
            self.plain[job_id].beats += 1

    @rule(
        claim=claims,
        kinds=st.lists(st.sampled_from(["progress", "incumbent"]), max_size=3),
        keeps=st.booleans(),
    )
    def record(self, claim: Claim, kinds: list[str], keeps: bool) -> None:
        """Write from a lease, perhaps an old one."""
        job = self.plain[claim.job.id]
        news = [NewEvent(kind=kind, data={"at": index}) for index, kind in enumerate(kinds)]
        kept = {"incumbent": {"objective": 1.5}, "incumbent_digest": PLACEMENT} if keeps else {}
        assert self.store.record(claim, news, **kept) == job.holds(claim)  # type: ignore[arg-type]
        if job.holds(claim):
            job.told += kinds
            job.beats += 1
            job.has_incumbent |= keeps

    @rule(claim=claims, status=ENDS)
    def finish(self, claim: Claim, status: JobStatus) -> None:
        """End from a lease, perhaps an old one."""
        job = self.plain[claim.job.id]
        held = job.holds(claim)
        assert self.store.finish(claim, Outcome(status=status, counters={FINISHED: 1.0})) == held
        if held:
            self.finished += 1
            job.end(status)

    @rule(claim=claims)
    def release(self, claim: Claim) -> None:
        """Give a job back."""
        job = self.plain[claim.job.id]
        held = job.holds(claim)
        assert self.store.release(claim) == held
        if held:
            job.end(JobStatus.STOPPED) if job.stop else job.requeue()

    @rule(target=leases)
    def watch(self) -> object:
        """See all leases as they are now."""
        found = self.store.leases()
        assert {lease.job_id: (lease.worker, lease.attempt, lease.beat) for lease in found} == {
            job_id: (job.worker, job.attempt, job.beats)
            for job_id, job in self.plain.items()
            if job.status is JobStatus.RUNNING
        }
        return multiple(*found)

    @rule(lease=leases)
    def retire(self, lease: Lease) -> None:
        """Take a job by what was seen of its lease, perhaps long ago."""
        job = self.plain[lease.job_id]
        stands = job.status is JobStatus.RUNNING and (job.attempt, job.beats) == (lease.attempt, lease.beat)
        status = self.store.retire(lease)
        if not stands:
            assert status is None
            return
        job.lost += 1
        if job.stop:
            job.end(JobStatus.STOPPED)
        elif job.lost >= MOST_ATTEMPTS:
            job.end(JobStatus.FAILED)
        else:
            job.requeue()
        assert status is job.status

    @rule(choice=st.integers(0, 9), kept=st.booleans())
    def come_late(self, choice: int, kept: bool) -> None:
        """Write as one whose job runs again elsewhere: in vain."""
        running = {job_id for job_id, job in self.plain.items() if job.status is JobStatus.RUNNING}
        old = [one for one in self.held if one.job.id in running and not self.plain[one.job.id].holds(one)]
        if old:
            self.record(old[choice % len(old)], ["progress"], kept)
            self.release(old[choice % len(old)])
            self.finish(old[choice % len(old)], JobStatus.SUCCEEDED)

    @rule(choice=st.integers(0, 9), by_beat=st.booleans())
    def live(self, choice: int, by_beat: bool) -> None:
        """Give a sign of life just before somebody acts on what was seen."""
        found = sorted(self.store.leases(), key=lambda lease: self.plain[lease.job_id].number)
        if found:
            lease = found[choice % len(found)]
            (holder,) = (
                one for one in self.held if one.job.id == lease.job_id and self.plain[one.job.id].holds(one)
            )
            self.beat([holder]) if by_beat else self.record(holder, [], False)
            self.retire(lease)

    @rule(choice=st.integers(0, 9))
    def lose_a_worker(self, choice: int) -> None:
        """Take a job by what stands now."""
        found = sorted(self.store.leases(), key=lambda lease: self.plain[lease.job_id].number)
        if found:
            self.retire(found[choice % len(found)])

    @rule(data=st.data())
    def request_stop(self, data: st.DataObject) -> None:
        """Stop any job."""
        assert self.store.request_stop("s-unknown") is None
        if not self.plain:
            return
        job_id = data.draw(st.sampled_from(sorted(self.plain, key=lambda one: self.plain[one].number)))
        job = self.plain[job_id]
        if job.status is JobStatus.QUEUED:
            job.stop = True
            job.end(JobStatus.STOPPED)
        elif job.status is JobStatus.RUNNING:
            job.stop = True
        found = self.store.request_stop(job_id)
        assert found is not None
        assert (found.status, found.stop_requested) == (job.status, job.stop)

    @invariant()
    def stands_where_it_should(self) -> None:
        """Compare what a listener sees."""
        heads = self.store.heads(list(self.plain))
        assert {job_id: (head.status, head.event_seq) for job_id, head in heads.items()} == {
            job_id: (job.status, len(job.told)) for job_id, job in self.plain.items()
        }

    def teardown(self) -> None:
        """Look at everything: each job ended once, its events are all there, counters added once."""
        for job_id, plain in self.plain.items():
            job = self.store.get(job_id)
            assert job is not None
            assert (job.status, job.worker, job.attempt, job.lost) == (
                plain.status,
                plain.worker,
                plain.attempt,
                plain.lost,
            )
            assert (job.incumbent_digest is not None) == plain.has_incumbent
            events = self.store.events(job_id)
            assert [event.seq for event in events] == list(range(1, len(events) + 1))
            assert [_said(event.kind, event.data) for event in events] == plain.told
            assert sum(event.kind == "done" for event in events) == (plain.status in TERMINAL)
        counts = Counter(job.status for job in self.plain.values())
        assert self.store.counts() == {status: counts[status] for status in JobStatus}
        with self.database.read() as connection:
            assert read_counters(connection).get(FINISHED, 0) == self.finished


def _said(kind: str, data: dict[str, object]) -> str:
    if kind == "done":
        return f"done {data['status']}"
    return str(data.get("phase", kind))


def test_the_queue_does_what_its_model_does(database: Database) -> None:
    """Submit, claim, beat, record, finish, release, retire and stop in any order."""
    run_state_machine_as_test(
        partial(Queue, database),  # type: ignore[arg-type]
        settings=settings(
            max_examples=30,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
