"""The process in which a foreign solver runs: ``python -m placement.solvers.milp.child``.

It reads one request from standard input and writes frames to standard output: better points as they come,
then an outcome or an error. It ends itself, with whatever it has started, when its parent goes.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from typing import BinaryIO

from placement.errors import BackendError
from placement.solvers.milp.backend import Unwatched
from placement.solvers.milp.backends import make_backend
from placement.solvers.milp.formulation import FloatArray
from placement.solvers.milp.frames import (
    Frame,
    error_frame,
    improved_frame,
    outcome_frame,
    read_frame,
    request_of,
    write_frame,
)

__all__ = ["main"]


class _Teller(Unwatched):
    """Passes better points to the parent, which ends this process when it wants no more."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def improved(self, value_V: FloatArray, bound: float) -> None:
        """Write a frame."""
        write_frame(self._stream, improved_frame(value_V, bound))


def main() -> None:
    """Solve one request."""
    answers = _own_output()
    request = read_frame(sys.stdin.buffer)
    if request is None:
        return
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        frame = _answer(request, answers)
    except ImportError as exc:
        frame = error_frame(f"is not installed: {exc}")
    except MemoryError:
        frame = error_frame(f"ran out of memory ({int(request['memory_bytes']) / 2**20:.0f} MiB are allowed)")
    except BackendError as exc:
        frame = error_frame(str(exc))
    write_frame(answers, frame)


def _answer(request: Frame, answers: BinaryIO) -> Frame:
    program, name, limits, memory_bytes = request_of(request)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return outcome_frame(make_backend(name).solve(program, limits, _Teller(answers)))


def _own_output() -> BinaryIO:
    """Keep standard output for frames: whatever solvers print goes to standard error."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(kept, "wb")


def _end_with_parent() -> None:
    """Wait until the parent closes the pipe, then end this process and those that it started."""
    # Not through sys.stdin: Python aborts at exit where a thread waits inside a buffered reader.
    os.read(0, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
    # Neither foreign threads nor destructors may hold up, or crash, what is already answered.
    sys.stdout.flush()
    os._exit(0)
