"""``moe-placement token``: shown once, counted at once, and never on the wrong stream."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from placement.cli.app import run
from service.state.tokens import parse_token
from tests.service.api.guarded import Keys
from tests.service.server import Server

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command on a data directory; return its code and what it told on either stream."""

    def run_it(*arguments: str) -> tuple[int, str, str]:
        code = run(["token", *arguments, "--data-dir", str(tmp_path / "data")])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run_it


def test_a_token_is_made_used_and_revoked(tmp_path: Path, command: Command) -> None:
    """The life of a token beside a running server."""
    folder = tmp_path / "data"
    code, out, err = command("create", "ann", "--scope", "admin")
    assert code == 0, err
    token = out.strip()
    parsed = parse_token(token)
    assert parsed is not None
    token_id, secret = parsed
    assert secret not in err
    assert (folder / "state.db").stat().st_mode & 0o077 == 0
    with Server(folder, role="api") as server:
        assert status_of(server, token) == 200
        renewed = command("rotate", token_id, "--grace", "0s")[1].strip()
        assert [status_of(server, text) for text in (token, renewed)] == [401, 200]
        listed = command("list")[1]
        assert "valid" in listed
        assert command("revoke", token_id)[0] == 0
        assert status_of(server, renewed) == 401
        assert "revoked" in command("list")[1]
    Keys(admin=token, submit=renewed, read=renewed).assert_kept_secret(server.log + listed)


def status_of(server: Server, token: str) -> int:
    """Return what an administrator's request with a token comes to."""
    with server.client(token=token) as client:
        return client.get("/v1/tokens").status_code


def test_json_is_one_object(command: Command) -> None:
    """For scripts: the token and what it may, with its limits."""
    out = command(
        *("create", "ci", "--scope", "read", "--expires-in", "12h", "--requests-per-minute", "60", "--json")
    )[1]
    found = json.loads(out)
    assert found["token"].startswith(f"mp_{found['id']}_")
    assert found["scopes"] == ["read"]
    assert found["limits"]["requests_per_minute"] == 60
    assert 12 * 3600 - 1 < found["expires_at"] - found["created_at"] <= 12 * 3600 + 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "x"), "scope"),
        (("create", "x", "--scope", "root"), "known: read, submit, admin"),
        (("create", "", "--scope", "read"), "name"),
        (("create", "x", "--scope", "read", "--expires-in", "soon"), "duration"),
        (("list",), "no folder of a service"),
        (("revoke", "nobody"), "no folder of a service"),
    ],
)
def test_bad_input_is_one_line(command: Command, arguments: tuple[str, ...], said: str) -> None:
    """What, where and how to mend it; code 2."""
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert said in err
