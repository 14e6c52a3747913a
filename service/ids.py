"""Ids of jobs and workers: unique, short enough to read out, and in the order of their making when sorted."""

from __future__ import annotations

import secrets
import threading
import time

__all__ = ["new_id"]

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32: no i, l, o, u."""
RANDOM_BITS = 80


class _Sequence:
    """Counts up from one id to the next, also within a millisecond and when the clock is set back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> int:
        fresh = (time.time_ns() // 1_000_000 << RANDOM_BITS) | secrets.randbits(RANDOM_BITS)
        with self._lock:
            # A random step, so that ids of one millisecond cannot be guessed from each other.
            self._last = fresh if fresh > self._last else self._last + 1 + secrets.randbits(RANDOM_BITS // 2)
            return self._last


_SEQUENCE = _Sequence()


def new_id(prefix: str) -> str:
    """Return ``prefix-`` and 26 lower-case characters: 48 bits of milliseconds, 80 random ones.

    Parameters
    ----------
    prefix
        What it names: ``s`` solve, ``e`` evaluation, ``c`` check, ``w`` worker.
    """
    number = _SEQUENCE.next()
    return f"{prefix}-" + "".join(ALPHABET[number >> shift & 31] for shift in range(125, -5, -5))
