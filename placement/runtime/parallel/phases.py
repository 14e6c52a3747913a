"""Where the time of an expert-parallel layer goes: marks between its phases, off by default."""

from __future__ import annotations

from typing import Protocol

__all__ = ["PHASES", "NoClock", "PhaseClock"]

PHASES = ("prepare", "dispatch", "experts", "combine", "unpermute")
"""In order; with exchanges in two stages the outer stage's phases enclose the inner one's."""


class PhaseClock(Protocol):
    """Told when a phase has been issued; a recorder of CUDA events, say."""

    def mark(self, phase: str) -> None:
        """Note that what belongs to this phase has been issued; ``start`` comes first."""
        ...


class NoClock:
    """Notes nothing."""

    def mark(self, phase: str) -> None:
        """Do nothing."""
