"""Talks to the placement service: a client, an asynchronous one, and what launchers call.

The names below are imported on first use: neither numpy nor the server's packages come with the client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.client.aio import AsyncClient
    from service.client.client import Client
    from service.client.errors import (
        AnswerError,
        InfeasibleSolveError,
        InvalidSolveError,
        JobFailedError,
        NoPlacementYetError,
        UnreachableError,
    )
    from service.client.launcher import Fallback, Fetched, fetch_on_rank_zero, fetch_placement
    from service.client.placement_client import PlacementClient
    from service.client.results import (
        Deployment,
        DeploymentPlacement,
        Evaluation,
        Event,
        Incumbent,
        PlacementFile,
        Solve,
        Trace,
        Version,
        WindowsTaken,
    )

_HOME = {
    "AnswerError": "errors",
    "AsyncClient": "aio",
    "Client": "client",
    "Deployment": "results",
    "DeploymentPlacement": "results",
    "Evaluation": "results",
    "Event": "results",
    "Fallback": "launcher",
    "Fetched": "launcher",
    "Incumbent": "results",
    "InfeasibleSolveError": "errors",
    "InvalidSolveError": "errors",
    "JobFailedError": "errors",
    "NoPlacementYetError": "errors",
    "PlacementClient": "placement_client",
    "PlacementFile": "results",
    "Solve": "results",
    "Trace": "results",
    "UnreachableError": "errors",
    "Version": "results",
    "WindowsTaken": "results",
    "fetch_on_rank_zero": "launcher",
    "fetch_placement": "launcher",
}

__all__ = [
    "AnswerError",
    "AsyncClient",
    "Client",
    "Deployment",
    "DeploymentPlacement",
    "Evaluation",
    "Event",
    "Fallback",
    "Fetched",
    "Incumbent",
    "InfeasibleSolveError",
    "InvalidSolveError",
    "JobFailedError",
    "NoPlacementYetError",
    "PlacementClient",
    "PlacementFile",
    "Solve",
    "Trace",
    "UnreachableError",
    "Version",
    "WindowsTaken",
    "fetch_on_rank_zero",
    "fetch_placement",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"service.client.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
