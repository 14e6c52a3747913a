"""The watcher: news reach whoever waits, cheaply, and nobody hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence

import pytest

from service.api.watch import GONE, Watcher
from service.errors import UnavailableError


class Counters:
    """Counters that count how often they are asked for."""

    def __init__(self, **values: int) -> None:
        self.values = values
        self.asked = 0
        self.broken = False
        self.answering = threading.Event()
        self.answering.set()

    def heads(self, keys: Sequence[str]) -> Mapping[str, int]:
        """Answer as a store would."""
        self.asked += 1
        self.answering.wait()
        if self.broken:
            raise OSError("connection refused")
        return {key: self.values[key] for key in keys if key in self.values}


def watcher_of(counters: Counters, *, patience_s: float = 0.3) -> Watcher:
    return Watcher({"job": counters.heads}, poll_s=0.01, patience_s=patience_s)


def test_news_wake_those_who_have_not_seen_them() -> None:
    """A waiter returns with the counter once it exceeds what was seen; another key's waiter sleeps on."""

    async def check() -> None:
        counters = Counters(a=3, b=7)
        watcher = watcher_of(counters)
        other = asyncio.create_task(watcher.wait("job", "b", 7, 30))
        assert await watcher.wait("job", "a", 2, 30) == 3
        waiting = asyncio.create_task(watcher.wait("job", "a", 3, 30))
        await asyncio.sleep(0.05)
        counters.values["a"] = 5
        assert await waiting == 5
        assert not other.done()
        watcher.close()
        assert await other == 7
        assert watcher.num_waiting == 0

    asyncio.run(check())


def test_a_thousand_waiters_cost_one_query_a_look() -> None:
    """Listeners of one key share its query, and without waiters nobody asks."""

    async def check() -> None:
        counters = Counters(a=0)
        watcher = watcher_of(counters)
        waiting = [asyncio.create_task(watcher.wait("job", "a", 0, 30)) for _ in range(1000)]
        while counters.asked < 3:
            await asyncio.sleep(0.01)
        assert counters.asked < len(waiting) / 10
        counters.values["a"] = 1
        assert set(await asyncio.gather(*waiting)) == {1}
        await asyncio.sleep(0.05)
        asked = counters.asked
        await asyncio.sleep(0.05)
        assert counters.asked == asked
        watcher.close()

    asyncio.run(check())


def test_a_timeout_returns_the_present_value_and_a_missing_key_says_so() -> None:
    """Nobody waits longer than asked, nor for what does not exist."""

    async def check() -> None:
        watcher = watcher_of(Counters(a=4))
        assert await watcher.wait("job", "a", 4, 0.05) == 4
        assert await watcher.wait("job", "a", 4, 0) == 4
        assert await watcher.wait("job", "nobody", 0, 30) == GONE
        watcher.close()

    asyncio.run(check())


def test_a_nudge_saves_the_rest_of_the_pause() -> None:
    """What this process changed itself is looked at without waiting for the next poll."""

    async def check() -> None:
        counters = Counters(a=0)
        watcher = Watcher({"job": counters.heads}, poll_s=3600)
        waiting = asyncio.create_task(watcher.wait("job", "a", 0, 30))
        await asyncio.sleep(0.01)
        counters.values["a"] = 1
        await asyncio.to_thread(watcher.nudge, "job", "a")
        assert await waiting == 1
        watcher.close()

    asyncio.run(check())


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
def test_waiters_learn_that_the_database_is_away(silent: bool) -> None:
    """After a while without an answer they get an error, and later ones are served once it is back."""

    async def check() -> None:
        counters = Counters(a=1)
        watcher = watcher_of(counters)
        if silent:
            counters.answering.clear()
        else:
            counters.broken = True
        waiting = [asyncio.create_task(watcher.wait("job", "a", 0, 30)) for _ in range(5)]
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(one) for one in found} == {UnavailableError}
        counters.broken = False
        counters.answering.set()
        assert await watcher.wait("job", "a", 0, 30) == 1
        watcher.close()

    asyncio.run(check())


def test_closing_wakes_everybody_and_stays_closed() -> None:
    """When the server ends, nobody is kept waiting."""

    async def check() -> None:
        watcher = watcher_of(Counters(a=1, b=2))
        waiting = [asyncio.create_task(watcher.wait("job", key, 9, 30)) for key in "ab" * 50]
        await asyncio.sleep(0.05)
        watcher.close()
        assert set(await asyncio.gather(*waiting)) == {9}
        assert watcher.closed
        assert await watcher.wait("job", "a", 0, 30) == 0

    asyncio.run(check())
