"""Recorded data sets: a folder of Parquet fragments, local or behind a URL, that is valid after every write.

`DatasetWriter` records, `DatasetSource` reads as a stream, `merge_datasets` joins. Each rank has a manifest,
its fragments, and while it records a spool. Names are imported on first use, so that nothing pays for Arrow
that does not use it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from traces.store.columns import ColumnBlock, ColumnSource, columns_of
    from traces.store.manifest import FORMAT, FragmentError
    from traces.store.merge import merge_datasets
    from traces.store.source import DatasetSource
    from traces.store.spool import Recovery
    from traces.store.whole import clear_dataset, read_dataset, write_dataset, write_npz
    from traces.store.writer import FRAGMENT_TOKENS, DatasetWriter

_HOME = {
    "FORMAT": "manifest",
    "FRAGMENT_TOKENS": "writer",
    "ColumnBlock": "columns",
    "ColumnSource": "columns",
    "DatasetSource": "source",
    "DatasetWriter": "writer",
    "FragmentError": "manifest",
    "Recovery": "spool",
    "clear_dataset": "whole",
    "columns_of": "columns",
    "merge_datasets": "merge",
    "read_dataset": "whole",
    "write_dataset": "whole",
    "write_npz": "whole",
}

__all__ = [
    "FORMAT",
    "FRAGMENT_TOKENS",
    "ColumnBlock",
    "ColumnSource",
    "DatasetSource",
    "DatasetWriter",
    "FragmentError",
    "Recovery",
    "clear_dataset",
    "columns_of",
    "merge_datasets",
    "read_dataset",
    "write_dataset",
    "write_npz",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"traces.store.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
