"""Reads recorded data sets, the project's own format (`traces.store`)."""

from __future__ import annotations

from pathlib import Path

from traces.trace import Trace

__all__ = ["read", "sniff"]


def sniff(path: Path) -> bool:
    """Tell whether `path` is a folder with a manifest of ours."""
    return path.is_dir() and any(path.glob("manifest.rank*.json"))


def read(path: Path) -> Trace:
    """Read the data set of folder `path`; raises `InputError` as `traces.store.read_dataset` does."""
    from traces.store import read_dataset  # pyarrow takes a while to import

    return read_dataset(path)
