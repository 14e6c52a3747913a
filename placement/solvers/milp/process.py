"""Runs a backend in a child process: killed on time, capped in memory, and free to crash.

Shape letters: V variables.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import placement
from placement.errors import BackendError
from placement.solvers.milp.backend import Limits, Outcome, Watcher
from placement.solvers.milp.formulation import MilpProgram
from placement.solvers.milp.frames import Frame, outcome_of, read_frame, request_frame, write_frame
from placement.solvers.milp.result import Limit, MilpStatus
from placement.stopping import Deadline, Never, StoppingCriterion

__all__ = ["solve_in_child"]

POLL_S = 0.03

GRACE_S = 1.0
"""Time beyond its limit in which a backend may hand in what it has before it is killed, seconds."""


def solve_in_child(
    program: MilpProgram, backend: str, limits: Limits, watcher: Watcher, *, memory_bytes: int
) -> Outcome:
    """Solve a program in a child process and return its outcome, or the best that it told of.

    Raises
    ------
    BackendError
        If the child fails, with its reason.
    """
    late: StoppingCriterion = Never()
    if limits.time_limit_s is not None:
        late = Deadline(limits.time_limit_s + GRACE_S)
    with tempfile.TemporaryFile() as log, _child(log) as child:
        frames = _frames_of(child, request_frame(program, backend, limits, memory_bytes))
        told = Outcome(status=MilpStatus.STOPPED)
        while True:
            if watcher.stopped():
                return _ended(told, Limit.STOP)
            if late():
                return _ended(told, Limit.TIME)
            with contextlib.suppress(queue.Empty):
                frame = frames.get(timeout=POLL_S)
                if frame is None:
                    raise BackendError(f"{backend} {_cause_of_death(child, log, memory_bytes)}")
                if str(frame["kind"]) == "error":
                    raise BackendError(f"{backend} {frame['message']}")
                if str(frame["kind"]) == "outcome":
                    return outcome_of(frame)
                told = Outcome(
                    status=MilpStatus.FEASIBLE, value_V=frame["value_V"], bound=float(frame["bound"])
                )
                watcher.improved(frame["value_V"], told.bound)


def _ended(told: Outcome, limit: Limit) -> Outcome:
    return Outcome(status=told.status, value_V=told.value_V, bound=told.bound, limit=limit)


@contextlib.contextmanager
def _child(log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a child in a process group of its own; kill the whole group in the end."""
    root = str(Path(placement.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        [sys.executable, "-m", "placement.solvers.milp.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for stream in (child.stdin, child.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _frames_of(child: subprocess.Popen[bytes], request: Frame) -> queue.Queue[Frame | None]:
    """Talk to a child from threads of their own: a full pipe must not keep us from polling."""
    frames: queue.Queue[Frame | None] = queue.Queue()
    assert child.stdin is not None
    assert child.stdout is not None
    requests, answers = child.stdin, child.stdout

    def ask() -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):
            write_frame(requests, request)

    def listen() -> None:
        with contextlib.suppress(ValueError):
            while (frame := read_frame(answers)) is not None:
                frames.put(frame)
        frames.put(None)

    for target in (ask, listen):
        threading.Thread(target=target, daemon=True).start()
    return frames


def _cause_of_death(child: subprocess.Popen[bytes], log: IO[bytes], memory_bytes: int) -> str:
    code = child.wait()
    log.seek(0)
    lines = log.read().decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    if any("bad_alloc" in line or "MemoryError" in line or "out of memory" in line.lower() for line in said):
        return f"ran out of memory ({memory_bytes / 2**20:.0f} MiB are allowed)"
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"{how} and no answer{': ' + said[-1] if said else ''}"
