"""Clients that do not read, and clients that do not finish writing: the others do not notice."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from service.state.database import Database, open_database
from service.state.jobs import JobStore
from service.state.records import JobStatus, NewEvent, Outcome
from tests.service.server import Server, eventually, listen, tiny_trace, upload

DEAF = 150
LISTENING = 10
EVENTS = 60
EVENT_BYTES = 50_000
MOST_GROWTH_MB = 150


@contextmanager
def _opened(server: Server) -> Iterator[Database]:
    database = open_database(server.database, upgrade=False)
    try:
        yield database
    finally:
        database.close()


def _deaf(server: Server, job_id: str) -> socket.socket:
    """Open a stream and never read it; the kernel keeps little for it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((server.host, server.port))
    head = f"GET /v1/solves/{job_id}/events HTTP/1.1\r\nHost: {server.host}:{server.port}\r\n\r\n"
    sock.sendall(head.encode())
    return sock


def _rss_mb(server: Server) -> float:
    return sum(process.memory_info().rss for process in server.processes()) / 1e6


def test_listeners_that_never_read_keep_nobody_waiting(tmp_path: Path) -> None:
    """Of many listeners most never read: the others get every event, and memory stays bounded.

    The events are recorded as a worker does, by this process: 3 MB for every listener.
    """
    with (
        Server(tmp_path / "data", role="api", env={"MOE_PLACEMENT_LEASE_SECONDS": "600"}) as server,
        server.client() as client,
        _opened(server) as database,
        ExitStack() as stack,
    ):
        trace_id = upload(client, tiny_trace(tmp_path / "tiny.npz"))
        job_id = client.post("/v1/solves", json={"trace_id": trace_id, "topology": "h100:1x2"}).json()["id"]
        jobs = JobStore(database)
        claim = jobs.claim("w-test", cpus=8)
        assert claim is not None
        for _ in range(DEAF):
            stack.enter_context(_deaf(server, job_id))
        heard: list[list[int]] = [[] for _ in range(LISTENING)]

        def hear(into: list[int]) -> None:
            with server.client(timeout_s=60) as own:
                into.extend(event.id for event in listen(own, job_id))

        threads = [threading.Thread(target=hear, args=(into,)) for into in heard]
        for thread in threads:
            thread.start()
        before_mb = _rss_mb(server)
        for number in range(EVENTS):
            data = {"phase": "test", "number": number, "filler": "x" * EVENT_BYTES}
            assert jobs.record(claim, [NewEvent(kind="progress", data=data)])
            assert client.get("/health/live").is_success
        assert _rss_mb(server) - before_mb < MOST_GROWTH_MB
        assert jobs.finish(
            claim, Outcome(status=JobStatus.FAILED, error={"code": "internal", "message": "-"})
        )
        for thread in threads:
            thread.join(60)
        assert heard == [list(range(1, EVENTS + 3))] * LISTENING


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET /v1/solves HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ",
        b"POST /v1/traces HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\nPK",
        b"",
    ],
    ids=["in the head", "in the body", "before the head"],
)
def test_requests_that_never_end_keep_nobody_waiting(tmp_path: Path, beginning: bytes) -> None:
    """300 connections that have begun a request and stopped: others are served, and the server can end."""
    with Server(tmp_path / "data", role="api") as server, server.client() as client, ExitStack() as stack:
        for _ in range(300):
            sock = stack.enter_context(socket.create_connection((server.host, server.port)))
            if beginning:
                sock.sendall(beginning)
        for _ in range(20):
            assert client.get("/v1/solves").is_success
        trace_id = upload(client, tiny_trace(tmp_path / "tiny.npz"))
        assert client.get(f"/v1/traces/{trace_id}").is_success
        server.stop(within_s=30)
    eventually(lambda: not server.processes())
