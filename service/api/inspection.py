"""Has uploaded files looked into by `service.inspect`, within bounds on time, memory and processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import structlog

from service.errors import InvalidError, TooLargeError, UnavailableError
from service.settings import Settings

__all__ = ["Inspector", "child_environment"]

MOST_AT_ONCE = 2
TIME_LIMIT_S = 120.0
MOST_REPLY_BYTES = 1 << 20
LEAST_MEMORY_BYTES = 4 << 30
"""Of address space: the libraries that open traces take a part of it before they begin."""

ROOT = Path(__file__).parents[2]

_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "NUMBA_CACHE_DIR")
"""Of the environment the child gets these: it has no use for our secrets."""

_log = structlog.get_logger("service.inspection")


class Inspector:
    """Starts the children, a few at a time.

    Parameters
    ----------
    settings
        For the limits.
    """

    def __init__(self, settings: Settings) -> None:
        self._limits = {
            "memory_bytes": max(settings.solve_memory_bytes, LEAST_MEMORY_BYTES),
            "cpu_s": int(TIME_LIMIT_S),
            "file_bytes": settings.max_unpacked_bytes,
            "unpacked_bytes": settings.max_unpacked_bytes,
            "core_bytes": 0,
        }
        self._turn = asyncio.Semaphore(MOST_AT_ONCE)

    async def ask(
        self, task: str, path: Path, *, limits: Mapping[str, int] | None = None, **details: Any
    ) -> Any:
        """Have one file looked into.

        Parameters
        ----------
        task
            ``trace``, ``figures``, ``loads``, ``placement`` or ``zstd``.
        limits
            Which replace the usual ones.
        details
            Further entries of the request.

        Raises
        ------
        InvalidError
            If the file is not what it should be.
        TooLargeError
            If it is larger than allowed once it is unpacked.
        """
        request = {
            "task": task,
            "path": str(path),
            "parent": os.getpid(),
            "limits": {**self._limits, **(limits or {})},
            **details,
        }
        async with self._turn:
            code, reply = await _run(request, path.parent)
        if code == 0 and "error" not in reply and "too_large" not in reply:
            return reply
        if "too_large" in reply:
            raise TooLargeError(f"the body unpacks to more than {request['limits']['unpacked_bytes']} bytes")
        if "error" in reply:
            raise InvalidError(_sentence(reply["error"]))
        raise InvalidError(_end(code))


async def _run(request: Mapping[str, Any], folder: Path) -> tuple[int, dict[str, Any]]:
    """Run one child; return its exit code and reply, which is empty where there is none."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "service.inspect"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=folder,
        env=child_environment(),
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(TIME_LIMIT_S):
            out, told = await child.communicate(orjson.dumps(request))
    except TimeoutError:
        return -signal.SIGXCPU, {}
    finally:
        if child.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()
    if child.returncode:
        _log.warning("inspection ended", code=child.returncode, told=told[-2000:].decode("utf-8", "replace"))
        return child.returncode, {}
    last = out[-MOST_REPLY_BYTES:].rstrip().rpartition(b"\n")[2]
    reply: dict[str, Any] = orjson.loads(last)
    return 0, reply


def child_environment() -> dict[str, str]:
    """Return what of our environment the child gets: nothing that it could tell anybody."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _sentence(error: str) -> str:
    """Return a reader's complaint, which begins with its verb, with a subject."""
    verb = error.partition(" ")[0]
    return f"the file {error}" if verb.isalpha() and verb.islower() and verb.endswith("s") else error


def _end(code: int) -> str:
    """Return what it means that the child ended without a word."""
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"the file takes more than {TIME_LIMIT_S:g} s, or more memory than allowed, to be opened"
    if code == -signal.SIGXFSZ:
        raise UnavailableError("the file needs more room to be opened than allowed")
    return "the file cannot be opened: it is damaged, or of a kind that makes its reader fail"
