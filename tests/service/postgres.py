"""A private PostgreSQL: its own cluster in a scratch folder, to start, kill and throw away.

``from tests.service.postgres import Cluster``. It listens on a free port of 127.0.0.1 and on a socket in its
folder, trusts everybody there, and by default does not wait for the disk; `durable` clusters do.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import psycopg
from psycopg import sql

__all__ = ["Cluster", "find_binaries"]

START_S = 60.0
POLL_S = 0.02
OWNER = "postgres"
"""User that runs the cluster when we are root, as which PostgreSQL refuses to run."""
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    "shared_buffers": "32MB",
    "log_min_messages": "warning",
    "timezone": "UTC",
}
CARELESS = {"fsync": "off", "full_page_writes": "off"}
"""Kept when its processes are killed, not when the machine is."""


def find_binaries() -> Path | None:
    """Return the folder with ``initdb`` and ``postgres``, the newest release's; None if there is none."""
    packaged = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    newest = sorted(packaged, key=lambda path: float(path.parts[-3]), reverse=True)
    found = shutil.which("initdb")
    for path in [*newest, *([Path(found).resolve()] if found else [])]:
        if (path.parent / "postgres").exists():
            return path.parent
    return None


class Cluster:
    """One server with its own data; a context that starts it and throws it away at the end.

    Parameters
    ----------
    durable
        Whether a commit is on disk when it is acknowledged, as where it counts.
    """

    def __init__(self, binaries: Path, *, durable: bool = False) -> None:
        self._binaries = binaries
        self._settings = SETTINGS | ({} if durable else CARELESS)
        self._process: subprocess.Popen[bytes] | None = None
        # Not under a test's folder: paths of sockets are short, and the owner must be able to walk there.
        self.folder = Path(tempfile.mkdtemp(prefix="mppg-", dir="/tmp"))
        self.port = 0

    def __enter__(self) -> Cluster:
        try:
            self._initialise()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def url(self, database: str = "postgres") -> str:
        """Return the URL of a database as the service takes it."""
        return f"postgresql+psycopg://{OWNER}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server and wait until it answers; after `kill`, on the same port with the same data."""
        deadline = time.monotonic() + START_S
        self.port = self.port or _free_port()
        self._launch()
        while not self._answers():
            if time.monotonic() > deadline:
                raise TimeoutError(f"PostgreSQL did not start: {self._log()}")
            if self._process is not None and self._process.poll() is not None:
                # Processes of a killed server may still hold its memory for a moment.
                self._launch()
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End the server in order; open connections are cut."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(START_S)
            self._process = None

    def kill(self) -> None:
        """End the server and its backends as a failure of power does: at once."""
        if self._process is None:
            return
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(self._process.pid)
            main.suspend()  # so that it starts nothing more
            for process in [*main.children(recursive=True), main]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait(START_S)
        self._process = None

    def close(self) -> None:
        """End the server and remove its data."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def connect(self, database: str = "postgres") -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
        """Give a connection that commits every statement."""
        connection = psycopg.connect(
            host="127.0.0.1", port=self.port, user=OWNER, dbname=database, autocommit=True, connect_timeout=10
        )
        try:
            yield connection
        finally:
            connection.close()

    def create(self, name: str, *, template: str = "template0") -> str:
        """Make a database; return its URL."""
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        with self.connect() as connection:
            connection.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))
        return self.url(name)

    def drop(self, name: str) -> None:
        """Remove a database, whoever is connected to it."""
        statement = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
        with self.connect() as connection:
            connection.execute(statement.format(sql.Identifier(name)))

    def _initialise(self) -> None:
        if os.geteuid() == 0:
            owner = pwd.getpwnam(OWNER)
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
        arguments = ["--no-sync", "--auth=trust", f"--username={OWNER}", "--encoding=UTF8", "--locale=C"]
        command = [str(self._binaries / "initdb"), "-D", str(self.folder / "data"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, **self._as_owner())
        if done.returncode != 0:
            raise RuntimeError(f"initdb: {done.stderr.strip() or done.stdout.strip()}")

    def _launch(self) -> None:
        settings = self._settings | {"unix_socket_directories": str(self.folder), "port": str(self.port)}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", self.folder / "data", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt of the tests must not end it first
                **self._as_owner(),
            )

    def _as_owner(self) -> dict[str, Any]:
        who = {"user": OWNER, "group": OWNER, "extra_groups": []} if os.geteuid() == 0 else {}
        return {"cwd": self.folder, **who}

    def _answers(self) -> bool:
        try:
            with self.connect():
                return True
        except psycopg.OperationalError:
            return False

    def _log(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")[-2000:]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
