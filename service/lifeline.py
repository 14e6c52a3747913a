"""Becomes a module that can be ended from the first moment: ``python -m service.lifeline MODULE [PARENT]``.

Told to end (SIGTERM) before the module is there to do so in order, the process ends at once, and well:
nothing has begun. With the number of its parent it is also told when that one is gone, however it went; the
kernel sees to it.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from types import FrameType

__all__ = ["end_with_parent", "main", "share_arenas"]

_PR_SET_PDEATHSIG = 1
_M_ARENA_MAX = -8
_LIBC = ctypes.CDLL(None, use_errno=True)


def end_with_parent(parent: int) -> None:
    """Have this process told to end when its parent dies.

    Parameters
    ----------
    parent
        The parent's process id: it may be gone already.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(0)


def share_arenas() -> None:
    """Have threads share what others gave back: this process alone, not the solves that it starts."""
    if hasattr(_LIBC, "mallopt"):  # glibc
        _LIBC.mallopt(_M_ARENA_MAX, 2)


def _end(number: int, frame: FrameType | None) -> None:
    # An exception may come while something is imported, where Python swallows it in its own callbacks.
    os._exit(0)


def main() -> None:
    """Prepare for the end, then become the module."""
    signal.signal(signal.SIGTERM, _end)
    share_arenas()
    _, module, *parent = sys.argv
    if parent:
        end_with_parent(int(parent[0]))
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
