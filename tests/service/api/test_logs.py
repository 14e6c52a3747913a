"""Logs: one form for all, secrets struck out wherever they come from, one line a request."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from service.api.logs import redacted
from tests.service.api.guarded import Guarded
from tests.service.server import eventually

TOKEN = "mp_0123456789ab_" + "S3cr3t-_" * 5 + "abc"

SPEAK = """
import logging, sys, warnings, structlog
from types import SimpleNamespace
from service.api.logs import configure_logs
configure_logs(SimpleNamespace(log_format=sys.argv[1], log_level="info"))
token = "mp_0123456789ab_" + "S3cr3t-_" * 5 + "abc"
log = structlog.get_logger("ours")
log.info("one", authorization=f"Bearer {token}", url="postgresql://me:hunter2@db/x", layer=3, text="a b")
log.debug("too quiet")
logging.getLogger("uvicorn.error").warning("two %s", token)
logging.getLogger("sqlalchemy.engine").error("cannot reach postgresql+psycopg://me:hunter2@db/x?password=hunter2")
warnings.warn(f"three {token}")
try:
    raise ValueError(f"four {token}")
except ValueError:
    log.exception("five")
    logging.getLogger("lib").exception("six\\nwith a second line")
"""


def spoken(form: str) -> str:
    """Return what a process that knows secrets writes to its log."""
    command = [sys.executable, "-c", SPEAK, form]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == ""
    return ended.stderr


def test_text_is_read_by_people() -> None:
    """One line an event, fields by name, tracebacks below; no secret."""
    text = spoken("text")
    assert "S3cr3t" not in text
    assert "hunter2" not in text
    assert 'info    one authorization=*** url=postgresql://me:***@db/x layer=3 text="a b"' in text
    assert "too quiet" not in text
    assert "two mp_0123456789ab_***" in text
    assert text.count("Traceback") == 2
    assert "six with a second line" in text


def test_json_is_read_by_machines() -> None:
    """Every line is one object, whoever wrote it."""
    text = spoken("json")
    assert "S3cr3t" not in text
    assert "hunter2" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["level"] for line in lines] == ["info", "warning", "error", "warning", "error", "error"]
    assert all(line["timestamp"].endswith("Z") for line in lines)
    assert lines[0]["layer"] == 3
    assert "ValueError: four mp_0123456789ab_***" in lines[4]["exception"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"x {TOKEN} y", "x mp_0123456789ab_*** y"),
        (f"Authorization: Bearer {TOKEN}", "Authorization: Bearer mp_0123456789ab_***"),
        ("BEARER abcdefgh", "BEARER ***"),
        ("Basic dXNlcjpwYXNz", "Basic ***"),
        ("postgresql://me:p@ss:w0rd@host/db", "postgresql://me:***@host/db"),
        ("GET /x?token=abc&limit=3", "GET /x?token=***&limit=3"),
        ("http://host:80/path", "http://host:80/path"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_secrets_are_struck_out(text: str, expected: str) -> None:
    """Tokens, headers, passwords in URLs and in queries."""
    assert redacted(text) == expected


def test_a_request_has_one_line(guarded: Guarded) -> None:
    """Who asked for what and what came of it, by the template of the route: ids are not in it."""
    with guarded.client(guarded.keys.read) as client:
        answer = client.get("/v1/traces/sha256:" + "7" * 64 + "?token=" + guarded.keys.read)
    found = eventually(
        lambda: [line for line in guarded.server.log.splitlines() if answer.headers["x-request-id"] in line],
        10.0,
        what="the line of the request",
    )
    assert len(found) == 1
    line = json.loads(found[0])
    assert {key: line[key] for key in ("method", "route", "status", "bytes", "event")} == {
        "method": "GET",
        "route": "/v1/traces/{trace_id}",
        "status": 404,
        "bytes": len(answer.content),
        "event": "request",
    }
    assert line["caller"] == guarded.keys.read.split("_")[1]
    assert line["ms"] > 0
