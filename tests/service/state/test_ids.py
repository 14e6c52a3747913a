"""Ids: unique, in order, of one shape."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.ids import new_id


def test_ids_sort_in_the_order_of_their_making() -> None:
    """Also many within one millisecond."""
    made = [new_id("s") for _ in range(10_000)]
    assert made == sorted(made)
    assert len(set(made)) == len(made)
    assert all(re.fullmatch(r"s-[0-9a-hjkmnp-tv-z]{26}", one) for one in made)


def test_ids_begin_with_the_time() -> None:
    """The first ten characters are milliseconds."""
    before = time.time_ns() // 1_000_000
    text = new_id("e").removeprefix("e-")[:10]
    made = sum("0123456789abcdefghjkmnpqrstvwxyz".index(c) << 5 * (9 - i) for i, c in enumerate(text))
    assert before <= made <= time.time_ns() // 1_000_000


def test_ids_stay_in_order_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour back is no earlier id."""
    first = new_id("s")
    earlier = time.time_ns() - 3_600_000_000_000
    monkeypatch.setattr("service.ids.time.time_ns", lambda: earlier)
    assert new_id("s") > first


def test_ids_of_threads_differ() -> None:
    """No two threads get the same."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_id("w"), range(5_000)))
    assert len(set(made)) == len(made)
