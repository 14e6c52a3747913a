"""Reads any trace: what a file is, is found out from its content, never from its name.

A format is a module of `traces.importers` with `sniff` and `read`, listed in `READERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from placement.errors import InputError
from traces.files import reading
from traces.importers import dataset, npz
from traces.trace import Trace

__all__ = ["READERS", "TraceReader", "read_trace"]


class TraceReader(Protocol):
    """One trace format; a module with these two functions is one.

    Heavy libraries are imported inside `read`, and `sniff` looks at little.
    """

    def sniff(self, path: Path) -> bool:
        """Tell whether the file or folder is of this format, complete or not."""
        ...

    def read(self, path: Path) -> Trace:
        """Read it; every failure is an `InputError` that names the path."""
        ...


READERS: Mapping[str, TraceReader] = MappingProxyType({"dataset": dataset, "npz": npz})
"""Trace formats by the name that ``--from`` takes, in the order in which they are tried."""


def read_trace(path: str | Path, *, format: str | None = None) -> Trace:
    """Read a routing trace of any known format.

    Parameters
    ----------
    path
        File or folder.
    format
        A key of `READERS`, to insist on that format; found out from the content by default.

    Raises
    ------
    InputError
        If there is no such path, it is of no known format, damaged, or no valid trace.
    """
    path = Path(path)
    with reading(path):
        if format is not None and format not in READERS:
            raise InputError(f"cannot be read as {format!r}; known formats: {', '.join(READERS)}")
        if not path.is_dir() and not path.is_file():
            raise InputError("is neither a file nor a folder" if path.exists() else "does not exist")
        name = format or _sniff(path)
    return READERS[name].read(path)


def _sniff(path: Path) -> str:
    for name, reader in READERS.items():
        if reader.sniff(path):
            return name
    if path.is_dir():
        raise InputError("is a folder, but no recorded data set: it has no manifest.rankNNNNN.json")
    with path.open("rb") as file:
        head = file.read(16)
    raise InputError(
        f"is no trace of a known format ({', '.join(READERS)}): it "
        + (f"begins with {head!r}" if head else "is empty")
    )
