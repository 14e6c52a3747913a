"""Logs on stderr, one line an event, as text or JSON: ours, uvicorn's and every library's; secrets never.

Whatever a line is made of, what looks like a token or a password is struck out of the finished line.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Protocol

import orjson
import structlog
from structlog.typing import Processor

__all__ = ["REQUEST_ID", "AccessLine", "configure_logs", "redacted"]

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the request that is being served; every line that is written meanwhile carries it."""

_Fields = MutableMapping[str, Any]

_SECRETS = (
    (re.compile(r"(mp_[0-9a-z]{4,32}_)[A-Za-z0-9_-]+"), r"\1***"),
    (re.compile(r"(?i)\b(bearer|basic)(\s+)(?!mp_)[^\s\"',]{4,}"), r"\1\2***"),
    (re.compile(r"(://[^\s:/@\"']*:)[^\s\"']*@"), r"\1***@"),
    (re.compile(r"(?i)([?&](?:token|access_token|api_key|secret|password)=)[^&\s\"']+"), r"\1***"),
)
_HINTS = ("mp_", "://", "bearer", "basic", "token=", "key=", "secret=", "password=")
_SECRET_FIELDS = frozenset({"authorization", "cookie", "password", "secret", "token"})
_PLAIN = re.compile(r"[^\s\"'=\\\x00-\x1f\x7f]+")


class _Settings(Protocol):
    @property
    def log_format(self) -> str: ...

    @property
    def log_level(self) -> str: ...


def configure_logs(settings: _Settings) -> None:
    """Send every log of this process to stderr in one form; may be called again."""
    level = getattr(logging, settings.log_level.upper())
    render = _as_json if settings.log_format == "json" else _as_text
    ours: list[Processor] = [
        _with_request_id,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper("iso"),
    ]
    structlog.configure(
        processors=[*ours, structlog.processors.format_exc_info, _hide, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _LINES,
        cache_logger_on_first_use=False,
    )
    handler = _Handler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*ours, structlog.stdlib.add_logger_name],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                _hide,
                render,
            ],
        )
    )
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(level)
    logging.captureWarnings(True)
    AccessLine.configure(enabled=level <= logging.INFO, as_json=render is _as_json)
    logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "alembic", "placement", "traces"):
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.propagate = name != "uvicorn.access"  # every request has a line of ours


def redacted(text: str) -> str:
    """Strike tokens and passwords out of a text."""
    lowered = text.lower()
    if any(hint in lowered for hint in _HINTS):
        for pattern, instead in _SECRETS:
            text = pattern.sub(instead, text)
    return text


class AccessLine:
    """The line of a request, written without the detours of other lines: there are thousands a second.

    Nothing in it comes from the caller but the id of the request, which is checked.
    """

    _enabled = True
    _as_json = False

    @classmethod
    def configure(cls, *, enabled: bool, as_json: bool) -> None:
        """Set whether lines are written, and how."""
        cls._enabled, cls._as_json = enabled, as_json

    @classmethod
    def write(
        cls, *, method: str, route: str, status: int, ms: float, num_bytes: int, caller: str, request_id: str
    ) -> None:
        """Write a line."""
        if not cls._enabled:
            return
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        if cls._as_json:
            text = (
                f'{{"method":"{method}","route":"{route}","status":{status},"ms":{ms:.2f},'
                f'"bytes":{num_bytes},"caller":"{caller}","request_id":"{request_id}","level":"info",'
                f'"timestamp":"{now}","event":"request"}}'
            )
        else:
            text = (
                f"{now} info    request method={method} route={route} status={status} ms={ms:.2f} "
                f"bytes={num_bytes} caller={caller} request_id={request_id}"
            )
        _LINES.line(text)


class _Lines:
    """Writes lines to stderr; when that fails there is nobody left to tell."""

    def line(self, text: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(text + "\n")

    debug = info = warning = error = critical = exception = msg = line


_LINES = _Lines()


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _LINES.line(self.format(record))


def _with_request_id(logger: object, name: str, fields: _Fields) -> _Fields:
    request_id = REQUEST_ID.get()
    if request_id is not None:
        fields.setdefault("request_id", request_id)
    return fields


def _hide(logger: object, name: str, fields: _Fields) -> _Fields:
    for key in fields:
        if key.lower() in _SECRET_FIELDS:
            fields[key] = "***"
    return fields


def _as_json(logger: object, name: str, fields: _Fields) -> str:
    return redacted(orjson.dumps(fields, default=str, option=orjson.OPT_NON_STR_KEYS).decode())


def _as_text(logger: object, name: str, fields: _Fields) -> str:
    head = f"{fields.pop('timestamp', '')} {fields.pop('level', ''):<7} {_one_line(fields.pop('event', ''))}"
    trace = fields.pop("exception", None)
    parts = [head, *(f"{key}={_quoted(value)}" for key, value in fields.items())]
    return redacted(" ".join(parts) + ("" if trace is None else f"\n{trace}"))


def _quoted(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _one_line(value: object) -> str:
    return " ".join(str(value).split())
