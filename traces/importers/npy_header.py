"""Reads the header of an ``.npy`` file from strangers: what it says is not yet what the file holds."""

from __future__ import annotations

import tokenize
import warnings
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from placement.errors import InputError
from traces.files import one_line

__all__ = ["NpyHeader", "read_npy_header"]

# NumPy parses headers of old versions with Python's tokenizer, which fails in its own ways.
_DAMAGED = (ValueError, EOFError, SyntaxError, TypeError, LookupError, ArithmeticError, tokenize.TokenError)


@dataclass(frozen=True, slots=True, kw_only=True)
class NpyHeader:
    """What the header of an ``.npy`` file says.

    Parameters
    ----------
    shape, dtype, fortran_order
        Of the array.
    num_bytes
        Length of the header.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool
    num_bytes: int

    @property
    def content_bytes(self) -> int:
        """Bytes of the array that it announces."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


def read_npy_header(file: IO[bytes]) -> NpyHeader:
    """Read the header at the start of a file.

    Raises
    ------
    InputError
        If there is none, it is damaged, or of a version that holds no plain numbers.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            elif version == (2, 0):
                shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
            else:
                raise InputError(f"has the NumPy format version {version}; it holds no plain numbers")
    except InputError:
        raise
    except _DAMAGED as exc:
        raise InputError(f"is damaged or no array ({one_line(exc)}); restore it from a copy") from exc
    if min(shape, default=0) < 0:
        raise InputError(f"is damaged: it says that it has the shape {list(shape)}; restore it from a copy")
    return NpyHeader(shape=shape, dtype=dtype, fortran_order=fortran_order, num_bytes=file.tell())
