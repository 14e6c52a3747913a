"""A leased job and its process, as a worker holds them, and what the worker writes down of them."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placement.errors import ServiceError
from service.artifacts import ArtifactFiles, DiskFullError
from service.errors import UnavailableError
from service.jobs.messages import Message
from service.jobs.order import Order
from service.jobs.outcomes import failed, outcome_of
from service.jobs.runner import Ended, How, Limits, Run
from service.settings import Settings
from service.state.artifacts import ArtifactStore
from service.state.jobs import JobStore
from service.state.records import Claim, JobKind, JobStatus, NewEvent, Outcome

__all__ = ["Bench", "Task"]

_log = logging.getLogger(__name__)

LEAST_SLACK_S = 30.0
"""How far a solve may pass its own time limit, for bound, evaluation and a busy machine."""
SLACK_SHARE = 0.5
MOST_TROUBLE_S = 60.0
"""How long a placement is offered to a store that does not take it."""
CHUNK_BYTES = 1 << 20
QUICK = frozenset({JobKind.EVALUATION, JobKind.CHECK})


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What tasks work with.

    Parameters
    ----------
    num_cpus
        Threads that the worker's jobs may use together.
    pid
        The worker's process id.
    """

    settings: Settings
    files: ArtifactFiles
    artifacts: ArtifactStore
    jobs: JobStore
    num_cpus: int
    pid: int


class Task:
    """One lease.

    Parameters
    ----------
    claim
        The lease.
    bench
        Stores and settings.
    on_news
        Called, from another thread, when there is something to record.
    """

    def __init__(self, claim: Claim, bench: Bench, on_news: Callable[[], None]) -> None:
        self.claim = claim
        self.job = claim.job
        self.is_stopped = claim.job.stop_requested
        self.is_closing = False
        self.is_over = False
        """Whether nothing more is to be written: it has ended, or is somebody else's."""
        self._bench = bench
        self._on_news = on_news
        self._run: Run | None = None
        self._unable: Outcome | None = None
        self._stored: set[str] = set()
        self._troubled_s: float | None = None

    @property
    def is_quick(self) -> bool:
        """Whether it takes no more than one reading of the trace."""
        return self.job.kind in QUICK

    @property
    def num_cpus(self) -> int:
        """Threads that it uses."""
        return max(1, min(self.job.cpus, self._bench.num_cpus))

    def start(self) -> None:
        """Fetch what it needs, and start its process; what cannot be had is the job's failure."""
        try:
            order = self._order()
        except DiskFullError as exc:
            self._unable = failed("internal", str(exc))
        except UnavailableError:
            raise
        except ServiceError as exc:
            self._unable = failed("internal", str(exc))
        except OSError as exc:
            self._unable = failed("internal", f"the scratch folder cannot be used: {exc.strerror}")
        else:
            self._run = Run(order, self._limits(), self._on_news)
            self._run.start()
            if self.is_stopped:
                self._run.stop()

    def stop(self) -> None:
        """A caller wants it to end."""
        if not self.is_stopped:
            self.is_stopped = True
            if self._run is not None:
                self._run.stop()

    def shut_down(self) -> None:
        """The worker goes: bring the process to an end with what it has."""
        self.is_closing = True
        if self._run is None:
            return
        if self.is_quick:
            self._run.abandon()
        else:
            self._run.stop()

    def drop(self) -> None:
        """The lease is lost: end the process, and write nothing more."""
        self.is_over = True
        if self._run is not None:
            self._run.abandon()

    @property
    def is_gone(self) -> bool:
        """Whether the process is gone too."""
        return self._run is None or self._run.is_gone

    def close(self) -> None:
        """Wait for the process, and remove its folder."""
        if self._run is not None:
            self._run.close()

    def record(self) -> None:
        """Write down what has come.

        Raises
        ------
        UnavailableError
            If the database is away: what was not written is kept.
        """
        if self.is_over:
            return
        try:
            self._write_down()
        except UnavailableError:
            raise
        except ServiceError as exc:
            self._bear(exc)

    def _write_down(self) -> None:
        if self._run is None and self._unable is None:
            if self.is_closing:
                self._give_back()
                return
            self.start()
        if self._unable is not None:
            self._finish(self._unable)
            return
        assert self._run is not None
        # Asked first: every message comes before the end.
        ended = self._run.ended
        messages = self._run.take()
        try:
            while messages and not self.is_over:
                self._record(messages[0])
                messages.pop(0)
        finally:
            self._run.put_back(messages)
        if ended is not None and not self.is_over:
            self._conclude(ended)

    def _bear(self, exc: ServiceError) -> None:
        """Try again while a store of artifacts does not take a file, and give up in the end."""
        now = time.monotonic()
        self._troubled_s = self._troubled_s or now
        if now - self._troubled_s < MOST_TROUBLE_S:
            raise UnavailableError(str(exc)) from exc
        self._fail(f"the placement cannot be kept: {exc}")

    def _record(self, message: Message) -> None:
        kept = message.get("kept")
        data = {name: value for name, value in message.items() if name not in ("kind", "kept")}
        event = NewEvent(kind=message["kind"], data=data)
        if message["kind"] != "incumbent":
            self._note(event)
            return
        digest = None
        if kept is not None:
            try:
                digest = self._store(kept)
            except DiskFullError as exc:
                self._fail(f"the placement cannot be kept: {exc}")
                return
        if digest is not None:
            event = NewEvent(kind="incumbent", data={**data, "placement_id": digest})
        self._note(event, incumbent=event.data, incumbent_digest=digest)

    def _note(self, event: NewEvent, **incumbent: Any) -> None:
        if not self._bench.jobs.record(self.claim, [event], **incumbent):
            self.lose()

    def lose(self) -> None:
        """The lease is somebody else's by now."""
        _log.warning("the lease on %s is lost; its process is ended", self.job.id)
        self.drop()

    def _fail(self, why: str) -> None:
        """End the job, not the worker."""
        self._unable = failed("internal", why)
        if self._run is not None:
            self._run.abandon()
        self._finish(self._unable)

    def _store(self, kept: Message) -> str | None:
        """Keep a placement's file; None where a newer one has taken its place already."""
        digest: str = kept["digest"]
        if digest in self._stored:
            return digest
        assert self._run is not None
        path = self._run.folder / kept["file"]
        try:
            found = self._keep(path)
        except FileNotFoundError:
            return None
        if found != digest:
            raise UnavailableError(f"the placement of {self.job.id} was damaged on its way")
        self._bench.artifacts.add(
            digest=digest,
            kind="placement",
            size_bytes=kept["size_bytes"],
            format="native",
            summary=kept["summary"],
            created_by=self.job.caller,
        )
        self._stored.add(digest)
        path.unlink(missing_ok=True)
        return digest

    def _keep(self, path: Path) -> str:
        with path.open("rb") as file, self._bench.files.draft() as draft:
            while chunk := file.read(CHUNK_BYTES):
                draft.write(chunk)
            return self._bench.files.keep(draft)

    def _conclude(self, ended: Ended) -> None:
        """End the job, or give it back."""
        if ended.how is How.LOST and not self.is_closing:
            self._retire()
            return
        try:
            digest = (
                None if ended.message is None or "digest" not in ended.message else self._store(ended.message)
            )
        except DiskFullError as exc:
            self._fail(f"the placement cannot be kept: {exc}")
            return
        if self.is_closing and not self.is_stopped and self._is_unfinished(ended):
            self._release(ended, digest)
            return
        self._finish(outcome_of(ended, job=self.job, is_stopped=self.is_stopped))

    def _is_unfinished(self, ended: Ended) -> bool:
        if ended.how is How.RESULT:
            return ended.message is not None and ended.message["result"].get("termination") == "stopped"
        return ended.how in (How.STOPPED, How.LOST) or ended.code == "no-placement"

    def _release(self, ended: Ended, digest: str | None) -> None:
        """Give the job back, to go on from what it has found."""
        if digest is not None and ended.message is not None:
            objective = ended.message["result"]["objective"]
            incumbent = {
                **{key: objective.get(key) for key in ("name", "unit", "lower_bound", "gap")},
                "objective": objective.get("value"),
                "solver": ended.message["result"].get("solver"),
                "elapsed_s": ended.message["result"].get("elapsed_s"),
                "placement_id": digest,
            }
            self._bench.jobs.record(self.claim, [], incumbent=incumbent, incumbent_digest=digest)
        self._give_back()

    def _give_back(self) -> None:
        self._bench.jobs.release(self.claim)
        self.is_over = True
        _log.info("%s goes back to the queue: the worker shuts down", self.job.id)

    def _retire(self) -> None:
        """The process was killed by somebody else: as if this worker had been lost with it."""
        for lease in self._bench.jobs.leases():
            if (lease.job_id, lease.attempt) == (self.job.id, self.claim.attempt):
                status = self._bench.jobs.retire(lease)
                _log.error("the process of %s was killed; the job is %s", self.job.id, status)
        self.is_over = True

    def _finish(self, outcome: Outcome) -> None:
        if not self._bench.jobs.finish(self.claim, outcome):
            self.lose()
            return
        self.is_over = True
        level = logging.WARNING if outcome.status is JobStatus.FAILED else logging.INFO
        why = "" if outcome.error is None else f": {outcome.error['message']}"
        _log.log(level, "%s %s%s", self.job.id, outcome.status, why)

    def _order(self) -> Order:
        job, bench = self.job, self._bench
        files = bench.files
        assert job.trace_digest is not None
        trace = files.local(job.trace_digest)
        start = None if job.start_digest is None else files.local(job.start_digest)
        incumbent = None if job.incumbent_digest is None else files.local(job.incumbent_digest)
        return Order(
            kind=job.kind,
            spec=job.spec,
            trace=str(trace),
            start=None if start is None else str(start),
            incumbent=None if incumbent is None else str(incumbent),
            folder=tempfile.mkdtemp(prefix=f"{job.id}-", dir=files.scratch),
            parent=bench.pid,
            threads=self.num_cpus,
            memory_bytes=bench.settings.solve_memory_bytes,
            max_unpacked_bytes=bench.settings.max_unpacked_bytes,
        )

    def _limits(self) -> Limits:
        settings = self._bench.settings
        own = (self.job.spec.get("options") or {}).get("time_limit")
        time_s = settings.max_solve_seconds
        if own is not None:
            time_s = min(time_s, own + max(LEAST_SLACK_S, SLACK_SHARE * own))
        return Limits(
            memory_bytes=settings.solve_memory_bytes, time_s=time_s, grace_s=settings.stop_grace_seconds
        )
