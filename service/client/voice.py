"""Says on stderr what has become of the service: each change once, in one line, whichever thread met it."""

from __future__ import annotations

import sys
import threading

from placement.errors import PlacementError
from service.client.errors import AnswerError, UnreachableError
from service.errors import ForbiddenError, NotFoundError, ProblemError, UnauthorizedError

__all__ = ["AWAY", "GONE", "REFUSED", "TOKEN", "Voice", "kind_of"]

AWAY = "away"
"""The service cannot be reached, or says that it cannot answer now."""
TOKEN = "token"
"""The service wants another token."""
GONE = "gone"
"""There is no such deployment."""
REFUSED = "refused"
"""What was sent, or what was answered, does not do."""

_TEXTS = {
    AWAY: "the service is away, the job goes on and tries again",
    TOKEN: "the service refuses this job's token, the job goes on without it",
    GONE: "the deployment is gone, the job goes on with the placement that it has",
}


def kind_of(error: PlacementError) -> str:
    """Return what an error says about the service: AWAY, TOKEN, GONE or REFUSED."""
    if isinstance(error, UnauthorizedError | ForbiddenError):
        return TOKEN
    if isinstance(error, NotFoundError):
        return GONE
    if isinstance(error, UnreachableError | AnswerError):
        return AWAY
    if isinstance(error, ProblemError) and (error.status >= 500 or error.status == 429):
        return AWAY
    return REFUSED


class Voice:
    """What was said about the service, and what is to be said next; safe to use from several threads.

    Parameters
    ----------
    deployment
        Begins every line.
    speaks
        Whether anything is written: one process of a machine is enough.
    """

    def __init__(self, deployment: str, *, speaks: bool) -> None:
        self._deployment = deployment
        self._speaks = speaks
        self._lock = threading.Lock()
        self._troubles: dict[str, str] = {}
        self._said: set[str] = set()

    def failed(self, topic: str, error: PlacementError) -> None:
        """Say that something failed, unless that is known.

        Parameters
        ----------
        topic
            What failed, for `fine`.
        """
        kind = kind_of(error)
        if kind == REFUSED:
            self.once(f"{topic}: {error}", key=topic)
            return
        with self._lock:
            known = kind in self._troubles.values()
            self._troubles[topic] = kind
        if not known:
            self._say(f"WARNING: {self._deployment}: {_TEXTS[kind]}: {error}")

    def fine(self, topic: str, *, more: str = "") -> None:
        """Say that all is well again, if it was not.

        Parameters
        ----------
        more
            Added to the line.
        """
        with self._lock:
            before = self._troubles.pop(topic, None)
            if AWAY in (before, *self._troubles.values()):
                # Whoever gets an answer knows it for all.
                before = AWAY
                self._troubles = {key: kind for key, kind in self._troubles.items() if kind != AWAY}
            over = before is not None and before not in self._troubles.values()
        if over:
            self._say(f"{self._deployment}: the service answers again{more}")

    def once(self, text: str, *, key: str | None = None) -> None:
        """Say something, but not a second time.

        Parameters
        ----------
        key
            What is the same thing; default: the text.
        """
        with self._lock:
            known = (key or text) in self._said
            self._said.add(key or text)
        if not known:
            self._say(f"WARNING: {self._deployment}: {text}")

    def _say(self, text: str) -> None:
        if self._speaks:
            sys.stderr.write(f"moe-placement: {' '.join(text.split())}\n")
