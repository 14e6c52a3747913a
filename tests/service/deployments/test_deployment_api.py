"""The routes of deployments on real servers: entity tags, long polls, compare-and-set, refusals."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.deployments.deployed import (
    EXPERTS,
    LAYERS,
    SIZED,
    SPEC,
    Traffic,
    get,
    placement_of,
    promote,
    put,
    serving,
    spread,
    upload_placement,
    versions,
)

BACKWARDS = list(range(EXPERTS))[::-1]
PATH = "/v1/deployments"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server without workers, on SQLite; tests use deployments of their own names."""
    with serving(tmp_path_factory.mktemp("api"), None, role="api") as (_, found):
        yield found


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name of the test's own."""
    return re.sub(r"[^a-z0-9]+", "-", request.node.name)[:60]


def test_a_deployment_is_made_changed_and_removed(client: httpx.Client, name: str) -> None:
    """201 with Location, then 200; entity tags tell revisions apart."""
    made = client.put(f"{PATH}/{name}", json=SPEC)
    assert (made.status_code, made.headers["location"]) == (201, f"{PATH}/{name}")
    changed = client.put(f"{PATH}/{name}", json={**SPEC, "num_ranks": 2})
    assert changed.status_code == 200
    assert changed.headers["etag"] != made.headers["etag"]
    shown = client.get(f"{PATH}/{name}")
    assert shown.headers["etag"] == changed.headers["etag"]
    assert shown.json() == changed.json()
    assert shown.json()["facts"]["slots"] == EXPERTS
    assert name in [one["name"] for one in get(client, f"{PATH}?limit=500")["items"]]
    lost = client.put(f"{PATH}/{name}", json=SPEC, headers={"If-Match": made.headers["etag"]})
    assert (lost.status_code, lost.json()["code"]) == (412, "precondition-failed")
    assert client.put(f"{PATH}/{name}", json=SPEC, headers={"If-None-Match": "*"}).status_code == 412
    won = client.put(f"{PATH}/{name}", json=SPEC, headers={"If-Match": changed.headers["etag"]})
    assert won.status_code == 200
    assert client.delete(f"{PATH}/{name}", headers={"If-Match": made.headers["etag"]}).status_code == 412
    assert client.delete(f"{PATH}/{name}").status_code == 204
    assert client.get(f"{PATH}/{name}").status_code == 404


def test_pages_of_deployments(client: httpx.Client) -> None:
    """In order of names, without gaps."""
    for letter in "abc":
        put(client, f"page-{letter}")
    seen: list[str] = []
    cursor: str | None = "page-"
    while cursor is not None:
        page = get(client, f"{PATH}?limit=2&cursor={cursor}")
        seen += [one["name"] for one in page["items"]]
        cursor = page["next_cursor"]
    assert seen[:3] == ["page-a", "page-b", "page-c"]


@pytest.mark.parametrize("bad", ["-a", ".a", "a b", "a" * 65, "ä", "a%00", "a%0a"])
def test_names_that_are_none(client: httpx.Client, bad: str) -> None:
    """422 where one would be made, 404 where one is looked for."""
    answer = client.put(f"{PATH}/{bad}", json=SPEC)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid")
    for path in (f"{PATH}/{bad}", f"{PATH}/{bad}/placement", f"{PATH}/{bad}/versions"):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"topology": "/etc/passwd"}, "KIND:NODESxDEVICES"),
        ({"topology": "h100:1x5"}, "do not divide evenly"),
        ({"topology": {"nodes": 3}}, "topology"),
        ({"model": "/etc/passwd"}, "unknown model"),
        ({"model": {"layers": 2, "experts": 16}}, "model.top_k"),
        ({"model": {"layers": 2, "experts": 16, "top_k": 17}}, "top-17 of 16"),
        ({"model": {"layers": True, "experts": 16, "top_k": 1}}, "model.layers"),
        ({"model": {"layers": 1 << 20, "experts": 1 << 20, "top_k": 1}}, "more than the service takes"),
        ({"model": {**SIZED, "hidden_size": 1 << 24}}, "missing"),
        ({"options": {"spare_slots": 3}}, "do not divide evenly"),
        ({"options": {"spare_slots": 4, "fill_memory": True}}, "leave out"),
        ({"options": {"calibration": {"kind": "no"}}}, "options.calibration"),
        ({"policy": {"mode": "sometimes"}}, "policy.mode"),
        ({"policy": {"max_pay_back_steps": 10}}, "sizes of the experts"),
        ({"policy": {"drift_treshold": 1}}, "drift_threshold"),
        ({"policy": {"min_windows": 1}}, "min_windows"),
        ({"num_ranks": 0}, "num_ranks"),
        ({"more": 1}, "more"),
    ],
)
def test_specs_that_make_no_sense(
    client: httpx.Client, name: str, changes: dict[str, Any], told: str
) -> None:
    """422 with one line that names the field; nothing is made."""
    answer = client.put(f"{PATH}/none", json={**SPEC, **changes})
    assert answer.status_code == 422, answer.text
    assert told in answer.json()["detail"]
    assert client.get(f"{PATH}/none").status_code == 404


def test_a_spec_cannot_leave_its_placement_behind(client: httpx.Client, name: str) -> None:
    """What runs must fit; without a placement everything may change."""
    other = {**SPEC, "topology": "h100:1x8"}
    put(client, name, options={"spare_slots": 4})
    assert client.put(f"{PATH}/{name}", json=other).status_code == 200
    put(client, name, options={"spare_slots": 4})
    promote(client, name, placement_of())
    assert client.put(f"{PATH}/{name}", json=other).status_code == 409
    assert client.put(f"{PATH}/{name}", json=SPEC).status_code == 409
    put(client, name, options={"spare_slots": 8})


def test_the_tag_changes_exactly_when_the_placement_does(client: httpx.Client, name: str) -> None:
    """Other specs, the same placement again, and windows leave it; another placement and back do not."""
    put(client, name)
    promote(client, name, placement_of())
    path = f"{PATH}/{name}/placement"
    first = client.get(path)
    assert first.content == placement_of()
    assert first.headers["x-placement-version"] == "1"
    put(client, name, policy={"drift_threshold": 0.5})
    promote(client, name, placement_of())
    Traffic().post(client, name, 1)
    assert client.get(path).headers["etag"] == first.headers["etag"]
    same = client.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", first.headers["etag"])
    promote(client, name, spread(BACKWARDS))
    second = client.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert (second.status_code, second.headers["x-placement-version"]) == (200, "2")
    assert second.headers["etag"] != first.headers["etag"]
    client.post(f"{PATH}/{name}/rollback", json={})
    third = client.get(path)
    assert (third.headers["etag"], third.headers["x-placement-version"]) == (first.headers["etag"], "3")


def test_forms_of_a_placement(client: httpx.Client, name: str) -> None:
    """Compressed where it is taken, as an engine's file where it is asked for; each with a tag of its own."""
    put(client, name, model=SIZED)
    document = json.loads(placement_of()) | {"padding": "x" * 2000}
    promote(client, name, json.dumps(document).encode())
    path = f"{PATH}/{name}/placement"
    plain = client.get(path, headers={"Accept-Encoding": "identity"})
    with client.stream("GET", path, headers={"Accept-Encoding": "gzip"}) as packed:
        raw = b"".join(packed.iter_raw())
    assert gzip.decompress(raw) == plain.content
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) == len(raw)
    assert packed.headers["etag"] != plain.headers["etag"]
    for etag in (plain.headers["etag"], packed.headers["etag"], f"W/{plain.headers['etag']}", '"a", "b", *'):
        again = client.get(path, headers={"If-None-Match": etag})
        assert again.status_code == (200 if "*" in etag else 304)
    assert client.get(path, headers={"If-None-Match": "*"}).status_code == 304
    rows = client.get(path, params={"format": "deepspeed"})
    assert rows.status_code == 200, rows.text
    assert rows.headers["etag"] not in (plain.headers["etag"], packed.headers["etag"])
    wrong = client.get(path, params={"format": "no-such"})
    assert (wrong.status_code, wrong.json()["code"]) == (422, "invalid")
    for wait in ("x", "-1", "301", "nan"):
        assert client.get(path, params={"wait": wait}).status_code == 422


def test_a_long_poll_ends_with_the_change(client: httpx.Client, name: str) -> None:
    """It wakes for the first placement, sleeps through changes of the spec, and ends empty-handed in time."""
    put(client, name)
    path = f"{PATH}/{name}/placement"
    begun = time.monotonic()
    assert client.get(path, params={"wait": 0.3}).status_code == 404
    assert time.monotonic() - begun >= 0.3
    assert client.get(f"{PATH}/none/placement", params={"wait": 30}).status_code == 404
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.get, path, params={"wait": 20})
        promote(client, name, placement_of())
        first = waiting.result(10)
        assert first.status_code == 200
        known = {"If-None-Match": first.headers["etag"]}
        assert client.get(path, params={"wait": 0.2}, headers=known).status_code == 304
        waiting = pool.submit(client.get, path, params={"wait": 20}, headers=known)
        put(client, name, num_ranks=3)
        promote(client, name, spread(BACKWARDS))
        second = waiting.result(10)
        assert (second.status_code, second.headers["x-placement-version"]) == (200, "2")
        known = {"If-None-Match": second.headers["etag"]}
        waiting = pool.submit(client.get, path, params={"wait": 20}, headers=known)
        client.delete(f"{PATH}/{name}")
        assert waiting.result(10).status_code == 404


def test_many_launchers_wait_for_one_change(client: httpx.Client, name: str) -> None:
    """All of them have it, and have the same."""
    put(client, name)
    path = f"{client.base_url}{PATH}/{name}/placement?wait=30"
    with ThreadPoolExecutor(24) as pool:
        waiting = [pool.submit(httpx.get, path, timeout=60, trust_env=False) for _ in range(24)]
        promote(client, name, placement_of())
        answers = [one.result(30) for one in waiting]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.headers["etag"] for answer in answers}) == 1


def test_launchers_that_hang_up_are_forgotten(client: httpx.Client, name: str) -> None:
    """A poll that is given up leaves the server as it was."""
    put(client, name)
    with pytest.raises(httpx.ReadTimeout):
        client.get(f"{PATH}/{name}/placement", params={"wait": 60}, timeout=0.2)
    promote(client, name, placement_of())
    assert client.get(f"{PATH}/{name}/placement").status_code == 200


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (placement_of(devices=2), "2 devices, the deployment 4"),
        (placement_of(experts=8, rows=[list(range(8))] * LAYERS), "8 experts, the deployment 16"),
        (placement_of([list(range(EXPERTS))]), "1 MoE layers, the deployment 2"),
        (
            json.dumps(
                {
                    "physical_to_logical_map": [[*range(EXPERTS), 4, 5, 6, 7]] * LAYERS,
                    "device_of_slot": [*(slot // 4 for slot in range(EXPERTS)), 0, 0, 0, 0],
                }
            ).encode(),
            "puts 8 experts on device 0, which has 4 slots",
        ),
    ],
)
def test_placements_that_do_not_fit(client: httpx.Client, name: str, content: bytes, told: str) -> None:
    """Refused before anything changes."""
    put(client, name)
    body = {"placement_id": upload_placement(client, content)}
    answer = client.put(f"{PATH}/{name}/placement", json=body)
    assert answer.status_code == 422, answer.text
    assert told in answer.json()["detail"]
    assert get(client, f"{PATH}/{name}")["version"] is None


def test_promotions_of_nothing(client: httpx.Client, name: str) -> None:
    """Unknown ids, both, none, solves without a placement, unknown deployments."""
    put(client, name)
    known = upload_placement(client, placement_of())
    trace = client.post(
        "/v1/traces",
        content=json.dumps({"logical_count": [[1, 2]], "top_k": 1}).encode(),
        headers={"Content-Type": "application/octet-stream"},
    )
    solve = client.post("/v1/solves", json={"trace_id": trace.json()["id"], "topology": "h100:1x2"}).json()
    for body, status in (
        ({"placement_id": "sha256:" + "0" * 64}, 404),
        ({"placement_id": trace.json()["id"]}, 404),
        ({"placement_id": "s-nothing"}, 404),
        ({"solve_id": "s-nothing"}, 404),
        ({"solve_id": "s\u0000"}, 422),
        ({"solve_id": solve["id"]}, 409),
        ({"solve_id": solve["id"], "placement_id": known}, 422),
        ({}, 422),
        ({"placement_id": known, "why": ""}, 422),
    ):
        answer = client.put(f"{PATH}/{name}/placement", json=body)
        assert answer.status_code == status, (body, answer.text)
    assert client.put(f"{PATH}/none/placement", json={"placement_id": known}).status_code == 404
    assert client.post(f"{PATH}/none/rollback", json={}).status_code == 404
    assert client.post(f"{PATH}/{name}/rollback", json={}).status_code == 409
    assert client.post(f"{PATH}/{name}/rollback", json={"to": 1}).status_code == 404


def test_promotions_as_expected_alone(client: httpx.Client, name: str) -> None:
    """By version or by tag, and the first one by ``If-None-Match: *``."""
    put(client, name)
    one, two = (upload_placement(client, content) for content in (placement_of(), spread(BACKWARDS)))
    path = f"{PATH}/{name}/placement"

    def try_it(placement_id: str, **headers: str) -> httpx.Response:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        return client.put(path, json={"placement_id": placement_id}, headers=named)

    assert try_it(one, If_Match="*").status_code == 412
    assert try_it(one, If_Match='"1"').status_code == 412
    assert try_it(one, If_None_Match="*").status_code == 200
    assert try_it(two, If_None_Match="*").status_code == 412
    etag = client.get(path).headers["etag"]
    assert try_it(two, If_Match='"sha256:0"').status_code == 412
    assert try_it(two, If_Match=f'"other", {etag}').status_code == 200
    assert try_it(one, If_Match=etag).status_code == 412
    lost = try_it(one, If_Match='"1"')
    assert (lost.status_code, lost.json()["current"]) == (412, 2)
    assert try_it(one, If_Match="2").json()["version"] == 3
    history = versions(client, name)
    assert [found["version"] for found in history] == [3, 2, 1]
    assert [found["current"] for found in history] == [True, False, False]
    page = get(client, f"{PATH}/{name}/versions?limit=2")
    assert page["next_cursor"] == 2
    assert get(client, f"{PATH}/{name}/versions?limit=2&cursor=2")["items"] == history[2:]


def test_rollbacks_skip_the_same_placement(client: httpx.Client, name: str) -> None:
    """The last other placement is meant, whatever its version; a second rollback returns."""
    put(client, name)
    promote(client, name, placement_of())
    promote(client, name, spread(BACKWARDS))
    first = client.post(f"{PATH}/{name}/rollback", json={"why": "slow"}).json()
    second = client.post(f"{PATH}/{name}/rollback", json={}).json()
    named = client.post(f"{PATH}/{name}/rollback", json={"to": 1}).json()
    assert [one["of_version"] for one in (first, second, named)] == [1, 2, 1]
    assert [one["version"] for one in (first, second, named)] == [3, 4, 5]
    assert first["why"] == "slow"
    late = client.post(f"{PATH}/{name}/rollback", json={"to": 2}, headers={"If-Match": '"4"'})
    assert late.status_code == 412


# -- windows -------------------------------------------------------------------------------------------------


def rows(value: Any = 1) -> list[list[Any]]:
    """Return a load in which one count is what it is."""
    found: list[list[Any]] = [[1] * EXPERTS for _ in range(LAYERS)]
    found[1][2] = value
    return found


def test_windows_are_taken_once(client: httpx.Client, name: str) -> None:
    """The answer names the current version; repeats are known, contradictions are conflicts."""
    put(client, name, num_ranks=2)
    body = {
        "rank": 1,
        "windows": [{"window": 7, "load": rows()}, {"window": 8, "tokens": 12, "load": rows()}],
    }
    first = client.post(f"{PATH}/{name}/windows", json=body)
    assert first.status_code == 202
    assert first.json() == {"stored": 2, "known": 0, "version": None, "revision": 1}
    promote(client, name, placement_of())
    again = client.post(f"{PATH}/{name}/windows", json={**body, "version": 1})
    assert again.json() == {"stored": 0, "known": 2, "version": 1, "revision": 2}
    # Whole numbers that a tensor printed as floats are the same counts.
    floats = {"rank": 1, "windows": [{"window": 7, "load": rows(1.0)}]}
    assert client.post(f"{PATH}/{name}/windows", json=floats).json()["known"] == 1
    other = {"rank": 1, "windows": [{"window": 9, "load": rows()}, {"window": 7, "load": rows(5)}]}
    assert client.post(f"{PATH}/{name}/windows", json=other).status_code == 409
    ninth = {"rank": 1, "windows": [{"window": 9, "load": rows()}]}
    assert client.post(f"{PATH}/{name}/windows", json=ninth).json()["stored"] == 1
    assert client.post(f"{PATH}/none/windows", json=body).status_code == 404


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"\xff", "not JSON"),
        ({"windows": []}, "windows: must be a list"),
        ({"windows": {}}, "windows: must be a list"),
        ({"windows": [1]}, "windows.0: must be a JSON object"),
        ({"windows": [{"window": 1}]}, "windows.0.load: has no list of layers"),
        ({"windows": [{"window": 1, "load": rows()[:1]}]}, "has 1 layers, the deployment 2"),
        ({"windows": [{"window": 1, "load": [[1], [1]]}]}, "has 1 experts, the deployment 16"),
        ({"windows": [{"window": 1, "load": [1, 2]}]}, "no list of experts"),
        ({"windows": [{"window": 1, "load": rows(-1)}]}, "windows.0.load.1.2: is -1"),
        ({"windows": [{"window": 1, "load": rows(1.5)}]}, "is a fraction"),
        ({"windows": [{"window": 1, "load": rows(None)}]}, "is null"),
        ({"windows": [{"window": 1, "load": rows("1")}]}, "is a text"),
        ({"windows": [{"window": 1, "load": rows(True)}]}, "is a truth value"),
        ({"windows": [{"window": 1, "load": rows([1])}]}, "is no number"),
        ({"windows": [{"window": 1, "load": rows(1 << 50)}]}, "counts are from 0"),
        ({"windows": [{"window": 1, "load": rows(10**30)}]}, "counts are"),
        (b'{"windows": [{"window": 1, "load": [[NaN]]}]}', "not JSON"),
        (b'{"windows": [{"window": 1, "load": [[1e999]]}]}', "not JSON"),
        ({"windows": [{"window": -1, "load": rows()}]}, "windows.0.window"),
        ({"windows": [{"window": 1.5, "load": rows()}]}, "windows.0.window"),
        ({"windows": [{"window": 1 << 60, "load": rows()}]}, "windows.0.window"),
        ({"windows": [{"load": rows()}]}, "windows.0.window"),
        ({"windows": [{"window": 1, "load": rows(), "tokens": -1}]}, "tokens"),
        ({"windows": [{"window": 1, "load": rows(), "tokens": "1"}]}, "tokens"),
        ({"windows": [{"window": 1, "load": rows(), "more": 1}]}, "unknown entry 'more'"),
        ({"windows": [{"window": 1, "load": rows()}] * 2}, "twice"),
        ({"windows": [{"window": 1, "load": rows()}], "rank": 1}, "rank: must be a whole number from 0 to 0"),
        ({"windows": [{"window": 1, "load": rows()}], "rank": True}, "rank"),
        ({"windows": [{"window": 1, "load": rows()}], "version": 0}, "version"),
        ({"windows": [{"window": 1, "load": rows()}], "x": 0}, "unknown entry 'x'"),
    ],
)
def test_windows_that_make_no_sense(client: httpx.Client, body: Any, told: str) -> None:
    """422 with the place of what is wrong; nothing is stored."""
    put(client, "malformed")
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(
        f"{PATH}/malformed/windows", content=content, headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid"), answer.text
    assert told in answer.json()["detail"]
    fresh = client.post(f"{PATH}/malformed/windows", json={"windows": [{"window": 1, "load": rows()}]}).json()
    assert fresh["stored"] + fresh["known"] == 1


# -- several servers -----------------------------------------------------------------------------------------


def test_two_servers_race_for_one_promotion(tmp_path: Path, database_url: str) -> None:
    """Of promotions that expect the same placement exactly one is made, wherever they come in."""
    with (
        serving(tmp_path, database_url, role="api") as (_, one),
        serving(tmp_path, database_url, role="api") as (_, two),
    ):
        put(one, "race")
        promote(one, "race", placement_of())
        for turn in range(2):
            etag = one.get(f"{PATH}/race/placement").headers["etag"]
            contents = [spread([*BACKWARDS[k:], *BACKWARDS[:k]]) for k in range(4 * turn, 4 * turn + 4)]
            ids = [upload_placement(one, content) for content in contents]
            statuses = _race([one, two] * 2, ids, etag)
            assert sorted(statuses) == [200, 412, 412, 412]
            assert two.get(f"{PATH}/race/placement").headers["x-placement-version"] == str(turn + 2)
        assert [found["version"] for found in versions(two, "race")] == [3, 2, 1]
        # A change at one server wakes who waits at the other.
        etag = two.get(f"{PATH}/race/placement").headers["etag"]
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(
                two.get, f"{PATH}/race/placement", params={"wait": 20}, headers={"If-None-Match": etag}
            )
            promote(one, "race", placement_of())
            assert waiting.result(10).headers["x-placement-version"] == "4"


def _race(clients: list[httpx.Client], ids: list[str], etag: str) -> list[int]:
    start = threading.Barrier(len(ids))

    def go(client: httpx.Client, placement_id: str) -> int:
        start.wait()
        body = {"placement_id": placement_id}
        return client.put(f"{PATH}/race/placement", json=body, headers={"If-Match": etag}).status_code

    with ThreadPoolExecutor(len(ids)) as pool:
        return list(pool.map(go, clients, ids))


def test_a_server_that_ends_lets_launchers_go(tmp_path: Path) -> None:
    """Who waits is answered as things stand when the server is told to end."""
    with serving(tmp_path, None, role="api") as (server, client):
        put(client, "end")
        promote(client, "end", placement_of())
        etag = client.get(f"{PATH}/end/placement").headers["etag"]
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(
                client.get, f"{PATH}/end/placement", params={"wait": 60}, headers={"If-None-Match": etag}
            )
            # Whether the server has the request by then or not, the answer is the same.
            server.stop()
            try:
                assert waiting.result(10).status_code == 304
            except httpx.TransportError:
                # It came too late: the server listened no more.
                assert not server.is_running
