"""What the service answers, typed and frozen; `document` is the answer as it came."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from placement.errors import InputError
from service.client.errors import JobFailedError, job_error

if TYPE_CHECKING:
    from placement.plan import Placement

__all__ = [
    "FINAL",
    "Deployment",
    "DeploymentPlacement",
    "Evaluation",
    "Event",
    "Incumbent",
    "PlacementFile",
    "Solve",
    "Trace",
    "Version",
    "WindowsTaken",
]

FINAL = frozenset({"succeeded", "stopped", "failed", "timed_out"})
"""Statuses that a job keeps."""

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A trace that the service holds.

    Parameters
    ----------
    id
        ``sha256:`` and the digest of the bytes that were sent.
    """

    id: str
    document: Document = field(repr=False)

    @classmethod
    def of(cls, document: Document) -> Trace:
        """Read an answer."""
        return cls(id=_text(document, "id"), document=document)


@dataclass(frozen=True, slots=True, kw_only=True)
class Incumbent:
    """The best placement of a solve so far; a figure is None where it is not known."""

    objective: float | None
    lower_bound: float | None
    gap: float | None
    solver: str | None
    elapsed_s: float | None
    placement_id: str | None

    @classmethod
    def of(cls, document: Document) -> Incumbent:
        """Read an answer, or the data of an event."""
        return cls(
            objective=_number(document, "objective"),
            lower_bound=_number(document, "lower_bound"),
            gap=_number(document, "gap"),
            solver=document.get("solver"),
            elapsed_s=_number(document, "elapsed_s"),
            placement_id=document.get("placement_id"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Solve:
    """A solve as it stands.

    Parameters
    ----------
    status
        ``queued``, ``running``, ``succeeded``, ``stopped``, ``failed`` or ``timed_out``.
    placement_id
        Placement that it has found, if any.
    result, error
        What came out, once it has ended: one, the other, or both.
    """

    id: str
    status: str
    incumbent: Incumbent | None
    placement_id: str | None
    result: Document | None = field(repr=False)
    error: Document | None
    document: Document = field(repr=False)

    @classmethod
    def of(cls, document: Document) -> Solve:
        """Read an answer."""
        incumbent, result = _object(document, "incumbent"), _object(document, "result")
        found = document.get("placement_id") or (result or {}).get("placement_id")
        return cls(
            id=_text(document, "id"),
            status=_text(document, "status"),
            incumbent=None if incumbent is None else Incumbent.of(incumbent),
            placement_id=None if found is None else str(found),
            result=result,
            error=_object(document, "error"),
            document=document,
        )

    @property
    def is_final(self) -> bool:
        """Whether it has ended."""
        return self.status in FINAL

    def failure(self) -> JobFailedError | None:
        """Return why there is no result, None where there is one or may still be."""
        if not self.is_final or self.status == "succeeded" or self.placement_id is not None:
            return None
        return job_error(self.id, self.error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A placement's score on a trace; `result` is there once it has succeeded."""

    id: str
    status: str
    result: Document | None
    error: Document | None
    document: Document = field(repr=False)

    @classmethod
    def of(cls, document: Document) -> Evaluation:
        """Read an answer."""
        return cls(
            id=_text(document, "id"),
            status=_text(document, "status"),
            result=_object(document, "result"),
            error=_object(document, "error"),
            document=document,
        )

    @property
    def is_final(self) -> bool:
        """Whether it has ended."""
        return self.status in FINAL

    def failure(self) -> JobFailedError | None:
        """Return why there is no result, None where there is one or may still be."""
        return job_error(self.id, self.error) if self.is_final and self.status != "succeeded" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a job; `seq` counts from 1 without gaps."""

    seq: int
    kind: str
    data: Document

    @property
    def incumbent(self) -> Incumbent | None:
        """The improvement that it tells of."""
        return Incumbent.of(self.data) if self.kind == "incumbent" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementFile:
    """A placement as the service sent it, byte for byte; it is parsed on demand.

    Parameters
    ----------
    format
        ``native``, or the engine's.
    """

    content: bytes = field(repr=False)
    format: str = "native"
    etag: str | None = None

    def placement(self) -> Placement:
        """Return the placement.

        Raises
        ------
        InputError
            If the bytes are none, or the file is an engine's: `placement.formats` reads those.
        """
        from placement.io import placement_from_dict

        if self.format != "native":
            raise InputError(f"the file is one of {self.format}; ask for the native one")
        try:
            document = json.loads(self.content)
        except (ValueError, RecursionError) as exc:
            raise InputError(f"the placement that was sent is not JSON: {exc}") from exc
        return placement_from_dict(document, source="the placement that was sent")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentPlacement(PlacementFile):
    """The placement that a deployment should run.

    Parameters
    ----------
    version
        Its number in the deployment's history; None where the service did not say.
    placement_id
        Its digest.
    """

    version: int | None = None
    placement_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A named running model.

    Parameters
    ----------
    version
        Number of its current placement; None before the first.
    """

    name: str
    version: int | None
    etag: str | None
    document: Document = field(repr=False)

    @classmethod
    def of(cls, document: Document, *, etag: str | None = None) -> Deployment:
        """Read an answer."""
        return cls(
            name=_text(document, "name"), version=_count(document, "version"), etag=etag, document=document
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One placement in the history of a deployment: who put it there, when and why, and what came of it.

    Parameters
    ----------
    cause
        ``manual``, ``automatic`` or ``rollback``.
    of_version
        For a rollback: the version that it returned to.
    """

    version: int
    placement_id: str | None
    solve_id: str | None
    cause: str | None
    by: str | None
    why: str | None
    of_version: int | None
    predicted: Document | None
    observed: Document | None
    document: Document = field(repr=False)

    @classmethod
    def of(cls, document: Document) -> Version:
        """Read an answer."""
        return cls(
            version=int(document["version"]),
            placement_id=document.get("placement_id"),
            solve_id=document.get("solve_id"),
            cause=document.get("cause"),
            by=document.get("by"),
            why=document.get("why"),
            of_version=_count(document, "of_version"),
            predicted=_object(document, "predicted"),
            observed=_object(document, "observed"),
            document=document,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowsTaken:
    """What became of posted windows, and which version is current: fetch it if it is another.

    Parameters
    ----------
    stored, known
        Windows that are new, and that were there already.
    """

    stored: int
    known: int
    version: int | None
    document: Document = field(repr=False)

    @classmethod
    def of(cls, document: Document) -> WindowsTaken:
        """Read an answer."""
        return cls(
            stored=int(document["stored"]),
            known=int(document["known"]),
            version=_count(document, "version"),
            document=document,
        )


def _text(document: Document, key: str) -> str:
    value = document[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is a {type(value).__name__}, not a text")
    return value


def _object(document: Document, key: str) -> Document | None:
    value = document.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} is a {type(value).__name__}, not an object")
    return value


def _number(document: Document, key: str) -> float | None:
    value = document.get(key)
    return float(value) if isinstance(value, int | float) else None


def _count(document: Document, key: str) -> int | None:
    value = document.get(key)
    return value if isinstance(value, int) else None
