"""Requests for traces, placements and jobs, as data: where they go, what they carry, how answers are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

from placement.errors import InputError
from service.client.call import Call, Reply, json_body
from service.client.results import Evaluation, PlacementFile, Solve, Trace

__all__ = [
    "JSON_TYPE",
    "MADE",
    "cursor_of",
    "evaluate",
    "filled",
    "health",
    "items_of",
    "path_name",
    "placement_file",
    "send_placement",
    "send_trace",
    "solve",
    "solves",
    "stop",
    "submit",
    "trace",
]

Topology = str | Mapping[str, Any]
Model = str | Mapping[str, Any] | None

JSON_TYPE = {"Content-Type": "application/json"}
BYTES = {"Content-Type": "application/octet-stream"}
DONE_OR_GOING_ON = frozenset({200, 202})
MADE = frozenset({200, 201})
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,199}")
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def path_name(value: str, what: str) -> str:
    """Return a name as part of a path; it must not lead anywhere else."""
    if not isinstance(value, str) or _PLAIN.fullmatch(value) is None:
        raise InputError(f"{what} {value!r} is none: letters, digits, '.', '_', '-' and ':' are taken")
    return quote(value, safe=":")


def filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is given of some values."""
    return {key: value for key, value in values.items() if value is not None}


# Traces and placements


def trace(trace_id: str) -> Call[Trace]:
    """Ask for a trace that the service may hold."""
    return Call(
        method="GET",
        path=f"/v1/traces/{path_name(trace_id, 'trace')}",
        read=lambda reply: Trace.of(reply.document()),
    )


def send_trace(content: Iterable[bytes], size_bytes: int, *, model: str | None = None) -> Call[Trace]:
    """Send a trace; `content` is gone through once for every attempt."""

    def body() -> Iterator[bytes]:
        return iter(content)

    return Call(
        method="POST",
        path="/v1/traces",
        params={} if model is None else {"model": model},
        headers={**BYTES, "Content-Length": str(size_bytes)},
        body=body,
        accepted=MADE,
        read=lambda reply: Trace.of(reply.document()),
        bounded=False,
        # It is opened before it is taken.
        patience_s=600.0,
    )


def send_placement(content: bytes, *, devices: int | None = None, model: str | None = None) -> Call[str]:
    """Send any engine's placement file; the answer is its id."""
    return Call(
        method="POST",
        path="/v1/placements",
        params={key: str(value) for key, value in filled({"devices": devices, "model": model}).items()},
        headers=BYTES,
        body=lambda: content,
        accepted=MADE,
        read=lambda reply: str(reply.document()["id"]),
        patience_s=60.0,
    )


def placement_file(placement_or_solve_id: str, *, format: str = "native") -> Call[PlacementFile]:
    """Ask for a placement by its own id or that of its solve."""
    name = path_name(placement_or_solve_id, "solve or placement")
    stored = _DIGEST.fullmatch(placement_or_solve_id) is not None

    def read(reply: Reply) -> PlacementFile:
        return PlacementFile(content=reply.content, format=format, etag=reply.headers.get("etag"))

    return Call(
        method="GET",
        path=f"/v1/placements/{name}" if stored else f"/v1/solves/{name}/placement",
        params={} if format == "native" else {"format": format},
        read=read,
        patience_s=60.0,
    )


# Solves and evaluations


def submit(
    trace_id: str,
    topology: Topology,
    *,
    model: Model,
    start: str | None,
    options: Mapping[str, Any],
    idempotency_key: str,
    priority: int,
    validate_only: bool,
    wait_s: float,
) -> Call[Solve]:
    """Queue a solve, or have its input checked alone."""
    values = _problem(trace_id, topology, model, options) | filled({"start_placement_id": start})
    if priority:
        values["priority"] = priority
    if validate_only:
        values["validate_only"] = True
    return Call(
        method="POST",
        path="/v1/solves",
        params={"wait": f"{wait_s:g}"} if validate_only else {},
        headers={**JSON_TYPE, "Idempotency-Key": _key(idempotency_key)},
        body=json_body(values),
        accepted=DONE_OR_GOING_ON,
        read=lambda reply: Solve.of(reply.document()),
        patience_s=wait_s if validate_only else 0.0,
    )


def _problem(trace_id: str, topology: Topology, model: Model, options: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {"trace_id": trace_id, "topology": topology}
    given = filled(options)
    return values | filled({"model": model}) | ({"options": given} if given else {})


def _key(key: str) -> str:
    if _KEY.fullmatch(key) is None:
        raise InputError("an idempotency key has 1 to 255 visible ASCII characters, and no space")
    return key


def solve(solve_id: str) -> Call[Solve]:
    """Ask how a solve stands."""
    return Call(
        method="GET",
        path=f"/v1/solves/{path_name(solve_id, 'solve')}",
        read=lambda reply: Solve.of(reply.document()),
    )


def solves(*, status: str | None, limit: int, cursor: str | None) -> Call[tuple[list[Solve], str | None]]:
    """Ask for a page of solves, newest first, and where the next one begins."""

    def read(reply: Reply) -> tuple[list[Solve], str | None]:
        document = reply.document()
        return [Solve.of(row) for row in items_of(document)], cursor_of(document)

    given = filled({"status": status, "limit": limit, "cursor": cursor})
    return Call(
        method="GET",
        path="/v1/solves",
        params={key: str(value) for key, value in given.items()},
        read=read,
    )


def stop(solve_id: str) -> Call[Solve]:
    """Ask for the early end of a solve."""
    return Call(
        method="DELETE",
        path=f"/v1/solves/{path_name(solve_id, 'solve')}",
        accepted=DONE_OR_GOING_ON,
        read=lambda reply: Solve.of(reply.document()),
    )


def evaluate(
    placement_id: str,
    trace_id: str,
    topology: Topology,
    *,
    model: Model,
    options: Mapping[str, Any],
    wait_s: float,
    idempotency_key: str,
) -> Call[Evaluation]:
    """Have a placement scored; sent again with the same key, it waits on for the same score."""
    return Call(
        method="POST",
        path="/v1/evaluations",
        params={"wait": f"{wait_s:g}"},
        headers={**JSON_TYPE, "Idempotency-Key": _key(idempotency_key)},
        body=json_body(_problem(trace_id, topology, model, options) | {"placement_id": placement_id}),
        accepted=DONE_OR_GOING_ON,
        read=lambda reply: Evaluation.of(reply.document()),
        patience_s=wait_s,
    )


def health() -> Call[Mapping[str, Any]]:
    """Ask whether the service is ready."""
    return Call(method="GET", path="/health/ready", read=lambda reply: reply.document())


def items_of(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows of a page."""
    items = document["items"]
    if not isinstance(items, list):
        raise ValueError("items is no list")
    return items


def cursor_of(document: Mapping[str, Any]) -> str | None:
    """Return where the page after a page begins."""
    found = document.get("next_cursor")
    return None if found is None else str(found)
