"""Tests of stopping criteria, on clocks that stand still until told."""

from __future__ import annotations

import pytest

from placement.errors import InputError
from placement.stopping import AnyOf, Cancellation, Deadline, Never


def test_a_deadline_follows_its_clock() -> None:
    """It stops when, and not before, the seconds have passed."""
    now = [100.0]
    deadline = Deadline(2.5, clock=lambda: now[0])
    assert not deadline()
    now[0] = 102.4
    assert not deadline()
    now[0] = 102.5
    assert deadline()


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_deadline_needs_time(seconds: float) -> None:
    """No time at all is a slip of the pen."""
    with pytest.raises(InputError, match=r"time limit is .*above 0"):
        Deadline(seconds)


def test_cancellation_lasts() -> None:
    """Once cancelled, always cancelled."""
    cancellation = Cancellation()
    assert not cancellation()
    cancellation.cancel()
    cancellation.cancel()
    assert cancellation()


def test_any_criterion_suffices() -> None:
    """The first criterion that says so stops the solve; none never does."""
    cancellation = Cancellation()
    either = AnyOf(Never(), cancellation)
    assert not either()
    cancellation.cancel()
    assert either()
    assert not AnyOf()()
