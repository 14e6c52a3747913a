"""Reads NumPy archives (``.npz``) of top-k expert ids.

Keys: ``topk`` integers [tokens, layers, k]; optional ``num_experts`` (else the largest id + 1), ``sequence``,
``position``, ``rank``, ``domain`` integers [tokens], ``domain_names``, ``model_name``, ``moe_layer_ids``.
Archives come from strangers: sizes are checked before anything is unpacked and nothing is unpickled. Large
archives are not read into memory but mapped (`npz_source`).
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.files import check_size, reading
from traces.importers.npy_header import NpyHeader, read_npy_header
from traces.importers.npz_source import NpzSource, mapped_array
from traces.importers.routed_values import npy_shape
from traces.source import MemorySource, TraceSource
from traces.trace import Trace

if TYPE_CHECKING:
    from traces.readers import ReadOptions

__all__ = ["ARCHIVE_FAILURES", "is_archive_of_arrays", "open", "sniff"]

Array = npt.NDArray[Any]

ARCHIVE_FAILURES = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError)
"""What reading a damaged zip archive of arrays may raise."""

_TOKEN_KEYS = ("sequence", "position", "rank", "domain")
_IN_MEMORY_BYTES = 2**28
_KEYS = ("topk", "num_experts", *_TOKEN_KEYS, "domain_names", "model_name", "moe_layer_ids")


def sniff(path: Path) -> bool:
    """Tell whether `path` is a zip archive that begins with a NumPy array.

    The first entry's own header is read, not the directory at the end, so that a truncated archive is
    recognised too; PyTorch's zip archives begin with another entry. Archives without ``topk`` whose first
    array is expert ids all the same are vLLM's.
    """
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(30)
        if not head.startswith(b"PK\x03\x04"):
            return False
        if not file.read(int.from_bytes(head[26:28], "little")).endswith(b".npy"):
            return False
    return not is_archive_of_arrays(path)


def is_archive_of_arrays(path: Path) -> bool:
    """Tell whether an archive is complete, has no ``topk``, and begins with ids [tokens, layers, k]."""
    if not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if not entries or any(entry.filename == "topk.npy" for entry in entries):
                return False
            with archive.open(entries[0]) as file:
                npy_shape(file, entries[0].file_size)
    except (InputError, OSError, *ARCHIVE_FAILURES):
        # Damaged archives are refused by whoever opens them.
        return False
    return True


def open(path: Path, options: ReadOptions) -> TraceSource:
    """Read the archive, or map it where it is large.

    Raises
    ------
    InputError
        If it is damaged, too large, holds pickled objects or no ``topk``, or its arrays are no valid trace.
    """
    with reading(path, *ARCHIVE_FAILURES):
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if "topk" not in entries:
                found = ", ".join(sorted(entries)[:10]) or "none"
                raise InputError(f"has no array topk [tokens, layers, k]; its arrays are: {found}")
            used = {key: entries[key] for key in _KEYS if key in entries}
            check_size(sum(info.file_size for info in used.values()), path.stat().st_size)
            large = {
                key: info
                for key, info in used.items()
                if key in ("topk", *_TOKEN_KEYS) and used["topk"].file_size > _IN_MEMORY_BYTES
            }
            headers = {key: _header(archive, info, key) for key, info in large.items()}
            arrays = {key: _read_array(archive, info, key) for key, info in used.items() if key not in large}
            arrays |= {key: mapped_array(path, archive, info, headers[key]) for key, info in large.items()}
        if not large:
            return MemorySource(Trace(**_fields(arrays), **_about(arrays)))
        return NpzSource(path, _fields(arrays), _about(arrays))


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, key: str) -> NpyHeader:
    """Return what an array's header says, checked against its size; it may lie."""
    try:
        with archive.open(info) as file:
            header = read_npy_header(file)
    except InputError as exc:
        raise InputError(f"array {key} {exc}") from exc
    dtype, num_bytes = header.dtype, info.file_size - header.num_bytes
    if dtype.hasobject or dtype.names is not None:
        raise InputError(f"array {key} holds Python objects or records ({dtype}), not plain numbers")
    if header.content_bytes != num_bytes:
        raise InputError(
            f"array {key} says it is {dtype} {list(header.shape)}, but is {num_bytes} bytes long"
        )
    return header


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, key: str) -> Array:
    # NumPy makes room for what the array's header says before it reads on.
    _header(archive, info, key)
    with archive.open(info) as file:
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _fields(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Return the arrays of tokens by the names that `Trace` has for them."""
    return {"experts_TLK": arrays["topk"]} | {f"{key}_T": arrays[key] for key in _TOKEN_KEYS if key in arrays}


def _about(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Return what all tokens have in common, by the names that `Trace` has for it."""
    topk = arrays["topk"]
    if topk.dtype.kind not in "iu":
        raise InputError(f"topk holds {topk.dtype} values, not integer expert ids")
    names = _names(arrays)
    name = _scalar(arrays, "model_name", "U")
    layer_ids = arrays.get("moe_layer_ids")
    if layer_ids is not None and (layer_ids.ndim != 1 or layer_ids.dtype.kind not in "iu"):
        raise InputError(
            f"moe_layer_ids is {layer_ids.dtype} {list(layer_ids.shape)}, not a list of integers"
        )
    num_experts = _scalar(arrays, "num_experts", "iu")
    if num_experts is None:
        num_experts = int(topk.max(initial=0)) + 1
    return {
        "num_experts": num_experts,
        "domain_names": names,
        "model_name": name,
        "moe_layer_ids": None if layer_ids is None else tuple(layer_ids.tolist()),
    }


def _scalar(arrays: Mapping[str, Array], key: str, kinds: str) -> Any:
    value = arrays.get(key)
    if value is None:
        return None
    if value.size != 1 or value.dtype.kind not in kinds:
        raise InputError(
            f"{key} is {value.dtype} {list(value.shape)}, not one {'name' if 'U' in kinds else 'integer'}"
        )
    return value.item()


def _names(arrays: Mapping[str, Array]) -> tuple[str, ...]:
    """Return the domains' names, or their numbers where the archive names none."""
    names, domain_T = arrays.get("domain_names"), arrays.get("domain")
    if names is not None:
        if names.ndim != 1 or (names.dtype.kind != "U" and names.size):
            raise InputError(f"domain_names is {names.dtype} {list(names.shape)}, not a list of names")
        return tuple(names.tolist())
    if domain_T is None or domain_T.dtype.kind not in "iu" or not domain_T.size:
        return ()
    return tuple(str(domain) for domain in range(min(int(domain_T.max()) + 1, domain_T.size)))
