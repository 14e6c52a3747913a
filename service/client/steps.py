"""What takes several requests, written once: each step gives a request and is given its result.

`Client` sends what the steps ask for and waits, `AsyncClient` awaits it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar

from service.client import calls
from service.client.call import Budget, Call
from service.client.errors import AnswerError
from service.client.results import Evaluation, Trace
from service.client.uploads import Upload
from service.errors import NotFoundError

__all__ = ["WAIT_S", "Steps", "all_pages", "evaluate", "upload_trace"]

T = TypeVar("T")
WAIT_S = 30.0
"""How long the service holds back an answer that is not ready."""

Steps = Generator[Call[Any], Any, T]


def upload_trace(upload: Upload, digest: str, *, model: str | None = None) -> Steps[Trace]:
    """Send a trace unless the service holds it."""
    try:
        known: Trace = yield calls.trace(digest)
    except NotFoundError:
        pass
    else:
        return known
    sent: Trace = yield calls.send_trace(upload, upload.size_bytes, model=model)
    if sent.id != digest:
        raise AnswerError(f"{upload.path} was sent as {digest} and arrived as {sent.id}; send it again")
    return sent


def evaluate(
    placement_id: str,
    trace_id: str,
    topology: str | Mapping[str, Any],
    *,
    model: str | Mapping[str, Any] | None,
    options: Mapping[str, Any],
    limit: Budget,
) -> Steps[Evaluation]:
    """Have a placement scored, and wait for the score."""
    key = uuid.uuid4().hex
    while True:
        call = calls.evaluate(
            placement_id,
            trace_id,
            topology,
            model=model,
            options=options,
            wait_s=max(0.0, limit.left_s(WAIT_S)),
            idempotency_key=key,
        )
        found: Evaluation = yield call
        if found.is_final:
            break
        limit.check(call.where)
    if (failure := found.failure()) is not None:
        raise failure
    return found


def all_pages(page: Callable[[str | None], Call[tuple[list[T], str | None]]]) -> Steps[list[T]]:
    """Ask for page after page."""
    found: list[T] = []
    cursor: str | None = None
    while True:
        rows: list[T]
        rows, cursor = yield page(cursor)
        found += rows
        if cursor is None:
            return found
