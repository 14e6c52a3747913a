"""Callers that do not give up: they ask again, with the same key, until the service has acknowledged."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from service.artifacts import digest_of
from tests.service.chaos.ledger import Ledger, Promotion
from tests.service.server import LINEAR, listen, tiny_trace

__all__ = ["Caller", "GiveUp", "follow", "promote", "start_callers", "submit", "upload_traces"]

TOPOLOGY = "h100:1x4"
DEPLOYMENT = "prod"
PAUSE_S = 0.1
MOST_WAITING = 3
AGAIN = (429, 502, 503, 504)


class GiveUp(Exception):  # noqa: N818
    """The run is over before the service answered."""


class Caller:
    """One caller with a connection to each of the servers.

    Parameters
    ----------
    urls
        Servers, tried at random.
    over
        Set when the run is over: what was not acknowledged by then does not count.
    """

    def __init__(self, urls: Sequence[str], ledger: Ledger, over: threading.Event, *, seed: int) -> None:
        self.ledger = ledger
        self.over = over
        self.random = random.Random(seed)
        self._clients = [httpx.Client(base_url=url, timeout=20.0, trust_env=False) for url in urls]

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()

    @property
    def client(self) -> httpx.Client:
        """A connection to one of the servers."""
        return self.random.choice(self._clients)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Ask until there is an answer that is final."""
        while not self.over.is_set():
            try:
                response = self.client.request(method, path, **options)
            except httpx.TransportError as exc:
                self.ledger.count(f"retry: {type(exc).__name__}")
            else:
                if response.status_code not in AGAIN:
                    if response.status_code >= 500:
                        self.ledger.violate(f"{method} {path}: {response.status_code} {response.text[:300]}")
                    return response
                self.ledger.count(f"retry: {response.status_code}")
            self.over.wait(PAUSE_S * self.random.uniform(0.5, 2))
        raise GiveUp


def submit(caller: Caller, trace_id: str, number: int) -> str:
    """Submit one solve, most of them short, and note that it was accepted."""
    key = f"job-{number}"
    options: dict[str, Any] = {"solver": "greedy", "window": 64, "seed": number, "calibration": LINEAR}
    if number % 4 == 0:
        options |= {"solver": "search", "time_limit": 2.0}
    response = caller.ask(
        "POST",
        "/v1/solves",
        json={"trace_id": trace_id, "topology": TOPOLOGY, "options": options},
        headers={"Idempotency-Key": key},
    )
    if response.status_code not in (200, 202):
        caller.ledger.violate(f"POST /v1/solves: {response.status_code} {response.text[:300]}")
        raise GiveUp
    job_id: str = response.json()["id"]
    caller.ledger.accept(key, job_id)
    return job_id


def follow(caller: Caller, job_id: str) -> None:
    """Follow a job's events to the end over any number of connections: every number once, in order."""
    seen = 0
    while not caller.over.is_set():
        try:
            for event in listen(caller.client, job_id, after=seen):
                if event.id != seen + 1:
                    caller.ledger.violate(f"{job_id}: a listener got event {event.id} after {seen}")
                seen = event.id
                if event.kind == "done":
                    caller.ledger.count("streams followed to the end")
                    return
        except (httpx.TransportError, AssertionError):
            caller.ledger.count("streams broken off")
        caller.over.wait(PAUSE_S)


def upload_traces(caller: Caller, path: Path, number: int) -> str:
    """Upload a small trace; the service must say the digest that we know."""
    content = tiny_trace(path / f"trace-{number}.npz", tokens=256, seed=number).read_bytes()
    response = caller.ask("POST", "/v1/traces", content=content)
    found = response.json().get("id")
    if found != digest_of(content):
        caller.ledger.violate(f"an upload of {digest_of(content)} was answered with {response.text[:300]}")
        raise GiveUp
    caller.ledger.keep(found, len(content))
    return str(found)


def promote(caller: Caller, placement_id: str, why: str) -> None:
    """Promote a placement and note the version."""
    response = caller.ask(
        "PUT", f"/v1/deployments/{DEPLOYMENT}/placement", json={"placement_id": placement_id, "why": why}
    )
    if response.status_code not in (200, 201):
        caller.ledger.violate(f"a promotion was answered with {response.status_code} {response.text[:300]}")
        return
    version = int(response.json()["version"])
    caller.ledger.promote(
        Promotion(deployment=DEPLOYMENT, why=why, placement_id=placement_id, version=version)
    )


def finished_placement(caller: Caller, job_id: str) -> str | None:
    """Return a job's placement, None as long as there is none."""
    found = caller.ask("GET", f"/v1/solves/{job_id}").json()
    if found["status"] not in ("succeeded", "stopped") or not found.get("result"):
        return None
    return str(found["result"]["placement_id"])


def _submitting(caller: Caller, trace_id: str, first: int, step: int) -> None:
    """Submit solves and stop some, with no more than a few of them waiting."""
    number, waiting = first, list[str]()
    while not caller.over.is_set():
        job_id = submit(caller, trace_id, number)
        waiting.append(job_id)
        if number % 5 == 0:
            response = caller.ask("DELETE", f"/v1/solves/{job_id}")
            if response.is_success:
                caller.ledger.stop(job_id)
        while len(waiting) >= MOST_WAITING:
            waiting = [one for one in waiting if _status(caller, one) in ("queued", "running")]
            caller.over.wait(PAUSE_S)
        number += step
        caller.over.wait(caller.random.uniform(0.1, 0.5))


def _status(caller: Caller, job_id: str) -> str:
    found: str = caller.ask("GET", f"/v1/solves/{job_id}").json()["status"]
    return found


def _following(caller: Caller) -> None:
    while not caller.over.is_set():
        job_id = caller.ledger.some_job(caller.random.randrange(1 << 30))
        if job_id is not None:
            follow(caller, job_id)
        caller.over.wait(PAUSE_S)


def _uploading(caller: Caller, folder: Path) -> None:
    number = 0
    while not caller.over.is_set():
        number += 1
        upload_traces(caller, folder, number)
        caller.over.wait(caller.random.uniform(0.3, 1.0))


def _promoting(caller: Caller) -> None:
    number, last = 0, None
    while not caller.over.is_set():
        job_id = caller.ledger.some_job(caller.random.randrange(1 << 30))
        placement_id = finished_placement(caller, job_id) if job_id is not None else None
        # To promote what runs already changes nothing, and has no version of its own.
        if placement_id is not None and placement_id != last:
            number += 1
            promote(caller, placement_id, f"promotion {number}")
            last = placement_id
        caller.over.wait(caller.random.uniform(0.2, 0.6))


def start_callers(
    urls: Sequence[str], ledger: Ledger, over: threading.Event, *, trace_id: str, folder: Path, seed: int
) -> list[threading.Thread]:
    """Start all callers, each in a thread of its own."""
    works: list[Callable[[Caller], None]] = [
        *(lambda caller, n=n: _submitting(caller, trace_id, n, 3) for n in range(3)),
        *(_following for _ in range(4)),
        lambda caller: _uploading(caller, folder),
        _promoting,
    ]

    def run(work: Callable[[Caller], None], number: int) -> None:
        with Caller(urls, ledger, over, seed=seed * 1000 + number) as caller:
            try:
                work(caller)
            except GiveUp:
                ledger.count("callers interrupted at the end")
            except (AssertionError, KeyError, TypeError, ValueError) as exc:
                ledger.violate(f"a caller could not go on: {exc!r}")

    threads = [
        threading.Thread(target=run, args=(work, number), name=f"caller-{number}")
        for number, work in enumerate(works)
    ]
    for thread in threads:
        thread.start()
    return threads


def wait_for(condition: Callable[[], bool], within_s: float) -> bool:
    """Wait for a condition; False if it did not come."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
