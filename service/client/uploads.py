"""What is sent as a trace: a file as it is, a folder as one tar that is the same every time.

The tar holds names and contents alone: no times, owners or modes, so that the same data set has the same
digest wherever and whenever it is sent, and is sent once.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from placement.errors import InputError

__all__ = ["Upload"]

CHUNK_BYTES = 1 << 20
MOST_FILES = 20_000
SPOOL = ".spool.arrow"
"""End of the names of what a recording has not finished; readers never look into them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A run of bytes: given ones, then those of a file, then zeros up to a whole block."""

    head: bytes
    path: Path | None
    size_bytes: int

    @property
    def padding_bytes(self) -> int:
        return -self.size_bytes % tarfile.BLOCKSIZE if self.head else 0

    @property
    def total_bytes(self) -> int:
        return len(self.head) + self.size_bytes + self.padding_bytes


class Upload:
    """The bytes of a trace, as often as they are wanted.

    Parameters
    ----------
    path
        A file, or the folder of a data set.

    Raises
    ------
    InputError
        If there is no such file or folder, or it holds what cannot be sent.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        kind = _kind(self.path)
        self._parts = _archive(self.path) if kind == "folder" else [_file(self.path)]
        self.size_bytes = sum(part.total_bytes for part in self._parts)

    def digest(self) -> str:
        """Return the id that the service will give it.

        Raises
        ------
        InputError
            If a file cannot be read, or changes meanwhile.
        """
        found = hashlib.sha256()
        for chunk in self:
            found.update(chunk)
        return f"sha256:{found.hexdigest()}"

    def __iter__(self) -> Iterator[bytes]:
        for part in self._parts:
            if part.head:
                yield part.head
            if part.path is not None:
                yield from _read(part.path, part.size_bytes)
            if part.padding_bytes:
                yield bytes(part.padding_bytes)


def _kind(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise InputError(f"trace {path} cannot be read: {reason}") from exc
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        raise InputError(f"trace {path} is neither a file nor a folder")
    return "file"


def _file(path: Path) -> _Part:
    size_bytes = path.stat().st_size
    if not size_bytes:
        raise InputError(f"trace {path} is empty")
    return _Part(head=b"", path=path, size_bytes=size_bytes)


def _archive(folder: Path) -> list[_Part]:
    """Lay out a tar of all files of a folder, in order of their names."""
    parts = []
    for name in sorted(_names(folder)):
        info = tarfile.TarInfo(name)
        info.size = (folder / name).stat().st_size
        info.mode = 0o644
        try:
            head = info.tobuf(format=tarfile.PAX_FORMAT, encoding="utf-8", errors="strict")
        except UnicodeEncodeError as exc:
            raise InputError(f"trace {folder}: the name {name!r} is not UTF-8") from exc
        parts.append(_Part(head=head, path=folder / name, size_bytes=info.size))
    if not parts:
        raise InputError(f"trace {folder} is an empty folder")
    used_bytes = sum(part.total_bytes for part in parts)
    end = bytes(2 * tarfile.BLOCKSIZE)
    end += bytes(-(used_bytes + len(end)) % tarfile.RECORDSIZE)
    return [*parts, _Part(head=end, path=None, size_bytes=0)]


def _names(folder: Path) -> Iterator[str]:
    """Yield the files of a folder, relative to it; those that begin with a dot are nobody's data."""
    count = 0
    for root, folders, files in os.walk(folder, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(root, name)
            if name.startswith(".") or name.endswith(SPOOL):
                continue
            if not path.is_file():
                raise InputError(f"trace {folder}: {path.relative_to(folder)} is no plain file")
            count += 1
            if count > MOST_FILES:
                raise InputError(
                    f"trace {folder} has more than {MOST_FILES:,} files; is it the folder of one data set?"
                )
            yield path.relative_to(folder).as_posix()


def _unreadable(error: OSError) -> None:
    raise InputError(f"folder {error.filename} cannot be read: {error.strerror}") from error


def _read(path: Path, size_bytes: int) -> Iterator[bytes]:
    """Yield exactly as many bytes of a file as it had when it was looked at."""
    left = size_bytes
    try:
        with path.open("rb") as file:
            while left:
                chunk = file.read(min(CHUNK_BYTES, left))
                if not chunk:
                    break
                left -= len(chunk)
                yield chunk
            changed = left or file.read(1)
    except OSError as exc:
        raise InputError(f"trace {path} cannot be read: {exc.strerror}") from exc
    if changed:
        raise InputError(f"trace {path} changed while it was read; send it once it is complete")
