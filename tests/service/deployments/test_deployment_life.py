"""A deployment's whole life with real servers and workers, on both databases."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
import orjson

from tests.service.deployments.deployed import (
    EXPERTS,
    QUICK,
    Traffic,
    get,
    put,
    serving,
    until,
    versions,
)
from tests.service.server import eventually

AUTO: dict[str, Any] = {
    "mode": "auto",
    "drift_threshold": 0.15,
    "cool_down_seconds": 0,
    "min_gain": 0.02,
    "min_windows": 4,
    "judge_windows": 3,
    "solve": QUICK,
}


def test_a_whole_life(tmp_path: Path, database_url: str) -> None:
    """First solve, drift, refresh, a bad promotion that is taken back, a rollback by hand."""
    with serving(tmp_path, database_url) as (_, client):
        put(client, "life", num_ranks=4, policy=AUTO)
        answer = client.get("/v1/deployments/life/placement")
        assert (answer.status_code, answer.json()["code"]) == (404, "not-found")

        # 1: a placement solved for even traffic is promoted by hand, and a launcher that waits has it.
        waiting = Waiting(client, "life")
        solve_id = _solved(client)
        made = client.put(
            "/v1/deployments/life/placement", json={"solve_id": solve_id, "why": "first"}
        ).json()
        assert (made["version"], made["cause"], made["solve_id"]) == (1, "manual", solve_id)
        assert waiting.answer().headers["x-placement-solve"] == solve_id
        waiting = Waiting(client, "life", waiting.answer().headers["etag"])

        # 2: even traffic, posted by four ranks at once, starts nothing.
        traffic = Traffic()
        _post_of_ranks(client, traffic, 4)
        calm = until(client, "life", lambda found: (found["drift"] or {}).get("windows") == 4)
        assert not calm["drift"]["due"]
        assert calm["refresh"]["number"] == 0

        # 3: two experts of one device become hot: a refresh is solved, judged, promoted, observed.
        traffic.turn((0, 1))
        _post_of_ranks(client, traffic, 4)
        refreshed = until(client, "life", lambda found: found["version"] == 2)
        assert refreshed["refresh"]["last"]["outcome"] == "promoted"
        changed = waiting.answer()
        assert (changed.status_code, changed.headers["x-placement-version"]) == (200, "2")
        newest = versions(client, "life")[0]
        assert (newest["cause"], newest["by"]) == ("automatic", "controller")
        assert newest["predicted"]["gain"] > 0.1
        _post_of_ranks(client, traffic, 3)
        until(client, "life", lambda found: found["refresh"]["observing"] is None)
        newest = versions(client, "life")[0]
        assert newest["observed"]["gain"] > 0.1
        assert newest["observed"]["windows"] == 3
        job = get(client, f"/v1/solves/{newest['solve_id']}")
        assert (job["deployment"], job["caller"]) == ("life", "controller")

        # 4: other experts of one device become hot; the refresh that follows meets traffic that is made to
        # hurt the new placement most, and is taken back.
        traffic.turn(_together(client, "life"))
        _post_of_ranks(client, traffic, 4)
        until(client, "life", lambda found: found["version"] == 3)
        assert versions(client, "life")[0]["cause"] == "automatic"
        traffic.turn(_worst(client, "life", bad=3, good=2))
        _post_of_ranks(client, traffic, 3)
        until(client, "life", lambda found: found["version"] >= 4)
        back, bad = versions(client, "life")[:2]
        if back["version"] > 4:
            back, bad = versions(client, "life")[-4], versions(client, "life")[-3]
        assert (back["cause"], back["of_version"], back["by"]) == ("rollback", 2, "controller")
        assert "worse than version 2" in back["why"]
        assert bad["observed"]["gain"] < 0

        # 5: by hand, everything can be taken back; the audit log knows all of it.
        put(client, "life", num_ranks=4, policy={**AUTO, "mode": "manual"})
        first = client.post("/v1/deployments/life/rollback", json={"to": 1, "why": "start again"}).json()
        assert (first["cause"], first["of_version"], first["placement_id"]) == (
            "rollback",
            1,
            made["placement_id"],
        )
        history = versions(client, "life")
        assert [one["version"] for one in history] == list(range(len(history), 0, -1))
        actions = [entry["action"] for entry in get(client, "/v1/audit?limit=200")["items"]]
        assert {
            "deployment.create",
            "deployment.promote",
            "deployment.rollback",
            "deployment.refresh",
        } <= set(actions)


class Waiting:
    """A launcher's long poll, in a thread."""

    def __init__(self, client: httpx.Client, name: str, etag: str | None = None) -> None:
        self._answers: list[httpx.Response] = []
        headers = {} if etag is None else {"If-None-Match": etag}
        path = f"{client.base_url}/v1/deployments/{name}/placement?wait=60"

        def ask() -> None:
            self._answers.append(httpx.get(path, headers=headers, timeout=90, trust_env=False))

        self._thread = threading.Thread(target=ask)
        self._thread.start()

    def answer(self) -> httpx.Response:
        """Return the answer, which must come."""
        self._thread.join(60)
        return self._answers[0]


def _solved(client: httpx.Client) -> str:
    """Return a solve for even traffic."""
    counts = Traffic(seed=5)
    loads = [counts.load_LE().tolist() for _ in range(8)]
    trace = client.post(
        "/v1/traces",
        content=orjson.dumps({"logical_count": loads, "top_k": 2}),
        headers={"Content-Type": "application/octet-stream"},
    )
    assert trace.status_code in (200, 201), trace.text
    body = {
        "trace_id": trace.json()["id"],
        "topology": "h100:1x4",
        "options": {"objective": "balance", "time_limit": 3.0},
    }
    answer = client.post("/v1/solves", json=body)
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    path = f"/v1/solves/{job_id}"
    eventually(lambda: get(client, path)["status"] not in ("queued", "running"), 30, every_s=0.2)
    found = get(client, path)
    assert found["status"] == "succeeded", found
    return job_id


def _post_of_ranks(client: httpx.Client, traffic: Traffic, count: int, *, ranks: int = 4) -> None:
    """Post windows in parts of four ranks at the same time."""
    windows = []
    for _ in range(count):
        windows.append((traffic.window, traffic.load_LE()))
        traffic.window += 1
    failures: list[str] = []

    def post(rank: int) -> None:
        parts = [
            {"window": number, "load": (load_LE // ranks + (rank < load_LE % ranks)).tolist()}
            for number, load_LE in windows
        ]
        answer = client.post("/v1/deployments/life/windows", json={"rank": rank, "windows": parts})
        if answer.status_code != 202:
            failures.append(answer.text)

    threads = [threading.Thread(target=post, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def _devices(client: httpx.Client, digest: str) -> list[list[int]]:
    """Return the device of each expert's first copy, layer by layer."""
    found = get(client, f"/v1/placements/{digest}")
    slots = found["device_of_slot"]
    return [
        [slots[row.index(expert)] for expert in range(EXPERTS)] for row in found["physical_to_logical_map"]
    ]


def _together(client: httpx.Client, name: str) -> tuple[int, ...]:
    """Return two experts that the current placement has on one device in every layer, if there are any."""
    rows = _devices(client, versions(client, name)[0]["placement_id"])
    pairs = [(a, b) for a in range(2, EXPERTS) for b in range(a + 1, EXPERTS)]
    return max(pairs, key=lambda pair: sum(row[pair[0]] == row[pair[1]] for row in rows))


def _worst(client: httpx.Client, name: str, *, bad: int, good: int) -> tuple[int, ...]:
    """Return two experts that one version has on one device, and the other one apart, in most layers."""
    by_version = {one["version"]: one["placement_id"] for one in versions(client, name)}
    new, old = _devices(client, by_version[bad]), _devices(client, by_version[good])

    def hurts(pair: tuple[int, int]) -> int:
        a, b = pair
        return sum((n[a] == n[b]) - (o[a] == o[b]) for n, o in zip(new, old, strict=True))

    return max([(a, b) for a in range(EXPERTS) for b in range(a + 1, EXPERTS)], key=hurts)
