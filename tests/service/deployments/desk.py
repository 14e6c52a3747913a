"""A controller that works step by step: its child computes, and the test says what solves have found."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.artifacts import ArtifactFiles
from service.deployments.controller import Controller
from service.deployments.records import Cause, Deployment, LoadPart, NewVersion, Version
from service.deployments.resolve import facts_of
from service.deployments.spec import DeploymentSpec
from service.settings import Settings
from service.state.artifacts import ArtifactStore
from service.state.database import Database
from service.state.deployments import DeploymentStore
from service.state.jobs import JobStore
from service.state.records import Job, JobStatus, Outcome
from tests.service.deployments.deployed import SPEC, Traffic, placement_of
from tests.service.server import eventually

NAME = "desk"
ROW = list(range(16))
AUTO: dict[str, Any] = {
    "mode": "auto",
    "drift_threshold": 0.1,
    "cool_down_seconds": 0,
    "min_windows": 4,
    "judge_windows": 2,
}


def swapped(*pairs: tuple[int, int]) -> list[int]:
    """Return experts in order but for some that change places."""
    row = ROW[:]
    for one, other in pairs:
        row[one], row[other] = row[other], row[one]
    return row


APART = swapped((1, 4))
"""Experts 0 and 1, which share a device in order, on two."""


@dataclass
class Desk:
    """The stores of a deployment, its traffic, and a controller that steps when it is told to."""

    database: Database
    data_dir: Path
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        self.settings = Settings(
            data_dir=self.data_dir,
            database_url=self.database.engine.url.render_as_string(hide_password=False),
            lease_seconds=0.5,
        )
        self.files = ArtifactFiles(self.data_dir)
        self.store = DeploymentStore(self.database)
        self.jobs = JobStore(self.database)
        self.controller = Controller(self.database, self.settings, look_s=0.02, pause_s=0.0)

    @property
    def deployment(self) -> Deployment:
        """The deployment as it stands."""
        return self.store.get(NAME)

    @property
    def last(self) -> dict[str, Any]:
        """How the last refresh ended."""
        return self.deployment.refresh.last or {}

    def put(self, **changes: Any) -> None:
        """Create or change the deployment."""
        spec = DeploymentSpec.model_validate({**SPEC, **changes}).model_dump(mode="json")
        self.store.put(NAME, {**spec, "facts": facts_of(spec)}, by="test")

    def keep(self, row: list[int]) -> str:
        """Store a placement with experts in some order in every layer; return its id."""
        content = placement_of([row, row])
        digest = self.files.put(content)
        ArtifactStore(self.database).add(
            digest=digest,
            kind="placement",
            size_bytes=len(content),
            format="native",
            summary={},
            created_by="test",
        )
        return digest

    def promote(self, row: list[int]) -> Version:
        """Promote a placement by hand."""
        predicted = {"balance": 1.02}
        new = NewVersion(
            digest=self.keep(row), cause=Cause.MANUAL, by="test", why="test", predicted=predicted
        )
        return self.store.promote(NAME, new)

    def post(self, count: int) -> None:
        """Post windows of the traffic as it is now."""
        for _ in range(count):
            self.post_load(self.traffic.load_LE())

    def post_load(self, load_LE: npt.NDArray[Any]) -> None:
        """Post one window."""
        part = LoadPart(
            window=self.traffic.window,
            rank=0,
            version=None,
            tokens=1.0,
            load=zlib.compress(np.asarray(load_LE, dtype="<i8").tobytes()),
        )
        self.traffic.window += 1
        self.store.windows.add(NAME, [part])

    def refreshes(self) -> list[Job]:
        """Return the solves of all refreshes, newest first."""
        return self.jobs.page(deployment=NAME)

    def finish(self, row: list[int] | None, *, termination: str = "converged") -> Job:
        """End the solve that waits: with a placement, or without any."""
        claim = self.jobs.claim("w-test", cpus=8)
        assert claim is not None
        digest = None if row is None else self.keep(row)
        outcome = Outcome(
            status=JobStatus.FAILED if row is None else JobStatus.SUCCEEDED,
            result=None if row is None else {"termination": termination, "objective": {"value": 1.0}},
            placement_digest=digest,
            error={"code": "infeasible", "message": "no placement"} if row is None else None,
        )
        assert self.jobs.finish(claim, outcome)
        return claim.job

    def step(self, times: int = 1) -> None:
        """Have the controller look."""
        for _ in range(times):
            self.controller.look()

    def refreshed(self, row: list[int]) -> None:
        """Go through a refresh whose solve finds a placement."""
        self.step()
        self.finish(row)
        self.step()

    def close(self) -> None:
        """End the controller's child."""
        self.controller.stop()
        self.controller.run()

    def until(self, condition: Callable[[], bool], within_s: float = 60.0) -> None:
        """Have the controller look until something is so; the lease of one that was killed must run out."""

        def is_so() -> bool:
            self.step()
            return condition()

        eventually(is_so, within_s, every_s=0.05)
