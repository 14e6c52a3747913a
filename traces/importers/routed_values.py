"""Expert ids as they travel in responses: base64 of an ``.npy`` or of bare integers, lists, or an object.

Shape letters: T tokens, L layers, K top-k.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.files import one_line
from traces.importers.npy_header import read_npy_header

__all__ = ["NPY_IN_BASE64", "decoded_ids", "ids_shape", "npy_shape", "raw_ids", "raw_size"]

NPY_IN_BASE64 = "k05VTVBZ"
"""How the base64 text of an ``.npy`` file begins."""

_ID_BYTES = 4
_HEADER_CHARACTERS = 4 * 4096


def raw_size(text: str) -> int:
    """Return how many ids the base64 text of bare 32-bit integers holds, without decoding it."""
    num_bytes = len(text) * 3 // 4 - text[-2:].count("=")
    if len(text) % 4 or num_bytes % _ID_BYTES:
        raise InputError(f"routed_experts has {len(text)} characters, which is no base64 of 32-bit ids")
    return num_bytes // _ID_BYTES


def raw_ids(text: str) -> npt.NDArray[np.int32]:
    """Return the ids in the base64 text of bare little-endian 32-bit integers."""
    return np.frombuffer(_decoded(text), dtype="<i4")


def ids_shape(value: Any) -> tuple[int, int, int]:
    """Return the ``[tokens, layers, k]`` of a value that tells it, decoding no more than needed.

    Raises
    ------
    InputError
        If it does not tell it.
    """
    if isinstance(value, str) and value.startswith(NPY_IN_BASE64):
        shape, _ = npy_shape(io.BytesIO(_decoded(value[:_HEADER_CHARACTERS])), len(value) * 3 // 4)
        return shape
    return _three(decoded_ids(value).shape)


def decoded_ids(value: Any) -> npt.NDArray[Any]:
    """Return the ids of a value that tells its own shape.

    Parameters
    ----------
    value
        Base64 text of an ``.npy`` file, nested lists, or ``{"data", "shape", "dtype"}``.

    Raises
    ------
    InputError
        If it is none of these, or damaged.
    """
    if isinstance(value, str):
        if not value.startswith(NPY_IN_BASE64):
            raise InputError("routed_experts is text, but no base64 of an .npy file")
        content = _decoded(value)
        shape, dtype = npy_shape(io.BytesIO(content), len(content))
        num_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
        return np.frombuffer(content[len(content) - num_bytes :], dtype=dtype).reshape(shape)
    if isinstance(value, Mapping):
        return _from_object(value)
    if isinstance(value, list):
        return _from_lists(value)
    raise InputError(f"routed_experts is {type(value).__name__}, not text or lists of expert ids")


def npy_shape(file: IO[bytes], num_bytes: int) -> tuple[tuple[int, int, int], np.dtype[Any]]:
    """Return what the header of an ``.npy`` file says, checked against the file's size.

    Parameters
    ----------
    file
        The file, at its start.
    num_bytes
        Its size; up to two bytes more where the size is that of base64 text.

    Raises
    ------
    InputError
        If the file holds no integers ``[tokens, layers, k]`` in C order, or lies about its size.
    """
    header = read_npy_header(file)
    shape, dtype = header.shape, header.dtype
    if dtype.kind not in "iu" or len(shape) != 3 or (header.fortran_order and min(shape) > 1):
        raise InputError(f"is {dtype} {list(shape)}, not integer expert ids [tokens, layers, k]")
    claimed = header.content_bytes + header.num_bytes
    if not 0 <= num_bytes - claimed <= 2:
        raise InputError(f"says it is {dtype} {list(shape)}, {claimed} bytes, but is {num_bytes} bytes long")
    return _three(shape), dtype


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise InputError(f"expert ids have shape {list(shape)}, not [tokens, layers, k]")
    return shape[0], shape[1], shape[2]


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise InputError(f"routed_experts is no base64 ({one_line(exc)})") from exc


def _from_object(value: Mapping[str, Any]) -> npt.NDArray[Any]:
    data, shape = value.get("data"), value.get("shape")
    if (
        not isinstance(data, str)
        or not isinstance(shape, list)
        or any(type(size) is not int or size < 0 for size in shape)
    ):
        raise InputError("routed_experts is an object without data and shape")
    try:
        dtype = np.dtype(value.get("dtype") or "int32").newbyteorder("<")
    except (TypeError, ValueError) as exc:
        raise InputError(f"routed_experts has the unknown type {value.get('dtype')!r}") from exc
    content = _decoded(data)
    if dtype.kind not in "iu" or int(np.prod(shape, dtype=object)) * dtype.itemsize != len(content):
        raise InputError(f"routed_experts says it is {dtype} {shape}, but is {len(content)} bytes long")
    return np.frombuffer(content, dtype=dtype).reshape(_three(tuple(shape)))


def _from_lists(value: list[Any]) -> npt.NDArray[Any]:
    try:
        ids = np.array(value)
    except (ValueError, OverflowError) as exc:
        raise InputError("routed_experts has rows of different lengths") from exc
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise InputError(f"routed_experts is {ids.dtype} {list(ids.shape)}, not integers [tokens][layers][k]")
    return ids
