"""The error tree: every failure a caller can meet, with the exit code of the command line.

Messages say what is wrong, where, and how to mend it, with the numbers.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "ExchangeError",
    "InfeasibleError",
    "InputError",
    "NoPlacementFoundError",
    "PlacementError",
    "ServiceError",
]


class PlacementError(Exception):
    """Base of every error that this project raises on purpose."""

    exit_code = 1


class InputError(PlacementError, ValueError):
    """The caller's input is malformed, inconsistent or unknown."""

    exit_code = 2


class InfeasibleError(PlacementError):
    """No placement can satisfy the constraints; the message names the constraint and by how much."""

    exit_code = 3


class NoPlacementFoundError(PlacementError):
    """A limit stopped the solve before any placement was found."""

    exit_code = 4


class BackendError(PlacementError):
    """A foreign solver is missing, crashed, ran out of memory or gave an answer that does not hold."""


class ServiceError(PlacementError):
    """The placement service or the network failed."""

    exit_code = 5


class ExchangeError(PlacementError):
    """A rank of a process group is lost or does not answer in time."""

    exit_code = 5
