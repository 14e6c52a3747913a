"""Starts the process of a job and watches over it: messages, memory, time, stop, and a hard end if need be.

A run has a thread of its own and touches no database, so that a job stays bounded while the database is away.
What it learns waits in `Run.take` for whoever records it; while nobody does, newer incumbents replace older.
"""

from __future__ import annotations

import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import service
from service.jobs.memory import held_bytes
from service.jobs.messages import CHUNK_BYTES, Message, lines_of, read_message
from service.jobs.order import Order

__all__ = ["Ended", "How", "Limits", "Run"]

_log = logging.getLogger(__name__)

TICK_S = 0.05
MEMORY_LOOK_S = 0.1
EXIT_S = 2.0
"""How long a process may take to go once it has sent its result."""
MOST_WAITING = 1000
MEMORY_SIGNS = ("memoryerror", "bad_alloc", "out of memory", "cannot allocate")
"""What libraries write when an allocation failed that they cannot do without."""
TAIL_BYTES = 2000

SECRETS = ("DATABASE_URL", "MOE_PLACEMENT_DATABASE_URL", "MOE_PLACEMENT_ARTIFACT_URL", "PGPASSWORD")
SECRET_BEGINNINGS = ("AWS_", "GOOGLE_", "GCS_", "AZURE_", "FSSPEC_")
"""Variables that a job has no use for: it is given local files."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


class How(StrEnum):
    """How a run ended."""

    RESULT = "result"
    """By itself, with a result."""
    ERROR = "error"
    """By itself, with an error that has a code."""
    STOPPED = "stopped"
    """It did not heed a stop, and was killed."""
    TIMED_OUT = "timed-out"
    """It ran past its limit, and was killed or ended with what it had."""
    OUT_OF_MEMORY = "out-of-memory"
    """It held more memory than it may, and was killed."""
    CRASHED = "crashed"
    """It ended without a word."""
    LOST = "lost"
    """Somebody else killed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds that a run is held to from outside.

    Parameters
    ----------
    memory_bytes
        Memory of the process and those that it starts.
    time_s
        Seconds until it is asked to stop, and killed if it does not.
    grace_s
        How long a stop may take.
    """

    memory_bytes: int
    time_s: float
    grace_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The end of a run.

    Parameters
    ----------
    how
        How it came.
    message
        The ``result`` message, or the newest kept incumbent where there is none; None without either.
    code, why
        Code and message of an error.
    """

    how: How
    message: Message | None = None
    code: str | None = None
    why: str | None = None


class Run:
    """One process for one job.

    Parameters
    ----------
    order
        What it does; its folder exists.
    limits
        Bounds.
    on_news
        Called from the run's thread when there is something to take.
    """

    def __init__(self, order: Order, limits: Limits, on_news: Callable[[], None]) -> None:
        self.order = order
        self.folder = Path(order.folder)
        self._limits = limits
        self._on_news = on_news
        self._turn = threading.Lock()
        self._waiting: list[Message] = []
        self._ended: Ended | None = None
        self._last: Message | None = None
        self._kept: Message | None = None
        self._stop_s: float | None = None
        self._is_late = False
        self._abandoned = threading.Event()
        self._wake_out, self._wake_in = os.pipe()
        self._pid: int | None = None
        self._most_bytes = 0
        self._thread = threading.Thread(target=self._run, name=f"job-{self.folder.name}", daemon=True)

    def start(self) -> None:
        """Start the process."""
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Process id; None before it has started."""
        return self._pid

    def take(self) -> list[Message]:
        """Return the messages that came since the last time."""
        with self._turn:
            messages, self._waiting = self._waiting, []
        return messages

    def put_back(self, messages: list[Message]) -> None:
        """Leave messages that could not be recorded for later."""
        with self._turn:
            self._waiting = messages + self._waiting

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended and was waited for."""
        return not self._thread.is_alive()

    @property
    def ended(self) -> Ended | None:
        """How it ended, once it has; every message came before."""
        return self._ended

    def stop(self) -> None:
        """Ask for the end; after the grace it is forced."""
        with self._turn:
            if self._stop_s is None:
                self._stop_s = time.monotonic()
        self._wake()

    def abandon(self) -> None:
        """Kill it, whatever it has found."""
        self._abandoned.set()
        self._wake()

    def close(self) -> None:
        """Wait for the end of the process, and remove its folder."""
        self._thread.join()
        for descriptor in (self._wake_in, self._wake_out):
            os.close(descriptor)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wake(self) -> None:
        os.write(self._wake_in, b"!")

    def _run(self) -> None:
        try:
            with self._started() as process:
                self._pid = process.pid
                try:
                    ended = self._follow(process)
                finally:
                    _kill_group(process)
        except OSError as exc:
            why = f"the job's process cannot be started: {exc.strerror or exc}"
            ended = Ended(how=How.ERROR, code="internal", why=why)
        except ValueError as exc:
            why = f"the job's process said what cannot be understood: {exc}"
            ended = Ended(how=How.CRASHED, code="internal", why=why)
        self._end(ended)

    def _end(self, ended: Ended) -> None:
        if self._ended is None:
            self._ended = ended
            self._on_news()

    def _started(self) -> subprocess.Popen[bytes]:
        path = self.folder / "order.json"
        self.order.write(path)
        with (self.folder / "stderr.txt").open("wb") as errors:
            # In a thread that lives as long as it: the kernel ends it with the thread that started it.
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "service.jobs.child", str(path)],
                cwd=self.folder,
                env=_environment(self.order),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                start_new_session=True,
            )

    def _follow(self, process: subprocess.Popen[bytes]) -> Ended:
        """Take messages until the end, whoever brings it."""
        assert process.stdout is not None
        began_s = time.monotonic()
        watch = _Watch(self._limits, began_s)
        buffer = bytearray()
        source = process.stdout.fileno()
        poll = select.poll()
        for descriptor in (source, self._wake_out):
            poll.register(descriptor, select.POLLIN | select.POLLHUP)
        is_told = False
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(TICK_S * 1000)}
            if self._wake_out in ready:
                os.read(self._wake_out, CHUNK_BYTES)
            if source in ready:
                chunk = os.read(source, CHUNK_BYTES)
                if not chunk:
                    return self._without_result(process)
                for line in lines_of(buffer, chunk):
                    ended = self._receive(read_message(line))
                    if ended is not None:
                        # Whoever records it need not wait until the process is gone.
                        self._end(ended)
                        return ended
            if self._abandoned.is_set():
                return Ended(how=How.LOST)
            if watch.is_late() and self._stop_s is None:
                self._is_late = True
                self.stop()
            if self._stop_s is not None and not is_told:
                is_told = True
                _tell_stop(process)
            ended = watch.verdict(process.pid, self._stop_s)
            if ended is not None:
                return self._killed(process, ended, buffer)

    def _receive(self, message: Message) -> Ended | None:
        kind = message.pop("kind")
        if kind == "result":
            return Ended(how=How.TIMED_OUT if self._is_late else How.RESULT, message=message)
        if kind == "error":
            return Ended(how=How.ERROR, code=message["code"], why=message["message"], message=self._kept)
        self._add({**message, "kind": kind})
        return None

    def _add(self, message: Message) -> None:
        with self._turn:
            if message["kind"] == "incumbent":
                self._kept = message.get("kept") or self._kept
                # Only the newest matters; one that nobody took yet makes room.
                stale = [one for one in self._waiting if one["kind"] == "incumbent"]
                self._waiting = [one for one in self._waiting if one["kind"] != "incumbent"]
                for one in stale:
                    self._unlink(one)
                if stale and "kept" not in message and "kept" in stale[-1]:
                    self._waiting.append(stale[-1])
            if len(self._waiting) < MOST_WAITING:
                self._waiting.append(message)
        self._on_news()

    def _unlink(self, message: Message) -> None:
        kept = message.get("kept")
        if kept is not None and kept is not self._kept:
            (self.folder / kept["file"]).unlink(missing_ok=True)

    def _killed(self, process: subprocess.Popen[bytes], ended: Ended, buffer: bytearray) -> Ended:
        """Take what it has still said, and kill it; that it is gone need not be waited for."""
        assert process.stdout is not None
        os.killpg(process.pid, signal.SIGSTOP)
        source = process.stdout.fileno()
        os.set_blocking(source, False)
        with suppress(BlockingIOError):
            while chunk := os.read(source, CHUNK_BYTES):
                for line in lines_of(buffer, chunk):
                    said = self._receive(read_message(line))
                    if said is not None:
                        return said
        how = How.TIMED_OUT if ended.how is How.STOPPED and self._is_late else ended.how
        found = Ended(how=how, message=self._kept, code=ended.code, why=ended.why)
        self._end(found)
        return found

    def _without_result(self, process: subprocess.Popen[bytes]) -> Ended:
        """Say why a process ended without a word."""
        try:
            code = process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        tail = _tail(self.folder / "stderr.txt")
        _log.error("the process of a job ended with code %d; it wrote: %s", code, tail or "nothing")
        if code == -signal.SIGKILL:
            why = "the job's process was killed (by the machine's memory guard?)"
            return Ended(how=How.LOST, message=self._kept, why=why)
        if any(sign in tail.lower() for sign in MEMORY_SIGNS):
            why = _memory_text(self._limits)
            return Ended(how=How.OUT_OF_MEMORY, message=self._kept, code="out-of-memory", why=why)
        name = signal.Signals(-code).name if code < 0 else f"code {code}"
        why = f"the job's process ended by itself with {name}; the server's log says more"
        return Ended(how=How.CRASHED, message=self._kept, code="internal", why=why)


class _Watch:
    """Says when a process must go."""

    def __init__(self, limits: Limits, began_s: float) -> None:
        self._limits = limits
        self._end_s = began_s + limits.time_s
        self._next_look_s = began_s + MEMORY_LOOK_S

    def is_late(self) -> bool:
        """Whether its time is up."""
        return time.monotonic() >= self._end_s

    def verdict(self, pid: int, stop_s: float | None) -> Ended | None:
        """Return the end that is to be brought about now."""
        now = time.monotonic()
        if stop_s is not None and now >= stop_s + self._limits.grace_s:
            return Ended(how=How.STOPPED)
        if now >= self._next_look_s:
            self._next_look_s = now + MEMORY_LOOK_S
            if held_bytes(pid) > self._limits.memory_bytes:
                return Ended(how=How.OUT_OF_MEMORY, code="out-of-memory", why=_memory_text(self._limits))
        return None


def _memory_text(limits: Limits) -> str:
    return (
        f"the job needs more than the {limits.memory_bytes / 2**20:,.0f} MiB of memory that one may use here"
    )


def _tell_stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(b"stop\n")
    except BrokenPipeError:
        # It is on its way out by itself.
        return


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it started: it leads a group of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        # All are gone, or dead and not yet waited for.
        return


def _environment(order: Order) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in SECRETS and not name.startswith(SECRET_BEGINNINGS)
    }
    root = str(Path(service.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, kept.get("PYTHONPATH"))))
    threads = dict.fromkeys(THREAD_VARIABLES, str(order.threads))
    return {**kept, **threads, "PYTHONPATH": path, "TMPDIR": order.folder}


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode("utf-8", "replace").strip()
    except OSError:
        return ""
