"""Deployments as the rest of the service sees them: frozen, typed, without a database."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any

__all__ = [
    "Added",
    "Cause",
    "Current",
    "Deployment",
    "LoadPart",
    "NewVersion",
    "Phase",
    "RefreshState",
    "StoredPart",
    "Version",
]


class Cause(StrEnum):
    """Why a version is there."""

    MANUAL = "manual"
    AUTOMATIC = "automatic"
    ROLLBACK = "rollback"


class Phase(StrEnum):
    """Where the automatic refresh of a deployment is."""

    IDLE = "idle"
    STARTING = "starting"
    """What to solve is written down; the job is submitted under a key of its own, so that it is only once."""
    SOLVING = "solving"


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshState:
    """What the controllers of a deployment know together; kept as JSON, changed by compare-and-set.

    Parameters
    ----------
    serial
        Counts every change: who has read another one must read again.
    owner, beat
        Controller that holds the lease, and its count of signs of life.
    phase
        Where the refresh is.
    number
        Refreshes begun so far.
    evaluated
        Number of the last part of a window that the drift takes account of.
    plan
        What the running refresh solves: trace, start, windows fitted.
    job_id
        Its solve.
    watch
        Version whose windows are observed, against which one, after which part.
    cool_down
        When the last change ended, for how many seconds and since which part nothing starts.
    attainable
        Balance that the last refresh in vain could reach, for which version: no less is expected of it.
    last
        How the last refresh or rollback ended, and why.
    """

    serial: int = 0
    owner: str | None = None
    beat: int = 0
    phase: Phase = Phase.IDLE
    number: int = 0
    evaluated: int = 0
    plan: dict[str, Any] | None = None
    job_id: str | None = None
    watch: dict[str, Any] | None = None
    cool_down: dict[str, Any] | None = None
    attainable: dict[str, Any] | None = None
    last: dict[str, Any] | None = None

    @classmethod
    def of(cls, values: dict[str, Any] | None) -> RefreshState:
        """Return the state of its JSON form; unknown entries, of a later release, are left out."""
        known = {field.name for field in fields(cls)}
        found = {key: value for key, value in (values or {}).items() if key in known}
        return cls(**{**found, "phase": Phase(found.get("phase", Phase.IDLE))})

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    def ended(self) -> RefreshState:
        """Return the state without a refresh under way."""
        return replace(self, phase=Phase.IDLE, plan=None, job_id=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A named running model, as it stands.

    Parameters
    ----------
    spec
        Topology, model, options, policy as given and completed, and ``facts`` that follow from them.
    revision
        Counts every change of spec and placement.
    version
        Current version of the placement; None before the first.
    """

    name: str
    spec: dict[str, Any]
    revision: int
    version: int | None
    drift: dict[str, Any] | None
    refresh: RefreshState
    created_at: float
    updated_at: float


@dataclass(frozen=True, slots=True)
class Current:
    """What launchers must know of a deployment; positional, since thousands a second are made."""

    revision: int
    version: int | None
    digest: str | None
    job_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVersion:
    """A placement to promote.

    Parameters
    ----------
    digest
        Placement.
    job_id
        Solve that found it, if any.
    by, why
        Who promotes it, and the reason.
    of_version
        For a rollback: the version it returns to.
    predicted
        Objective, balance and gain that it promises.
    """

    digest: str
    cause: Cause
    by: str
    why: str
    job_id: str | None = None
    of_version: int | None = None
    predicted: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A placement that was promoted."""

    deployment: str
    version: int
    placement_digest: str
    job_id: str | None
    cause: Cause
    by: str
    why: str
    of_version: int | None
    predicted: dict[str, Any] | None
    observed: dict[str, Any] | None
    promoted_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPart:
    """What one rank counted in one window.

    Parameters
    ----------
    version
        Version of the placement that was running, where the rank says so.
    load
        zlib of int64 ``[layers, experts]``, little-endian: token-expert pairs of logical experts.
    """

    window: int
    rank: int
    version: int | None
    tokens: float
    load: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart(LoadPart):
    """A part as it was stored; `number` counts parts in order of arrival."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """What became of posted windows: how many are new, how many were known, and what is current."""

    stored: int
    known: int
    version: int | None
    revision: int
