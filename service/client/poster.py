"""A thread that posts load windows: a short queue, from which the oldest go when the service is away.

Shape letters: L MoE layers, E logical experts.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from placement.errors import PlacementError
from service.client.link import Address, Link, Pauses
from service.client.voice import REFUSED, Voice, kind_of

__all__ = ["QUEUE_WINDOWS", "Poster", "Posting"]

QUEUE_WINDOWS = 64

TOPIC = "windows are not taken, and dropped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Posting:
    """A window to post, and the version of the placement that ran."""

    window: Mapping[str, Any]
    version: int | None


class Poster:
    """Posts what one rank counted, from the first `put` to `stop`.

    Parameters
    ----------
    rank
        Whose windows these are.
    queue_windows
        How many may wait.
    """

    def __init__(
        self,
        deployment: str,
        address: Address,
        *,
        rank: int,
        voice: Voice,
        queue_windows: int = QUEUE_WINDOWS,
    ) -> None:
        self._deployment = deployment
        self._link = Link(address)
        self._rank = rank
        self._voice = voice
        self._most = queue_windows
        self._pauses = Pauses()
        self._changed = threading.Condition()
        self._queue: deque[Posting] = deque()
        self._working = False
        self._failing = False
        self._told = 0
        self._thread: threading.Thread | None = None
        self.dropped = 0
        """Windows that were given up."""
        self.posted = 0
        """Windows that the service took."""

    def put(self, posting: Posting) -> None:
        """Add a window to the queue; the oldest goes where there is no room. Does not wait."""
        with self._changed:
            if self._pauses.over:
                return
            if len(self._queue) >= self._most:
                self._queue.popleft()
                self.dropped += 1
            self._queue.append(posting)
            self._changed.notify_all()
            if self._thread is None:
                # The network may hang in what nobody can interrupt, and must not keep the job from ending.
                self._thread = threading.Thread(target=self._run, name="post-windows", daemon=True)
                self._thread.start()

    def stop(self, *, within_s: float) -> None:
        """Take no more windows; wait for those in the queue as long as the service takes them.

        Parameters
        ----------
        within_s
            Seconds to wait at most.
        """
        end_s = time.monotonic() + within_s
        with self._changed:
            while (self._queue or self._working) and not self._failing:
                if not self._changed.wait(max(0.0, end_s - time.monotonic())):
                    break
            self.dropped += len(self._queue)
            self._queue.clear()
            self._pauses.end()
            self._changed.notify_all()

    def _run(self) -> None:
        while (posting := self._next()) is not None:
            error = self._sent(posting)
            self._done(posting, error)
            if error is None:
                self._voice.fine(TOPIC, more=self._since())
                self._pauses.succeeded()
            elif not self._pauses.over:
                self._voice.failed(TOPIC, error)
                if self._failing:
                    self._pauses.wait()
        self._link.drop()

    def _next(self) -> Posting | None:
        """Wait for a window; None at the end."""
        with self._changed:
            while not self._queue and not self._pauses.over:
                self._changed.wait()
            self._working = not self._pauses.over
            return self._queue.popleft() if self._working else None

    def _sent(self, posting: Posting) -> PlacementError | None:
        try:
            self._link.client().post_windows(
                self._deployment, [posting.window], rank=self._rank, version=posting.version
            )
        except PlacementError as exc:
            return exc
        return None

    def _done(self, posting: Posting, error: PlacementError | None) -> None:
        """Note what became of a window; what may still be taken goes back to where it was."""
        if error is not None:
            # Another token may lie in the file by now.
            self._link.drop()
        with self._changed:
            self._working = False
            self._failing = error is not None and kind_of(error) != REFUSED
            if error is None:
                self.posted += 1
            elif self._failing and len(self._queue) < self._most and not self._pauses.over:
                self._queue.appendleft(posting)
            else:
                self.dropped += 1
            self._changed.notify_all()

    def _since(self) -> str:
        """Say how many windows were dropped since this was last said."""
        with self._changed:
            count, self._told = self.dropped - self._told, self.dropped
        return f"; {count} windows were dropped meanwhile" if count else ""
