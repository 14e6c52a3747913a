"""Submitting solves: acknowledged once they are kept, once per key, and refused in one clear line."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.service.server import listen
from tests.service.solves.solve_site import RESULT, Site

UNKNOWN = "sha256:" + "0" * 64


def post(site: Site, body: Any, *, key: str | None = None, server: int = 0) -> httpx.Response:
    """Submit at one of the servers."""
    headers = {} if key is None else {"Idempotency-Key": key}
    return site.clients[server].post("/v1/solves", json=body, headers=headers)


def test_a_key_submitted_twenty_times_at_two_servers_makes_one_job(site: Site) -> None:
    """Twenty threads, two processes, one database: one job, and one of the answers says that it made it."""
    for _ in range(5):
        submit_one = partial(post, site, site.body(priority=1), key=uuid4().hex)
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda n, one=submit_one: one(server=n % 2), range(20)))
        assert len({answer.json()["id"] for answer in answers}) == 1
        assert sorted(answer.status_code for answer in answers) == [200] * 19 + [202]
    keyless = {post(site, site.body()).json()["id"] for _ in range(3)}
    assert len(keyless) == 3


def test_a_key_with_another_request_is_a_conflict(site: Site) -> None:
    """What is asked for counts, not how it is written; a check and a solve do not share keys."""
    key = uuid4().hex
    first = post(site, site.body(), key=key)
    same = {"options": {"seed": 0}, "topology": "h100:1x2", "trace_id": site.trace}
    assert post(site, same, key=key).json()["id"] == first.json()["id"]
    other = post(site, site.body(priority=3), key=key)
    assert (other.status_code, other.json()["code"]) == (409, "conflict")
    assert other.json()["job_id"] == first.json()["id"]
    location = first.headers["location"]
    assert location == first.json()["links"]["self"] == f"/v1/solves/{first.json()['id']}"


def test_a_hundred_at_once_are_all_kept(site: Site) -> None:
    """Group commit gives every caller its own job."""
    with ThreadPoolExecutor(50) as pool:
        answers = list(
            pool.map(lambda n: post(site, site.body(options={"seed": n}), server=n % 2), range(100))
        )
    ids = [answer.json()["id"] for answer in answers]
    assert {answer.status_code for answer in answers} == {202}
    assert len(set(ids)) == 100
    for seed, job in enumerate(ids):
        assert site.client.get(f"/v1/solves/{job}").json()["request"]["options"]["seed"] == seed


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        ({"trace_id": UNKNOWN}, 404, f"trace_id: there is no trace {UNKNOWN}"),
        ({"start_placement_id": UNKNOWN}, 404, "start_placement_id: there is no placement sha256"),
        ({"start_placement_id": "s-1"}, 404, "start_placement_id: there is no placement or solve 's-1'"),
        ({"topology": "h10:1x2"}, 422, "did you mean 'h100'?"),
        ({"topology": {"name": "x"}}, 422, "topology"),
        ({"topology": "/etc/passwd"}, 422, "topology"),
        ({"model": "no-such-model"}, 422, "no-such-model"),
        ({"options": {"solver": "serch"}}, 422, "did you mean 'search'?"),
        ({"options": {"max_moves": 3}}, 422, "start_placement_id"),
        ({"options": {"threads": 1000}}, 422, "threads"),
        ({"options": {"windw": 3}}, 422, "options.windw: is unknown; did you mean 'window'?"),
        ({"options": {"calibration": {"a": 10**25}}}, 422, "calibration"),
        ({"trace_id": None}, 422, "trace_id"),
    ],
)
def test_what_cannot_be_is_refused_at_once(site: Site, more: dict[str, Any], status: int, says: str) -> None:
    """The answer names the member and what to do, and nothing is queued."""
    before = site.client.get("/v1/solves", params={"limit": 1}).json()["items"]
    answer = post(site, site.body(**more))
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert says in answer.json()["detail"]
    assert site.client.get("/v1/solves", params={"limit": 1}).json()["items"] == before


def test_a_bad_request_does_not_spoil_those_beside_it(site: Site) -> None:
    """In one transaction with others, what is refused is refused alone."""
    bodies = [site.body(trace_id=UNKNOWN) if n % 3 == 0 else site.body() for n in range(30)]
    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda body: post(site, body), bodies))
    assert [answer.status_code for answer in answers] == [404 if n % 3 == 0 else 202 for n in range(30)]


def test_a_body_that_is_no_json_is_refused(site: Site) -> None:
    """Its type, its length and its form."""

    def send(content: bytes, **headers: str) -> int:
        return site.client.post("/v1/solves", content=content, headers=headers).status_code

    assert send(b"{}", **{"Content-Type": "text/plain"}) == 415
    assert send(b"{}", **{"Content-Encoding": "gzip"}) == 415
    assert send(b"{" * 10_000) == 422
    assert send(b" " * (5 << 20)) == 413
    assert send(b"") == 422
    assert send(b"{}", **{"Idempotency-Key": "two words"}) == 422


def test_pages_stay_as_they_are_while_jobs_arrive(site: Site) -> None:
    """Newest first, each job once, however many come between two pages."""
    mine = [site.submit() for _ in range(25)]
    seen: list[str] = []
    cursor = None
    while len(seen) < 25:
        params = {"limit": 7} | ({} if cursor is None else {"cursor": cursor})
        page = site.client.get("/v1/solves", params=params).json()
        seen += [job["id"] for job in page["items"]]
        cursor = page["next_cursor"]
        site.submit()
        if cursor is None:
            break
    assert [job for job in seen if job in mine] == mine[::-1]
    assert len(set(seen)) == len(seen)


def test_lists_are_filtered_by_status(site: Site) -> None:
    """What has ended is found among the ended alone, with its figures."""
    job = site.submit(priority=7)
    site.player.play(job, num_events=0)
    ended = site.client.get("/v1/solves", params={"status": "succeeded", "limit": 1}).json()["items"]
    assert [one["id"] for one in ended] == [job]
    assert ended[0]["request"] is None
    queued = site.client.get("/v1/solves", params={"status": "queued", "limit": 200}).json()["items"]
    assert job not in [one["id"] for one in queued]
    assert site.client.get("/v1/solves", params={"deployment": "nobody"}).json()["items"] == []


@pytest.mark.parametrize(
    "query",
    [
        "cursor=%00",
        "cursor=@@",
        "cursor=-1",
        "cursor=ffffffffffffffffffffff",
        "limit=0",
        "limit=1000",
        "status=new",
        "deployment=%00",
        "limit=99999999999999999999999",
    ],
)
def test_bad_queries_are_refused(site: Site, query: str) -> None:
    """A cursor of nobody's, and limits that nobody offers."""
    assert site.client.get(f"/v1/solves?{query}").status_code == 422


def test_a_solve_tells_where_it_stands(site: Site) -> None:
    """Queued, running with its incumbent, and ended: the contract's members are there all along."""
    job = site.submit(priority=9)
    url = f"/v1/solves/{job}"
    queued = site.client.get(url).json()
    assert queued["status"] == "queued"
    assert (queued["elapsed"], queued["result"], queued["gap"]) == (None, None, None)
    assert queued["request"]["topology"] == "h100:1x2"
    claim = site.player.claim(job)
    incumbent = {"objective": 2.0, "lower_bound": 1.0, "gap": 0.5, "solver": "search", "elapsed_s": 0.1}
    assert site.player.jobs.record(claim, [], incumbent=incumbent)
    running = site.client.get(url).json()
    assert (running["status"], running["attempt"], running["incumbent"]) == ("running", 1, incumbent)
    assert (running["objective"], running["bound"], running["gap"]) == (2.0, 1.0, 0.5)
    assert running["elapsed"] >= 0
    site.player.end(claim)
    ended = site.client.get(url).json()
    assert (ended["status"], ended["result"]) == ("succeeded", RESULT)
    assert (ended["objective"], ended["lower_bound"], ended["gap"]) == (1.5, 1.2, 0.2)
    assert ended["elapsed"] == ended["ended_at"] - ended["started_at"]
    assert [event.id for event in listen(site.client, job)] == list(range(1, ended["last_event"] + 1))


def test_there_is_no_placement_before_there_is_one(site: Site) -> None:
    """404 says where the solve stands; unknown solves and formats are told apart."""
    job = site.submit()
    url = f"/v1/solves/{job}/placement"
    answer = site.client.get(url)
    assert (answer.status_code, answer.json()["job_status"]) == (404, "queued")
    assert site.client.get(url, params={"incumbent": True}).status_code == 404
    assert site.client.get(url, params={"format": "sglan"}).status_code == 422
    for strange in ("s-1", "s-" + "0" * 26, "%00", "..", "e-" + "0" * 26):
        assert site.client.get(f"/v1/solves/{strange}").status_code == 404


def test_more_urgent_solves_go_first(site: Site) -> None:
    """By priority, whatever came first."""
    later, sooner = site.submit(priority=99), site.submit(priority=100)
    first = site.player.jobs.claim("player", cpus=64)
    assert first is not None
    assert first.job.id == sooner
    site.player.end(first)
    site.player.play(later, num_events=0)
    times = [site.client.get(f"/v1/solves/{job}").json()["started_at"] for job in (sooner, later)]
    assert times == sorted(times)
