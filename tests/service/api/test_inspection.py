"""The process that opens what strangers send: bounded, without our secrets, and alone in its fall."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from service.api import inspection
from service.api.inspection import Inspector
from service.errors import InvalidError
from service.settings import read_settings
from tests.service.server import tiny_trace


def ask(folder: Path, path: Path, **details: Any) -> Any:
    """Have a trace looked into."""
    inspector = Inspector(read_settings(data_dir=folder))
    return asyncio.run(inspector.ask("trace", path, model=None, folder=str(folder), **details))


def test_a_header_is_told(tmp_path: Path) -> None:
    """The format and what the trace holds."""
    found = ask(tmp_path, tiny_trace(tmp_path / "t.npz"))
    assert (found["format"], found["summary"]["num_tokens"]) == ("npz", 512)


def test_it_falls_alone(tmp_path: Path) -> None:
    """Without the memory that it needs the child ends; the file is refused in one line."""
    path = tiny_trace(tmp_path / "t.npz")
    with pytest.raises(InvalidError, match="cannot be opened"):
        ask(tmp_path, path, limits={"memory_bytes": 64 << 20})
    assert ask(tmp_path, path)["format"] == "npz"


def test_it_has_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that does not come to an end is killed, with everything that it started."""
    monkeypatch.setattr(inspection, "TIME_LIMIT_S", 0.01)
    with pytest.raises(InvalidError, match=r"takes more than 0\.01 s"):
        ask(tmp_path, tiny_trace(tmp_path / "t.npz"))


def test_it_knows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The password of the database is not in its environment."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hunter2@db/x")
    monkeypatch.setenv("MOE_PLACEMENT_DATABASE_URL", "postgresql://me:hunter2@db/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    environment = inspection.child_environment()
    assert "hunter2" not in str(environment)
    assert environment["PATH"] == os.environ["PATH"]


def test_messages_name_no_path_of_ours(tmp_path: Path) -> None:
    """What is wrong is told of the file that was sent, not of where it lies here."""
    path = tmp_path / "draft"
    path.write_bytes(tiny_trace(tmp_path / "t.npz").read_bytes()[:-100])
    with pytest.raises(InvalidError) as caught:
        ask(tmp_path, path)
    assert str(tmp_path) not in caught.value.detail
    assert caught.value.detail.startswith("the archive is damaged")
