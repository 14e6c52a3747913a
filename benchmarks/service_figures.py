"""The figures of the service, each measured on a server of its own kind over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sqlalchemy as sa

from benchmarks.service_history import write_history
from benchmarks.service_listen import Listeners
from benchmarks.service_load import Measured, Plan, apply_load
from benchmarks.service_stage import (
    DEPLOYMENT,
    Figure,
    Stage,
    deploy,
    median,
    memory_mb,
    request_text,
    staged,
    wait_for_end,
)
from placement.solvers.registry import solver_names
from service.state import tables
from service.state.database import open_database
from service.state.jobs import JobStore
from service.state.records import JobStatus, NewEvent, Outcome
from tests.service.server import BYTE16, LINEAR, Server, eventually, upload
from traces.store import write_npz
from traces.synthesize import synthesize

__all__ = ["FIGURES", "Settings", "solvers_of"]

GET_PER_S, GET_P99_MS = 1500, 25
NOT_MODIFIED_PER_S = 2500
POST_P99_MS = 50
POST_CALLERS = 100
EVENT_P99_MS = 100
STOP_S = 0.5
RESTART_S = 3.0
HISTORY = 10_000
MEMORY_MB = 250
OVERHEAD_S = 0.3
SMALL = {"solver": "greedy", "window": 64, "calibration": LINEAR}
EVENT_EVERY_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How long and how often to measure."""

    seconds: float
    pairs: int
    history: int
    solvers: tuple[str, ...]
    database: str
    urls: Iterator[str | None]
    """A new database at every turn; None for SQLite in the data directory."""

    @property
    def role_env(self) -> dict[str, str]:
        """Variables of every server."""
        return {"MOE_PLACEMENT_LOG_LEVEL": "warning"}


@contextmanager
def _stage(settings: Settings, role: str = "all", **env: str) -> Iterator[Stage]:
    with (
        TemporaryDirectory(prefix="moe-placement-benchmark-") as folder,
        staged(
            Path(folder),
            database=settings.database,
            url=next(settings.urls),
            role=role,
            env={**settings.role_env, **env},
        ) as stage,
    ):
        yield stage


def read_figures(settings: Settings) -> Iterator[Figure]:
    """Measure memory, and reads of placements."""
    with _stage(settings) as stage:
        time.sleep(3)
        yield from memory(stage, "idle, before any solve")
        yield from reads(settings, stage)
        yield from memory(stage, "idle, after the GETs and a solve", solve_first=True)


def post_figures(settings: Settings) -> Iterator[Figure]:
    """Measure submissions, without and with a worker on the machine."""
    for role in ("api", "all"):
        with _stage(settings, role) as stage:
            yield from posts(settings, stage, role)


def event_figures(settings: Settings) -> Iterator[Figure]:
    """Measure events with one listener and with many."""
    with _stage(settings, "api", MOE_PLACEMENT_LEASE_SECONDS="600") as stage:
        for listeners in (1, 200):
            yield events(settings, stage, listeners)


def solve_figures(settings: Settings) -> Iterator[Figure]:
    """Measure what the service adds to a solve."""
    with _stage(settings) as stage:
        yield from overhead(settings, stage)


def stop_figures(settings: Settings) -> Iterator[Figure]:
    """Measure how soon solves stop."""
    with _stage(settings) as stage:
        yield from stops(settings, stage)


def restart_figures(settings: Settings) -> Iterator[Figure]:
    """Measure a restart."""
    yield restart(settings)


def memory(stage: Stage, when: str, *, solve_first: bool = False) -> Iterator[Figure]:
    """Measure the memory of all processes."""
    if solve_first:
        job = _submit(stage.client, stage.trace_id, SMALL)
        wait_for_end(stage.client, job)
        eventually(lambda: not stage.server.child_pids, 20)
        time.sleep(2)
    pss_mb, rss_mb, processes = memory_mb(stage.server)
    yield Figure(
        what=f"memory, {when}",
        database=stage.database,
        target=f"<= {MEMORY_MB} MB",
        measured=f"PSS {pss_mb:.0f} MB, RSS {rss_mb:.0f} MB in {processes} processes",
        met=pss_mb <= MEMORY_MB,
        values={"pss_mb": pss_mb, "rss_mb": rss_mb, "processes": processes},
    )


def _submit(client: Any, trace_id: str, options: dict[str, Any], topology: str = "h100:1x4") -> str:
    body = {"trace_id": trace_id, "topology": topology, "options": options}
    found: str = client.post("/v1/solves", json=body).raise_for_status().json()["id"]
    return found


def reads(settings: Settings, stage: Stage) -> Iterator[Figure]:
    """Measure GET and 304 of the deployed placement, and GET of a placement by its id."""
    with TemporaryDirectory() as folder:
        placement_id, etag = deploy(stage.client, Path(folder))
    path = f"/v1/deployments/{DEPLOYMENT}/placement"
    get = request_text(stage, "GET", path)
    same = request_text(stage, "GET", path, headers={"If-None-Match": etag})
    by_id = request_text(stage, "GET", f"/v1/placements/{placement_id}")
    for what, text, expect, per_s, p99_ms in (
        ("GET deployment's placement, 58 x 288", get, 200, GET_PER_S, GET_P99_MS),
        ("304 of the deployment's placement", same, 304, NOT_MODIFIED_PER_S, None),
        ("GET placement by id, 58 x 288", by_id, 200, None, None),
    ):
        for connections in (16, 100):
            plan = Plan(
                port=stage.port,
                requests=(text,),
                connections=connections,
                seconds=settings.seconds,
                expect=expect,
            )
            # Throughput is asked of 16 callers; 100 show what waiting in line does to the 99th percentile.
            found, cpu_ms = _loaded(stage, plan)
            yield _read_figure(
                stage, f"{what}, {connections} callers", found, cpu_ms, per_s, p99_ms, connections
            )


def _loaded(stage: Stage, plan: Plan) -> tuple[Measured, float]:
    """Apply a load; return what was measured, and the server's processor time for an answer.

    The latter hardly depends on what else the machine does.
    """
    began_s = _cpu_s(stage.server)
    found = apply_load(plan)
    return found, (_cpu_s(stage.server) - began_s) / max(1, found.answered_in_all) * 1e3


def _cpu_s(server: Server) -> float:
    times = [process.cpu_times() for process in server.processes()]
    return sum(found.user + found.system for found in times)


def _read_figure(
    stage: Stage,
    what: str,
    found: Measured,
    cpu_ms: float,
    per_s: float | None,
    p99_ms: float | None,
    connections: int,
) -> Figure:
    target, met = "", None
    if per_s is not None and connections == 16 and stage.database == "SQLite":
        target = f">= {per_s}/s" + (f", p99 <= {p99_ms} ms" if p99_ms is not None else "")
        met = found.requests_per_s >= per_s and found.failed == 0
        met = met and (p99_ms is None or found.p99_ms <= p99_ms)
    return Figure(
        what=what,
        database=stage.database,
        target=target,
        measured=f"{found.line()}, {cpu_ms:.2f} ms of the server's CPU each",
        met=met,
        values={**asdict(found), "cpu_ms": cpu_ms},
    )


def posts(settings: Settings, stage: Stage, role: str) -> Iterator[Figure]:
    """Measure the acknowledgement of solves, 100 callers at once."""
    body = json.dumps({"trace_id": stage.trace_id, "topology": "h100:1x4", "options": SMALL})
    where = {"api": "no worker here", "all": "the worker solves meanwhile"}[role]
    for how, every_s in (("one a second each", 1.0), ("closed loop", None)):
        run = f"{role}-{how.replace(' ', '-')}-"
        text = request_text(
            stage, "POST", "/v1/solves", headers={"Idempotency-Key": f"{run}%KEY%"}, body=body
        )
        plan = Plan(
            port=stage.port,
            requests=(text,),
            connections=POST_CALLERS,
            seconds=settings.seconds,
            every_s=every_s,
            expect=202,
        )
        found, cpu_ms = _loaded(stage, plan)
        yield Figure(
            what=f"POST of a solve, {POST_CALLERS} callers, {how}, {where}",
            database=stage.database,
            target=f"p99 <= {POST_P99_MS} ms",
            measured=f"{found.line()}, {cpu_ms:.2f} ms of the server's CPU each",
            met=found.p99_ms <= POST_P99_MS and found.failed == 0,
            values={**asdict(found), "cpu_ms": cpu_ms},
        )


def events(settings: Settings, stage: Stage, listeners: int) -> Figure:
    """Measure from the record of an event to its receipt by every listener.

    The events are recorded as a worker does, in this process; the time of each is the one in its row.
    """
    job_id = _submit(stage.client, stage.trace_id, SMALL)
    database = open_database(stage.server.database, upgrade=False)
    jobs = JobStore(database)
    try:
        claim = jobs.claim("benchmark", cpus=1)
        if claim is None or claim.job.id != job_id:
            raise RuntimeError(f"another job than {job_id} was claimed: {claim}")
        came = Listeners("127.0.0.1", stage.port, job_id, listeners)
        for number in range(int(settings.seconds / EVENT_EVERY_S)):
            jobs.record(claim, [NewEvent(kind="progress", data={"phase": "benchmark", "number": number})])
            time.sleep(EVENT_EVERY_S)
        jobs.finish(claim, Outcome(status=JobStatus.FAILED, error={"code": "internal", "message": "over"}))
        received = came.end()
        with database.read() as connection:
            rows = connection.execute(
                sa.select(tables.events.c.seq, tables.events.c.at).where(tables.events.c.job_id == job_id)
            )
            at_s = {row.seq: row.at for row in rows}
    finally:
        database.close()
    # What was there before the listeners came is no news.
    first_news = 2
    took_ms = sorted(
        (when_s - at_s[number]) * 1e3
        for stream in received
        for number, when_s in stream
        if number >= first_news
    )
    missing = len(at_s) * listeners - sum(len(stream) for stream in received)
    p50, p99 = took_ms[len(took_ms) // 2], took_ms[int(0.99 * len(took_ms))]
    return Figure(
        what=f"event to listener, {listeners} listening",
        database=stage.database,
        target=f"p99 <= {EVENT_P99_MS} ms",
        measured=f"p50 {p50:.0f} ms, p99 {p99:.0f} ms, most {took_ms[-1]:.0f} ms; {len(took_ms)} received, "
        f"{missing} missing",
        met=p99 <= EVENT_P99_MS and missing == 0,
        values={"p50_ms": p50, "p99_ms": p99, "most_ms": took_ms[-1], "missing": missing},
    )


def overhead(settings: Settings, stage: Stage) -> Iterator[Figure]:
    """Measure a solve over HTTP against the same on the command line, in turn."""
    with stage.server.client(timeout_s=120) as client, TemporaryDirectory() as folder:
        trace_id = upload(client, BYTE16)
        for solver in ("greedy", "eplb"):
            options = {"solver": solver, "window": 4096, "objective": "balance"}
            here_s, there_s = [], []
            for _ in range(settings.pairs):
                began_s = time.perf_counter()
                found = wait_for_end(client, _submit(client, trace_id, options))
                content = client.get(f"/v1/solves/{found['id']}/placement").raise_for_status().content
                there_s.append(time.perf_counter() - began_s)
                began_s = time.perf_counter()
                written = _on_command_line(options, Path(folder))
                here_s.append(time.perf_counter() - began_s)
                _same_objective(content, written)
            yield _overhead_figure(stage, solver, here_s, there_s)


def _on_command_line(options: dict[str, Any], folder: Path) -> bytes:
    out = folder / "placement.json"
    flags = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    subprocess.run(
        [
            *(sys.executable, "-m", "placement.cli", "solve", str(BYTE16), "-t", "h100:1x4"),
            *(*flags, "-o", str(out)),
        ],
        check=True,
        capture_output=True,
    )
    return out.read_bytes()


def _same_objective(one: bytes, other: bytes) -> None:
    values = [json.loads(content)["objective"]["value"] for content in (one, other)]
    if values[0] != values[1]:
        raise RuntimeError(f"service and command line disagree: {values}")


def _overhead_figure(stage: Stage, solver: str, here_s: list[float], there_s: list[float]) -> Figure:
    over_s = median([there - here for there, here in zip(there_s, here_s, strict=True)])
    return Figure(
        what=f"solve of byte16 through the service over the command line, {solver}",
        database=stage.database,
        target=f"<= {OVERHEAD_S} s",
        measured=f"{over_s:+.2f} s (median of {len(here_s)} pairs; {median(there_s):.2f} s against "
        f"{median(here_s):.2f} s)",
        met=over_s <= OVERHEAD_S,
        values={"service_s": there_s, "command_line_s": here_s},
    )


def stops(settings: Settings, stage: Stage) -> Iterator[Figure]:
    """Measure from DELETE to the final state, in every solver, while it reads and while it solves."""
    with stage.server.client(timeout_s=120) as client, TemporaryDirectory() as folder:
        traces = {
            "large": _synthetic(client, Path(folder) / "large.npz", layers=58, experts=256, top_k=8),
            "few": _synthetic(client, Path(folder) / "few.npz", layers=24, experts=16, top_k=4),
        }
        for solver in settings.solvers:
            for after_s in (0.5, 5.0):
                yield _stop(stage, client, traces, solver, after_s)


def _synthetic(client: Any, path: Path, *, layers: int, experts: int, top_k: int) -> str:
    trace = synthesize(num_tokens=32_768, num_layers=layers, num_experts=experts, top_k=top_k, seed=0)
    write_npz(trace, path)
    return upload(client, path)


LONG: dict[str, dict[str, Any]] = {
    "exact": {"trace": "few", "topology": "h100:1x4", "calibration": LINEAR},
    "chain": {"semantics": "stay-put", "objective": "traffic"},
    "split": {"spare_slots": 32, "replica_split": "hash"},
    "moetuner": {"topology": "h100:1x8"},
    "moetuner-sum": {"topology": "h100:1x8"},
}
"""Large problems for solvers that refuse the common one, 58 layers of 256 experts on 4 x 8 devices."""


def _stop(stage: Stage, client: Any, traces: dict[str, str], solver: str, after_s: float) -> Figure:
    options = {"solver": solver, "time_limit": 60.0, **LONG.get(solver, {})}
    trace_id, topology = traces[options.pop("trace", "large")], options.pop("topology", "h100:4x8")
    job_id = _submit(client, trace_id, options, topology)
    eventually(lambda: client.get(f"/v1/solves/{job_id}").json()["status"] != "queued", 30)
    time.sleep(after_s)
    before = client.get(f"/v1/solves/{job_id}").json()
    began_s = time.perf_counter()
    client.delete(f"/v1/solves/{job_id}").raise_for_status()
    found = wait_for_end(client, job_id)
    took_s = time.perf_counter() - began_s
    late = before["status"] != "running"
    kept = "with" if (found.get("result") or {}).get("placement_id") else "without"
    why = (found.get("error") or {}).get("message", "")
    return Figure(
        what=f"stop-early, {solver}, {after_s} s after its start",
        database=stage.database,
        target=f"<= {STOP_S} s",
        measured=f"was {before['status']} before {why}"
        if late
        else f"{took_s:.2f} s ({found['status']}, {kept} a placement)",
        met=None if late else took_s <= STOP_S and found["status"] == "stopped",
        values={"solver": solver, "after_s": after_s, "stop_s": took_s, "status": found["status"]},
    )


def restart(settings: Settings) -> Figure:
    """Measure from the start of a process to its readiness with a long history."""
    with TemporaryDirectory(prefix="moe-placement-benchmark-") as folder:
        data_dir, url = Path(folder) / "data", next(settings.urls)
        with Server(data_dir, database_url=url, env=settings.role_env) as server:
            database = open_database(server.database, upgrade=False)
            try:
                write_history(database, settings.history)
            finally:
                database.close()
        took_s = _restarts(Server(data_dir, database_url=url, env=settings.role_env))
    return Figure(
        what=f"restart to ready, {settings.history:,} solves in history",
        database=settings.database,
        target=f"<= {RESTART_S} s",
        measured=f"{median(took_s):.2f} s (most {max(took_s):.2f} s of {len(took_s)})",
        met=max(took_s) <= RESTART_S,
        values={"took_s": took_s},
    )


def _restarts(server: Server) -> list[float]:
    """Start a server after its graceful end, then twice after its processes were killed."""
    took_s = []
    try:
        for _ in range(3):
            began_s = time.perf_counter()
            server.start()
            took_s.append(time.perf_counter() - began_s)
            server.kill()
    finally:
        server.kill()
    return took_s


def solvers_of(quick: bool) -> tuple[str, ...]:
    """Return which solvers to stop."""
    return ("auto", "search", "ilp") if quick else ("auto", *solver_names())


FIGURES: dict[str, Callable[[Settings], Iterator[Figure]]] = {
    "reads": read_figures,
    "posts": post_figures,
    "events": event_figures,
    "solves": solve_figures,
    "stops": stop_figures,
    "restart": restart_figures,
}
"""What can be measured, by name."""
