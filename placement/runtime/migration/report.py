"""How a migration went."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

__all__ = ["MigrationReport", "MigrationStatus"]


class MigrationStatus(StrEnum):
    """Where a migration stands; the same on all ranks after the same `advance`."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationReport:
    """What one rank has to say about a migration so far.

    Parameters
    ----------
    status, failure
        Where it stands; why it failed, empty if it did not.
    rounds, rounds_planned
        Rounds switched over, and all.
    moves
        Copies between ranks that were switched over, on all ranks.
    sent_bytes, received_bytes
        Of this rank, without checksums.
    transfer_s
        Time in which this rank's bytes were on their way, in seconds: of each stage from when it was packed,
        or the last one was through, to its last byte.
    gb_per_s
        Rate of the busier direction of this rank meanwhile, GB per second.
    wall_s
        Time since the migration began, until it ended, in seconds.
    checks
        Arrived messages whose checksums were right.
    extra_bytes
        Largest memory on this rank for waiting experts and for those on their way to others.
    """

    status: MigrationStatus
    failure: str
    rounds: int
    rounds_planned: int
    moves: int
    sent_bytes: int
    received_bytes: int
    transfer_s: float
    gb_per_s: float
    wall_s: float
    checks: int
    extra_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
