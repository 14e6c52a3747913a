"""Keeps statistics in a file: a zip archive of a JSON head and plain NumPy arrays, nothing pickled.

The first entry is ``moe-statistics.json``: the format's name and all that is no array. Then come the arrays
as ``NAME.npy``, compressed, in the smallest type that holds them. Files come from strangers: sizes are
checked before anything is unpacked, and counts against each other.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.files import check_size, reading, writing_whole
from traces.source import TraceHeader
from traces.statistics.routing import RoutingStatistics
from traces.statistics.sample import TokenSample
from traces.statistics.segment import Segment

__all__ = ["FORMAT", "HEAD", "load", "save"]

Array = npt.NDArray[Any]

FORMAT = "moe-statistics/1"
"""Name of the format, in the file's head."""

HEAD = "moe-statistics.json"
"""Name of the first entry."""

_FOREIGN = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    KeyError,
    TypeError,
)
_MOST_HEAD_BYTES = 1 << 24
_MOST_TOKENS = 1 << 62
_COMPRESSION = 4
_COUNTS = (
    "load_LE",
    "load_WLE",
    "time_load_BLE",
    "transitions_LEE",
    "first_transitions_LEE",
    "coactivation_LEE",
    "rank_R",
    "rank_tokens_R",
    "home_load_RLE",
    "domain_tokens_C",
    "domain_load_CLE",
)
_NEEDED = ("load_LE", "load_WLE", "time_load_BLE")
_SIGNED = ("rank_R", "rank_tokens_R", "domain_tokens_C")
_SAMPLE = "sample."


def save(statistics: RoutingStatistics, path: str | Path, *, with_sample: bool = True) -> None:
    """Write statistics to a file, whole or not at all.

    Parameters
    ----------
    statistics
        The statistics.
    path
        The file; one that is there is replaced.
    with_sample
        Whether to write the sampled tokens, which say what single tokens selected.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    if not with_sample:
        statistics = replace(statistics, sample=None)
    arrays = {name: _narrow(array) for name, array in statistics.arrays().items()}
    head = {"format": FORMAT, **statistics.plain(), "arrays": list(arrays)}
    with (
        writing_whole(Path(path)) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=_COMPRESSION) as archive,
    ):
        archive.writestr(zipfile.ZipInfo(HEAD), json.dumps(head))
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")
            info.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(info, "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def _narrow(array: Array) -> Array:
    """Return integers in the smallest little-endian type that holds them."""
    if array.dtype.kind == "f":
        return array.astype("<f8", copy=False)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    kind = "u" if low >= 0 else "i"
    for size in (1, 2, 4):
        limits = np.iinfo(f"{kind}{size}")
        if limits.min <= low and high <= limits.max:
            return array.astype(f"<{kind}{size}", copy=False)
    return array.astype(f"<{kind}8", copy=False)


def load(path: str | Path) -> RoutingStatistics:
    """Read statistics from a file.

    Raises
    ------
    InputError
        If it is damaged, of another format or too large, or its counts contradict each other.
    """
    path = Path(path)
    with reading(path, *_FOREIGN), zipfile.ZipFile(path) as archive:
        head = _head(archive)
        entries = {name: archive.getinfo(f"{name}.npy") for name in _names(head)}
        check_size(sum(info.file_size for info in entries.values()), path.stat().st_size)
        arrays = {name: _read_array(archive, info, name) for name, info in entries.items()}
        statistics = _statistics(head, arrays)
        _check_counts(statistics)
    return statistics


def _head(archive: zipfile.ZipFile) -> dict[str, Any]:
    info = archive.getinfo(HEAD)
    if info.file_size > _MOST_HEAD_BYTES:
        raise InputError(f"has a head of {info.file_size} bytes; {_MOST_HEAD_BYTES} are possible")
    head = json.loads(archive.read(info))
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        found = head.get("format") if isinstance(head, dict) else None
        raise InputError(f"has the format {found!r}, not {FORMAT!r}; read it with the version that wrote it")
    return head


def _names(head: Mapping[str, Any]) -> list[str]:
    """Return the arrays that are there and known; a later version may add others."""
    known = {*_COUNTS, *(f"{_SAMPLE}{name}" for name in TokenSample.ARRAYS)}
    names = [name for name in head["arrays"] if name in known]
    lacking = [name for name in _NEEDED if name not in names]
    if lacking:
        raise InputError(f"has no array {lacking[0]}; write it again from the trace")
    return names


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Array:
    with archive.open(info) as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        header_bytes = file.tell()
    if dtype.hasobject or dtype.kind not in "iuf" or (dtype.kind == "f") != name.endswith("priority_T"):
        raise InputError(f"array {name} holds {dtype} values, not counts")
    # NumPy makes room for what the array's header says before it reads on; the header may lie.
    if np.prod(shape, dtype=object) * dtype.itemsize != info.file_size - header_bytes:
        raise InputError(f"array {name} is not as long as it says")
    with archive.open(info) as file:
        array = np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    if array.dtype.kind == "i" and array.size and int(array.min()) < -1:
        raise InputError(f"array {name} holds {int(array.min())}; counts are not negative")
    return array


def _statistics(head: Mapping[str, Any], arrays: Mapping[str, Array]) -> RoutingStatistics:
    header = dict(head["header"])
    layer_ids = header.get("moe_layer_ids")
    about = TraceHeader(
        num_layers=_number(header, "num_layers", 1),
        num_experts=_number(header, "num_experts", 1),
        top_k=_number(header, "top_k", 1),
        model_name=None if header.get("model_name") is None else str(header["model_name"]),
        moe_layer_ids=None if layer_ids is None else tuple(int(layer) for layer in layer_ids),
        domain_names=tuple(str(name) for name in header.get("domain_names", ())),
    )
    counts = {name: _as_counts(name, arrays[name]) for name in _COUNTS if name in arrays}
    return RoutingStatistics(
        header=about,
        window_tokens=_number(head, "window_tokens", 1),
        window_stride=_power_of_two(head, "window_stride"),
        time_windows=_power_of_two(head, "time_windows"),
        most_ranks=_number(head, "most_ranks", 0),
        segments=tuple(
            Segment(
                digest=str(segment["digest"]),
                first_window=_number(segment, "first_window", 0),
                num_windows=_number(segment, "num_windows", 0),
                tail_tokens=_number(segment, "tail_tokens", 0),
            )
            for segment in head["segments"]
        ),
        sample=_sample(head, arrays, about),
        **counts,
    )


def _as_counts(name: str, array: Array) -> Array:
    if name in _SIGNED:
        return array.astype(np.int64)
    if array.dtype.kind != "u":
        raise InputError(f"array {name} holds {array.dtype} values, not counts")
    return array


def _sample(head: Mapping[str, Any], arrays: Mapping[str, Array], header: TraceHeader) -> TokenSample | None:
    parts = {name.removeprefix(_SAMPLE): array for name, array in arrays.items() if name.startswith(_SAMPLE)}
    if not parts:
        return None
    ids = parts.pop("experts_TLK")
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < header.num_experts:
        raise InputError(f"the sample names expert {int(ids.max())} of {header.num_experts}")
    priority_T = parts.pop("priority_T")
    return TokenSample(
        experts_TLK=ids.astype(header.dtype),
        priority_T=priority_T.astype(np.float64),
        most_per_stratum=_number(head, "most_per_stratum", 1),
        **{name: array.astype(np.int64) for name, array in parts.items()},
    )


def _number(head: Mapping[str, Any], name: str, least: int) -> int:
    value = head[name]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST_TOKENS:
        raise InputError(f"{name} is {value!r}, not a number of at least {least}")
    return value


def _power_of_two(head: Mapping[str, Any], name: str) -> int:
    value = _number(head, name, 1)
    if value & (value - 1):
        raise InputError(f"{name} is {value}, not a power of two")
    return value


def _check_counts(statistics: RoutingStatistics) -> None:
    """Refuse counts that no trace of so many tokens has."""
    top_k, num_tokens = statistics.header.top_k, statistics.num_tokens
    window = statistics.window_tokens * top_k
    time_B = statistics.time_tokens_B[:, None] * top_k
    expected = {
        "load_LE": num_tokens * top_k,
        "load_WLE": window,
        "time_load_BLE": time_B,
    }
    for name, pairs in expected.items():
        found = getattr(statistics, name).sum(axis=-1, dtype=np.int64)
        if (found != pairs).any():
            raise InputError(f"{name} does not add up to {top_k} experts a token; the file is damaged")
    totals = {
        "transitions_LEE": num_tokens * top_k**2,
        "first_transitions_LEE": num_tokens,
        "coactivation_LEE": num_tokens * top_k * (top_k - 1),
    }
    for name, total in totals.items():
        count = getattr(statistics, name)
        if count is not None and (count.sum(axis=(1, 2), dtype=np.int64) != total).any():
            raise InputError(f"{name} does not add up to the pairs of {num_tokens} tokens; it is damaged")
