"""The header of a safetensors file: read with suspicion, rewritten with other names and nothing else changed.

A file is the length of its header (8 bytes, little endian), the header (JSON) and the tensors' bytes. Here no
library comes between: names must change without the weights passing through memory, and undoing a change must
give the very same bytes, so new names are put into the old text.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from placement._fields import brief
from placement.checkpoint.json_text import members, no_repeats, spliced
from placement.errors import InputError

__all__ = ["BITS_OF_DTYPE", "MAX_HEADER_BYTES", "Header", "TensorEntry", "quoted", "read_header"]

MAX_HEADER_BYTES = 100_000_000
"""Longest header that is read; the limit of the safetensors library."""

MAX_DIMENSIONS = 64
LONGEST_QUOTED = 160
LENGTH_BYTES = 8
ALIGNMENT = 8

BITS_OF_DTYPE: dict[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Bits of one element of each type that the format knows."""

_METADATA = "__metadata__"
_KEYS = {"dtype", "shape", "data_offsets"}


class TensorEntry(NamedTuple):
    """One tensor of a file.

    Parameters
    ----------
    name, dtype, shape
        As the header gives them.
    begin, end
        Its bytes, counted from the end of the header.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The header of one file, checked against the file's size.

    Parameters
    ----------
    text
        The JSON text, padding included.
    tensors
        All tensors, in the order of their bytes.
    data_begin, data_bytes
        Where the tensors' bytes start in the file, and how many there are.
    """

    text: str
    tensors: tuple[TensorEntry, ...]
    data_begin: int
    data_bytes: int

    def renamed(self, new_name_of: Mapping[str, str]) -> bytes:
        """Return the bytes that start the file when some tensors have other names, length included.

        Everything else of the text stays: order, spelling, metadata. The padding is again what the
        safetensors library writes (to a multiple of 8 bytes), or as long as another writer made it.
        """
        if not new_name_of:
            return self._with_length(self.text.encode())
        changes = (
            (member.key_begin, member.key_end, new_name_of[member.key])
            for member in members(self.text)
            if member.key in new_name_of
        )
        text = "".join(spliced(self.text, changes))
        bare = text.rstrip(" ").encode()
        padding = len(text) - len(text.rstrip(" "))
        if self._is_padded_as_usual():
            padding = -len(bare) % ALIGNMENT
        return self._with_length(bare + b" " * padding)

    def _is_padded_as_usual(self) -> bool:
        padding = len(self.text) - len(self.text.rstrip(" "))
        return len(self.text.encode()) % ALIGNMENT == 0 and padding < ALIGNMENT

    @staticmethod
    def _with_length(text: bytes) -> bytes:
        return len(text).to_bytes(LENGTH_BYTES, "little") + text


def quoted(name: str) -> str:
    """Return a tensor's name as it may stand in a message: whole, unless nobody would name a tensor so."""
    return repr(name if len(name) <= LONGEST_QUOTED else f"{name[:LONGEST_QUOTED]}...")


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file and check everything that it says.

    Raises
    ------
    InputError
        If the file cannot be read, is truncated, or its header is too long, no JSON, names a tensor twice, or
        gives types, shapes and offsets that contradict each other or the file's size.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = _header_length(file.read(LENGTH_BYTES), size)
            content = file.read(length)
    except OSError as exc:
        raise InputError(
            f"{path}: cannot be read ({exc.strerror}); check the path and its permissions"
        ) from exc
    except InputError as exc:
        raise InputError(f"{path}: {exc}") from exc
    try:
        if len(content) != length:
            raise InputError(f"its header ends after {len(content)} of {length} bytes; get the file again")
        return _parse(content, data_bytes=size - LENGTH_BYTES - length)
    except InputError as exc:
        raise InputError(f"{path}: {exc}") from exc


def _header_length(first: bytes, size: int) -> int:
    if len(first) < LENGTH_BYTES:
        raise InputError(f"is no safetensors file: it has {size} bytes; get the file again")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES:
        raise InputError(
            f"is no safetensors file: its header would be {length} bytes, allowed are {MAX_HEADER_BYTES}"
        )
    if LENGTH_BYTES + length > size:
        raise InputError(
            f"is truncated: its header takes {length} bytes, the file has {size}; get the file again"
        )
    return length


def _parse(content: bytes, *, data_bytes: int) -> Header:
    try:
        text = content.decode("utf-8")
        values = json.loads(text, object_pairs_hook=no_repeats)
    except InputError:
        raise
    except (ValueError, RecursionError) as exc:
        raise InputError("its header is not JSON; get the file again") from exc
    if not isinstance(values, dict):
        raise InputError("its header is no object; get the file again")
    _check_metadata(values.pop(_METADATA, {}))
    entries = [_entry(name, value) for name, value in values.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_offsets(entries, data_bytes)
    return Header(
        text=text,
        tensors=tuple(entries),
        data_begin=LENGTH_BYTES + len(content),
        data_bytes=data_bytes,
    )


def _check_metadata(value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InputError("the __metadata__ of its header is no object of texts; get the file again")


def _entry(name: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != _KEYS:
        raise InputError(f"its header describes tensor {quoted(name)} by {brief(value)}; get the file again")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS_OF_DTYPE:
        raise InputError(f"tensor {quoted(name)} has the unknown type {brief(dtype)}")
    if not _are_sizes(shape):
        raise InputError(f"tensor {quoted(name)} has the impossible shape {brief(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"tensor {quoted(name)} has the impossible data_offsets {brief(offsets)}")
    bits = math.prod(shape) * BITS_OF_DTYPE[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise InputError(
            f"tensor {quoted(name)} of {dtype} {brief(shape)} takes {bits / 8:g} bytes, its offsets give "
            f"{offsets[1] - offsets[0]}; get the file again"
        )
    # Names recur in the index and in the other pass over the files; one copy of each is enough.
    return TensorEntry(
        name=sys.intern(name), dtype=dtype, shape=tuple(shape), begin=offsets[0], end=offsets[1]
    )


def _are_sizes(values: object) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= MAX_DIMENSIONS
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _check_offsets(entries: list[TensorEntry], data_bytes: int) -> None:
    at = 0
    for entry in entries:
        if entry.begin != at:
            problem = "overlaps the tensor before it" if entry.begin < at else "leaves a gap before it"
            raise InputError(f"tensor {quoted(entry.name)} {problem}; get the file again")
        at = entry.end
    if at != data_bytes:
        problem = "is truncated" if at > data_bytes else "has bytes that belong to no tensor"
        raise InputError(f"{problem}: its tensors take {at} bytes, it holds {data_bytes}; get the file again")
