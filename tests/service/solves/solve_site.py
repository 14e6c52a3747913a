"""What tests of solves share: servers, a client, and a worker that the test itself plays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import httpx

from service.state.database import Database
from service.state.jobs import JobStore
from service.state.records import Claim, JobStatus, NewEvent, Outcome
from tests.service.server import Server, tiny_trace, upload

__all__ = ["Player", "Site", "submit"]

WORKER = "player"
RESULT = {"objective": {"name": "balance", "value": 1.5, "unit": "", "lower_bound": 1.2, "gap": 0.2}}


class Player:
    """Claims jobs and records their events in the servers' database, as the test wants it."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.jobs = JobStore(database)

    def claim(self, job: str) -> Claim:
        """Take a job; those that other tests left before it are ended."""
        while (claim := self.jobs.claim(WORKER, cpus=64)) is not None:
            if claim.job.id == job:
                return claim
            self.end(claim)
        raise AssertionError(f"{job} is not in the queue")

    def say(self, claim: Claim, number: int, *, padding: int = 0) -> None:
        """Record one event, with as many bytes more."""
        data = {"phase": "solving", "n": number, "padding": "x" * padding}
        assert self.jobs.record(claim, [NewEvent(kind="progress", data=data)])

    def end(self, claim: Claim) -> None:
        """End a job well."""
        assert self.jobs.finish(claim, Outcome(status=JobStatus.SUCCEEDED, result=RESULT))

    def play(self, job: str, *, num_events: int, padding: int = 0) -> None:
        """Run a job from its claim to its end."""
        claim = self.claim(job)
        for number in range(num_events):
            self.say(claim, number, padding=padding)
        self.end(claim)


@dataclass(frozen=True, kw_only=True)
class Site:
    """Two API processes on one database."""

    servers: tuple[Server, Server]
    clients: tuple[httpx.Client, httpx.Client]
    folder: Path
    player: Player

    @property
    def client(self) -> httpx.Client:
        """Client of the first server."""
        return self.clients[0]

    @cached_property
    def trace(self) -> str:
        """Id of a small trace."""
        return upload(self.client, tiny_trace(self.folder / "tiny.npz"))

    def body(self, **more: object) -> dict[str, object]:
        """Return the body of a small solve."""
        return {"trace_id": self.trace, "topology": "h100:1x2", **more}

    def submit(self, **more: object) -> str:
        """Queue a solve; return its id."""
        return submit(self.client, self.body(**more))


def submit(client: httpx.Client, body: object) -> str:
    """Queue a solve; return its id."""
    answer = client.post("/v1/solves", json=body)
    assert answer.status_code == 202, answer.text
    found: str = answer.json()["id"]
    return found
