"""Solves, evaluations and checks through a real worker: the command line's results, told as they come."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from service.state.counters import label_text, read_counters
from service.state.records import JobKind, JobStatus
from service.state.totals import JOBS_FAILED, JOBS_FINISHED, SOLVE_GAP, SOLVE_SECONDS, histogram_of
from tests.service.jobs.worker_support import LINEAR, ROOT, Shop
from tests.service.server import tiny_trace


def cli(tmp_path: Path, *arguments: str) -> dict[str, object]:
    """Run the command line with the calibration of the tests; return its report."""
    weights = tmp_path / "linear.json"
    weights.write_text(json.dumps(LINEAR), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "placement.cli", *arguments, "--calibration", str(weights), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    report: dict[str, object] = json.loads(done.stdout)
    return report


def test_a_solve_gives_the_command_lines_placement(shop: Shop, tmp_path: Path) -> None:
    """Same trace, options and seed: the same bytes of a placement file, and the same figures."""
    trace = tiny_trace(tmp_path / "trace.npz", tokens=1024, layers=2, experts=8)
    out = tmp_path / "placement.json"
    options = ["-t", "h100:2x2", "--spare-slots", "4", "--window", "64", "--seed", "7", "-o", str(out)]
    report = cli(tmp_path, "solve", str(trace), *options)
    with shop.worker():
        job = shop.done(shop.submit(trace, topology="h100:2x2", spare_slots=4, window=64, seed=7))
    assert job.status is JobStatus.SUCCEEDED, job.error
    assert job.result is not None
    assert job.placement_digest is not None
    assert shop.files.read(job.placement_digest) == out.read_bytes()
    for name in ("objective", "metrics", "termination", "solver", "candidates", "skipped", "moves"):
        assert job.result[name] == report[name], name
    assert job.result["placement_id"] == job.placement_digest
    kept = shop.artifacts.get(job.placement_digest)
    assert kept is not None
    assert (kept.kind, kept.size_bytes, kept.created_by) == ("placement", out.stat().st_size, "tester")


def test_a_start_and_a_budget_of_moves(shop: Shop, tmp_path: Path) -> None:
    """With a start the moves are counted, and a budget binds, as on the command line."""
    trace = tiny_trace(tmp_path / "trace.npz", tokens=512, layers=1, experts=16)
    first, out = tmp_path / "first.json", tmp_path / "second.json"
    common = [str(trace), "-t", "h100:1x4", "--window", "64"]
    cli(tmp_path, "solve", *common, "--solver", "contiguous", "-o", str(first))
    report = cli(tmp_path, "solve", *common, "--start", str(first), "--max-moves", "3", "-o", str(out))
    start = shop.keep(first, "placement")
    with shop.worker():
        job = shop.done(shop.submit(trace, window=64, start=start, max_moves=3))
    assert job.result is not None, job.error
    assert job.result["moves"] == report["moves"]
    assert 0 < job.result["moves"]["count"] <= 3
    assert shop.files.read(job.result["placement_id"]) == out.read_bytes()


def test_incumbents_stream_in_order(shop: Shop, tmp_path: Path) -> None:
    """Events tell phases and falling objectives, each incumbent with its placement, and end with ``done``."""
    with shop.worker():
        trace = tiny_trace(tmp_path / "trace.npz", tokens=2048, layers=2, experts=16)
        job = shop.done(shop.submit(trace))
    events = shop.jobs.events(job.id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    phases = [event.data["phase"] for event in events if event.kind == "progress"]
    assert phases[:3] == ["started", "reading", "solving"]
    assert phases[-1] == "writing"
    incumbents = [event.data for event in events if event.kind == "incumbent"]
    objectives = [data["objective"] for data in incumbents]
    assert objectives == sorted(set(objectives), reverse=True)
    assert len(objectives) >= 2
    for data in incumbents:
        assert 0 <= data["gap"] <= 1
        assert data["lower_bound"] <= data["objective"]
    assert job.result is not None
    assert objectives[-1] == pytest.approx(job.result["objective"]["value"])
    first = json.loads(shop.files.read(incumbents[0]["placement_id"]))
    assert first["objective"]["value"] == incumbents[0]["objective"]
    assert first["metrics"]["balance"] >= 1
    assert events[-1].kind == "done"
    assert events[-1].data["status"] == "succeeded"


def test_an_evaluation_reports_what_the_command_line_does(shop: Shop, tmp_path: Path) -> None:
    """The score of a placement, by the digest of its file."""
    trace = tiny_trace(tmp_path / "trace.npz", tokens=2048)
    out = tmp_path / "placement.json"
    common = ["-t", "h100:1x4", "--window", "128"]
    cli(tmp_path, "solve", str(trace), *common, "--solver", "eplb", "-o", str(out))
    report = cli(tmp_path, "evaluate", str(out), str(trace), *common)
    with shop.worker():
        start = shop.keep(out, "placement")
        job = shop.done(shop.submit(trace, kind=JobKind.EVALUATION, start=start, window=128))
    assert job.result is not None, job.error
    assert {name: job.result[name] for name in report} == report


def test_a_check_says_what_the_problem_is(shop: Shop, tmp_path: Path) -> None:
    """Nothing is solved; sizes and notes come back."""
    trace = tiny_trace(tmp_path / "trace.npz", tokens=512, layers=2, experts=8)
    with shop.worker():
        job = shop.done(shop.submit(trace, kind=JobKind.CHECK, window=128, spare_slots=4))
    assert job.result is not None, job.error
    found = {name: job.result[name] for name in ("layers", "experts", "devices", "slots", "windows")}
    assert found == {"layers": 2, "experts": 8, "devices": 4, "slots": 12, "windows": 4}
    assert "only 4 windows" in " ".join(job.result["notes"])


def test_a_data_set_comes_as_an_archive(shop: Shop, tmp_path: Path) -> None:
    """A folder in a tar is unpacked for the job; its content is the trace's."""
    trace = tiny_trace(tmp_path / "trace.npz", tokens=2048)
    folder = tmp_path / "set"
    arguments = ["trace", "import", str(trace), "-o", str(folder)]
    subprocess.run(
        [sys.executable, "-m", "placement.cli", *arguments], cwd=ROOT, check=True, capture_output=True
    )
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as archive:
        archive.add(folder, arcname="set")
    with shop.worker():
        packed = shop.submit(tmp_path / "set.tar.gz", window=128, solver="greedy")
        plain = shop.submit(trace, window=128, solver="greedy")
        jobs = [shop.done(packed), shop.done(plain)]
    assert [job.error for job in jobs] == [None, None]
    objectives = [job.result["objective"] for job in jobs if job.result is not None]
    assert objectives[0] == objectives[1]


def test_failures_have_codes_and_clear_messages(shop: Shop, tmp_path: Path) -> None:
    """Bad input, impossible problems and limits each end as what they are; no local path is told."""
    garbage = tmp_path / "garbage.bin"
    garbage.write_bytes(b"this is no trace" * 100)
    trace = shop.keep(tiny_trace(tmp_path / "trace.npz"))
    slots = {"name": "tiny", "nodes": [{"kind": "h100", "devices": 2, "slots": 3}]}
    with shop.worker():
        ids = [
            shop.submit(garbage),
            shop.submit(trace, topology=slots),
            shop.submit(trace, solver="chain"),
            shop.submit(trace, topology="no-such-gpu:1x4"),
            shop.submit(trace, objective="traffic", time_limit=1e-6),
            shop.submit(trace, calibration=None),
        ]
        jobs = [shop.done(job_id) for job_id in ids]
    codes = [(job.status.value, (job.error or {}).get("code")) for job in jobs]
    assert codes == [
        ("failed", "invalid"),
        ("failed", "infeasible"),
        ("failed", "invalid"),
        ("failed", "invalid"),
        ("timed_out", "no-placement"),
        ("failed", "invalid"),
    ]
    messages = [str(job.error["message"]) for job in jobs if job.error is not None]
    assert "the trace" in messages[0]
    assert "known format" in messages[0]
    assert "8 experts do not fit the topology's 6 slots" in messages[1]
    for message in messages:
        assert str(shop.data_dir) not in message
        assert "--" not in message
        assert "\n" not in message


def test_ends_are_counted(shop: Shop, tmp_path: Path) -> None:
    """What ends adds to the counters, once."""
    trace = shop.keep(tiny_trace(tmp_path / "trace.npz"))
    with shop.worker():
        for options in ({"solver": "greedy"}, {"solver": "eplb"}, {"solver": "chain"}):
            shop.done(shop.submit(trace, **options))
    with shop.database.read() as connection:
        totals = read_counters(connection)
    assert totals[JOBS_FINISHED, label_text(kind="solve", status="succeeded")] == 2
    assert totals[JOBS_FAILED, label_text(code="invalid")] == 1
    assert histogram_of(SOLVE_SECONDS, totals)[0][-1][1] == 3
    assert histogram_of(SOLVE_GAP, totals)[0][-1][1] == 2


def test_nothing_is_left_behind(shop: Shop, tmp_path: Path) -> None:
    """Scratch folders go with their jobs, and the worker's row goes with it."""
    with shop.worker() as worker:
        shop.done(shop.submit(tiny_trace(tmp_path / "trace.npz"), solver="greedy"))
        assert [row.cpus for row in shop.workers.list()] == [2]
        assert worker.stop() == 0
        assert worker.children() == []
    assert list(shop.files.scratch.iterdir()) == []
    assert shop.workers.list() == []


def test_the_worker_stays_small(shop: Shop) -> None:
    """What computes is imported by the jobs' processes alone."""
    code = "import sys, service.jobs.worker; print(*sorted({n.partition('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(done.stdout.split()) & {"numpy", "scipy", "fastapi", "starlette", "numba", "psutil"} == set()
