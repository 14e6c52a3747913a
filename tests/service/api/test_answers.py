"""Every answer: strict headers, an id, problems in one form; what is inside stays inside."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import APIRouter

from service.api.app import create_app
from service.api.context import Context
from service.errors import UnavailableError
from service.serve import make_context
from service.settings import read_settings
from tests.service.api.guarded import Guarded, assert_problem, make_keys, read_raw, send_raw
from tests.service.postgres import Cluster
from tests.service.server import Server, eventually

STRICT = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/traces", 200),
        ("GET", "/health/live", 200),
        ("GET", "/nope", 404),
        ("PUT", "/v1/traces", 405),
        ("GET", "/v1/traces/nope", 404),
        ("GET", "/v1/traces?limit=0", 422),
        ("DELETE", "/v1/traces/nope", 404),
        ("GET", "/openapi.json", 200),
        ("GET", "/docs", 200),
        ("GET", "/", 200),
    ],
)
def test_every_answer_is_strict(open_server: Server, method: str, path: str, status: int) -> None:
    """Headers that keep browsers from guessing, framing, leaking and loading from elsewhere."""
    with open_server.client() as client:
        answer = client.request(method, path)
    assert answer.status_code == status
    assert {name: answer.headers.get(name) for name in STRICT} == STRICT
    policy = answer.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in policy
    assert "default-src 'none'" in policy or "default-src 'self'" in policy
    assert "http" not in policy
    assert answer.headers["cache-control"]
    assert "server" not in answer.headers
    assert answer.headers["x-request-id"]


def test_what_is_not_there_is_a_problem(open_server: Server) -> None:
    """Unknown paths and methods are told in the form of all problems; what is possible is listed."""
    with open_server.client() as client:
        assert_problem(client.get("/nope"), 404, "not-found")
        answer = client.put("/v1/traces")
    problem = assert_problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "GET, POST"
    assert "GET, POST" in problem["detail"]


def test_a_caller_names_its_request(open_server: Server) -> None:
    """A plain id is kept, in the answer and in the log; anything else is replaced."""
    with open_server.client() as client:
        assert (
            client.get("/v1/traces", headers={"X-Request-Id": "job-42.a"}).headers["x-request-id"]
            == "job-42.a"
        )
        for odd in ("a b", "x" * 65, "mp_0123456789ab_" + "A" * 43, 'a"b', "a=b"):
            assert client.get("/v1/traces", headers={"X-Request-Id": odd}).headers["x-request-id"] != odd
    eventually(lambda: "request_id=job-42.a" in open_server.log, 10.0, what="the line of the request")


def test_validation_says_where(guarded: Guarded) -> None:
    """A wrong parameter is named; what was sent is not repeated."""
    with guarded.client(guarded.keys.admin) as client:
        problem = assert_problem(client.get("/v1/audit?limit=many&target=%00"), 422, "invalid")
    assert "limit" in problem["detail"]
    assert len(problem["errors"]) == 2


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /v1/traces HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /v1/traces HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/traces HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
)
def test_broken_http_is_refused(open_server: Server, sent: bytes) -> None:
    """Requests that no two servers would read alike are not guessed at, and the server goes on."""
    assert 400 <= send_raw(open_server, sent).status < 500
    with open_server.client() as client:
        assert client.get("/v1/traces").status_code == 200


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    """A process's stores."""
    made = make_context(read_settings(data_dir=tmp_path / "data", role="api"))
    yield made
    made.tokens.close()
    made.database.close()


BROKEN = APIRouter()


@BROKEN.get("/broken/{how}")
async def break_down(how: str) -> None:
    """Fail in a way that nobody expects."""
    failures: dict[str, Exception] = {
        "bug": RuntimeError("the secret inside"),
        "disk": OSError(28, "No space left on device: /secret/inside"),
        "other-disk": OSError(5, "Input/output error: /secret/inside"),
        "database": UnavailableError("the database cannot be used now: secret inside"),
        "driver": sa.exc.OperationalError("SELECT inside", {}, Exception("secret")),
        "pool": sa.exc.TimeoutError("secret inside"),
        "surrogate": sa.exc.StatementError(
            "inside", "SELECT", {}, UnicodeEncodeError("utf-8", "\ud800", 0, 1, "x")
        ),
    }
    raise failures[how] from (RuntimeError("secret inside") if how == "database" else None)


def ask_broken(context: Context, how: str) -> httpx.Response:
    """Have the application break down."""
    app = create_app(context)
    app.include_router(BROKEN)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(f"/broken/{how}")

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("how", "status", "code", "retry"),
    [
        ("bug", 500, "internal", False),
        ("other-disk", 500, "internal", False),
        ("disk", 503, "unavailable", True),
        ("database", 503, "unavailable", True),
        ("driver", 503, "unavailable", True),
        ("pool", 503, "unavailable", True),
        ("surrogate", 422, "invalid", False),
    ],
)
def test_failures_tell_nothing_of_the_inside(
    context: Context, how: str, status: int, code: str, retry: bool
) -> None:
    """What broke is for the log; the caller learns whether to come again."""
    answer = ask_broken(context, how)
    assert_problem(answer, status, code)
    assert "secret" not in answer.text
    assert "inside" not in answer.text
    assert ("retry-after" in answer.headers) == retry
    assert {name: answer.headers.get(name) for name in STRICT} == STRICT


def test_a_database_that_is_gone_is_503(tmp_path: Path, cluster: Cluster, postgresql_url: str) -> None:
    """Requests that need it say so and when to come again; the process goes on living."""
    keys = make_keys(tmp_path / "data", postgresql_url)
    with (
        Server(tmp_path / "data", role="api", database_url=postgresql_url) as server,
        server.client(token=keys.read) as client,
    ):
        assert client.get("/v1/traces").status_code == 200
        cluster.drop(postgresql_url.rpartition("/")[2].partition("?")[0])
        for _ in range(3):
            answer = client.get("/v1/traces")
            problem = assert_problem(answer, 503, "unavailable")
            assert answer.headers["retry-after"]
            assert "state_" not in problem["detail"]
        assert client.get("/health/live").status_code == 200
        assert client.get("/health/ready").status_code == 503
    keys.assert_kept_secret(server.log)


def test_the_document_describes_itself(open_server: Server) -> None:
    """Every operation lists its problems, and those that need a token say so."""
    with open_server.client() as client:
        document: dict[str, Any] = client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for path in ("/v1/traces", "/v1/placements", "/v1/tokens", "/v1/audit"):
        for operation in document["paths"][path].values():
            assert operation["security"] == [{"bearer": []}]
            assert "application/problem+json" in operation["responses"]["401"]["content"]


def test_heads_have_bounds(open_server: Server) -> None:
    """A head without end is not gathered in memory: it is refused, in the form of all problems."""
    endless = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-Filler: " + b"x" * 1_000_000
    answer = send_raw(open_server, endless)
    assert (answer.status, answer.document["code"]) == (431, "head-too-large")
    many = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-Filler: x\r\n" * 1000 + b"\r\n"
    assert send_raw(open_server, many).status == 200


def test_what_is_no_http_is_a_problem(open_server: Server) -> None:
    """Even then the answer has the one form."""
    answer = send_raw(open_server, b"\x16\x03\x01\x02\x00 a TLS greeting\r\n\r\n")
    assert (answer.status, answer.document["code"]) == (400, "invalid")


def test_a_body_that_nobody_reads_is_cut_off(guarded: Guarded) -> None:
    """After a refusal some of the rest is taken, so that the caller sees the answer; not for ever."""
    with socket.create_connection((guarded.server.host, guarded.server.port), timeout=20) as connection:
        connection.sendall(b"POST /v1/traces HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert read_raw(connection).status == 401
        taken = taken_bytes(connection, most_bytes=200 << 20)
    assert 10 << 20 <= taken < 200 << 20


def taken_bytes(connection: socket.socket, *, most_bytes: int) -> int:
    """Send until the other side has enough; return how many bytes it took."""
    sent = 0
    with suppress(ConnectionError):
        while sent < most_bytes:
            connection.sendall(b"x" * (1 << 20))
            sent += 1 << 20
    return sent


@pytest.mark.parametrize("host", ["evil.example", "[", "a b", "\xff"])
def test_hosts_lead_nowhere(open_server: Server, host: str) -> None:
    """A path with a slash too many is not redirected to whatever host the caller names."""
    answer = send_raw(open_server, f"GET /v1/traces/ HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1"))
    assert answer.status in (400, 403, 404)
    assert "location" not in answer.headers
