"""What is not safe does not start: one line says what, and how to mend it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from placement.errors import InputError
from service.api.exposure import check_exposure, is_loopback
from service.settings import Settings, read_settings
from tests.service.api.guarded import make_keys


class Tokens:
    """Whether there are any."""

    def __init__(self, *, are_there: bool) -> None:
        self.any = lambda: are_there


def settings_of(folder: Path, **given: object) -> Settings:
    folder.mkdir(mode=0o700, exist_ok=True)
    return read_settings(data_dir=folder / "data", **given)


def refusal(settings: Settings, *, tokens: bool = False, environment: dict[str, str] | None = None) -> str:
    """Return why a start is refused."""
    with pytest.raises(InputError) as caught:
        check_exposure(settings, Tokens(are_there=tokens), environment or {})
    return str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org", "", "127.0.0.1.example.org"])
def test_other_machines_need_tokens(tmp_path: Path, host: str) -> None:
    """Without a token the service listens on loopback alone."""
    settings = settings_of(tmp_path, host=host)
    assert "token create" in refusal(settings)
    check_exposure(settings, Tokens(are_there=True), {})


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1.2.3", "::1", "localhost", "LocalHost.", "::ffff:127.0.0.1"]
)
def test_loopback_needs_none(tmp_path: Path, host: str) -> None:
    """Who serves this machine alone may do without."""
    assert is_loopback(host)
    check_exposure(settings_of(tmp_path, host=host), Tokens(are_there=False), {})


@pytest.mark.parametrize("name", ["FORWARDED_ALLOW_IPS", "UVICORN_PROXY_HEADERS"])
def test_a_proxy_needs_tokens(tmp_path: Path, name: str) -> None:
    """Through a proxy everyone would look like this machine."""
    assert name in refusal(settings_of(tmp_path), environment={name: "*"})
    check_exposure(settings_of(tmp_path), Tokens(are_there=True), {name: "*"})


@pytest.mark.parametrize("mode", [0o777, 0o702, 0o1777])
def test_folders_that_others_write_are_refused(tmp_path: Path, mode: int) -> None:
    """Whoever writes there could swap a placement, tokens or not."""
    settings = settings_of(tmp_path)
    settings.data_dir.mkdir()
    settings.data_dir.chmod(mode)
    assert "chmod go-w" in refusal(settings, tokens=True)


def test_a_database_that_others_read_is_refused(tmp_path: Path) -> None:
    """It holds the hashes of the tokens."""
    make_keys(tmp_path / "data")
    settings = settings_of(tmp_path)
    check_exposure(settings, Tokens(are_there=True), {})
    (settings.data_dir / "state.db").chmod(0o644)
    assert "chmod 600" in refusal(settings, tokens=True)


def test_the_server_itself_refuses(tmp_path: Path) -> None:
    """The command ends with code 2 and one line, and never listened."""
    environment = {**os.environ, "MOE_PLACEMENT_DATA_DIR": str(tmp_path / "data")}
    command = [sys.executable, "-m", "placement.cli", "serve", "--host", "0.0.0.0", "--port", "0"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "serving on" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert re.match(r"moe-placement: error: .*token create", last)
