"""Reads saved statistics (`traces.statistics.file`): traffic of which counts and a sample are left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from traces.readers import ReadOptions
    from traces.statistics import RoutingStatistics

__all__ = ["open", "sniff"]

_FIRST_ENTRY = b"moe-statistics.json"
_LOCAL_HEADER_BYTES = 30


def sniff(path: Path) -> bool:
    """Tell whether `path` is a zip archive that begins with the head of statistics, complete or not."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_LOCAL_HEADER_BYTES)
        return head.startswith(b"PK\x03\x04") and file.read(len(_FIRST_ENTRY)) == _FIRST_ENTRY


def open(path: Path, options: ReadOptions) -> RoutingStatistics:
    """Read the statistics; raises `InputError` as `traces.statistics.load` does."""
    from traces.statistics.file import load

    return load(path)
