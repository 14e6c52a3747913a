"""Every request that the service takes, as data: where it goes, what it carries, how its answer is read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

from placement.errors import InputError
from service.client.call import Call, Reply, json_body
from service.client.results import (
    Deployment,
    DeploymentPlacement,
    Evaluation,
    PlacementFile,
    Solve,
    Trace,
    Version,
    WindowsTaken,
)

__all__ = [
    "delete_deployment",
    "deployment",
    "deployment_placement",
    "deployments",
    "evaluate",
    "health",
    "placement_file",
    "post_windows",
    "promote",
    "put_deployment",
    "rollback",
    "send_placement",
    "send_trace",
    "solve",
    "solves",
    "stop",
    "submit",
    "trace",
    "versions",
]

T = TypeVar("T")
Topology = str | Mapping[str, Any]
Model = str | Mapping[str, Any] | None

JSON = {"Content-Type": "application/json"}
BYTES = {"Content-Type": "application/octet-stream"}
MOST_WAIT_S = 300.0
"""Longest that the service holds an answer back."""
DONE_OR_GOING_ON = frozenset({200, 202})
MADE = frozenset({200, 201})
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,199}")
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def _name(value: str, what: str) -> str:
    """Return a name as part of a path; it must not lead anywhere else."""
    if not isinstance(value, str) or _PLAIN.fullmatch(value) is None:
        raise InputError(f"{what} {value!r} is none: letters, digits, '.', '_', '-' and ':' are taken")
    return quote(value, safe=":")


def _fill(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


# Traces and placements


def trace(trace_id: str) -> Call[Trace]:
    """Ask for a trace that the service may hold."""
    return Call(
        method="GET",
        path=f"/v1/traces/{_name(trace_id, 'trace')}",
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
        params={key: str(value) for key, value in _fill({"devices": devices, "model": model}).items()},
        headers=BYTES,
        body=lambda: content,
        accepted=MADE,
        read=lambda reply: str(reply.document()["id"]),
        patience_s=60.0,
    )


def placement_file(placement_or_solve_id: str, *, format: str = "native") -> Call[PlacementFile]:
    """Ask for a placement by its own id or that of its solve."""
    name = _name(placement_or_solve_id, "solve or placement")
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
    values = _problem(trace_id, topology, model, options) | _fill({"start_placement_id": start})
    if priority:
        values["priority"] = priority
    if validate_only:
        values["validate_only"] = True
    return Call(
        method="POST",
        path="/v1/solves",
        params={"wait": f"{wait_s:g}"} if validate_only else {},
        headers={**JSON, "Idempotency-Key": _key(idempotency_key)},
        body=json_body(values),
        accepted=DONE_OR_GOING_ON,
        read=lambda reply: Solve.of(reply.document()),
        patience_s=wait_s if validate_only else 0.0,
    )


def _problem(trace_id: str, topology: Topology, model: Model, options: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {"trace_id": trace_id, "topology": topology}
    given = _fill(options)
    return values | _fill({"model": model}) | ({"options": given} if given else {})


def _key(key: str) -> str:
    if _KEY.fullmatch(key) is None:
        raise InputError("an idempotency key has 1 to 255 visible ASCII characters, and no space")
    return key


def solve(solve_id: str) -> Call[Solve]:
    """Ask how a solve stands."""
    return Call(
        method="GET",
        path=f"/v1/solves/{_name(solve_id, 'solve')}",
        read=lambda reply: Solve.of(reply.document()),
    )


def solves(*, status: str | None, limit: int, cursor: str | None) -> Call[tuple[list[Solve], str | None]]:
    """Ask for a page of solves, newest first, and where the next one begins."""

    def read(reply: Reply) -> tuple[list[Solve], str | None]:
        document = reply.document()
        return [Solve.of(row) for row in _items(document)], _next(document)

    given = _fill({"status": status, "limit": limit, "cursor": cursor})
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
        path=f"/v1/solves/{_name(solve_id, 'solve')}",
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
        headers={**JSON, "Idempotency-Key": _key(idempotency_key)},
        body=json_body(_problem(trace_id, topology, model, options) | {"placement_id": placement_id}),
        accepted=DONE_OR_GOING_ON,
        read=lambda reply: Evaluation.of(reply.document()),
        patience_s=wait_s,
    )


# Deployments


def _deployment(name: str) -> str:
    return f"/v1/deployments/{_name(name, 'deployment')}"


def _read_deployment(reply: Reply) -> Deployment:
    return Deployment.of(reply.document(), etag=reply.headers.get("etag"))


def _if_match(etag: str | None) -> dict[str, str]:
    return {} if etag is None else {"If-Match": etag}


def put_deployment(name: str, spec: Mapping[str, Any], *, if_match: str | None) -> Call[Deployment]:
    """Create or change a deployment."""
    return Call(
        method="PUT",
        path=_deployment(name),
        headers={**JSON, **_if_match(if_match)},
        body=json_body(spec),
        accepted=MADE,
        read=_read_deployment,
        # After an answer that was lost, the second attempt would meet its own change.
        repeatable=if_match is None,
    )


def deployment(name: str) -> Call[Deployment]:
    """Ask how a deployment stands."""
    return Call(method="GET", path=_deployment(name), read=_read_deployment)


def deployments(*, cursor: str | None) -> Call[tuple[list[Deployment], str | None]]:
    """Ask for a page of deployments, and where the next one begins."""

    def read(reply: Reply) -> tuple[list[Deployment], str | None]:
        document = reply.document()
        return [Deployment.of(row) for row in _items(document)], _next(document)

    return Call(
        method="GET", path="/v1/deployments", params={} if cursor is None else {"cursor": cursor}, read=read
    )


def delete_deployment(name: str, *, if_match: str | None) -> Call[None]:
    """Remove a deployment."""
    return Call(
        method="DELETE",
        path=_deployment(name),
        headers=_if_match(if_match),
        accepted=frozenset({200, 204}),
        read=lambda reply: None,
        # The second attempt would not find it.
        repeatable=False,
    )


def deployment_placement(
    name: str, *, etag: str | None = None, wait_s: float = 0.0
) -> Call[DeploymentPlacement | None]:
    """Ask for the placement to run; None where it is the one that `etag` names."""

    def read(reply: Reply) -> DeploymentPlacement | None:
        return None if reply.status == 304 else _read_placement(reply)

    wait_s = min(wait_s, MOST_WAIT_S)
    return Call(
        method="GET",
        path=f"{_deployment(name)}/placement",
        params={"wait": f"{wait_s:g}"} if wait_s > 0 else {},
        headers={} if etag is None else {"If-None-Match": etag},
        accepted=frozenset({200, 304}),
        read=read,
        patience_s=max(0.0, wait_s),
    )


def _read_placement(reply: Reply) -> DeploymentPlacement:
    """Read a placement, and check that it is the one that the headers name."""
    named = reply.headers.get("x-placement-id")
    if named is not None and named != f"sha256:{hashlib.sha256(reply.content).hexdigest()}":
        raise ValueError(f"its digest is not {named}")
    version = reply.headers.get("x-placement-version", "")
    return DeploymentPlacement(
        content=reply.content,
        etag=reply.headers.get("etag"),
        version=int(version) if version.isdecimal() else None,
        placement_id=named,
    )


def promote(
    name: str, *, solve: str | None, placement: str | None, why: str, if_match: str | None
) -> Call[Version]:
    """Make the placement of a solve the one to run."""
    if (solve is None) == (placement is None):
        raise InputError("promote either a solve or a placement")
    return Call(
        method="PUT",
        path=f"{_deployment(name)}/placement",
        headers={**JSON, **_if_match(if_match)},
        body=json_body(_fill({"solve_id": solve, "placement_id": placement, "why": why or None})),
        accepted=MADE,
        read=lambda reply: Version.of(reply.document()),
        # What runs already is promoted once; but the second attempt would find another placement to match.
        repeatable=if_match is None,
    )


def rollback(name: str, *, version: int | None, why: str, if_match: str | None) -> Call[Version]:
    """Return to an earlier placement."""
    return Call(
        method="POST",
        path=f"{_deployment(name)}/rollback",
        headers={**JSON, **_if_match(if_match)},
        body=json_body(_fill({"to": version, "why": why or None})),
        accepted=MADE,
        read=lambda reply: Version.of(reply.document()),
        # Twice back is where it was.
        repeatable=False,
    )


def versions(name: str, *, cursor: str | None) -> Call[tuple[list[Version], str | None]]:
    """Ask for a page of the history of a deployment, and where the next one begins."""

    def read(reply: Reply) -> tuple[list[Version], str | None]:
        document = reply.document()
        return [Version.of(row) for row in _items(document)], _next(document)

    return Call(
        method="GET",
        path=f"{_deployment(name)}/versions",
        params={} if cursor is None else {"cursor": cursor},
        read=read,
    )


def post_windows(
    name: str, windows: Iterable[Mapping[str, Any]], *, rank: int, version: int | None
) -> Call[WindowsTaken]:
    """Report what a rank counted; a window that is known already counts once."""
    values = {"rank": rank, "windows": [_plain(window) for window in windows]}
    return Call(
        method="POST",
        path=f"{_deployment(name)}/windows",
        headers=JSON,
        body=json_body(values | _fill({"version": version})),
        accepted=frozenset({200, 202}),
        read=lambda reply: WindowsTaken.of(reply.document()),
    )


def _plain(window: Mapping[str, Any]) -> dict[str, Any]:
    """Return a window as JSON has it: arrays and tensors as lists."""
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in window.items()}


def health() -> Call[Mapping[str, Any]]:
    """Ask whether the service is ready."""
    return Call(method="GET", path="/health/ready", read=lambda reply: reply.document())


def _items(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    items = document["items"]
    if not isinstance(items, list):
        raise ValueError("items is no list")
    return items


def _next(document: Mapping[str, Any]) -> str | None:
    found = document.get("next_cursor")
    return None if found is None else str(found)
