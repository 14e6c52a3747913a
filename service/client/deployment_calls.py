"""Requests for deployments, as data: where they go, what they carry, how answers are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from placement.errors import InputError
from service.client.call import Call, Reply, json_body
from service.client.calls import JSON_TYPE, MADE, cursor_of, filled, items_of, path_name
from service.client.results import Deployment, DeploymentPlacement, Version, WindowsTaken

__all__ = [
    "delete_deployment",
    "deployment",
    "deployment_placement",
    "deployments",
    "post_windows",
    "promote",
    "put_deployment",
    "rollback",
    "versions",
]

MOST_WAIT_S = 300.0
"""Longest that the service holds an answer back."""


def _deployment(name: str) -> str:
    return f"/v1/deployments/{path_name(name, 'deployment')}"


def _read_deployment(reply: Reply) -> Deployment:
    return Deployment.of(reply.document(), etag=reply.headers.get("etag"))


def _if_match(etag: str | None) -> dict[str, str]:
    return {} if etag is None else {"If-Match": etag}


def put_deployment(name: str, spec: Mapping[str, Any], *, if_match: str | None) -> Call[Deployment]:
    """Create or change a deployment."""
    return Call(
        method="PUT",
        path=_deployment(name),
        headers={**JSON_TYPE, **_if_match(if_match)},
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
        return [Deployment.of(row) for row in items_of(document)], cursor_of(document)

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
        headers={**JSON_TYPE, **_if_match(if_match)},
        body=json_body(filled({"solve_id": solve, "placement_id": placement, "why": why or None})),
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
        headers={**JSON_TYPE, **_if_match(if_match)},
        body=json_body(filled({"to": version, "why": why or None})),
        accepted=MADE,
        read=lambda reply: Version.of(reply.document()),
        # Twice back is where it was.
        repeatable=False,
    )


def versions(name: str, *, cursor: str | None) -> Call[tuple[list[Version], str | None]]:
    """Ask for a page of the history of a deployment, and where the next one begins."""

    def read(reply: Reply) -> tuple[list[Version], str | None]:
        document = reply.document()
        return [Version.of(row) for row in items_of(document)], cursor_of(document)

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
        headers=JSON_TYPE,
        body=json_body(values | filled({"version": version})),
        accepted=frozenset({200, 202}),
        read=lambda reply: WindowsTaken.of(reply.document()),
    )


def _plain(window: Mapping[str, Any]) -> dict[str, Any]:
    """Return a window as JSON has it: arrays and tensors as lists."""
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in window.items()}
