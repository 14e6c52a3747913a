"""Moves bytes from file to file: long runs inside the kernel, rows through a buffer of fixed size."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from placement.checkpoint.plan import Reorder
from placement.errors import InputError

__all__ = ["BUFFER_BYTES", "Copier", "copy_file", "copying"]

BUFFER_BYTES = 8 * 2**20
"""Bytes held at a time. Twice this are alive while rows are put in order."""

KERNEL_STEP_BYTES = 64 * 2**20
"""Bytes copied by one call to the kernel: often enough for a progress bar and for Ctrl-C."""

_NOT_HERE = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})
_TARGET_IS_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})

_NUMPY_INTEGERS = {"U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2"} | {
    name: f"<{name[0].lower()}{int(name[1:]) // 8}" for name in ("U32", "I32", "U64", "I64")
}


@contextmanager
def copying(source: Path, target: Path) -> Iterator[None]:
    """Turn the operating system's refusal to copy into an input error.

    Raises
    ------
    InputError
        Instead of an `OSError` raised inside.
    """
    try:
        yield
    except OSError as exc:
        reason = exc.strerror or str(exc)
        if exc.errno in _TARGET_IS_FULL:
            raise InputError(
                f"{target.parent}: cannot be written ({reason}); make room or choose another folder"
            ) from exc
        raise InputError(f"{source}: cannot be copied to {target.parent} ({reason}); check both") from exc


class Copier:
    """Copies parts of one open file to the end of another.

    Parameters
    ----------
    source_fd, target_fd
        Open files; the target is written where it stands.
    advance
        Called with the number of bytes after each step.
    buffer_bytes
        Most bytes to hold at a time.
    """

    def __init__(
        self,
        source_fd: int,
        target_fd: int,
        *,
        advance: Callable[[int], None],
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        self._source_fd = source_fd
        self._target_fd = target_fd
        self._advance = advance
        self._buffer_bytes = buffer_bytes
        self._in_kernel = hasattr(os, "copy_file_range")

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write bytes that do not come from the source."""
        left = memoryview(data)
        while left:
            left = left[os.write(self._target_fd, left) :]

    def copy(self, begin: int, count: int) -> None:
        """Copy a run of bytes as it is.

        Raises
        ------
        InputError
            If the source ends before.
        """
        while count:
            done = self._kernel_step(begin, count) if self._in_kernel else self._buffer_step(begin, count)
            begin, count = begin + done, count - done
            self._advance(done)

    def reorder(self, begin: int, reorder: Reorder) -> None:
        """Copy a tensor with its experts in another order.

        Raises
        ------
        InputError
            If the source ends before.
        """
        if reorder.ids_dtype is not None:
            self._map_ids(begin, reorder, reorder.ids_dtype)
            return
        old, inner = reorder.old_of_new_E, reorder.inner_bytes
        slab = old.size * inner
        if slab > self._buffer_bytes:
            for outer in range(reorder.outer):
                for first, length in _runs(old):
                    self.copy(begin + outer * slab + first * inner, length * inner)
            return
        at_once = self._buffer_bytes // slab
        for outer in range(0, reorder.outer, at_once):
            count = min(at_once, reorder.outer - outer) * slab
            slabs = np.frombuffer(self._read(begin + outer * slab, count), np.uint8).reshape(
                -1, old.size, inner
            )
            self.write(np.ascontiguousarray(slabs[:, old]).data.cast("B"))
            self._advance(count)

    def _map_ids(self, begin: int, reorder: Reorder, dtype: str) -> None:
        """Replace every id of an expert by its new one; other values (padding) stay."""
        new_of_old_E = np.argsort(reorder.old_of_new_E, kind="stable")
        step = self._buffer_bytes // 4 // reorder.inner_bytes * reorder.inner_bytes
        left = reorder.outer * reorder.inner_bytes
        while left:
            count = min(step, left)
            ids = np.frombuffer(self._read(begin, count), _NUMPY_INTEGERS[dtype]).copy()
            is_expert = (ids >= 0) & (ids < new_of_old_E.size)
            ids[is_expert] = new_of_old_E[ids[is_expert].astype(np.int64)]
            self.write(ids.tobytes())
            self._advance(count)
            begin, left = begin + count, left - count

    def _kernel_step(self, begin: int, count: int) -> int:
        try:
            done = os.copy_file_range(
                self._source_fd, self._target_fd, min(count, KERNEL_STEP_BYTES), offset_src=begin
            )
        except OSError as exc:
            if exc.errno not in _NOT_HERE:
                raise
            # Across some file systems the kernel cannot; what it cannot do once it cannot do later.
            self._in_kernel = False
            return self._buffer_step(begin, count)
        if done == 0:
            # Some file systems say 0 where they mean that they cannot; reading tells which it is.
            self._in_kernel = False
            return self._buffer_step(begin, count)
        return done

    def _buffer_step(self, begin: int, count: int) -> int:
        data = self._read(begin, min(count, self._buffer_bytes))
        self.write(data)
        return len(data)

    def _read(self, begin: int, count: int) -> bytes | bytearray:
        data = os.pread(self._source_fd, count, begin)
        if len(data) == count:
            return data
        parts = bytearray(data)
        while len(parts) < count:
            more = os.pread(self._source_fd, count - len(parts), begin + len(parts))
            if not more:
                raise InputError(f"became shorter while it was read: it ends at byte {begin + len(parts)}")
            parts += more
        return parts


def _runs(old_E: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Iterator[tuple[int, int]]:
    """Yield neighbours that stay neighbours as one run: its first old place, and its length."""
    breaks = np.nonzero(np.diff(old_E) != 1)[0] + 1
    for run in np.split(old_E, breaks):
        yield int(run[0]), len(run)


def copy_file(source: Path, target: Path, *, advance: Callable[[int], None]) -> None:
    """Copy a whole file.

    Raises
    ------
    InputError
        If it cannot be read or written.
    """
    with (
        copying(source, target),
        source.open("rb", buffering=0) as file,
        target.open("xb", buffering=0) as out,
    ):
        size = os.fstat(file.fileno()).st_size
        Copier(file.fileno(), out.fileno(), advance=advance).copy(0, size)
        os.fsync(out.fileno())
