"""Leases on deployments: kept by counting beats, which others watch with their own monotonic clock."""

from __future__ import annotations

import time

from service.deployments.records import RefreshState
from service.state.deployments import DeploymentStore

__all__ = ["LeaseLostError", "Leases"]

BEATS_PER_LEASE = 4


class LeaseLostError(Exception):
    """Another controller has taken over."""


class Leases:
    """One controller's view of who works on what.

    Parameters
    ----------
    owner
        Id of the controller.
    lease_s
        Seconds for which the count of a lease must stand still before it is free.
    """

    def __init__(self, deployments: DeploymentStore, owner: str, *, lease_s: float) -> None:
        self._deployments = deployments
        self._owner = owner
        self._lease_s = lease_s
        self._seen: dict[str, tuple[str | None, int, float]] = {}
        self._next_beat = 0.0

    def is_free(self, name: str, state: RefreshState) -> bool:
        """Tell whether a lease is nobody's, one's own, or its count has stood still for long enough."""
        if state.owner is None or state.owner == self._owner:
            self._seen.pop(name, None)
            return True
        owner, beat, since = self._seen.get(name, (None, 0, 0.0))
        if (owner, beat) != (state.owner, state.beat):
            since = time.monotonic()
            self._seen[name] = (state.owner, state.beat, since)
        return time.monotonic() - since >= self._lease_s

    def take(self, name: str, state: RefreshState) -> bool:
        """Take the lease if it stands as it was seen."""
        self._next_beat = time.monotonic() + self._lease_s / BEATS_PER_LEASE
        return self._deployments.take(name, self._owner, seen=(state.owner, state.beat)) is not None

    def keep(self, name: str) -> None:
        """Give a sign of life when it is time for one.

        Raises
        ------
        LeaseLostError
            If somebody else has the lease by now.
        """
        if time.monotonic() < self._next_beat:
            return
        self._next_beat = time.monotonic() + self._lease_s / BEATS_PER_LEASE
        if not self._deployments.renew(name, self._owner):
            raise LeaseLostError("another controller has taken over")

    def release(self, name: str) -> None:
        """Give the lease back."""
        self._deployments.release(name, self._owner)
