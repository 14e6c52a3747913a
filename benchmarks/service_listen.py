"""Many listeners of one job's events in a process of its own: when each event came to each of them.

``python -m benchmarks.service_listen HOST PORT JOB_ID LISTENERS`` prints ``listening`` when all are connected
and, after the last ``done``, one JSON list of ``[event, seconds since the epoch]`` for every listener.
"""

from __future__ import annotations

import json
import re
import select
import socket
import subprocess
import sys
import time

__all__ = ["Listeners", "main"]

EVENT = re.compile(rb"(?:^|\n)id: ?(\d+)\r?\n")
DONE = re.compile(rb"(?:^|\n)event: ?done\r?\n")
LONGEST_S = 120.0


class _Stream:
    """One listener."""

    __slots__ = ("came", "content", "searched", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.content = bytearray()
        self.searched = 0
        self.came: list[tuple[int, float]] = []

    @property
    def is_open(self) -> bool:
        """Whether the head of the answer has come."""
        return b"\r\n\r\n" in self.content

    def take(self, chunk: bytes, at_s: float) -> bool:
        """Take some bytes; False after the last event."""
        self.content += chunk
        for found in EVENT.finditer(self.content, self.searched):
            self.came.append((int(found[1]), at_s))
            self.searched = found.end() - 1
        return bool(chunk) and DONE.search(self.content, max(0, len(self.content) - 2000)) is None


def _open(host: str, port: int, job_id: str) -> _Stream:
    sock = socket.create_connection((host, port), timeout=LONGEST_S)
    sock.sendall(
        f"GET /v1/solves/{job_id}/events HTTP/1.1\r\nHost: {host}:{port}\r\n"
        "Accept: text/event-stream\r\n\r\n".encode()
    )
    return _Stream(sock)


def _listen(host: str, port: int, job_id: str, listeners: int) -> list[list[tuple[int, float]]]:
    streams = [_open(host, port, job_id) for _ in range(listeners)]
    poll, open_streams = select.epoll(), {stream.sock.fileno(): stream for stream in streams}
    for number in open_streams:
        poll.register(number, select.EPOLLIN)
    announced, until_s = False, time.monotonic() + LONGEST_S
    while open_streams and time.monotonic() < until_s:
        for number, _ in poll.poll(1.0):
            stream = open_streams[number]
            if not stream.take(stream.sock.recv(1 << 16), time.time()):
                poll.unregister(number)
                del open_streams[number]
                stream.sock.close()
        if not announced and all(stream.is_open for stream in streams):
            announced = True
            print("listening", flush=True)
    return [stream.came for stream in streams]


class Listeners:
    """Listeners in a process of their own."""

    def __init__(self, host: str, port: int, job_id: str, listeners: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.service_listen", host, str(port), job_id, str(listeners)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        if said != "listening":
            raise RuntimeError(f"the listeners could not begin: {said}")

    def end(self) -> list[list[tuple[int, float]]]:
        """Wait for the end of all streams; return what came, and when."""
        said, _ = self._process.communicate(timeout=LONGEST_S)
        found: list[list[tuple[int, float]]] = json.loads(said)
        return found


def main() -> None:
    """Listen."""
    host, port, job_id, listeners = sys.argv[1:]
    json.dump(_listen(host, int(port), job_id, int(listeners)), sys.stdout)


if __name__ == "__main__":
    main()
