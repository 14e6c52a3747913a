"""The controller's side of its child: started when there is something to compute, gone when there is not."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import orjson

from placement.errors import ServiceError
from service.settings import Settings

__all__ = ["CalculationError", "Calculator", "RefusedError"]

LIMIT_S = 300.0
"""A question that takes longer is given up."""

TICK_S = 0.2
READ_BYTES = 1 << 16


class CalculationError(ServiceError):
    """The child had no answer: how it ended."""


class RefusedError(CalculationError):
    """The question makes no sense: why. To ask again is of no use."""


class Calculator:
    """Asks a child process, one question at a time.

    Parameters
    ----------
    settings
        As of this process; the child runs with the same.
    idle_s
        Seconds without a question after which `rest` ends the child: it holds memory.
    """

    def __init__(self, settings: Settings, *, idle_s: float = 10.0) -> None:
        self._settings = settings
        self._idle_s = idle_s
        self._child: subprocess.Popen[bytes] | None = None
        self._used = 0.0

    def ask(
        self, task: str, *, meanwhile: Callable[[], None] = lambda: None, **question: Any
    ) -> dict[str, Any]:
        """Return the answer to a question.

        Parameters
        ----------
        meanwhile
            Called a few times a second while the child computes; what it raises ends the child.

        Raises
        ------
        RefusedError
            If the question makes no sense.
        CalculationError
            If the child dies or takes too long.
        """
        child = self._started()
        assert child.stdin is not None
        try:
            child.stdin.write(orjson.dumps({"task": task, **question}) + b"\n")
            child.stdin.flush()
            reply = orjson.loads(self._line(child, meanwhile))
        except (OSError, orjson.JSONDecodeError) as exc:
            self.close()
            raise CalculationError(f"the process that computes {task} ended: {exc}") from exc
        except BaseException:
            self.close()
            raise
        self._used = time.monotonic()
        if "error" in reply:
            raise RefusedError(reply["error"])
        answer: dict[str, Any] = reply["answer"]
        return answer

    def rest(self) -> None:
        """End a child that has had nothing to do for a while."""
        if self._child is not None and time.monotonic() - self._used > self._idle_s:
            self.close()

    def close(self) -> None:
        """End the child at once."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                # What was not read by then need not be.
                with suppress(BrokenPipeError):
                    stream.close()
        child.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is not None:
            self.close()
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "service.deployments.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**self._settings.environment(), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
            self._used = time.monotonic()
        return self._child

    def _line(self, child: subprocess.Popen[bytes], meanwhile: Callable[[], None]) -> bytes:
        assert child.stdout is not None
        deadline = time.monotonic() + LIMIT_S
        line = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if time.monotonic() > deadline:
                    raise CalculationError(f"nothing was computed within {LIMIT_S:.0f} s")
                if not selector.select(TICK_S):
                    meanwhile()
                    continue
                chunk = os.read(child.stdout.fileno(), READ_BYTES)
                if not chunk:
                    raise CalculationError(f"the process that computes ended with code {child.wait()}")
                line += chunk
        return bytes(line)
