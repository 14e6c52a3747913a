"""Following the events of a job: each once and in order, however often the connection breaks."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING
from urllib.parse import quote

from placement.errors import InputError, ServiceError
from service.client.call import Budget, Reply
from service.client.connection import IDLE_S, Connection
from service.client.errors import AnswerError, UnreachableError
from service.client.results import Event
from service.client.retries import is_worth_repeating, pause_s

if TYPE_CHECKING:
    from httpx_sse import ServerSentEvent

__all__ = ["Following"]

LOOK_S = 1.0
"""How often the clock is looked at where there is a limit."""

NOTHING_MORE = 204

LIVED_S = 5.0
"""A stream that lived so long was a good one, whatever broke it."""


class Following:
    """Where a listener is.

    A stream may break at any byte: what follows on the last whole event is asked for again. Repeats are left
    out, and a stream that skips a number is taken for broken.

    Parameters
    ----------
    after
        Number of the last event that is known already.
    timeout_s
        Seconds to listen; None for as long as it takes.
    """

    def __init__(
        self, connection: Connection, solve_id: str, *, after: int = 0, timeout_s: float | None = None
    ) -> None:
        if after < 0:
            raise InputError(f"after is {after}; events are numbered from 1")
        self.path = f"/v1/solves/{quote(solve_id, safe=':')}/events"
        self.last = after
        self.done = False
        self._connection = connection
        self._limit = Budget(timeout_s)
        self._limited = timeout_s is not None
        self._failures = 0
        self._patience: Budget | None = None
        self._opened_s: float | None = None

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to listen for."""
        return self.done or self._limit.spent

    @property
    def where(self) -> str:
        """What is asked, for messages."""
        return f"GET {self.path}"

    @property
    def headers(self) -> dict[str, str]:
        """What a new connection says."""
        asked = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        return {**asked, "Last-Event-ID": str(self.last)} if self.last else asked

    @property
    def read_s(self) -> float:
        """How long a connection may be silent."""
        return self._limit.left_s(LOOK_S if self._limited else IDLE_S)

    def opened(self, content_type: str) -> None:
        """Note that a stream has begun.

        Raises
        ------
        AnswerError
            If it is none of events.
        """
        if content_type.partition(";")[0].strip() != "text/event-stream":
            raise AnswerError(
                f"{self.where} was answered with {content_type[:60] or 'no type'}, not with events"
            )
        self._opened_s = time.monotonic()

    def refused(self, reply: Reply) -> None:
        """Take an answer that is no stream.

        Raises
        ------
        ServiceError
            Unless it says that the last event is known already.
        """
        if reply.status != NOTHING_MORE:
            raise reply.refusal()
        self.done = True

    def take(self, sent: ServerSentEvent) -> Event | None:
        """Take what a stream carries; None where it is known already.

        Raises
        ------
        UnreachableError
            If a number was skipped: the connection is to be made anew.
        """
        event = _event(sent)
        if event is None or event.seq <= self.last:
            return None
        if event.seq != self.last + 1:
            raise UnreachableError(f"{self.where}: event {self.last + 1} is missing", sent=True)
        self.last = event.seq
        self.done = event.kind == "done"
        self._forgive()
        return event

    def pause_s(self, error: ServiceError | None) -> float:
        """Return how long to wait before connecting again; 0 at the end.

        Parameters
        ----------
        error
            What broke the stream; None where it ended.

        Raises
        ------
        ServiceError
            `error`, where it will not mend itself or has not for too long.
        """
        if self.ended:
            return 0.0
        error = error or UnreachableError(f"{self.where}: the stream ended before the solve", sent=True)
        if not is_worth_repeating(error, repeatable=True):
            raise error
        lived_s = 0.0 if self._opened_s is None else time.monotonic() - self._opened_s
        silent = isinstance(error, UnreachableError) and error.silent
        if silent and self._limited and self._opened_s is not None:
            # The silence that lets the clock be looked at.
            self._opened_s = None
            return 0.0
        self._opened_s = None
        if lived_s >= LIVED_S and not silent:
            self._forgive()
        return self._next_pause_s(error)

    def _next_pause_s(self, error: ServiceError) -> float:
        self._failures += 1
        if self._patience is None:
            self._patience = Budget(self._connection.deadline_s)
        wait_s = pause_s(error, self._failures, self._connection.backoff)
        if self._patience.left_s(wait_s) < wait_s:
            raise error
        return max(0.0, self._limit.left_s(wait_s))

    def _forgive(self) -> None:
        self._failures = 0
        self._patience = None


def _event(sent: ServerSentEvent) -> Event | None:
    if not sent.id.isdecimal() or not sent.data:
        # The blank line after a comment (keep-alive) dispatches nothing.
        return None
    try:
        data = json.loads(sent.data)
    except (ValueError, RecursionError) as exc:
        raise AnswerError(f"event {sent.id} holds no JSON") from exc
    if not isinstance(data, dict):
        raise AnswerError(f"event {sent.id} holds a {type(data).__name__}, not an object")
    return Event(seq=int(sent.id), kind=sent.event, data=data)
