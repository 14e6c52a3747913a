"""Nearest known name for an unknown one, so that every "unknown X" message says what was likely meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["did_you_mean", "nearest"]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest in spelling to `name`, ignoring case; None where none is close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = get_close_matches(name.lower()[:200], by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the tail of an "unknown ..." message: a suggestion where one is close, then what is known."""
    names = list(known)
    suggestion = nearest(name, names)
    guess = f"did you mean {suggestion!r}? " if suggestion else ""
    return f"{guess}known: {', '.join(names)}"
