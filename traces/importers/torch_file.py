"""Reads PyTorch files (``.pt``) from strangers: tensors and plain values, never code.

A ``.pt`` file holds a pickle, which may run anything when it is loaded. PyTorch's restricted unpickler
(``weights_only=True``) builds tensors and plain containers alone; sizes are checked before it starts. Tensors
are mapped into memory, not read: what is never looked at costs nothing.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.files import check_size, one_line, reading

__all__ = ["as_array", "is_torch_file", "leading_strings", "load_torch"]

_LIMIT_PICKLE_BYTES = 2**30
"""Python objects take many times the room of their pickle; tensors lie outside of it."""

_LIMIT_LEGACY_BYTES = 2**31
"""The format of before PyTorch 1.6 cannot be mapped: it is read whole."""

_HEAD_BYTES = 1 << 14
_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_RECORDS = ("data.pkl", "version", "byteorder", ".format_version", ".storage_alignment", "constants.pkl")
_FORBIDDEN = re.compile(r"GLOBAL (\S+) was not an allowed global|GLOBAL (\S+) whose module \S+ is blocked")

# What the restricted unpickler, itself written in Python, may raise on bytes that are no pickle of tensors.
_DAMAGED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    NotImplementedError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    EOFError,
    MemoryError,
)


def is_torch_file(path: Path) -> bool:
    """Tell whether `path` begins as PyTorch files do, of today's or the old format, complete or not."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(_LEGACY_MAGIC):
        return True
    name = _first_entry(head)
    return name is not None and name.rpartition("/")[2] in _RECORDS and "/" in name


def leading_strings(path: Path) -> tuple[str, ...]:
    """Return the texts in the first bytes of a PyTorch file's pickle: a dictionary's first keys among them.

    The pickle is looked at, not loaded, so that a sniff costs little and runs nothing.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    name = _first_entry(head)
    if name is not None and name.endswith("/data.pkl"):
        extra = int.from_bytes(head[28:30], "little")
        head = head[30 + len(name.encode()) + extra :]
    return tuple(_strings(head))


def load_torch(path: Path) -> Any:
    """Load tensors and plain values from a PyTorch file, tensors mapped from the disk.

    Raises
    ------
    InputError
        If PyTorch is not installed, or the file is damaged, too large, or holds anything else than tensors
        and plain values (code among it, which is not run).
    """
    with reading(path):
        torch = _import_torch()
        mapped = _check(path)
        try:
            with warnings.catch_warnings():
                # Odd pickles make PyTorch warn before they make it refuse.
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except _DAMAGED as exc:
            raise InputError(_complaint(exc)) from exc


def as_array(value: object, what: str) -> npt.NDArray[Any]:
    """Return a loaded tensor as an array on the same memory.

    Parameters
    ----------
    value
        What should be a tensor.
    what
        Its name for messages.

    Raises
    ------
    InputError
        If it is no dense tensor of numbers, or pretends to be larger than what is stored.
    """
    torch = _import_torch()
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{what} is {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise InputError(f"{what} is no dense tensor of plain numbers")
    # A tensor may repeat its memory (stride 0) and so claim any size.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise InputError(
            f"{what} claims {list(value.shape)} {value.dtype} values, more than the file holds of it"
        )
    try:
        array: npt.NDArray[Any] = value.detach().numpy()
    except (TypeError, RuntimeError) as exc:
        raise InputError(f"{what} holds {value.dtype} values that NumPy does not know") from exc
    return array


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as exc:
        raise InputError(
            "PyTorch files need torch to be read; install with: pip install 'moe-placement[torch]'"
        ) from exc
    return torch


def _first_entry(head: bytes) -> str | None:
    """Return the name of a zip archive's first entry, from the entry's own header."""
    if not head.startswith(_ZIP_MAGIC):
        return None
    return head[30 : 30 + int.from_bytes(head[26:28], "little")].decode("utf-8", "replace")


def _strings(pickled: bytes) -> Iterator[str]:
    """Yield the texts of a pickle up to where it is cut off or makes no sense."""
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if isinstance(argument, str) and "UNICODE" in opcode.name:
                yield argument
    except (ValueError, LookupError, EOFError, struct.error):
        return


def _check(path: Path) -> bool:
    """Check sizes before anything is unpacked; tell whether the file can be mapped."""
    stored_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(len(_LEGACY_MAGIC))
    if not head.startswith(_ZIP_MAGIC):
        if not head.startswith(_LEGACY_MAGIC):
            is_pickle = head[:1] == b"\x80"
            what = (
                "a bare pickle, which may hold code or objects that are not tensors"
                if is_pickle
                else "neither a zip archive nor a pickle"
            )
            raise InputError(f"is no PyTorch file but {what}; it is not read")
        if stored_bytes > _LIMIT_LEGACY_BYTES:
            raise InputError("is in PyTorch's format of before 1.6 and too large for it; save it again")
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (*_DAMAGED, zipfile.LargeZipFile) as exc:
        raise InputError(f"is damaged or incomplete ({one_line(exc)}); restore it from a copy") from exc
    check_size(sum(entry.file_size for entry in entries), stored_bytes)
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"is compressed ({entry.filename}), as PyTorch never does; it is not read")
        if entry.filename.endswith(".pkl") and entry.file_size > _LIMIT_PICKLE_BYTES:
            raise InputError(
                f"pickles {entry.file_size} bytes beside its tensors, more than the limit of "
                f"{_LIMIT_PICKLE_BYTES}; dump more often"
            )
    return True


def _complaint(failure: Exception) -> str:
    """Return on one line why PyTorch would not load a file."""
    forbidden = _FORBIDDEN.search(str(failure)) if isinstance(failure, pickle.UnpicklingError) else None
    if forbidden is not None:
        name = forbidden.group(1) or forbidden.group(2)
        return (
            f"holds code or objects that are not tensors ({name.rstrip('.')}); nothing of it was run, and it "
            "is not read"
        )
    # PyTorch's own explanations run to paragraphs; the failure itself comes late in them.
    reason = str(failure).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    return (
        f"is damaged or no file of tensors ({reason[:160] or type(failure).__name__}); restore it from a copy"
    )
