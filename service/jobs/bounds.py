"""What the process of a job does to itself before it reads anything: limits, and an end with its worker."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from contextlib import suppress

__all__ = ["bind_to_parent", "end_group", "limit_process"]

_PR_SET_PDEATHSIG = 1

SLACK_BYTES = 256 << 20
"""Memory that is reserved and not used (stacks, arenas); what is used is watched from outside."""


def bind_to_parent(parent: int) -> None:
    """Have the kernel kill this process when its worker is gone, however it went."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        # It went before the kernel was asked.
        end_group()


def end_group() -> None:
    """Kill this process and those that it started, where it leads a group of its own."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def limit_process(*, memory_bytes: int, niceness: int) -> None:
    """Bound this process.

    Parameters
    ----------
    memory_bytes
        Beyond it an allocation fails, as a MemoryError that can be told.
    niceness
        How far it steps back behind others.
    """
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_DATA, memory_bytes + SLACK_BYTES)
    with suppress(OSError):
        # A wish: some containers forbid it.
        os.nice(niceness)


def _lower(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))
