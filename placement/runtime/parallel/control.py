"""Agreement without a barrier: a word that every rank sends along with the counts of each exchange."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAILED", "IDLE", "Control"]

FAILED = 0
"""Word of a rank that gave up; then all ranks agree on it."""

IDLE = 1
"""Word of a rank with nothing to say."""


@dataclass(slots=True)
class Control:
    """What this rank says to the others, and the least that all of them have said.

    All ranks run the same passes, so that they see the same `agreed` after the same pass: what is switched
    over when it reaches a value is switched over everywhere at once.

    Parameters
    ----------
    mine
        Sent in every exchange of counts, not negative. It may change between forward passes only.
    agreed
        Least of all ranks' words in the last exchange that ended.
    """

    mine: int = IDLE
    agreed: int = IDLE
