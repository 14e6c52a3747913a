"""Routing traces: recorded, read from files, stored, summarised and synthesised.

`traces.trace` holds the data, `traces.readers` finds out what a file is, `traces.store` writes data sets,
`traces.statistics` turns a trace into what the optimizer needs. The names below are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from traces.readers import read_trace
    from traces.statistics import build_profile, describe
    from traces.store import DatasetWriter, write_dataset, write_npz
    from traces.trace import Trace

_HOME = {
    "DatasetWriter": "store",
    "Trace": "trace",
    "build_profile": "statistics",
    "describe": "statistics",
    "read_trace": "readers",
    "write_dataset": "store",
    "write_npz": "store",
}

__all__ = [
    "DatasetWriter",
    "Trace",
    "build_profile",
    "describe",
    "read_trace",
    "write_dataset",
    "write_npz",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"traces.{_HOME[name]}"), name)
    raise AttributeError(f"module 'traces' has no attribute {name!r}")
