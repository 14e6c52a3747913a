"""Reads recorded data sets, the project's own format (`traces.store`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from placement.errors import InputError
from traces.source import MemorySource, TraceSource

if TYPE_CHECKING:
    from traces.readers import ReadOptions

__all__ = ["open", "open_url", "sniff"]


def sniff(path: Path) -> bool:
    """Tell whether `path` is a folder with a manifest of ours."""
    return path.is_dir() and any(path.glob("manifest.rank*.json"))


def open(path: Path, options: ReadOptions) -> TraceSource:
    """Open the data set of folder `path`; raises `InputError` as `traces.store.read_dataset` does."""
    from traces.store import read_dataset  # pyarrow takes a while to import

    return MemorySource(read_dataset(path))


def open_url(url: str) -> TraceSource:
    """Open a data set that lies behind a URL."""
    raise InputError(f"{url}: cannot be read; copy the data set to a local folder")
