"""What the service acknowledged, and what it did that it must not."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Ledger", "Promotion"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """A promotion that was acknowledged."""

    deployment: str
    why: str
    placement_id: str
    version: int


@dataclass(slots=True)
class Ledger:
    """Everything acknowledged, by all callers."""

    jobs: dict[str, str] = field(default_factory=dict)
    """Job by idempotency key."""
    uploads: dict[str, int] = field(default_factory=dict)
    """Size by digest."""
    promotions: list[Promotion] = field(default_factory=list)
    stopped: set[str] = field(default_factory=set)
    """Jobs whose stop was acknowledged."""
    windows: dict[tuple[str, int, int], int] = field(default_factory=dict)
    """Tokens by deployment, window and rank."""
    violations: list[str] = field(default_factory=list)
    tally: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def accept(self, key: str, job_id: str) -> None:
        """Note a job; the same key must always be the same job."""
        with self._lock:
            known = self.jobs.setdefault(key, job_id)
            if known != job_id:
                self.violations.append(f"key {key} was acknowledged as {known} and as {job_id}")

    def keep(self, digest: str, size_bytes: int) -> None:
        """Note an upload."""
        with self._lock:
            self.uploads[digest] = size_bytes

    def promote(self, promotion: Promotion) -> None:
        """Note a promotion."""
        with self._lock:
            self.promotions.append(promotion)

    def stop(self, job_id: str) -> None:
        """Note a stop."""
        with self._lock:
            self.stopped.add(job_id)

    def violate(self, what: str) -> None:
        """Note what must not happen."""
        with self._lock:
            self.violations.append(what)

    def count(self, what: str, by: int = 1) -> None:
        """Count something for the report."""
        with self._lock:
            self.tally[what] += by

    def some_job(self, index: int) -> str | None:
        """Return one of the accepted jobs."""
        with self._lock:
            ids = list(self.jobs.values())
        return ids[index % len(ids)] if ids else None
