"""Processes that work on one state at the same time; run as a program with a database's URL.

``python -m tests.service.state.actors ROLE URL NAME [ARGUMENTS]``: each waits for a line on its standard
input, and says on its standard output what the store has acknowledged.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import IO

from service.errors import UnavailableError
from service.state.database import Database, open_database
from service.state.jobs import JobStore
from service.state.records import Claim, JobStatus, NewEvent, Outcome
from tests.service.state.samples import new_job

__all__ = ["BATCH", "WORKED", "Actor", "lines", "said", "start"]

BATCH = 5
"""Jobs that a restless actor submits at once."""
WORKED = ("worked", "")
"""Counter of finished jobs."""

Actor = subprocess.Popen[str]


@contextmanager
def start(role: str, url: str, *arguments: str, many: int = 1) -> Iterator[list[Actor]]:
    """Start some, all of which wait for their line until the last one is there; kill them at the end."""
    with ExitStack() as stack:
        actors = []
        for number in range(many):
            command = [
                sys.executable,
                "-m",
                "tests.service.state.actors",
                role,
                url,
                f"a{number}",
                *arguments,
            ]
            actor = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            actors.append(stack.enter_context(actor))
            stack.callback(actor.kill)
        for actor in actors:
            assert _stream(actor.stdout).readline() == "here\n"
        for actor in actors:
            go = _stream(actor.stdin)
            go.write("go\n")
            go.flush()
        yield actors


def said(actor: Actor) -> list[str]:
    """Return what an actor says until it ends."""
    return _stream(actor.stdout).read().splitlines()


def lines(actor: Actor, count: int) -> list[str]:
    """Return the next lines of an actor."""
    return [line.rstrip("\n") for line in itertools.islice(_stream(actor.stdout), count)]


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def work(database: Database, name: str) -> None:
    """Take jobs until none is left, and say which."""
    store = JobStore(database)
    while (claim := store.claim(name, cpus=8)) is not None:
        _finish(store, claim)
        print(claim.job.id, flush=True)


def submit(database: Database, name: str, *keys: str) -> None:
    """Queue a job for every key, and say which of them were new."""
    store = JobStore(database)
    for key in keys:
        (answer,) = store.submit([new_job(idempotency_key=key)])
        print(key, answer.job.id, answer.created, flush=True)


def rush(database: Database, name: str, turn: str = "") -> None:
    """Submit, take and finish without end, and say what was acknowledged."""
    store = JobStore(database)
    for number in itertools.count():
        answers = store.submit(
            [new_job(idempotency_key=f"{name}{turn}-{number}-{part}") for part in range(BATCH)]
        )
        print("queued", *(answer.job.id for answer in answers), flush=True)
        claim = store.claim(name, cpus=8)
        if claim is not None and _finish(store, claim):
            print("finished", claim.job.id, flush=True)


def opened(database: Database, name: str) -> None:
    """Say that the database could be opened."""
    print("opened", flush=True)


def _finish(store: JobStore, claim: Claim) -> bool:
    store.record(claim, [NewEvent(kind="progress", data={"phase": "solving"})] * 2)
    return store.finish(claim, Outcome(status=JobStatus.SUCCEEDED, counters={WORKED: 1.0}))


ROLES: dict[str, Callable[..., None]] = {"open": opened, "rush": rush, "submit": submit, "work": work}


def main() -> None:
    """Play a role."""
    role, url, name, *arguments = sys.argv[1:]
    print("here", flush=True)
    sys.stdin.readline()
    database = open_database(url)
    try:
        ROLES[role](database, name, *arguments)
    except UnavailableError:  # its server was killed
        sys.exit(1)
    finally:
        database.close()


if __name__ == "__main__":
    main()
