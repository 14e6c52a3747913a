"""Load on an HTTP server from a process of its own: keep-alive connections, prepared requests, one loop.

``python -m benchmarks.service_load`` reads a plan (JSON) from stdin and prints what it measured. It asks in a
closed loop (every connection sends the next request when it has its answer) or paced (every connection sends
one request each so many seconds, at its own offset, and counts the wait from the time at which it was due).
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Load", "Measured", "Plan", "apply_load", "ceiling", "main", "trivial_server"]

CHUNK_BYTES = 1 << 18
HEAD_END = b"\r\n\r\n"
LONGEST_WAIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to ask for.

    Parameters
    ----------
    requests
        Whole requests as text, taken in turn by all connections; ``%KEY%`` in one becomes a number that no
        other request of the run has.
    connections
        Concurrent callers.
    seconds
        How long; answers that come later do not count.
    every_s
        Time between the requests of one connection; None for a closed loop.
    warm_s
        Time before the measurement in which answers do not count.
    expect
        Status of every answer; others are counted as failures.
    """

    port: int
    requests: tuple[str, ...]
    connections: int = 16
    seconds: float = 5.0
    every_s: float | None = None
    warm_s: float = 1.0
    expect: int = 200
    host: str = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What came back."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    most_ms: float
    answered: int
    answered_in_all: int
    """Those of the warm-up too."""
    failed: int
    received_mb_per_s: float
    load_cpu: float
    """Share of one core that the load generator took."""
    failures: dict[str, int] = field(default_factory=dict)

    def line(self) -> str:
        """Return one line for a person."""
        return (
            f"{self.requests_per_s:.0f}/s, p50 {self.p50_ms:.1f} ms, p99 {self.p99_ms:.1f} ms, "
            f"{self.failed} failed, generator {self.load_cpu:.0%} of a core"
        )


class _Connection:
    """One caller: a socket, what it has received, and when its request was due."""

    __slots__ = ("due_s", "have", "need", "sent", "sock", "status", "waiting")

    def __init__(self, sock: socket.socket, due_s: float) -> None:
        self.sock = sock
        self.due_s = due_s
        self.waiting = False
        self.have = bytearray()
        self.need = -1
        self.status = 0
        self.sent = 0.0

    def take(self, chunk: memoryview) -> bool:
        """Take some bytes of the answer; True at its end."""
        if self.need < 0:
            self.have += chunk
            end = self.have.find(HEAD_END)
            if end < 0:
                return False
            self.status = int(self.have[9:12])
            body_bytes = _content_length(bytes(self.have[:end])) if self.status != 304 else 0
            self.need = end + len(HEAD_END) + body_bytes - len(self.have)
            self.have.clear()
        else:
            self.need -= len(chunk)
        return self.need <= 0


def _content_length(head: bytes) -> int:
    at = head.lower().find(b"\r\ncontent-length:")
    if at < 0:
        raise ValueError(f"an answer without Content-Length: {head[:200]!r}")
    return int(head[at + 17 :].split(b"\r\n", 1)[0])


class Load:
    """One run of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._requests = [text.encode() for text in plan.requests]
        self._number = 0
        self._poll = select.epoll()
        self._open: dict[int, _Connection] = {}
        self._took_s: list[float] = []
        self._failures: dict[str, int] = {}
        self._received_bytes = 0
        self._answers = 0

    def run(self) -> Measured:
        """Ask until the time is over."""
        plan, now_s = self.plan, time.perf_counter()
        for number in range(plan.connections):
            offset_s = 0.0 if plan.every_s is None else plan.every_s * number / plan.connections
            self._connect(now_s + offset_s)
        counts_from_s = now_s + plan.warm_s
        until_s = counts_from_s + plan.seconds
        cpu_s = time.process_time()
        self._loop(counts_from_s, until_s)
        cpu_s = time.process_time() - cpu_s
        for connection in self._open.values():
            connection.sock.close()
        self._poll.close()
        return self._measured(cpu_s / (plan.seconds + plan.warm_s))

    def _connect(self, due_s: float) -> None:
        sock = socket.create_connection((self.plan.host, self.plan.port), timeout=LONGEST_WAIT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self._open[sock.fileno()] = _Connection(sock, due_s)
        self._poll.register(sock.fileno(), select.EPOLLIN)

    def _loop(self, counts_from_s: float, until_s: float) -> None:
        buffer = bytearray(CHUNK_BYTES)
        view = memoryview(buffer)
        while (now_s := time.perf_counter()) < until_s:
            next_s = self._send_due(now_s)
            wait_s = min(until_s, next_s) - time.perf_counter()
            for number, _ in self._poll.poll(max(0.0, wait_s)):
                connection = self._open[number]
                if self._receive(connection, view):
                    self._note(connection, time.perf_counter(), counts_from_s)

    def _send_due(self, now_s: float) -> float:
        """Send what is due; return when the next one is."""
        next_s = float("inf")
        for connection in list(self._open.values()):
            if connection.waiting:
                continue
            if connection.due_s <= now_s:
                self._send(connection)
            else:
                next_s = min(next_s, connection.due_s)
        return next_s

    def _send(self, connection: _Connection) -> None:
        self._number += 1
        request = self._requests[self._number % len(self._requests)]
        request = request.replace(b"%KEY%", b"%09d" % self._number)
        connection.waiting, connection.need = True, -1
        connection.sent = connection.due_s if self.plan.every_s is not None else time.perf_counter()
        connection.sock.sendall(request)

    def _receive(self, connection: _Connection, view: memoryview) -> bool:
        try:
            got = connection.sock.recv_into(view)
        except BlockingIOError:
            return False
        except ConnectionError as exc:
            return self._reopen(connection, type(exc).__name__)
        if got == 0:
            return self._reopen(connection, "closed")
        self._received_bytes += got
        return connection.take(view[:got])

    def _reopen(self, connection: _Connection, why: str) -> bool:
        self._failures[why] = self._failures.get(why, 0) + 1
        number = connection.sock.fileno()
        self._poll.unregister(number)
        del self._open[number]
        connection.sock.close()
        self._connect(time.perf_counter())
        return False

    def _note(self, connection: _Connection, now_s: float, counts_from_s: float) -> None:
        self._answers += 1
        if connection.status != self.plan.expect:
            name = str(connection.status)
            self._failures[name] = self._failures.get(name, 0) + 1
        elif connection.sent >= counts_from_s:
            self._took_s.append(now_s - connection.sent)
        connection.waiting = False
        if self.plan.every_s is None:
            connection.due_s = now_s
            self._send(connection)
        else:
            connection.due_s = max(connection.due_s + self.plan.every_s, connection.due_s)

    def _measured(self, cpu: float) -> Measured:
        took_s = sorted(self._took_s) or [float("nan")]
        return Measured(
            requests_per_s=len(self._took_s) / self.plan.seconds,
            p50_ms=_quantile(took_s, 0.5) * 1e3,
            p99_ms=_quantile(took_s, 0.99) * 1e3,
            most_ms=took_s[-1] * 1e3,
            answered=len(self._took_s),
            answered_in_all=self._answers,
            failed=sum(self._failures.values()),
            received_mb_per_s=self._received_bytes / (self.plan.seconds + self.plan.warm_s) / 1e6,
            load_cpu=cpu,
            failures=self._failures,
        )


def _quantile(sorted_values: Sequence[float], share: float) -> float:
    return sorted_values[min(len(sorted_values) - 1, int(share * len(sorted_values)))]


def apply_load(plan: Plan) -> Measured:
    """Run a plan in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.service_load"],
        input=json.dumps(asdict(plan)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the load generator failed: {done.stderr}")
    return Measured(**json.loads(done.stdout))


def trivial_server(body_bytes: int) -> None:
    """Answer every request with the same bytes, as fast as one Python process can; prints its port first."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % body_bytes + b"x" * body_bytes
    poll, connections = select.epoll(), dict[int, socket.socket]()
    with socket.create_server(("127.0.0.1", 0)) as door:
        print(door.getsockname()[1], flush=True)
        poll.register(door.fileno(), select.EPOLLIN)
        while True:
            for number, _ in poll.poll():
                if number == door.fileno():
                    sock, _ = door.accept()
                    connections[sock.fileno()] = sock
                    poll.register(sock.fileno(), select.EPOLLIN)
                elif not _answered(connections[number], answer):
                    poll.unregister(number)
                    connections.pop(number).close()


def _answered(sock: socket.socket, answer: bytes) -> bool:
    """Answer a request; False where the caller is gone."""
    try:
        if not sock.recv(1 << 16):
            return False
        sock.sendall(answer)
    except ConnectionError:
        return False
    return True


def ceiling(body_bytes: int, *, connections: int, seconds: float) -> Measured:
    """Return what the load generator reaches against `trivial_server`."""
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.service_load", "--trivial", str(body_bytes)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        request = "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        return apply_load(Plan(port=port, requests=(request,), connections=connections, seconds=seconds))
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


def main() -> None:
    """Run the plan on stdin, or the trivial server."""
    if sys.argv[1:2] == ["--trivial"]:
        trivial_server(int(sys.argv[2]))
        return
    plan: dict[str, Any] = json.load(sys.stdin)
    found = Load(Plan(**{**plan, "requests": tuple(plan["requests"])})).run()
    json.dump(asdict(found), sys.stdout)


if __name__ == "__main__":
    main()
