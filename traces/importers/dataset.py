"""Reads recorded data sets, the project's own format (`traces.store`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from traces.source import TraceSource

if TYPE_CHECKING:
    from traces.readers import ReadOptions

__all__ = ["open", "open_url", "sniff"]


def sniff(path: Path) -> bool:
    """Tell whether `path` is a folder with a manifest of ours."""
    return path.is_dir() and any(path.glob("manifest.rank*.json"))


def open(path: Path, options: ReadOptions) -> TraceSource:
    """Open the data set of folder `path` by its manifests; raises `InputError` as `DatasetSource` does."""
    from traces.store import DatasetSource  # pyarrow takes a while to import

    return DatasetSource(path)


def open_url(url: str) -> TraceSource:
    """Open a data set that lies behind a URL, of any kind that fsspec knows here."""
    from traces.store import DatasetSource

    return DatasetSource(url)
