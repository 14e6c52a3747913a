"""How the process of a job talks to its worker: lines of JSON out, one word in, on descriptors of their own.

Standard output is left to solvers written in C++, and thrown away.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from placement.io import dump_json
from service.jobs.messages import CHUNK_BYTES

__all__ = ["Channel"]


class Channel:
    """The process's end: takes standard input and output for itself.

    Must be made before anything prints.
    """

    def __init__(self) -> None:
        # Copies are not inherited: a solver's own processes neither read our orders nor write our messages.
        self._out = os.dup(1)
        self._in = os.dup(0)
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        self._turn = threading.Lock()

    def send(self, kind: str, content: Mapping[str, Any]) -> None:
        """Send a message; waits while the worker does not read."""
        left = memoryview(f"{dump_json({**content, 'kind': kind})}\n".encode())
        with self._turn:
            while left:
                left = left[os.write(self._out, left) :]

    def listen(self, on_stop: Callable[[], None], on_end: Callable[[], None]) -> None:
        """Follow the worker's orders in the background; its end is one."""

        def follow() -> None:
            while word := os.read(self._in, CHUNK_BYTES):
                if b"stop" in word:
                    on_stop()
            on_end()

        threading.Thread(target=follow, daemon=True, name="orders").start()
