"""Reads any trace: what a file is, is found out from its content, never from its name.

A format is a module of `traces.importers` with `sniff` and `open`, listed in `READERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from placement.errors import InputError
from traces.counts import ExpertCounts
from traces.files import reading
from traces.importers import (
    dataset,
    megatron,
    npz,
    sglang_counts,
    sglang_response,
    sglang_stat,
    sglang_tokens,
    statistics,
    tensorrt_llm,
    vllm,
    vllm_ascend,
)
from traces.source import MemorySource, TraceSource, read_all
from traces.trace import Trace

if TYPE_CHECKING:
    from placement.model_shape import ModelShape

__all__ = ["READERS", "ReadOptions", "TraceReader", "open_trace", "read_trace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """What a reader may be told beside the path; formats that know it themselves pay no heed.

    Parameters
    ----------
    model
        Shape of the model: its layer map, and top-k for formats that lack it.
    physical_map
        File that says which logical expert each physical slot held, for dumps of physical ids that lack it.
    domain
        Name of the kind of traffic that every token gets.
    """

    model: ModelShape | None = None
    physical_map: Path | None = None
    domain: str | None = None


class TraceReader(Protocol):
    """One trace format; a module with these two functions is one.

    Heavy libraries are imported inside `open`, and `sniff` looks at little.
    """

    def sniff(self, path: Path) -> bool:
        """Tell whether the file or folder is of this format, complete or not."""
        ...

    def open(self, path: Path, options: ReadOptions) -> TraceSource | ExpertCounts:
        """Open it, reading no more than needed to know its header; every failure names the path.

        Raises
        ------
        InputError
            If it is damaged, or lacks what only `options` can tell.
        """
        ...


READERS: Mapping[str, TraceReader] = MappingProxyType(
    {
        "dataset": dataset,
        "statistics": statistics,
        "npz": npz,
        "sglang-tokens": sglang_tokens,
        "sglang-stat": sglang_stat,
        "sglang-counts": sglang_counts,
        "sglang-response": sglang_response,
        "vllm": vllm,
        "tensorrt-llm": tensorrt_llm,
        "megatron": megatron,
        "vllm-ascend": vllm_ascend,
    }
)
"""Trace formats by the name that ``--from`` takes, in the order in which they are tried."""


def open_trace(
    path: str | Path, *, format: str | None = None, options: ReadOptions | None = None
) -> TraceSource | ExpertCounts:
    """Open routing traffic of any known format, token by token or counted.

    Parameters
    ----------
    path
        File or folder, or the URL of a recorded data set (``s3://...``).
    format
        A key of `READERS`, to insist on that format; found out from the content by default.
    options
        What the format itself may not know.

    Raises
    ------
    InputError
        If there is no such path, it is of no known format, or damaged.
    """
    if "://" in str(path):
        return dataset.open_url(str(path))
    path = Path(path)
    with reading(path):
        if format is not None and format not in READERS:
            raise InputError(f"cannot be read as {format!r}; known formats: {', '.join(READERS)}")
        if not path.is_dir() and not path.is_file():
            raise InputError("is neither a file nor a folder" if path.exists() else "does not exist")
        name = format or _sniff(path)
    return READERS[name].open(path, options or ReadOptions())


def read_trace(path: str | Path, *, format: str | None = None, options: ReadOptions | None = None) -> Trace:
    """Read a routing trace of any known format whole; use `open_trace` for what may not fit in memory.

    Parameters
    ----------
    path, format, options
        As for `open_trace`.

    Raises
    ------
    InputError
        If there is no such path, it is of no known format, damaged, no valid trace, or knows expert counts
        alone.
    """
    source = open_trace(path, format=format, options=options)
    if isinstance(source, ExpertCounts):
        raise InputError(f"{path}: holds expert counts, not which experts each token selected")
    return source.trace if isinstance(source, MemorySource) else read_all(source)


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
