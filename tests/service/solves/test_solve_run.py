"""Solves, checks and evaluations from their request to their end, with real workers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest

from placement.cli.placements import export_options
from placement.errors import InputError
from placement.formats.files import encode_as
from placement.io import placement_from_dict
from service.api.engine_files import FormatName
from service.jobs.problem import for_callers
from tests.service.server import BYTE16, Server, listen, tiny_trace, upload
from tests.service.solves.solve_site import submit

ROOT = Path(__file__).parents[3]
OPTIONS = {"objective": "balance", "spare_slots": 4, "window": 64, "seed": 3, "solver": "search"}
TOPOLOGY = "h100:1x4"
LINEAR = json.loads((ROOT / "placement" / "samples" / "linear.json").read_text(encoding="utf-8"))


class Place:
    """A server with a worker, and the command line beside it."""

    def __init__(self, server: Server, client: httpx.Client, folder: Path) -> None:
        self.server, self.client, self.folder = server, client, folder
        self.trace_path = tiny_trace(folder / "tiny.npz")
        self.trace = upload(client, self.trace_path)

    def body(self, **more: Any) -> dict[str, Any]:
        """Return the body of a short solve."""
        return {"trace_id": self.trace, "topology": TOPOLOGY, "options": OPTIONS, **more}

    def solve(self, **more: Any) -> dict[str, Any]:
        """Run a solve to its end."""
        return self.end_of(submit(self.client, self.body(**more)))

    def end_of(self, job: str) -> dict[str, Any]:
        """Wait for a job's last event; return the job."""
        *_, last = listen(self.client, job)
        assert last.kind == "done"
        found: dict[str, Any] = self.client.get(f"/v1/solves/{job}").json()
        assert last.data["status"] == found["status"]
        return found

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line in the folder."""
        return subprocess.run(
            [sys.executable, "-m", "placement.cli", *arguments],
            cwd=self.folder,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
            capture_output=True,
            text=True,
        )


@contextmanager
def running(folder: Path, *, database_url: str | None = None) -> Iterator[Place]:
    """Run one server of role all."""
    with Server(folder / "data", database_url=database_url) as server, server.client(timeout_s=60) as client:
        yield Place(server, client, folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server on the database that it brings along."""
    with running(tmp_path_factory.mktemp("place")) as found:
        yield found


@pytest.fixture(scope="module")
def solved(place: Place) -> dict[str, Any]:
    """A solve that has ended well."""
    found = place.solve()
    assert found["status"] == "succeeded", found
    return found


def test_a_solve_gives_what_the_command_line_gives(place: Place, solved: dict[str, Any]) -> None:
    """The same placement, the same figures, and its file under its own digest."""
    answer = place.client.get(f"/v1/solves/{solved['id']}/placement")
    assert answer.status_code == 200
    assert answer.headers["etag"] == f'"{solved["placement_id"]}"'
    ran = place.command(
        *("solve", str(place.trace_path), "--topology", TOPOLOGY, "--spare-slots", "4", "--window", "64"),
        *("--objective", "balance", "--seed", "3", "--solver", "search", "--out", "mine.json", "--json"),
    )
    assert ran.returncode == 0, ran.stderr
    mine, theirs = json.loads((place.folder / "mine.json").read_text()), answer.json()
    for key in ("physical_to_logical_map", "device_of_slot", "objective", "metrics", "breakdown", "model"):
        assert theirs[key] == mine[key], key
    assert theirs["provenance"]["trace"] == mine["provenance"]["trace"]
    assert solved["result"]["objective"] == mine["objective"]
    assert solved["objective"] == mine["objective"]["value"]
    assert solved["result"]["placement_id"] == solved["placement_id"]


def test_a_placement_comes_in_every_format(place: Place, solved: dict[str, Any]) -> None:
    """As an export gives it, or refused where an export is refused; 304 for who has it."""
    url = f"/v1/solves/{solved['id']}/placement"
    native = place.client.get(url)
    placement = placement_from_dict(native.json())
    refused: dict[str, str] = {}
    for name in get_args(FormatName):
        answer = place.client.get(url, params={"format": name})
        try:
            expected = encode_as(placement, name, export_options(placement, None))
        except InputError as exc:
            refused[name] = str(exc)
        if name in refused:
            assert answer.status_code == 422
            assert for_callers(refused[name], {}) in answer.json()["detail"]
            continue
        assert answer.status_code == 200, answer.text
        assert answer.text == (native.text if name == "native" else expected)
        tag = answer.headers["etag"]
        again = place.client.get(url, params={"format": name}, headers={"If-None-Match": f'"x", {tag}'})
        assert (again.status_code, again.content) == (304, b"")


def test_a_solve_goes_on_from_a_placement(place: Place, solved: dict[str, Any]) -> None:
    """By the placement's id or the solve's; the result is no worse, and its moves are counted."""
    for start in (solved["placement_id"], solved["id"]):
        found = place.solve(start_placement_id=start, options={**OPTIONS, "max_moves": 0})
        assert found["status"] == "succeeded", found
        assert found["result"]["moves"]["count"] == 0
        assert found["objective"] <= solved["objective"]


def test_an_evaluation_gives_what_the_command_line_gives(place: Place, solved: dict[str, Any]) -> None:
    """By the placement's id or the solve's, waited for or fetched later."""
    (place.folder / "scored.json").write_bytes(
        place.client.get(f"/v1/solves/{solved['id']}/placement").content
    )
    arguments = ("--topology", TOPOLOGY, "--objective", "balance", "--window", "64", "--json")
    ran = place.command("evaluate", "scored.json", str(place.trace_path), *arguments)
    assert ran.returncode == 0, ran.stderr
    body = {"trace_id": place.trace, "topology": TOPOLOGY, "options": {"objective": "balance", "window": 64}}
    for placement in (solved["placement_id"], solved["id"]):
        answer = place.client.post("/v1/evaluations", json={**body, "placement_id": placement})
        assert answer.status_code == 200, answer.text
        assert {key: answer.json()["result"][key] for key in json.loads(ran.stdout)} == json.loads(ran.stdout)
        assert place.client.get(answer.headers["location"]).json()["result"] == answer.json()["result"]
    queued = place.client.post(
        "/v1/evaluations", params={"wait": 0}, json={**body, "placement_id": solved["placement_id"]}
    )
    assert queued.status_code == 202
    assert queued.json()["links"]["self"] == queued.headers["location"]


def test_a_check_says_what_the_problem_is(place: Place) -> None:
    """Layers, experts, devices, slots and windows; nothing is solved, and no solve is listed."""
    before = place.client.get("/v1/solves").json()["items"]
    answer = place.client.post("/v1/solves", json=place.body(validate_only=True))
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["valid"] is True
    expected = {"layers": 2, "experts": 8, "devices": 4, "slots": 12, "windows": 8}
    assert {key: found["result"][key] for key in expected} == expected
    assert place.client.get("/v1/solves").json()["items"] == before


def test_a_check_says_why_there_is_no_problem(place: Place) -> None:
    """What only the trace tells is refused as well, with the numbers."""
    body = place.body(validate_only=True, options={**OPTIONS, "window": 100_000})
    answer = place.client.post("/v1/solves", json=body)
    assert answer.status_code == 422, answer.text
    assert "512" in answer.json()["detail"]


def test_a_solve_that_cannot_be_fails_with_its_code(place: Place) -> None:
    """The job says why; there is no placement, and nothing to wait for."""
    found = place.solve(options={**OPTIONS, "window": 100_000})
    assert found["status"] == "failed"
    assert found["error"]["code"] == "invalid"
    assert "512" in found["error"]["message"]
    answer = place.client.get(f"/v1/solves/{found['id']}/placement")
    assert (answer.status_code, answer.json()["job_status"]) == (404, "failed")


def test_a_stopped_solve_keeps_its_incumbent(place: Place) -> None:
    """Told to stop once it has found something, it ends as stopped, with a placement."""
    trace = upload(place.client, BYTE16)
    options = {"solver": "search", "time_limit": 120.0, "spare_slots": 8, "calibration": LINEAR}
    job = submit(place.client, {"trace_id": trace, "topology": "h100:1x8", "options": options})
    events = listen(place.client, job)
    first = next(event for event in events if event.kind == "incumbent")
    assert first.data["objective"] >= first.data["lower_bound"]
    assert place.client.delete(f"/v1/solves/{job}").status_code in (200, 202)
    *_, last = events
    assert (last.kind, last.data["status"]) == ("done", "stopped")
    found = place.client.get(f"/v1/solves/{job}").json()
    assert found["objective"] <= first.data["objective"]
    assert place.client.get(f"/v1/solves/{job}/placement").json()["objective"]["value"] == found["objective"]


def test_a_time_limit_is_kept(place: Place) -> None:
    """A search that could go on for long ends by itself, with what it has."""
    trace = upload(place.client, BYTE16)
    options = {"solver": "search", "time_limit": 1.0, "spare_slots": 8, "calibration": LINEAR}
    found = place.end_of(
        submit(place.client, {"trace_id": trace, "topology": "h100:1x8", "options": options})
    )
    assert found["status"] == "succeeded"
    assert found["placement_id"] is not None
    assert found["objective"] >= found["bound"] > 0


def test_a_solve_runs_on_postgresql(postgresql_url: str, tmp_path: Path) -> None:
    """State and queue in PostgreSQL, files beside: submitted, listened to, fetched, scored."""
    with running(tmp_path, database_url=postgresql_url) as place:
        found = place.solve()
        assert found["status"] == "succeeded"
        placement = place.client.get(f"/v1/solves/{found['id']}/placement").json()
        assert placement["objective"] == found["result"]["objective"]
        body = place.body(placement_id=found["id"], options={"objective": "balance", "window": 64})
        scored = place.client.post("/v1/evaluations", json=body).json()
        assert scored["result"]["objective"]["value"] == found["objective"]
