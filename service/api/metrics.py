"""What Prometheus is told: this process counts its requests; what all processes share is read when asked."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from placement import __version__
from service.state.counters import labels_of, read_counters
from service.state.records import JobStatus
from service.state.tables import artifacts, deployments, jobs, workers
from service.state.totals import JOBS_FAILED, JOBS_FINISHED, SOLVE_GAP, SOLVE_SECONDS, histogram_of

if TYPE_CHECKING:
    from fastapi import FastAPI

    from service.state.database import Database

__all__ = ["Metrics", "StateSnapshot", "metrics_of", "read_snapshot", "state_families"]

PREFIX = "moe_placement"
REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
WORKER_ALIVE_S = 60.0
"""A worker whose last sign of life is older is not counted."""
STREAMS = "/events"
_DRIFT = {
    "excess": ("drift", "By which share the balance of recent windows is worse than expected."),
    "balance": ("balance", "Fullest device over the mean one, on recent windows."),
    "shift": ("shift", "Distance of recent loads to those that were fitted, beyond noise."),
}


class Metrics:
    """What one server process counts by itself."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry(auto_describe=True)
        self._known: dict[tuple[str, str, int], tuple[Counter, Histogram | None]] = {}
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._requests = Counter(
            f"{PREFIX}_requests",
            "Requests that were answered.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            f"{PREFIX}_request_seconds",
            "Time to answer a request; one that waits for news includes the wait.",
            ["method", "route"],
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.event_listeners = Gauge(
            f"{PREFIX}_event_listeners", "Open streams of events.", registry=self.registry
        )
        reads = Counter(
            f"{PREFIX}_placement_reads",
            "Placements of deployments that were asked for, by whether the answer was there: hit, miss.",
            ["result"],
            registry=self.registry,
        )
        self.placement_reads = {True: reads.labels("hit"), False: reads.labels("miss")}
        self.database_errors = Counter(
            f"{PREFIX}_database_errors",
            "Statements of this process that the database failed.",
            registry=self.registry,
        )
        build = Gauge(
            f"{PREFIX}_build_info", "What runs here.", ["version", "python"], registry=self.registry
        )
        build.labels(__version__, platform.python_version()).set(1)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request, by the template of its route: paths of callers would be labels without end."""
        known = self._known.get((method, route, status))
        if known is None:
            known = self._known[method, route, status] = self._series(method, route, status)
        requests, times = known
        requests.inc()
        if times is not None:
            times.observe(seconds)

    def _series(self, method: str, route: str, status: int) -> tuple[Counter, Histogram | None]:
        # The parser lets HTTP's own methods through alone: callers cannot make up series.
        times = None if route.endswith(STREAMS) else self._seconds.labels(method, route)
        return self._requests.labels(method, route, str(status)), times

    def watch_database(self, database: Database) -> None:
        """Count what fails there from now on."""
        sa.event.listen(database.engine, "handle_error", self._count_error)

    def _count_error(self, context: sa.engine.ExceptionContext) -> None:
        # A constraint that refuses a row is an answer, not a failure.
        if not isinstance(context.sqlalchemy_exception, sa.exc.IntegrityError):
            self.database_errors.inc()


def metrics_of(app: FastAPI) -> Metrics:
    """Return the metrics of an application."""
    found: Metrics | None = getattr(app.state, "metrics", None)
    if found is None:
        found = app.state.metrics = Metrics()
        found.watch_database(app.state.context.database)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSnapshot:
    """What the database says of all processes together, at one moment.

    Parameters
    ----------
    queued_at
        When the oldest waiting job came.
    worker_cpus
        Of every worker that has given a sign of life lately.
    artifacts
        Number and bytes by kind.
    deployments
        ``(name, version, drift)`` of each.
    totals
        The counters.
    """

    at: float
    counts: dict[str, int] = field(default_factory=dict)
    queued_at: float | None = None
    worker_cpus: tuple[int, ...] = ()
    artifacts: dict[str, tuple[int, int]] = field(default_factory=dict)
    deployments: tuple[tuple[str, int | None, dict[str, Any] | None], ...] = ()
    totals: dict[tuple[str, str], float] = field(default_factory=dict)


def read_snapshot(database: Database) -> StateSnapshot:
    """Read the state, in one consistent look."""
    now = time.time()
    active = (JobStatus.QUEUED.value, JobStatus.RUNNING.value)
    with database.read() as connection:
        counts = connection.execute(
            sa.select(jobs.c.status, sa.func.count()).where(jobs.c.status.in_(active)).group_by(jobs.c.status)
        )
        queued_at = sa.select(sa.func.min(jobs.c.created_at)).where(jobs.c.status == active[0])
        alive = sa.select(workers.c.cpus).where(workers.c.seen_at > now - WORKER_ALIVE_S)
        stored = sa.select(
            artifacts.c.kind, sa.func.count(), sa.func.coalesce(sa.func.sum(artifacts.c.size_bytes), 0)
        ).group_by(artifacts.c.kind)
        running = sa.select(deployments.c.name, deployments.c.version, deployments.c.drift)
        return StateSnapshot(
            at=now,
            counts=dict.fromkeys(active, 0) | {row[0]: row[1] for row in counts},
            queued_at=connection.scalar(queued_at),
            worker_cpus=tuple(connection.scalars(alive)),
            artifacts={row[0]: (row[1], int(row[2])) for row in connection.execute(stored)},
            deployments=tuple((row[0], row[1], row[2]) for row in connection.execute(running)),
            totals=read_counters(connection),
        )


class Families(Collector):
    """Families that were made already, as something that can be written out."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        """Return them."""
        return self._families


def state_families(snapshot: StateSnapshot | None) -> Iterator[Metric]:
    """Return the metrics of a snapshot; None where the database did not answer."""
    yield _gauge("database_up", "Whether the database answers this process.", float(snapshot is not None))
    if snapshot is None:
        return
    oldest_s = 0.0 if snapshot.queued_at is None else max(0.0, snapshot.at - snapshot.queued_at)
    yield _by_label("jobs", "Jobs that are not finished.", "status", snapshot.counts)
    yield _gauge("queue_oldest_seconds", "Age of the job that waits longest.", oldest_s)
    yield _gauge("workers", "Worker processes that are alive.", len(snapshot.worker_cpus))
    yield _gauge("worker_cpus", "Threads that the workers may use together.", sum(snapshot.worker_cpus))
    numbers = {kind: number for kind, (number, _) in snapshot.artifacts.items()}
    sizes = {kind: size for kind, (_, size) in snapshot.artifacts.items()}
    yield _by_label("artifacts", "Stored artifacts.", "kind", numbers)
    yield _by_label("artifact_bytes", "Bytes of stored artifacts.", "kind", sizes)
    yield from _deployment_families(snapshot)
    yield from _total_families(snapshot.totals)


def _total_families(totals: dict[tuple[str, str], float]) -> Iterator[Metric]:
    yield _counter("jobs_finished", "Jobs that ended, ever.", ["kind", "status"], JOBS_FINISHED, totals)
    yield _counter("jobs_failed", "Jobs that ended with an error, ever.", ["code"], JOBS_FAILED, totals)
    yield _histogram("solve_seconds", "Time of solves from their start to their end.", SOLVE_SECONDS, totals)
    yield _histogram(
        "solve_gap", "Gap between objective and bound, as a share, of solves.", SOLVE_GAP, totals
    )
    known = {JOBS_FINISHED, JOBS_FAILED}
    parts = ("_bucket", "_sum")
    for name in sorted({name for name, _ in totals} - known):
        if not name.endswith(parts):
            labels = sorted({label for key, text in totals if key == name for label in labels_of(text)})
            yield _counter(name, "Counted by all processes together.", labels, name, totals)


def _deployment_families(snapshot: StateSnapshot) -> Iterator[Metric]:
    version = GaugeMetricFamily(
        f"{PREFIX}_deployment_version", "Current version of the placement.", labels=["deployment"]
    )
    gauges = {
        key: GaugeMetricFamily(f"{PREFIX}_deployment_{name}", text, labels=["deployment"])
        for key, (name, text) in _DRIFT.items()
    }
    for name, number, drift in snapshot.deployments:
        version.add_metric([name], float(number or 0))
        for key, gauge in gauges.items():
            value = (drift or {}).get(key)
            if isinstance(value, int | float):
                gauge.add_metric([name], float(value))
    yield version
    yield from gauges.values()


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)


def _by_label(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=[label])
    for key, value in sorted(values.items()):
        family.add_metric([key], float(value))
    return family


def _counter(
    name: str, text: str, labels: list[str], counter: str, totals: dict[tuple[str, str], float]
) -> Metric:
    family = CounterMetricFamily(f"{PREFIX}_{name}", text, labels=labels)
    for (key, label_text), value in sorted(totals.items()):
        if key == counter:
            given = labels_of(label_text)
            family.add_metric([given.get(label, "") for label in labels], value)
    return family


def _histogram(name: str, text: str, counter: str, totals: dict[tuple[str, str], float]) -> Metric:
    buckets, total = histogram_of(counter, totals)
    return HistogramMetricFamily(f"{PREFIX}_{name}", text, buckets=buckets, sum_value=total)
