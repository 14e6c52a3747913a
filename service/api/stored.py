"""Stored traces and placements as callers see them, page by page, and their removal."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import anyio.to_thread
import sqlalchemy as sa

from service.api.context import Context
from service.api.logs import REQUEST_ID
from service.api.security import Caller
from service.api.waiting import look
from service.errors import ConflictError, InvalidError, NotFoundError
from service.state.records import Artifact
from service.state.tables import artifacts

__all__ = [
    "DIGEST",
    "artifact_document",
    "artifact_of",
    "artifact_page",
    "check_stored",
    "in_thread",
    "location_of",
    "remove_artifact",
]

T = TypeVar("T")

DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
JUST_KEPT_S = 60.0


async def in_thread(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Run what may wait for a disk or a database in a thread."""
    return await anyio.to_thread.run_sync(lambda: function(*arguments, **options))


async def artifact_of(context: Context, digest: str, kind: str) -> Artifact:
    """Return a stored artifact.

    Raises
    ------
    NotFoundError
        If there is none of that kind, whatever the id looks like.
    """
    if DIGEST.fullmatch(digest) is not None:
        found = await look(context, context.artifacts.get, digest)
        if found is not None and found.kind == kind:
            return found
    raise _unknown(digest, kind)


async def check_stored(context: Context, digest: str, kind: str) -> None:
    """Make sure that an artifact is stored; see `artifact_of`, which takes longer."""
    if DIGEST.fullmatch(digest) is None or await look(context, context.artifacts.kind_of, digest) != kind:
        raise _unknown(digest, kind)


def _unknown(digest: str, kind: str) -> NotFoundError:
    shown = digest[:80].encode("ascii", "replace").decode()
    return NotFoundError(f"there is no {kind} {shown!r}; it was never uploaded, or removed")


def artifact_document(found: Artifact) -> dict[str, Any]:
    """Return an artifact as JSON."""
    return {
        "id": found.digest,
        "kind": found.kind,
        "format": found.format,
        "size_bytes": found.size_bytes,
        **{name: value for name, value in found.summary.items() if name not in _OWN},
        "created_at": found.created_at,
        "created_by": found.created_by,
        "links": {"self": location_of(found)},
    }


_OWN = frozenset({"id", "kind", "format", "size_bytes", "created_at", "created_by", "links"})


def location_of(found: Artifact) -> str:
    """Return the path of an artifact."""
    return f"/v1/{found.kind}s/{found.digest}"


async def artifact_page(context: Context, kind: str, *, limit: int, cursor: str | None) -> dict[str, Any]:
    """Return a page of artifacts, newest first, with the cursor of the next one."""
    found = await in_thread(
        context.artifacts.page, kind=kind, before=None if cursor is None else _before(cursor), limit=limit + 1
    )
    return {"items": [artifact_document(one) for one in found[:limit]], "next_cursor": _next(found, limit)}


def _next(found: Sequence[Artifact], limit: int) -> str | None:
    return f"{found[limit - 1].created_at!r}~{found[limit - 1].digest}" if len(found) > limit else None


def _before(cursor: str) -> tuple[float, str]:
    at, _, digest = cursor.partition("~")
    try:
        if DIGEST.fullmatch(digest) is not None:
            return float(at), digest
    except ValueError:
        pass
    raise InvalidError("cursor: is none of ours; take next_cursor of the page before")


async def remove_artifact(context: Context, found: Artifact, caller: Caller) -> None:
    """Remove an artifact that nothing names.

    Raises
    ------
    ConflictError
        If a job or a deployment names it.
    """
    await in_thread(_remove, context, found, caller.id, REQUEST_ID.get())


def _remove(context: Context, found: Artifact, who: str, request_id: str | None) -> None:
    try:
        with context.database.write() as connection:
            connection.execute(sa.delete(artifacts).where(artifacts.c.digest == found.digest))
            context.audit.record(
                who=who,
                action=f"{found.kind}.delete",
                target=found.digest,
                request_id=request_id,
                detail={"size_bytes": found.size_bytes, "format": found.format},
                connection=connection,
            )
    except sa.exc.IntegrityError as exc:
        raise ConflictError(
            f"a solve or a deployment names {found.digest}; it goes with the last of them (vacuum)"
        ) from exc
    # Bytes that somebody uploads again at this moment stay; nothing is lost but room, until the next vacuum.
    context.files.remove_unused(found.digest, unused_s=0.0)
