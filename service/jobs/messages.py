"""What the process of a job says, a line of JSON each: what comes in at the worker's end.

``progress`` (phase, ...), ``incumbent`` (figures, kept), ``result`` (result, file, ...), ``error`` (code,
message).
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["CHUNK_BYTES", "Message", "lines_of", "read_message"]

CHUNK_BYTES = 1 << 16
MOST_LINE_BYTES = 64 << 20

Message = dict[str, Any]


def lines_of(buffer: bytearray, chunk: bytes) -> list[bytes]:
    """Add what was read to a buffer; return the lines that are complete, and leave the rest in it.

    Raises
    ------
    ValueError
        If a line has no end.
    """
    buffer += chunk
    if b"\n" not in chunk:
        if len(buffer) > MOST_LINE_BYTES:
            raise ValueError(f"a message has more than {MOST_LINE_BYTES:,} bytes")
        return []
    *lines, rest = bytes(buffer).split(b"\n")
    buffer[:] = rest
    return lines


def read_message(line: bytes) -> Message:
    """Return a message of `Channel.send`.

    Raises
    ------
    ValueError
        If it is none.
    """
    message = json.loads(line)
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise ValueError(f"no message: {line[:80]!r}")
    return message
