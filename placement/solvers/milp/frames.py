"""Programs, limits and outcomes as bytes on a pipe: a length, then an ``.npz`` archive without pickles.

Shape letters: V variables.
"""

from __future__ import annotations

import io
import struct
from dataclasses import asdict, fields
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from placement.solvers.milp.backend import Limits, Outcome
from placement.solvers.milp.formulation import FloatArray, MilpProgram
from placement.solvers.milp.result import Limit, MilpStatus

__all__ = [
    "Frame",
    "error_frame",
    "improved_frame",
    "outcome_frame",
    "outcome_of",
    "read_frame",
    "request_frame",
    "request_of",
    "write_frame",
]

Frame = dict[str, npt.NDArray[Any]]

_LENGTH = struct.Struct("<q")


def write_frame(stream: IO[bytes], frame: Frame) -> None:
    """Write one frame and flush it."""
    buffer = io.BytesIO()
    np.savez(buffer, **frame)  # type: ignore[arg-type]
    stream.write(_LENGTH.pack(buffer.tell()))
    stream.write(buffer.getbuffer())
    stream.flush()


def read_frame(stream: IO[bytes]) -> Frame | None:
    """Read one frame; None where the stream has ended, even in the middle of one."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = stream.read(length)
    if len(body) < length:
        return None
    with np.load(io.BytesIO(body), allow_pickle=False) as archive:
        return dict(archive)


def request_frame(program: MilpProgram, backend: str, limits: Limits, memory_bytes: int) -> Frame:
    """Pack what a child needs to know."""
    frame = {
        f"program.{entry.name}": np.asarray(getattr(program, entry.name))
        for entry in fields(program)
        if getattr(program, entry.name) is not None
    }
    frame |= {
        f"limits.{name}": np.asarray(value) for name, value in asdict(limits).items() if value is not None
    }
    return frame | {"backend": np.asarray(backend), "memory_bytes": np.asarray(memory_bytes)}


def request_of(frame: Frame) -> tuple[MilpProgram, str, Limits, int]:
    """Unpack what `request_frame` packed."""

    def part(name: str) -> dict[str, Any]:
        chosen = {key.partition(".")[2]: value for key, value in frame.items() if key.startswith(f"{name}.")}
        return {key: value.item() if value.ndim == 0 else value for key, value in chosen.items()}

    return (
        MilpProgram(**part("program")),
        str(frame["backend"]),
        Limits(**part("limits")),
        int(frame["memory_bytes"]),
    )


def improved_frame(value_V: FloatArray, bound: float) -> Frame:
    """Pack a better point and the bound at that time."""
    return {"kind": np.asarray("improved"), "value_V": value_V, "bound": np.asarray(bound)}


def error_frame(message: str) -> Frame:
    """Pack the reason why there is no outcome."""
    return {"kind": np.asarray("error"), "message": np.asarray(message)}


def outcome_frame(outcome: Outcome) -> Frame:
    """Pack an outcome."""
    frame = {
        "kind": np.asarray("outcome"),
        "status": np.asarray(str(outcome.status)),
        "bound": np.asarray(outcome.bound),
        "limit": np.asarray(str(outcome.limit)),
        "rows_hold": np.asarray(outcome.rows_hold),
    }
    return frame if outcome.value_V is None else frame | {"value_V": outcome.value_V}


def outcome_of(frame: Frame) -> Outcome:
    """Unpack what `outcome_frame` packed."""
    return Outcome(
        status=MilpStatus(str(frame["status"])),
        value_V=frame.get("value_V"),
        bound=float(frame["bound"]),
        limit=Limit(str(frame["limit"])),
        rows_hold=bool(frame["rows_hold"]),
    )
