"""When a call is worth another attempt, and after how long: exponential, with full jitter, bounded."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from service.client.call import Budget, Call
from service.client.errors import UnreachableError
from service.errors import ProblemError

if TYPE_CHECKING:
    from tenacity import RetryCallState

__all__ = ["MOST_PAUSE_S", "Backoff", "is_worth_repeating", "pause_s", "retry_after_s", "tenacity_options"]

NOT_NOW = frozenset({HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT})
"""Answers that say nothing about what became of the request."""

REFUSED = HTTPStatus.TOO_MANY_REQUESTS
"""Nothing was done: any request may come again."""

MOST_PAUSE_S = 600.0
"""Whoever asks to be left alone for longer is not waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How attempts are spread.

    Parameters
    ----------
    first_s, most_s
        The n-th pause is drawn evenly from 0 to ``min(most_s, first_s * 2**n)``.
    attempts
        Most attempts of one call.
    """

    first_s: float = 0.1
    most_s: float = 10.0
    attempts: int = 30

    def pause_s(self, failures: int) -> float:
        """Return a random pause after so many failures in a row."""
        return random.uniform(0.0, self.ceiling_s(failures))

    def ceiling_s(self, failures: int) -> float:
        """Return the longest pause after so many failures in a row."""
        return min(self.most_s, self.first_s * 2.0 ** min(max(failures - 1, 0), 60))


def is_worth_repeating(error: BaseException | None, *, repeatable: bool) -> bool:
    """Whether another attempt may do better, and can do no harm."""
    if isinstance(error, UnreachableError):
        return repeatable or not error.sent
    if isinstance(error, ProblemError):
        return error.status == REFUSED or (repeatable and error.status in NOT_NOW)
    return False


def retry_after_s(error: BaseException | None) -> float:
    """Return how long the service asked to be left alone, seconds; 0 where it did not say."""
    if not isinstance(error, ProblemError):
        return 0.0
    told = error.extensions.get("retry_after", 0)
    try:
        return max(0.0, float(told))
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, parsedate_to_datetime(str(told)).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def pause_s(error: BaseException | None, failures: int, backoff: Backoff) -> float:
    """Return the pause before the next attempt: never shorter than the service asked for."""
    asked_s = retry_after_s(error)
    return asked_s + backoff.pause_s(failures if not asked_s else 1)


def tenacity_options(call: Call[Any], backoff: Backoff, budget: Budget) -> dict[str, Any]:
    """Return what tenacity is told about one call.

    It gives up where the next pause would end after the deadline, with the last error.
    """
    import tenacity

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        return pause_s(error, state.attempt_number, backoff)

    def give_up(state: RetryCallState) -> bool:
        no_time = budget.left_s(MOST_PAUSE_S) <= state.upcoming_sleep
        return no_time or state.attempt_number >= backoff.attempts

    return {
        "retry": tenacity.retry_if_exception(
            lambda error: is_worth_repeating(error, repeatable=call.repeatable)
        ),
        "wait": wait,
        "stop": give_up,
        "reraise": True,
    }
