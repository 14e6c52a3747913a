"""Events of solves over real sockets: every listener gets every event once, in order, whatever happens."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from service.state.database import open_database
from tests.service.server import Server, eventually, listen, tiny_trace, upload
from tests.service.solves.solve_site import Player, Site, submit

NUM_EVENTS = 30
"""Events that the played worker records between the first and ``done``."""
ALL = list(range(1, NUM_EVENTS + 3))


def test_a_listener_gets_every_event_once_and_resumes_where_it_was(site: Site) -> None:
    """Numbers count from 1 to the last one, ``done``; from any number on the rest follows."""
    job = site.submit()
    worker = threading.Thread(target=site.player.play, args=(job,), kwargs={"num_events": NUM_EVENTS})
    worker.start()
    found = list(listen(site.client, job))
    worker.join()
    assert [event.id for event in found] == ALL
    assert [event.kind for event in found] == ["progress"] * (NUM_EVENTS + 1) + ["done"]
    assert [event.data["n"] for event in found[1:-1]] == list(range(NUM_EVENTS))
    assert found[-1].data["status"] == "succeeded"
    for after in (0, 1, 17, NUM_EVENTS + 1):
        assert [event.id for event in listen(site.client, job, after=after)] == ALL[after:]


def test_a_listener_may_begin_anywhere_but_not_beyond_the_end(site: Site) -> None:
    """The number comes in the header or the query; who has seen ``done`` need not come back."""
    job = site.submit()
    site.player.play(job, num_events=1)
    url, get = f"/v1/solves/{job}/events", site.client.get
    assert get(url, headers={"Last-Event-ID": "3"}).status_code == 204
    assert get(url, params={"after": 3}).status_code == 204
    assert get(url, params={"after": 4}).status_code == 422
    assert get(url, headers={"Last-Event-ID": "two"}).status_code == 422
    assert get("/v1/solves/s-00000000000000000000000000/events").status_code == 404
    answer = get(url, params={"after": 2}, headers={"Last-Event-ID": "1"})
    assert answer.text.count("event: ") == 2
    assert answer.text.startswith("retry: ")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_listener_whose_server_is_killed_goes_on_at_another(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Killed in the middle of the stream, a listener resumes at a second process without gap or repeat."""
    url = request.getfixturevalue(f"{kind}_url")
    first = Server(tmp_path / "data", role="api", database_url=url)
    second = Server(tmp_path / "data", role="api", database_url=url)
    with second, _player(url) as player:
        first.start()
        with first.client() as client:
            job = submit(client, _body(client, tmp_path))
            claim = player.claim(job)
            player.say(claim, 0)
            stream = listen(client, job)
            found = [next(stream), next(stream)]
            first.kill()
            player.say(claim, 1)
            with pytest.raises(httpx.TransportError):
                found += stream
        with second.client() as client:
            others = listen(client, job, after=found[-1].id)
            found.append(next(others))
            player.say(claim, 2)
            player.end(claim)
            found += others
        assert [event.id for event in found] == [1, 2, 3, 4, 5]
        assert [event.data.get("n") for event in found] == [None, 0, 1, 2, None]


def test_a_server_that_ends_lets_its_listeners_go(sqlite_url: str, tmp_path: Path) -> None:
    """A graceful end does not wait for a job that nobody ends; the stream ends whole."""
    server = Server(tmp_path / "data", role="api", database_url=sqlite_url)
    with server, server.client() as client, _player(sqlite_url) as player:
        job = submit(client, _body(client, tmp_path))
        player.claim(job)
        stream = listen(client, job)
        assert next(stream).id == 1
        ending = threading.Thread(target=server.stop)
        ending.start()
        assert list(stream) == []
        ending.join()


@contextmanager
def _player(url: str) -> Iterator[Player]:
    database = open_database(url)
    try:
        yield Player(database)
    finally:
        database.close()


def _body(client: httpx.Client, folder: Path) -> dict[str, str]:
    return {"trace_id": upload(client, tiny_trace(folder / "tiny.npz")), "topology": "h100:1x2"}


def test_two_hundred_listeners_get_every_event(site: Site) -> None:
    """On both servers at once, each event once and in order."""

    async def hear(job: str) -> list[list[int]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=60, trust_env=False) as client:
            listeners = [
                asyncio.create_task(_hear(client, f"{server.base_url}/v1/solves/{job}/events"))
                for server in site.servers
                for _ in range(100)
            ]
            await asyncio.sleep(0.5)
            await asyncio.to_thread(site.player.play, job, num_events=NUM_EVENTS)
            return await asyncio.gather(*listeners)

    job = site.submit()
    found = asyncio.run(hear(job))
    assert len(found) == 200
    assert all(numbers == ALL for numbers in found)


async def _hear(client: httpx.AsyncClient, url: str) -> list[int]:
    """Return the numbers of all events of a job."""
    async with client.stream("GET", url) as answer:
        assert answer.status_code == 200
        return [int(line[4:]) async for line in answer.aiter_lines() if line.startswith("id: ")]


def test_a_listener_that_reads_nothing_holds_nobody_up(site: Site) -> None:
    """More comes than its connection can hold: it alone waits, and is freed once it goes."""
    job = site.submit()
    before = _num_sockets(site)
    with _deaf(site.servers[0], job):
        site.player.play(job, num_events=100, padding=100_000)
        assert [event.id for event in listen(site.client, job)] == list(range(1, 103))
        assert site.client.get(f"/v1/solves/{job}").json()["status"] == "succeeded"
        assert _num_sockets(site) > before
    eventually(lambda: _num_sockets(site) <= before, what="the connection that took nothing in closed")


@contextmanager
def _deaf(server: Server, job: str) -> Iterator[None]:
    """Listen without ever reading, with the smallest buffer there is."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.connect((server.host, server.port))
        connection.sendall(f"GET /v1/solves/{job}/events HTTP/1.1\r\nHost: {server.host}\r\n\r\n".encode())
        yield


def test_a_listener_that_goes_away_leaves_nothing_behind(site: Site) -> None:
    """Connections that clients close are closed at the server too, while the job still runs."""
    job = site.submit()
    site.player.claim(job)
    before = _num_sockets(site)
    for _ in range(20):
        stream = listen(site.client, job)
        assert next(stream).id == 1
        stream.close()  # type: ignore[attr-defined]
    eventually(lambda: _num_sockets(site) <= before, what="sockets of listeners closed")


def _num_sockets(site: Site) -> int:
    return len(psutil.Process(site.servers[0].pid).net_connections("tcp"))


def test_stopping_a_queued_solve_ends_its_stream(site: Site) -> None:
    """What was stopped before anybody began it has one event, the last; stopping again changes nothing."""
    job = site.submit()
    found: list[str] = []
    listener = threading.Thread(target=lambda: found.extend(event.kind for event in listen(site.client, job)))
    listener.start()
    first = site.client.delete(f"/v1/solves/{job}")
    listener.join(10)
    assert (first.status_code, first.json()["status"]) == (200, "stopped")
    assert found == ["done"]
    assert site.client.delete(f"/v1/solves/{job}").json() == first.json()


def test_stopping_a_running_solve_tells_its_worker(site: Site) -> None:
    """It is accepted until the worker has ended the job, told once, and written down."""
    job = site.submit()
    claim = site.player.claim(job)
    for _ in range(2):
        answer = site.client.delete(f"/v1/solves/{job}")
        assert (answer.status_code, answer.json()["stop_requested"]) == (202, True)
    assert site.player.jobs.beat([claim]).stop == {job}
    site.player.end(claim)
    assert site.client.delete(f"/v1/solves/{job}").status_code == 200
    changes = site.client.get("/v1/audit").json()["items"]
    assert [(change["action"], change["target"]) for change in changes[:1]] == [("solve.stop", job)]
