"""A service of one's own for a while: on a free port of this machine, gone when it is no longer needed."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from types import TracebackType

from placement.errors import ServiceError

__all__ = ["LocalService"]

READY_S = 60.0
END_S = 30.0
LOOK_S = 0.05
TAIL_LINES = 15

_SERVING = re.compile(r"^serving on http://[^:]+:(\d+)$", re.MULTILINE)


class LocalService:
    """A service process of this one, for notebooks, tests and trials; a context manager.

    It listens on 127.0.0.1 alone, needs no token, and ends when nobody refers to this object any more, or
    the thread that started it ends, if it was not stopped before. Settings in the caller's environment
    (``MOE_PLACEMENT_...``, ``DATABASE_URL``) do not reach it: a trial must not meet a real service's state.

    Parameters
    ----------
    data_dir
        Folder of its state, which stays; by default a temporary one, removed when it stops.
    """

    def __init__(self, data_dir: str | os.PathLike[str] | None = None) -> None:
        self._given = None if data_dir is None else Path(data_dir)
        self._scratch: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., LocalService] | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """Where it listens.

        Raises
        ------
        ServiceError
            If it does not run.
        """
        if not self.is_running:
            raise ServiceError("the service is not running")
        return f"http://127.0.0.1:{self._port}"

    @property
    def is_running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process; 0 before it was started."""
        return 0 if self._process is None else self._process.pid

    def start(self) -> LocalService:
        """Start it and return it once it is ready.

        Raises
        ------
        ServiceError
            If it runs already, or does not become ready: with what it said.
        """
        if self.is_running:
            raise ServiceError(f"the service runs already on {self.url}")
        self._scratch = Path(tempfile.mkdtemp(prefix="moe-placement-"))
        data_dir = self._given or self._scratch / "data"
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                # With the number of this process, the kernel ends it when we are gone.
                [sys.executable, "-m", "service.lifeline", "service.serve", str(os.getpid())],
                env=_environment(data_dir),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # Nobody refers to it any more, or the interpreter ends.
        self._finalizer = weakref.finalize(self, _end, self._process, self._scratch)
        try:
            self._wait_ready()
        except BaseException:
            self._end()
            raise
        return self

    def stop(self) -> None:
        """End it in order; does nothing where it does not run.

        Raises
        ------
        ServiceError
            If it had ended by itself, or did not end well: with what it said.
        """
        if self._process is None:
            return
        said, code = self._tail(), self._end()
        if code != 0:
            raise ServiceError(f"the service ended with code {code}: {said}")

    @property
    def _log_path(self) -> Path:
        if self._scratch is None:
            raise AssertionError("the service was not started")
        return self._scratch / "log"

    def _tail(self) -> str:
        lines = self._log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:]) or "it said nothing"

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while not self._is_ready():
            code = None if self._process is None else self._process.poll()
            if code is not None:
                raise ServiceError(f"the service ended with code {code} before it was ready: {self._tail()}")
            if time.monotonic() > deadline:
                raise ServiceError(f"the service was not ready within {READY_S:.0f} s: {self._tail()}")
            time.sleep(LOOK_S)

    def _is_ready(self) -> bool:
        if not self._port:
            said = _SERVING.search(self._log_path.read_text(encoding="utf-8", errors="replace"))
            if said is None:
                return False
            self._port = int(said[1])
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5.0)
        try:
            connection.request("GET", "/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _end(self) -> int:
        """End the process and return its exit code; nothing of it is left."""
        process, scratch = self._process, self._scratch
        if process is None or scratch is None or self._finalizer is None:
            raise AssertionError("the service was not started")
        self._finalizer.detach()
        self._process, self._scratch, self._port = None, None, 0
        return _end(process, scratch)

    def __enter__(self) -> LocalService:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.stop()
        elif self._process is not None:
            self._end()


def _end(process: subprocess.Popen[bytes], scratch: Path) -> int:
    process.terminate()
    try:
        code = process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    shutil.rmtree(scratch)
    return code


def _environment(data_dir: Path) -> dict[str, str]:
    ours = ("MOE_PLACEMENT_", "DATABASE_URL")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {
        "MOE_PLACEMENT_HOST": "127.0.0.1",
        "MOE_PLACEMENT_LISTEN_PORT": "0",
        "MOE_PLACEMENT_DATA_DIR": str(data_dir.absolute()),
        "PYTHONUNBUFFERED": "1",
    }
