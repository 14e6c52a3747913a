"""A server that asks for tokens, the tokens, and requests by hand where no client would send them."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from service.artifacts import private_folder
from service.state.database import open_database
from service.state.tokens import Issued, Limits, Scope, TokenStore
from tests.service.server import Server


@dataclass(frozen=True)
class Keys:
    """Tokens by scope, and every secret that was ever issued."""

    admin: str
    submit: str
    read: str
    issued: list[str] = field(default_factory=list)

    def note(self, text: str) -> str:
        """Remember a further token; return it."""
        self.issued.append(text)
        return text

    def assert_kept_secret(self, text: str) -> None:
        """No secret of any token is in a text."""
        for token in (self.admin, self.submit, self.read, *self.issued):
            assert token.split("_", 2)[2] not in text


@dataclass(frozen=True)
class Guarded:
    """A server with its tokens."""

    server: Server
    keys: Keys

    def client(self, token: str | None) -> httpx.Client:
        """Return a client with a token."""
        return self.server.client(token=token)


def make_keys(data_dir: Path, database_url: str | None = None) -> Keys:
    """Make a token of each scope in the state of a data directory."""
    private_folder(data_dir)
    url = database_url or f"sqlite:///{data_dir / 'state.db'}"
    made = {scope: issue(url, scope).text for scope in Scope}
    return Keys(admin=made[Scope.ADMIN], submit=made[Scope.SUBMIT], read=made[Scope.READ])


def issue(url: str, *scopes: Scope, limits: Limits | None = None, expires_at: float | None = None) -> Issued:
    """Make a token in the state at a URL, as the command line does."""
    database = open_database(url)
    store = TokenStore(database)
    try:
        return store.create("test", scopes, limits=limits, expires_at=expires_at, by="test")
    finally:
        store.close()
        database.close()


def state_url(server: Server) -> str:
    """Return the URL of a server's own state."""
    return f"sqlite:///{server.data_dir / 'state.db'}"


def scratch_of(server: Server) -> list[Path]:
    """Return what lies in a server's scratch folder."""
    return list((server.data_dir / "scratch").iterdir())


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The answer is a problem document with a status and a code; return it."""
    assert response.headers["content-type"] == "application/problem+json", response.text
    document: dict[str, Any] = response.json()
    assert (response.status_code, document["status"], document["code"]) == (status, status, code), document
    assert document["type"] == f"urn:moe-placement:problem:{code}"
    assert document["detail"].splitlines() == [document["detail"]]
    assert document["instance"] == f"urn:moe-placement:request:{response.headers['x-request-id']}"
    return document


@dataclass(frozen=True)
class RawAnswer:
    """What came back on a socket."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> dict[str, Any]:
        """The body as JSON."""
        found: dict[str, Any] = json.loads(self.body)
        return found


def send_raw(server: Server, sent: bytes, *, timeout_s: float = 10.0) -> RawAnswer:
    """Send bytes and read one answer."""
    with socket.create_connection((server.host, server.port), timeout=timeout_s) as connection:
        connection.sendall(sent)
        return read_raw(connection)


def read_raw(connection: socket.socket) -> RawAnswer:
    """Read one answer with a Content-Length."""
    got = b""
    while b"\r\n\r\n" not in got:
        got += _some(connection)
    head, _, body = got.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    while len(body) < int(headers.get("content-length", 0)):
        body += _some(connection)
    return RawAnswer(status=int(lines[0].split()[1]), headers=headers, body=body)


def _some(connection: socket.socket) -> bytes:
    got = connection.recv(1 << 16)
    if not got:
        raise AssertionError("the server closed the connection without an answer")
    return got
