"""Real server processes on real sockets: started, watched, stopped and killed.

``from tests.service.server import Server``. A server is ready when the context is entered and must end by
itself, with exit code 0 and no process left behind, when it is left; where the test failed, or the server
did, the end of its log is shown.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import httpx
import numpy as np
import psutil

__all__ = [
    "BYTE16",
    "LINEAR",
    "TINY_MODEL",
    "Server",
    "Sse",
    "eventually",
    "free_port",
    "listen",
    "pause_between_transactions",
    "tiny_trace",
    "upload",
]

ROOT = Path(__file__).parents[2]
BYTE16 = ROOT / "placement" / "samples" / "traces" / "byte16.npz"
"""The recorded sample trace: 599,040 tokens, 6 layers, top-2 of 16."""

LINEAR: dict[str, Any] = {"kind": "linear", "pair_cost": 1.0, "token_cost": 4.0}
"""A calibration that needs no sizes of the model."""
TINY_MODEL: dict[str, Any] = {
    "num_layers": 2,
    "num_experts": 8,
    "top_k": 2,
    "hidden_size": 64,
    "expert_hidden_size": 128,
}
"""The model that `tiny_trace` is of by default."""

MARK = "MOE_PLACEMENT_TEST_MARK"
TAIL_LINES = 40
POLL_S = 0.05
"""Looking at all processes takes a few milliseconds, which those under test want too."""

T = TypeVar("T")


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def eventually(
    condition: Callable[[], T | None], within_s: float = 20.0, *, what: str = "", every_s: float = POLL_S
) -> T:
    """Return the first true value of a condition; an AssertionError says what was there instead."""
    deadline = time.monotonic() + within_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what or condition}; last: {found!r}")
        time.sleep(every_s)


def pause_between_transactions(pid: int, database_url: str) -> None:
    """Stop a process while it does not hold SQLite's lock, with which it would keep everybody out."""
    scheme, _, path = database_url.partition(":///")

    def paused_without_lock() -> bool:
        os.kill(pid, signal.SIGSTOP)
        if scheme != "sqlite":
            return True
        connection = sqlite3.connect(path, timeout=0.2, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        except sqlite3.OperationalError:
            os.kill(pid, signal.SIGCONT)
            return False
        finally:
            connection.close()
        return True

    eventually(paused_without_lock, what=f"process {pid} paused between two transactions")


def tiny_trace(
    path: Path, *, tokens: int = 512, layers: int = 2, experts: int = 8, top_k: int = 2, seed: int = 0
) -> Path:
    """Write a small ``.npz`` trace: distinct experts per token and layer, the first ones more often."""
    rng = np.random.default_rng(seed)
    key_TLE = rng.gumbel(size=(tokens, layers, experts)) - 0.7 * np.log(np.arange(1, experts + 1))
    ids_TLK = np.argsort(-key_TLE, axis=2)[:, :, :top_k].astype(np.uint16)
    np.savez(path, topk=ids_TLK, num_experts=np.int64(experts))
    return path


class Server:
    """``moe-placement serve`` in a process group of its own.

    Parameters
    ----------
    data_dir
        Its data directory; the log is written beside it.
    database_url
        ``postgresql+psycopg://...``; SQLite in the data directory if None.
    env
        Further variables (``MOE_PLACEMENT_...``); the caller's own such variables are not passed on.
    arguments
        Further arguments of ``serve``.
    token
        Bearer token of `client`.
    command
        What to run instead of ``python -m placement.cli`` (a preloaded library, another interpreter).
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        role: Literal["all", "api", "worker"] = "all",
        database_url: str | None = None,
        env: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        host: str = "127.0.0.1",
        port: int | None = None,
        token: str | None = None,
        command: Sequence[str] = (sys.executable, "-m", "placement.cli"),
    ) -> None:
        self.data_dir = data_dir
        self.role = role
        self.host = host
        self.port = free_port() if port is None else port
        self.token = token
        self.database = database_url or f"sqlite:///{data_dir.absolute() / 'state.db'}"
        self.mark = uuid.uuid4().hex
        self.log_path = data_dir.parent / f"{data_dir.name}-{role}-{self.mark[:6]}.log"
        self._arguments = [
            *command,
            *("serve", "--host", host, "--port", str(self.port)),
            *("--data-dir", str(data_dir), "--role", role, *arguments),
        ]
        self._env = _environment(database_url, {**(env or {}), MARK: self.mark})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        """URL without a slash at the end."""
        return f"http://{self.host}:{self.port}"

    @property
    def log(self) -> str:
        """What it wrote so far, both streams."""
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    @property
    def pid(self) -> int:
        """The main process."""
        return self._started.pid

    @property
    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise AssertionError("the server was not started")
        return self._process

    @property
    def is_running(self) -> bool:
        """Whether the main process lives."""
        return self._process is not None and self._process.poll() is None

    def processes(self) -> list[psutil.Process]:
        """Return all of its processes that live, orphans too: they carry a mark in their environment."""
        return [process for process in psutil.process_iter() if _carries(process, self.mark)]

    def pids_of(self, module: str) -> list[int]:
        """Return the processes whose command line names a module (``service.jobs.worker``, ``...child``)."""
        return [process.pid for process in self.processes() if module in _command_of(process)]

    @property
    def worker_pids(self) -> list[int]:
        """Worker processes, which lease jobs."""
        return self.pids_of("service.jobs.worker")

    @property
    def child_pids(self) -> list[int]:
        """Processes that compute a job each."""
        return self.pids_of("service.jobs.child")

    def start(self, *, ready_within_s: float = 90.0) -> Server:
        """Start it and wait until it says that it is ready (a worker: until its process is there)."""
        self.launch()
        self.wait_ready(ready_within_s)
        return self

    def launch(self) -> None:
        """Start it and do not wait."""
        if self.is_running:
            raise AssertionError("the server runs already")
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._arguments,
                cwd=ROOT,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self, within_s: float = 90.0) -> None:
        """Wait for ``/health/ready``; a worker has none and is ready when its process is there."""
        deadline = time.monotonic() + within_s
        while not self._says_ready():
            code = self._started.poll()
            if code is not None:
                raise AssertionError(f"the server ended with code {code} before it was ready\n{self.tail()}")
            if time.monotonic() > deadline:
                tail = self.tail()
                self.kill()
                raise AssertionError(f"the server was not ready within {within_s} s\n{tail}")
            time.sleep(POLL_S)

    def _says_ready(self) -> bool:
        if self.role == "worker":
            return bool(self.worker_pids) or self.pid in [process.pid for process in self.processes()]
        # Not a client of httpx for each question: its certificates take longer to load than we wait.
        connection = http.client.HTTPConnection(self.host, self.port, timeout=5.0)
        try:
            connection.request("GET", "/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def client(self, *, token: str | None = None, timeout_s: float = 30.0) -> httpx.Client:
        """Return a client of this server, to be closed by the caller."""
        bearer = token or self.token
        return httpx.Client(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {bearer}"} if bearer else {},
            timeout=timeout_s,
            trust_env=False,
        )

    def signal(self, number: int) -> None:
        """Send a signal to the main process."""
        self._started.send_signal(number)

    def stop(self, *, within_s: float = 20.0) -> None:
        """Ask for a graceful end (SIGTERM); it must come, with exit code 0 and nothing left running."""
        if self.is_running:
            self.signal(signal.SIGTERM)
        try:
            code = self._started.wait(within_s)
        except subprocess.TimeoutExpired:
            tail = self.tail()
            self.kill()
            raise AssertionError(f"still running {within_s} s after SIGTERM\n{tail}") from None
        if code != 0:
            self.kill()
            raise AssertionError(f"ended with code {code} after SIGTERM\n{self.tail()}")
        self.assert_nothing_left()

    def assert_nothing_left(self, within_s: float = 10.0) -> None:
        """Wait until no process of it lives."""
        try:
            eventually(lambda: not self.processes(), within_s, what="all processes of the server ended")
        except AssertionError:
            left = [f"{process.pid}: {_command_of(process)}" for process in self.processes()]
            self.kill()
            raise AssertionError(f"left behind: {left}\n{self.tail()}") from None

    def crash(self) -> None:
        """Kill the main process alone, as the machine's memory guard would; its children must notice."""
        self._started.kill()
        self._started.wait()

    def kill(self) -> None:
        """Kill all of its processes at once, as if the machine went away."""
        while left := self.processes():
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=5)
        if self._process is not None:
            self._process.wait()

    def tail(self, lines: int = TAIL_LINES) -> str:
        """Return the last lines of the log."""
        return f"--- {self.log_path}\n" + "\n".join(self.log.splitlines()[-lines:])

    def __enter__(self) -> Server:
        try:
            return self.start()
        except BaseException:
            self.kill()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.stop()
            return
        error.add_note(self.tail())
        self.kill()


def _environment(database_url: str | None, extra: Mapping[str, str]) -> dict[str, str]:
    found = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MOE_PLACEMENT_", "DATABASE_", "COV_CORE_"))
    }
    if database_url is not None:
        found["DATABASE_URL"] = database_url
    return {**found, "PYTHONUNBUFFERED": "1", **extra}


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return f"{MARK}={mark}".encode() in Path(f"/proc/{process.pid}/environ").read_bytes()
    except (psutil.NoSuchProcess, OSError):
        return False


def _command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def upload(client: httpx.Client, path: Path) -> str:
    """Upload a trace; return its id."""
    with path.open("rb") as file:
        response = client.post(
            "/v1/traces", content=file, headers={"Content-Type": "application/octet-stream"}
        )
    assert response.status_code in (200, 201), response.text
    found: str = response.json()["id"]
    return found


class Sse:
    """One server-sent event."""

    __slots__ = ("at_s", "data", "id", "kind")

    def __init__(self, *, kind: str, id: int, data: dict[str, Any], at_s: float) -> None:
        self.kind, self.id, self.data, self.at_s = kind, id, data, at_s

    def __repr__(self) -> str:
        return f"Sse({self.id}, {self.kind}, {self.data})"


def listen(client: httpx.Client, job_id: str, *, after: int | None = None) -> Iterator[Sse]:
    """Yield a solve's events as they come, until the server ends the stream."""
    headers = {"Accept": "text/event-stream"} | ({} if after is None else {"Last-Event-ID": str(after)})
    with client.stream("GET", f"/v1/solves/{job_id}/events", headers=headers) as response:
        assert response.status_code == 200, response.read()
        fields: dict[str, str] = {}
        for line in response.iter_lines():
            name, _, value = line.partition(":")
            if name:
                fields[name] = value.removeprefix(" ")
            elif "data" in fields:
                yield Sse(
                    kind=fields.get("event", "message"),
                    id=int(fields.get("id", -1)),
                    data=json.loads(fields["data"]),
                    at_s=time.time(),
                )
                fields = {}
