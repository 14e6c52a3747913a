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

__all__ = ["end_with_parent", "main"]

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have this process told to end when its parent dies.

    Parameters
    ----------
    parent
        The parent's process id: it may be gone already.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(0)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def main() -> None:
    """Prepare for the end, then become the module."""
    signal.signal(signal.SIGTERM, _end)
    _, module, *parent = sys.argv
    if parent:
        end_with_parent(int(parent[0]))
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
