"""Where the token comes from, and where it does not go."""

from __future__ import annotations

from pathlib import Path

import pytest

from placement.errors import InputError
from service.client import Client
from service.client.token import checked_url, find_token, is_loopback


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """Return a file with a token that only its owner may read."""
    path = tmp_path / "token"
    path.write_text("mp_a_b\n")
    path.chmod(0o600)
    return path


def test_sources_in_order(token_file: Path) -> None:
    """The argument goes before the file, that before the variables."""
    environment = {"MOE_PLACEMENT_TOKEN": "mp_c_d", "MOE_PLACEMENT_TOKEN_FILE": str(token_file)}
    assert find_token("mp_e_f", file=token_file, environment=environment) == "mp_e_f"
    assert find_token(file=token_file, environment=environment) == "mp_a_b"
    assert find_token(environment=environment) == "mp_c_d"
    del environment["MOE_PLACEMENT_TOKEN"]
    assert find_token(environment=environment) == "mp_a_b"
    assert find_token(environment={}) is None


def test_a_group_may_read_the_file(token_file: Path) -> None:
    """Mounted secrets belong to a group."""
    token_file.chmod(0o440)
    assert find_token(file=token_file) == "mp_a_b"


def test_everybody_may_not(token_file: Path) -> None:
    """A file that everybody may read is refused, with what to do."""
    token_file.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        find_token(file=token_file)


@pytest.mark.parametrize("content", ["", "two words", "x" * 5000, "mp_a_b\nmp_c_d", "é", "\x00"])
def test_what_is_no_token_is_not_repeated(token_file: Path, content: str) -> None:
    """A wrong file is refused without showing what is in it."""
    token_file.write_text(content)
    with pytest.raises(InputError, match="holds no token") as raised:
        find_token(file=token_file)
    assert not content or content not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """So that it can be mended."""
    with pytest.raises(InputError, match="nowhere"):
        find_token(file=tmp_path / "nowhere")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.3.4.5", "[::1]", "a.localhost"])
def test_this_machine_needs_no_encryption(host: str) -> None:
    """What does not leave the machine may go in the clear."""
    assert checked_url(f"http://{host}:8700/", has_token=True, allow_http=False) == f"http://{host}:8700"


@pytest.mark.parametrize("host", ["example.org", "10.0.0.1", "localhost.example.org", "127.0.0.1.nip.io"])
def test_others_do(host: str) -> None:
    """A token is not sent over plain http to another machine, unless that is allowed."""
    with pytest.raises(InputError, match="plain http"):
        Client(f"http://{host}:8700", token="mp_a_b")
    assert checked_url(f"http://{host}:8700", has_token=True, allow_http=True)
    assert checked_url(f"https://{host}:8700", has_token=True, allow_http=False)
    assert checked_url(f"http://{host}:8700", has_token=False, allow_http=False)
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8700",
        "ftp://localhost",
        "http://",
        "http://[::1",
        "http://host:port",
        "http://user:secret@localhost",
        "http://localhost/?token=1",
        "http://localhost/#x",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    """A wrong URL is told at once, and never with a password in it."""
    with pytest.raises(InputError) as raised:
        checked_url(url, has_token=False, allow_http=False)
    assert "secret" not in str(raised.value)


def test_the_url_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """``MOE_PLACEMENT_URL`` is the default's default."""
    monkeypatch.delenv("MOE_PLACEMENT_URL", raising=False)
    assert checked_url(None, has_token=True, allow_http=False) == "http://127.0.0.1:8700"
    monkeypatch.setenv("MOE_PLACEMENT_URL", "https://example.org/placement/")
    assert checked_url(None, has_token=True, allow_http=False) == "https://example.org/placement"


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_no_time_is_no_time(seconds: float) -> None:
    """Deadlines are above 0."""
    with pytest.raises(InputError, match="deadline_s"):
        Client(deadline_s=seconds)
