"""One request and how its answer is read: what the client and the asynchronous client have in common."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from placement.errors import InputError, ServiceError
from service.client.errors import AnswerError, UnreachableError, problem_error

__all__ = ["Budget", "Call", "Reply", "json_body"]

T = TypeVar("T")

MOST_ANSWER_BYTES = 1 << 30
"""No placement is larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer that has been read whole."""

    status: int
    headers: Mapping[str, str]
    content: bytes
    where: str

    def document(self) -> dict[str, Any]:
        """Return the JSON object that it holds.

        Raises
        ------
        AnswerError
            If it holds none.
        """
        try:
            found = json.loads(self.content)
        except (ValueError, RecursionError) as exc:
            raise AnswerError(f"{self.where} was answered with {self._shown()}, not with JSON") from exc
        if not isinstance(found, dict):
            raise AnswerError(f"{self.where} was answered with a {type(found).__name__}, not with an object")
        return found

    def refusal(self) -> ServiceError:
        """Return the error that it stands for."""
        if 200 <= self.status < 400:
            return AnswerError(f"{self.where} was answered with {self.status}; is this the service's URL?")
        try:
            document = json.loads(self.content)
        except (ValueError, RecursionError):
            document = None
        error = problem_error(self.status, document, where=self.where)
        if "retry-after" in self.headers:
            error.extensions.setdefault("retry_after", self.headers["retry-after"])
        return error

    def _shown(self) -> str:
        kind = self.headers.get("content-type", "no type").partition(";")[0]
        return f"{len(self.content)} bytes of {kind[:60]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One request, and what its answer means.

    Parameters
    ----------
    read
        Turns an accepted answer into the result.
    accepted
        Statuses that `read` takes.
    repeatable
        Whether sending it twice does no more than sending it once. Otherwise it is sent again only where it
        cannot have had an effect.
    body
        Makes the body anew for every attempt: all bytes, or an iterator over them.
    patience_s
        How long the service may take on purpose before it answers (long polls), beyond the usual.
    bounded
        Whether the client's deadline holds; an upload takes as long as it makes progress.
    """

    method: str
    path: str
    read: Callable[[Reply], T]
    accepted: frozenset[int] = frozenset({200})
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Callable[[], bytes | Iterator[bytes]] | None = None
    repeatable: bool = True
    patience_s: float = 0.0
    bounded: bool = True

    @property
    def where(self) -> str:
        """What is asked, for messages."""
        return f"{self.method} {self.path}"

    def result(self, reply: Reply) -> T:
        """Return what an answer means.

        Raises
        ------
        ServiceError
            If the service refused, or what answered is not the service.
        """
        if reply.status not in self.accepted:
            raise reply.refusal()
        try:
            return self.read(reply)
        except (KeyError, TypeError, ValueError) as exc:
            raise AnswerError(
                f"{self.where} was answered with something unexpected ({exc!r}); is this the service's URL?"
            ) from exc


def json_body(values: Mapping[str, Any]) -> Callable[[], bytes]:
    """Return the body of a request that sends an object.

    Raises
    ------
    InputError
        If it holds what JSON does not have.
    """
    try:
        content = json.dumps(values, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as exc:
        raise InputError(f"this cannot be sent as JSON: {exc}") from exc
    return lambda: content


class Budget:
    """How much time is left, on a clock that does not jump.

    Parameters
    ----------
    seconds
        None for any amount.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end_s = None if seconds is None else time.monotonic() + seconds

    def left_s(self, at_most: float) -> float:
        """Return the seconds that are left, or `at_most` where there are more."""
        return at_most if self._end_s is None else min(at_most, self._end_s - time.monotonic())

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return self._end_s is not None and time.monotonic() >= self._end_s

    def check(self, where: str) -> None:
        """Raise where nothing is left.

        Raises
        ------
        UnreachableError
            If so.
        """
        if self.spent:
            raise UnreachableError(f"{where}: no complete answer within {self.seconds:g} s", sent=True)
