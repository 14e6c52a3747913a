"""Who is gone: leases whose count has stood still for too long by the watcher's own clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar

__all__ = ["StillWatch"]

Key = TypeVar("Key", bound=Hashable)


class StillWatch(Generic[Key]):
    """Tells which counters have stood still for a time.

    Only a monotonic clock is asked, and only this process's. Where the watcher itself was away (stopped, or
    without database), it begins anew: it cannot know what it has not seen.

    Parameters
    ----------
    still_s
        How long a counter may stand still.
    clock
        Monotonic seconds.
    """

    def __init__(self, *, still_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._still_s = still_s
        self._clock = clock
        self._seen: dict[Key, tuple[int, float]] = {}
        self._last_s = clock()

    def look(self, counts: Mapping[Key, int]) -> list[Key]:
        """Take note of counters, and return those that have stood still; others are forgotten."""
        now = self._clock()
        if now - self._last_s > self._still_s / 2:
            self._seen.clear()
        self._last_s = now
        before, self._seen = self._seen, {}
        for key, count in counts.items():
            known = before.get(key)
            self._seen[key] = known if known is not None and known[0] == count else (count, now)
        return [key for key, (_, since_s) in self._seen.items() if now - since_s >= self._still_s]
