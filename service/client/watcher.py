"""A thread that asks for the placement to run, again and again; the newest answer waits to be taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from placement.errors import InputError, PlacementError
from service.client.link import Address, Link, Pauses
from service.client.results import DeploymentPlacement
from service.client.shelf import Fetched
from service.client.voice import AWAY, Voice, kind_of
from service.errors import NotFoundError

__all__ = ["WAIT_S", "Watcher"]

WAIT_S = 10.0
"""How long the service holds an answer back; also how long a thread may outlive its end."""

LEAST_S = 0.5
"""Time between questions, should something in between answer at once that nothing is new."""

TOPIC = "the placement of the service is not used"


class Watcher:
    """Watches a deployment, from `start` to `stop`.

    Parameters
    ----------
    known
        ETag of the placement that the job has.
    take
        Checks an answer and keeps it; raises InputError where it does not fit the job.
    """

    def __init__(
        self,
        deployment: str,
        address: Address,
        *,
        known: str | None,
        take: Callable[[DeploymentPlacement], Fetched],
        voice: Voice,
        wait_s: float = WAIT_S,
    ) -> None:
        self._deployment = deployment
        self._link = Link(address)
        self._known = known
        self._take = take
        self._voice = voice
        self._wait_s = wait_s
        self._pauses = Pauses()
        self._lock = threading.Lock()
        self._newest: Fetched | None = None
        # The network may hang in what nobody can interrupt, and must not keep the job from ending.
        self._thread = threading.Thread(target=self._run, name="watch-placement", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def newest(self) -> Fetched | None:
        """Return the newest placement that was not returned yet."""
        with self._lock:
            found, self._newest = self._newest, None
            return found

    def stop(self) -> None:
        """Ask no more; a question that is on its way ends by itself."""
        self._pauses.end()

    def _run(self) -> None:
        while not self._pauses.over:
            begun_s = time.monotonic()
            try:
                answer = self._ask()
            except PlacementError as exc:
                if not self._pauses.over:
                    self._voice.failed(TOPIC, exc)
                if kind_of(exc) != AWAY:
                    # Another token may lie in the file by now.
                    self._link.drop()
                self._pauses.wait()
                continue
            self._voice.fine(TOPIC)
            self._pauses.succeeded()
            if answer is not None:
                self._put(answer)
            self._pauses.rest(LEAST_S - (time.monotonic() - begun_s))
        self._link.drop()

    def _ask(self) -> DeploymentPlacement | None:
        client = self._link.client()
        try:
            return client.deployment_placement(self._deployment, etag=self._known, wait_s=self._wait_s)
        except NotFoundError:
            # Raised again where it is the deployment that is missing, not its first placement.
            client.deployment(self._deployment)
            return None

    def _put(self, answer: DeploymentPlacement) -> None:
        self._known = answer.etag or self._known
        try:
            found = self._take(answer)
        except InputError as exc:
            named = "what the service sent" if answer.version is None else f"version {answer.version}"
            self._voice.once(f"{named} is not used: {exc}", key=f"unfit {answer.etag}")
            return
        with self._lock:
            self._newest = found
