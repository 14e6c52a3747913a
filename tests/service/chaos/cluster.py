"""Servers that share one database, and the ways in which they may be lost."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from tests.service.chaos.ledger import Ledger
from tests.service.server import Server, eventually

__all__ = ["Cluster", "DatabaseProcess", "postgres_cluster", "sqlite_cluster"]

LEASE_S = 3.0
ORPHANS_WITHIN_S = 15.0
READY_WITHIN_S = 40.0


class DatabaseProcess(Protocol):
    """A database server of our own that may be killed."""

    def kill(self) -> None:
        """Kill all of its processes at once."""

    def start(self) -> None:
        """Start it (again)."""


@dataclass(slots=True)
class Cluster:
    """The servers.

    Parameters
    ----------
    database
        The database server where it is a process; SQLite is none.
    artifact_url
        Where artifacts are if not in the data directory.
    """

    servers: list[Server]
    ledger: Ledger
    random: random.Random
    database: DatabaseProcess | None = None
    artifact_url: str | None = None
    lost: dict[str, int] = field(default_factory=dict)
    """How often each loss was brought about."""
    _to_come: list[tuple[str, Callable[[], bool]]] = field(default_factory=list)

    @property
    def urls(self) -> list[str]:
        """Servers that take requests."""
        return [server.base_url for server in self.servers if server.role != "worker"]

    def start(self) -> None:
        """Start all."""
        for server in self.servers:
            server.start(ready_within_s=READY_WITHIN_S)

    def lose_something(self) -> None:
        """Bring about one loss, and mend it; every kind comes before one comes again."""
        if not self._to_come:
            self._to_come = self._losses()
            self.random.shuffle(self._to_come)
        name, loss = self._to_come.pop()
        if loss():
            self.lost[name] = self.lost.get(name, 0) + 1

    def _losses(self) -> list[tuple[str, Callable[[], bool]]]:
        losses: list[tuple[str, Callable[[], bool]]] = [
            ("worker killed", self._kill_worker),
            ("main process killed", self._crash),
            ("machine lost", self._lose_machine),
            ("solve killed", self._kill_child),
            ("worker paused beyond its lease", self._pause_worker),
        ]
        if self.database is not None:
            losses.append(("database killed", self._kill_database))
        return losses

    def _kill_worker(self) -> bool:
        pids = [pid for server in self.servers for pid in _workers_of(server)]
        if not pids:
            return False
        pid = self.random.choice(pids)
        _send(pid, signal.SIGKILL)
        self._mend()
        return True

    def _kill_child(self) -> bool:
        pids = [pid for server in self.servers for pid in server.child_pids]
        if pids:
            _send(self.random.choice(pids), signal.SIGKILL)
        return bool(pids)

    def _pause_worker(self) -> bool:
        """Stop a worker until its lease is over: others take its jobs, and what it writes then is void."""
        pids = [pid for server in self.servers for pid in _workers_of(server)]
        if not pids:
            return False
        pid = self.random.choice(pids)
        _send(pid, signal.SIGSTOP)
        with suppress(psutil.TimeoutExpired, psutil.NoSuchProcess):
            psutil.Process(pid).wait(LEASE_S * 1.7)
        _send(pid, signal.SIGCONT)
        return True

    def _crash(self) -> bool:
        server = self.random.choice(self.servers)
        if not server.is_running:
            return False
        server.crash()
        try:
            eventually(lambda: not server.processes(), ORPHANS_WITHIN_S)
        except AssertionError:
            left = [f"{process.pid} {process.cmdline()[1:5]}" for process in server.processes()]
            self.ledger.violate(f"orphans {ORPHANS_WITHIN_S} s after their main process was killed: {left}")
        self._mend()
        return True

    def _lose_machine(self) -> bool:
        server = self.random.choice(self.servers)
        server.kill()
        self._mend()
        return True

    def _kill_database(self) -> bool:
        assert self.database is not None
        self.database.kill()
        self.database.start()
        self._mend()
        return True

    def _mend(self) -> None:
        """Start again what is gone; who lives must not need it."""
        for server in self.servers:
            if not server.is_running:
                server.kill()
                server.start(ready_within_s=READY_WITHIN_S)

    def settle(self) -> None:
        """Let everything run again."""
        self._mend()
        for server in self.servers:
            server.wait_ready(READY_WITHIN_S)

    def stop(self) -> None:
        """End all gracefully: exit code 0, no process left."""
        for server in self.servers:
            try:
                server.stop(within_s=30.0)
            except AssertionError as exc:
                self.ledger.violate(str(exc))

    def kill(self) -> None:
        """Kill all."""
        for server in self.servers:
            server.kill()


def _workers_of(server: Server) -> list[int]:
    """Worker processes; with the role ``worker`` the main process may be one itself."""
    if server.role == "worker" and server.is_running and not server.worker_pids:
        return [server.pid]
    return server.worker_pids


def _send(pid: int, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).send_signal(number)


def _settings(extra: Mapping[str, str]) -> dict[str, str]:
    return {"MOE_PLACEMENT_LEASE_SECONDS": str(LEASE_S), "MOE_PLACEMENT_CPUS": "2", **extra}


def sqlite_cluster(folder: Path, ledger: Ledger, *, seed: int) -> Cluster:
    """Three servers on one data directory."""
    data_dir = folder / "data"
    roles = ("all", "api", "worker")
    servers = [Server(data_dir, role=role, env=_settings({})) for role in roles]  # type: ignore[arg-type]
    return Cluster(servers=servers, ledger=ledger, random=random.Random(seed))


def postgres_cluster(
    folder: Path, ledger: Ledger, *, seed: int, url: str, database: DatabaseProcess
) -> Cluster:
    """Four servers as on four machines: a data directory each, artifacts and database shared."""
    artifacts = folder / "artifacts"
    artifacts.mkdir()
    artifact_url = f"file://{artifacts}"
    roles = ("api", "api", "worker", "worker")
    servers = [
        Server(
            folder / f"machine{number}",
            role=role,  # type: ignore[arg-type]
            database_url=url,
            env=_settings({"MOE_PLACEMENT_ARTIFACT_URL": artifact_url}),
        )
        for number, role in enumerate(roles)
    ]
    return Cluster(
        servers=servers,
        ledger=ledger,
        random=random.Random(seed),
        database=database,
        artifact_url=artifact_url,
    )
