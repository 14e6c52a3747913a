"""Views of the dashboard over HTTP: figures, grids and moves of stored things, cheap to ask for again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.api.guarded import Guarded, assert_problem
from tests.service.deployments.deployed import Traffic, placement_of, promote, put, upload_placement
from tests.service.server import LINEAR, Server, eventually, listen, tiny_trace, upload

NO_ID = "sha256:" + "0" * 64
VIEWS = [
    f"/v1/traces/{NO_ID}/figures",
    f"/v1/placements/{NO_ID}/grid",
    f"/v1/placements/{NO_ID}/moves?from={NO_ID}",
    "/v1/solves/s-01kapn3v5c9w8j2m6r0xq4t7yz/figure",
    "/v1/deployments/nope/figure",
]


@pytest.fixture(scope="module")
def working(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that solves."""
    with Server(tmp_path_factory.mktemp("views") / "data") as server:
        yield server


def get(client: httpx.Client, path: str) -> dict[str, Any]:
    """Return a view."""
    response = client.get(path)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def store(client: httpx.Client, rows: list[list[int]], *, devices: int = 2, experts: int = 4) -> str:
    """Upload a placement with slots in equal parts; return its id."""
    slots = len(rows[0])
    document = {
        "format": "moe-placement/1",
        "num_layers": len(rows),
        "num_experts": experts,
        "num_devices": devices,
        "physical_to_logical_map": rows,
        "device_of_slot": [slot * devices // slots for slot in range(slots)],
    }
    return upload_placement(client, json.dumps(document).encode())


def small_trace(path: Path, ids_TLK: list[list[list[int]]]) -> Path:
    """Write a trace of four experts token by token."""
    np.savez(path, topk=np.array(ids_TLK, dtype=np.uint16), num_experts=np.int64(4))
    return path


# -- who may -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", VIEWS)
def test_views_need_a_token_that_reads(guarded: Guarded, path: str) -> None:
    """Without a token 401, with one that only reads the answer: that there is no such thing."""
    with guarded.client(None) as client:
        assert_problem(client.get(path), 401, "unauthorized")
    with guarded.client(guarded.keys.read) as client:
        assert_problem(client.get(path), 404, "not-found")


# -- placements ----------------------------------------------------------------------------------------------


def test_a_grid_says_what_is_where(client: httpx.Client) -> None:
    """Without a trace there are no loads; an empty slot is -1."""
    placement = store(client, [[0, 1, 2, 3, -1, 0], [3, 2, 1, 0, -1, -1]])
    found = get(client, f"/v1/placements/{placement}/grid")
    assert found == {
        "num_layers": 2,
        "num_experts": 4,
        "num_devices": 2,
        "num_slots": 6,
        "model_name": None,
        "moe_layer_ids": [0, 1],
        "device_of_slot": [0, 0, 0, 1, 1, 1],
        "expert_LS": [[0, 1, 2, 3, -1, 0], [3, 2, 1, 0, -1, -1]],
        "load_LE": None,
        "load_LD": None,
        "balance_L": None,
    }


def test_a_grid_with_a_trace_says_how_busy_it_is(client: httpx.Client, tmp_path: Path) -> None:
    """Expert 0 takes 6 of 8 pairs and has a replica on each device; experts 1 and 3 take one each.

    Devices hold 3 + 1 and 3 + 1: even. In the other layer all pairs go to expert 3, on device 0.
    """
    trace = upload(client, small_trace(tmp_path / "t.npz", [[[e], [3]] for e in (0, 0, 0, 1, 0, 3, 0, 0)]))
    placement = store(client, [[0, 1, 2, 3, -1, 0], [3, 2, 1, 0, -1, -1]])
    found = get(client, f"/v1/placements/{placement}/grid?trace_id={trace}")
    assert found["load_LE"] == [[1.5, 0.25, 0.0, 0.25], [0.0, 0.0, 0.0, 2.0]]
    assert found["load_LD"] == [[1.0, 1.0], [2.0, 0.0]]
    assert found["balance_L"] == [1.0, 2.0]


def test_a_trace_of_another_shape_is_refused(client: httpx.Client, tmp_path: Path) -> None:
    """With the numbers of both, in one line."""
    trace = upload(client, tiny_trace(tmp_path / "t.npz"))
    placement = store(client, [[0, 1, 2, 3]])
    problem = assert_problem(client.get(f"/v1/placements/{placement}/grid?trace_id={trace}"), 409, "conflict")
    assert "2 layers of 8 experts, the placement 1 of 4" in problem["detail"]
    for unknown in (NO_ID, "x", placement):
        assert_problem(client.get(f"/v1/placements/{placement}/grid?trace_id={unknown}"), 404, "not-found")


def test_a_large_grid_is_a_small_answer(client: httpx.Client) -> None:
    """58 layers of 862 slots on 431 devices are less than 1.5 MB, packed less than a third of that."""
    rng = np.random.default_rng(0)
    rows = [[*(row := rng.permutation(768).tolist()), *row[:94]] for _ in range(58)]
    placement = store(client, rows, devices=431, experts=768)
    answer = client.get(f"/v1/placements/{placement}/grid")
    assert answer.json()["expert_LS"] == rows
    assert len(answer.content) < 1_500_000
    assert answer.headers["content-encoding"] == "gzip"
    assert int(answer.headers["content-length"]) < 500_000
    plain = client.get(f"/v1/placements/{placement}/grid", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == answer.content


def test_what_claims_any_number_of_devices_is_refused(client: httpx.Client) -> None:
    """A small file may name a billion devices; nothing of that size is made."""
    placement = store(client, [[0, 1, 2, 3]], devices=1 << 30)
    for view in ("grid", f"moves?from={placement}"):
        problem = assert_problem(client.get(f"/v1/placements/{placement}/{view}"), 409, "conflict")
        assert "1073741824 devices" in problem["detail"]


def test_moves_are_the_copies_that_are_missing(client: httpx.Client) -> None:
    """Experts 1 and 2 change places; what a device holds already costs nothing, wherever its slot is."""
    before, after = store(client, [[0, 1, 2, 3]]), store(client, [[2, 0, 3, 1]])
    found = get(client, f"/v1/placements/{after}/moves?from={before}")
    assert found == {
        "num_moves": 2,
        "moved_share": 0.5,
        "moves": [
            {"layer": 0, "expert": 1, "from_device": 0, "to_device": 1},
            {"layer": 0, "expert": 2, "from_device": 1, "to_device": 0},
        ],
    }
    assert get(client, f"/v1/placements/{after}/moves?from={after}")["num_moves"] == 0


def test_devices_are_not_relabelled(client: httpx.Client) -> None:
    """Two devices that swap everything must copy everything."""
    before, after = store(client, [[0, 1, 2, 3]]), store(client, [[2, 3, 0, 1]])
    assert get(client, f"/v1/placements/{after}/moves?from={before}")["moved_share"] == 1.0


def test_moves_need_two_placements_of_one_shape(client: httpx.Client) -> None:
    """What differs is named; unknown ones are not found; without `from` the request is invalid."""
    one, other = store(client, [[0, 1, 2, 3]]), store(client, [[0, 1, 2, 3]] * 2)
    problem = assert_problem(client.get(f"/v1/placements/{one}/moves?from={other}"), 409, "conflict")
    assert "num_layers: 2 against 1" in problem["detail"]
    assert_problem(client.get(f"/v1/placements/{one}/moves?from={NO_ID}"), 404, "not-found")
    assert_problem(client.get(f"/v1/placements/{one}/moves"), 422, "invalid")


# -- traces --------------------------------------------------------------------------------------------------


def test_a_trace_is_drawn_once(client: httpx.Client, tmp_path: Path) -> None:
    """Facts and figures; whoever has them is told so."""
    trace = upload(client, tiny_trace(tmp_path / "t.npz", seed=7))
    first = client.get(f"/v1/traces/{trace}/figures")
    found = first.json()
    assert [one["name"] for one in found["figures"]] == ["load", "windows", "distance"]
    for one in found["figures"]:
        assert one["title"]
        assert one["caption"]
        assert one["figure"]["data"]
        assert one["figure"]["layout"]["height"] > 0
    assert found["facts"]["Experts never selected"] == "0 of 16"
    again = client.get(f"/v1/traces/{trace}/figures", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_counts_are_drawn_too(client: httpx.Client) -> None:
    """A single window has no course of time."""
    counts = {"logical_count": [[[5, 1, 1, 1]]], "top_k": 1}
    answer = client.post("/v1/traces", json=counts)
    assert answer.status_code == 201, answer.text
    found = get(client, f"/v1/traces/{answer.json()['id']}/figures")
    assert [one["name"] for one in found["figures"]] == ["load"]
    assert found["facts"]["Busiest expert of all"] == "expert 0 of layer 0, 2.50 times the mean"


# -- solves --------------------------------------------------------------------------------------------------


def test_a_solve_is_drawn_from_its_events(working: Server, tmp_path: Path) -> None:
    """One mark per incumbent; the end is that of the result."""
    with working.client() as client:
        trace = upload(client, tiny_trace(tmp_path / "t.npz"))
        options = {"objective": "balance", "time_limit": 5.0, "window": 64}
        asked = {"trace_id": trace, "topology": "h100:1x4", "options": options}
        solve = client.post("/v1/solves", json=asked).json()["id"]
        events = list(listen(client, solve))
        told = [event.data["objective"] for event in events if event.kind == "incumbent"]
        found = get(client, f"/v1/solves/{solve}/figure")
        result = get(client, f"/v1/solves/{solve}")["result"]["objective"]
    assert told
    curve = {trace["name"]: trace for trace in found["figure"]["data"]}
    drawn = curve["best objective"]["y"]
    assert drawn[: len(told)] == told
    assert drawn[-1] == result["value"]
    assert curve["lower bound"]["y"][-1] == result["lower_bound"]
    assert "no other can be more than" in found["caption"]


def test_a_solve_that_waits_says_so(client: httpx.Client, tmp_path: Path) -> None:
    """No figure yet; the caption tells what is to come, and what will never come."""
    trace = upload(client, tiny_trace(tmp_path / "t.npz"))
    asked = {"trace_id": trace, "topology": "h100:1x4", "options": {"calibration": LINEAR}}
    solve = client.post("/v1/solves", json=asked).json()["id"]
    found = get(client, f"/v1/solves/{solve}/figure")
    assert found["figure"] is None
    assert "queued" in found["caption"]
    client.delete(f"/v1/solves/{solve}")
    assert "nothing to draw" in get(client, f"/v1/solves/{solve}/figure")["caption"]


# -- deployments ---------------------------------------------------------------------------------------------


def test_a_deployment_says_what_to_do_first(client: httpx.Client) -> None:
    """Promote, then post windows; then its balance is drawn under the versions that ran."""
    put(client, "views")
    path = "/v1/deployments/views/figure"
    assert "promote one with PUT /v1/deployments/views/placement" in get(client, path)["caption"]
    promote(client, "views", placement_of())
    empty = get(client, path)
    assert (empty["figure"], "/v1/deployments/views/windows" in empty["caption"]) == (None, True)
    traffic = Traffic(hot=(0, 1))
    traffic.post(client, "views", 3)
    promote(client, "views", placement_of([[0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]] * 2))
    assert "no load window has come since" in get(client, path)["caption"]
    traffic.post(client, "views", 2)

    found = get(client, path)

    windows = next(one for one in found["figure"]["data"] if one["name"] == "posted windows")
    assert [version for _, version in windows["customdata"]] == [1, 1, 1, 2, 2]
    assert [note["text"] for note in found["figure"]["layout"]["annotations"]] == ["version 1", "version 2"]
    assert "mean of 2 windows" in found["caption"]


# -- files of pages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plotly.js", "charts.js", "dashboard.js"])
def test_files_of_pages_are_sent_once(client: httpx.Client, name: str) -> None:
    """Packed, with an ETag, and only where they have changed."""
    first = client.get(f"/assets/{name}")
    assert first.status_code == 200
    assert first.headers["content-type"].startswith("text/javascript")
    assert first.headers["vary"] == "Accept-Encoding"
    again = client.get(f"/assets/{name}", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert int(first.headers["content-length"]) <= 600_000


@pytest.mark.parametrize("name", ["nope.js", "dashboard.html", "..%2Fpages.py", "style.css"])
def test_only_known_names_are_files(client: httpx.Client, name: str) -> None:
    """Nothing else of the folder, and nothing beside it."""
    assert_problem(client.get(f"/assets/{name}"), 404, "not-found")


def test_the_scratch_folder_is_left_empty(client: httpx.Client, open_server: Server, tmp_path: Path) -> None:
    """What a child writes for a view goes with it."""
    trace = upload(client, tiny_trace(tmp_path / "t.npz", seed=9))
    get(client, f"/v1/traces/{trace}/figures")
    eventually(lambda: not list((open_server.data_dir / "scratch").iterdir()), what="scratch is empty")
