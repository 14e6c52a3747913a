"""Deployments as callers see them: their JSON, and the models and examples that describe it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.deployments.records import Deployment, Phase, Version
from service.deployments.spec import DeploymentOptions, Policy
from service.schemas import ShortText

__all__ = [
    "DEPLOYMENT",
    "DEPLOYMENT_REQUEST",
    "DRIFT",
    "PROMOTION",
    "VERSION",
    "WINDOWS_REQUEST",
    "WINDOWS_TAKEN",
    "DeploymentDocument",
    "DeploymentPage",
    "DriftDocument",
    "Promotion",
    "Rollback",
    "VersionDocument",
    "VersionPage",
    "WindowsTaken",
    "deployment_document",
    "version_document",
]

PlacementName = Annotated[str, Field(min_length=1, max_length=80)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Promotion(_Request):
    """Body of ``PUT /v1/deployments/{name}/placement``: one of both ids."""

    solve_id: PlacementName | None = Field(default=None, description="Solve whose placement it is.")
    placement_id: PlacementName | None = Field(default=None, description="Digest of a placement.")
    why: ShortText = Field(default="by hand", description="For the history.")


class Rollback(_Request):
    """Body of ``POST /v1/deployments/{name}/rollback``."""

    to: int | None = Field(
        default=None, ge=1, le=(1 << 31) - 1, description="Version; default: the placement that ran before."
    )
    why: ShortText = Field(default="by hand", description="For the history.")


class _Document(BaseModel):
    model_config = ConfigDict(extra="allow")


class DeploymentDocument(_Document):
    """A deployment as it stands."""

    name: str
    revision: int = Field(description="Counts every change of spec and placement.")
    version: int | None = Field(description="Current version of the placement; null before the first.")
    topology: str | dict[str, Any]
    model: str | dict[str, Any]
    options: DeploymentOptions
    num_ranks: int
    policy: Policy
    facts: dict[str, Any] = Field(description="What follows: layers, experts, top_k, devices, slots.")
    drift: dict[str, Any] | None = Field(
        default=None,
        description="What recent windows say: balance, reference, excess, shift; what holds back a refresh.",
    )
    refresh: dict[str, Any] = Field(description="Where the automatic refresh is, and how the last ended.")
    created_at: float
    updated_at: float
    links: dict[str, str]


class DeploymentPage(_Document):
    """Deployments in order of their names."""

    items: list[DeploymentDocument]
    next_cursor: str | None


class VersionDocument(_Document):
    """A placement that was promoted."""

    version: int
    placement_id: str
    solve_id: str | None
    cause: Literal["manual", "automatic", "rollback"]
    by: str
    why: str
    of_version: int | None = Field(description="For a rollback: the version that it returns to.")
    predicted: dict[str, Any] | None
    observed: dict[str, Any] | None = Field(
        description="On the windows since: balance, that of the version before, gain."
    )
    promoted_at: float
    current: bool


class VersionPage(_Document):
    """Versions, newest first."""

    items: list[VersionDocument]
    next_cursor: int | None


class DriftDocument(_Document):
    """What recent windows say of the current placement."""

    name: str
    version: int | None
    drift: dict[str, Any] | None
    refresh: dict[str, Any]


class WindowsTaken(_Document):
    """What became of posted windows."""

    stored: int
    known: int = Field(description="Parts that were there already.")
    version: int | None = Field(description="Current version of the placement: fetch it if it is another.")
    revision: int


def deployment_document(found: Deployment) -> dict[str, Any]:
    """Return a deployment as JSON."""
    path = f"/v1/deployments/{found.name}"
    spec = {key: found.spec[key] for key in ("topology", "model", "options", "num_ranks", "policy", "facts")}
    return {
        "name": found.name,
        "revision": found.revision,
        "version": found.version,
        **spec,
        "drift": found.drift,
        "refresh": _refresh(found),
        "created_at": found.created_at,
        "updated_at": found.updated_at,
        "links": {
            "self": path,
            "placement": f"{path}/placement",
            "versions": f"{path}/versions",
            "windows": f"{path}/windows",
            "drift": f"{path}/drift",
            "solves": f"/v1/solves?deployment={found.name}",
        },
    }


def _refresh(found: Deployment) -> dict[str, Any]:
    """Return what concerns callers of the controllers' state."""
    state, plan = found.refresh, found.refresh.plan or {}
    return {
        "phase": str(state.phase),
        "number": state.number,
        "solve_id": state.job_id if state.phase is Phase.SOLVING else None,
        "of_version": plan.get("of_version"),
        "fitted_windows": plan.get("fitted"),
        "observing": None if state.watch is None else state.watch["version"],
        "cool_down_began": None if state.cool_down is None else state.cool_down["began"],
        "attainable": state.attainable,
        "last": state.last,
    }


def version_document(found: Version, *, current: int | None) -> dict[str, Any]:
    """Return a version as JSON."""
    return {
        "version": found.version,
        "placement_id": found.placement_digest,
        "solve_id": found.job_id,
        "cause": str(found.cause),
        "by": found.by,
        "why": found.why,
        "of_version": found.of_version,
        "predicted": found.predicted,
        "observed": found.observed,
        "promoted_at": found.promoted_at,
        "current": found.version == current,
    }


_PLACEMENT_ID = "sha256:" + "c4" * 32
_SOLVE_ID = "s-01kapn3v5c9w8j2m6r0xq4t7yz"
_PATH = "/v1/deployments/chat-prefill"

DEPLOYMENT_REQUEST: dict[str, Any] = {
    "topology": "h100:4x8",
    "model": "deepseek-v3",
    "options": {"semantics": "dispatch", "spare_slots": 32},
    "num_ranks": 32,
    "policy": {
        "mode": "auto",
        "drift_threshold": 0.1,
        "max_pay_back_steps": 5000,
        "cool_down_seconds": 900,
        "max_moves": 300,
        "window_steps": 1000,
        "solve": {"time_limit": 20},
    },
}

DEPLOYMENT: dict[str, Any] = {
    "name": "chat-prefill",
    "revision": 3,
    "version": 2,
    "topology": "h100:4x8",
    "model": "deepseek-v3",
    "options": DeploymentOptions(spare_slots=32).model_dump(mode="json"),
    "num_ranks": 32,
    "policy": Policy(mode="auto").model_dump(mode="json"),
    "facts": {"layers": 58, "experts": 256, "top_k": 8, "devices": 32, "slots": 288},
    "drift": {"version": 2, "balance": 1.08, "reference": 1.05, "excess": 0.029, "shift": 0.0, "due": False},
    "refresh": {"phase": "idle", "number": 1, "solve_id": None, "last": None},
    "created_at": 1763822400.0,
    "updated_at": 1763822460.0,
    "links": {"self": _PATH, "placement": f"{_PATH}/placement"},
}

DRIFT: dict[str, Any] = {key: DEPLOYMENT[key] for key in ("name", "version", "drift", "refresh")}

PROMOTION: dict[str, Any] = {"solve_id": _SOLVE_ID, "why": "first placement"}

VERSION: dict[str, Any] = {
    "version": 2,
    "placement_id": _PLACEMENT_ID,
    "solve_id": _SOLVE_ID,
    "cause": "automatic",
    "by": "controller",
    "why": "drift of 14.2%; 120 moves gain 9.1% in balance on 4 windows that were not fitted",
    "of_version": None,
    "predicted": {"balance": 1.05, "previous_balance": 1.155, "gain": 0.091, "moves": 120},
    "observed": {"windows": 8, "balance": 1.06, "previous_balance": 1.16, "gain": 0.086, "complete": True},
    "promoted_at": 1763822460.0,
    "current": True,
}

WINDOWS_REQUEST: dict[str, Any] = {
    "rank": 0,
    "version": 2,
    "windows": [{"window": 1763822400, "tokens": 12, "load": [[6, 6, 6, 6], [12, 4, 4, 4]]}],
}

WINDOWS_TAKEN: dict[str, Any] = {"stored": 1, "known": 0, "version": 2, "revision": 3}
