"""Archives from strangers: a data set's folder as one tar, tar.gz or zip, unpacked within bounds.

Only plain files and folders with plain names come out. Everything streams, and what an archive says about its
own sizes is never believed: bytes are counted as they come out.
"""

from __future__ import annotations

import gzip
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from placement.errors import InputError

__all__ = ["MOST_ENTRIES", "MOST_RATIO", "archive_kind", "is_dataset_archive", "unpack"]

MOST_ENTRIES = 20_000
"""Files and folders in one archive."""

MOST_RATIO = 200.0
"""Bytes that come out per byte of the archive; traces shrink by far less."""

FREE_BYTES = 64 << 20
"""What may come out whatever the ratio: a small archive may be all zeros."""

MOST_HEADER_BYTES = 1 << 20
"""Bytes between the contents of two entries of a tar: names, and what pax says."""

MOST_DIRECTORY_BYTES = 32 << 20
"""Size of a zip's central directory, which is read whole."""

CHUNK_BYTES = 1 << 20
MOST_DEPTH = 8
MOST_NAME_BYTES = 200

_MANIFEST = re.compile(r"(^|/)manifest\.rank\d+\.json$")
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError)


def archive_kind(path: Path) -> str | None:
    """Return ``tar``, ``tar.gz`` or ``zip`` by content, None for anything else."""
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if _is_tar(head):
        return "tar"
    if head.startswith(b"\x1f\x8b"):
        try:
            with gzip.open(path) as inside:
                return "tar.gz" if _is_tar(inside.read(512)) else None
        except _DAMAGE:
            return None
    return None


def _is_tar(head: bytes) -> bool:
    return len(head) == 512 and head[257:262] == b"ustar"


def is_dataset_archive(path: Path) -> bool:
    """Whether a file is an archive of a recorded data set: other traces (``.npz``, ``.pt``) are zips as well.

    Raises
    ------
    InputError
        If it is a damaged zip.
    """
    kind = archive_kind(path)
    if kind != "zip":
        return kind is not None
    with _damage(path), _open_zip(path) as archive:
        return any(_MANIFEST.search(name) for name in archive.namelist())


def unpack(
    path: Path,
    folder: Path,
    *,
    max_bytes: int,
    max_entries: int = MOST_ENTRIES,
    max_ratio: float = MOST_RATIO,
) -> Path:
    """Unpack an archive into an empty folder; what came out before a failure is the caller's to remove.

    Parameters
    ----------
    max_bytes
        Most bytes that may come out.
    max_entries
        Most files and folders.
    max_ratio
        Most bytes out per byte of the archive.

    Returns
    -------
    folder
        Where the data set is: `folder`, or the one folder in it that holds everything.

    Raises
    ------
    InputError
        If it is no archive, damaged, too large, or holds anything but plain files and folders.
    """
    kind = archive_kind(path)
    if kind is None:
        raise InputError("is no tar, tar.gz or zip archive")
    packed_bytes = path.stat().st_size
    limits = _Limits(
        max_bytes=min(max_bytes, max(FREE_BYTES, int(max_ratio * packed_bytes))), max_entries=max_entries
    )
    target = _Target(folder, limits)
    with _damage(path):
        if kind == "zip":
            _unpack_zip(path, target)
        else:
            _unpack_tar(path, target, packed=kind == "tar.gz")
    return _inner(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limits:
    max_bytes: int
    max_entries: int


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Target:
    """A folder being filled, and the count of what went into it."""

    def __init__(self, folder: Path, limits: _Limits) -> None:
        self._folder = folder
        self._limits = limits
        self._num_entries = 0
        self._num_bytes = 0

    def check_size(self, size_bytes: int) -> None:
        """Refuse early what an entry itself says is too large."""
        if self._num_bytes + size_bytes > self._limits.max_bytes:
            raise InputError(
                f"the archive unpacks to more than {self._limits.max_bytes:,} bytes, the most that is taken"
            )

    def make_folder(self, name: str) -> None:
        """Make the folder of an entry."""
        self._count()
        path = self._path(name)
        if path.is_file():
            raise InputError(f"the archive's {name!r} is both a file and a folder")
        path.mkdir(parents=True, exist_ok=True)

    def make_file(self, name: str, content: _Readable) -> int:
        """Write the file of an entry; return its size."""
        self._count()
        path = self._path(name)
        size_bytes = 0
        with self._create(path, name) as file:
            while chunk := content.read(CHUNK_BYTES):
                self.check_size(len(chunk))
                self._num_bytes += len(chunk)
                size_bytes += len(chunk)
                file.write(chunk)
        return size_bytes

    def _create(self, path: Path, name: str) -> BinaryIO:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("xb")
        except (FileExistsError, NotADirectoryError) as exc:
            raise InputError(f"the archive holds {name!r} twice, or as file and folder") from exc

    def _count(self) -> None:
        self._num_entries += 1
        if self._num_entries > self._limits.max_entries:
            raise InputError(f"the archive has more than {self._limits.max_entries:,} entries")

    def _path(self, name: str) -> Path:
        return self._folder.joinpath(*_plain_parts(name))


def _plain_parts(name: str) -> list[str]:
    """Split an entry's name; whatever could lead out of the folder is refused."""
    parts = [part for part in name.rstrip("/").split("/") if part != "."]
    unsafe = (
        name.startswith("/")
        or any(part in ("", "..") or len(part.encode()) > MOST_NAME_BYTES for part in parts)
        or any(ord(letter) < 32 or letter in "\\:\x7f" for letter in name)
        or len(parts) > MOST_DEPTH
    )
    if unsafe:
        raise InputError(f"the archive's entry {name[:80]!r} has a name that is not taken")
    return parts


def _unpack_tar(path: Path, target: _Target, *, packed: bool) -> None:
    with path.open("rb") as raw, closing(gzip.GzipFile(fileobj=raw) if packed else raw) as plain:
        stream = _Metered(plain)
        # As a stream: nothing is sought, and no list of entries grows beyond what was counted.
        with tarfile.open(fileobj=cast(BinaryIO, stream), mode="r|", bufsize=64 << 10) as archive:
            while (entry := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]
                _unpack_tar_entry(archive, entry, target, stream)
                stream.allow(0)


def _unpack_tar_entry(
    archive: tarfile.TarFile, entry: tarfile.TarInfo, target: _Target, stream: _Metered
) -> None:
    if entry.isdir():
        if entry.name.rstrip("/") != ".":
            target.make_folder(entry.name)
        return
    if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.issparse():
        raise InputError(f"the archive's entry {entry.name[:80]!r} is no plain file or folder")
    target.check_size(entry.size)
    stream.allow(entry.size)
    content = archive.extractfile(entry)
    assert content is not None
    if target.make_file(entry.name, content) != entry.size:
        raise InputError(f"the archive ends within {entry.name[:80]!r}; it is truncated")


class _Metered:
    """A stream that ends in an error once more is read than the contents account for.

    A tar may claim a name of gigabytes, which would be read into memory.
    """

    def __init__(self, stream: _Readable) -> None:
        self._stream = stream
        self._taken = 0
        self.allow(0)

    def allow(self, size_bytes: int) -> None:
        """Let one entry's content and the next header pass."""
        self._allowed = self._taken + size_bytes + MOST_HEADER_BYTES

    def read(self, size: int) -> bytes:
        """Read some bytes."""
        chunk = self._stream.read(size)
        self._taken += len(chunk)
        if self._taken > self._allowed:
            raise InputError(f"the archive has more than {MOST_HEADER_BYTES:,} bytes about one entry")
        return chunk


def _unpack_zip(path: Path, target: _Target) -> None:
    with _open_zip(path) as archive:
        for entry in archive.infolist():
            _check_zip_entry(entry)
            if entry.is_dir():
                target.make_folder(entry.filename)
                continue
            target.check_size(entry.file_size)
            with archive.open(entry) as content:
                target.make_file(entry.filename, content)


def _open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip whose directory is small enough to be read whole."""
    size_bytes = _directory_bytes(path)
    if size_bytes > MOST_DIRECTORY_BYTES:
        raise InputError(
            f"the archive's directory has {size_bytes:,} bytes; {MOST_DIRECTORY_BYTES:,} are taken"
        )
    return zipfile.ZipFile(path)


def _directory_bytes(path: Path) -> int:
    """Return what the end of a zip says of the size of its directory, at most 64 KiB of comment behind it."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (22 + 20 + 56 + 0xFFFF)))
        tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        raise zipfile.BadZipFile("it has no directory at its end")
    (size_bytes,) = struct.unpack_from("<L", tail, end + 12)
    wide = tail.rfind(b"PK\x06\x06", 0, end)
    if size_bytes == 0xFFFFFFFF or tail[max(0, end - 20) : end].startswith(b"PK\x06\x07"):
        size_bytes = struct.unpack_from("<Q", tail, wide + 40)[0] if wide >= 0 else size_bytes
    return int(size_bytes)


def _check_zip_entry(entry: zipfile.ZipInfo) -> None:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise InputError(f"the archive's entry {entry.filename[:80]!r} is no plain file or folder")
    if entry.flag_bits & 1:
        raise InputError(f"the archive's entry {entry.filename[:80]!r} is encrypted")
    # Others are decompressed in one piece, of any size.
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"the archive's entry {entry.filename[:80]!r} is neither stored nor deflated")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Say that the archive is damaged where the libraries stumble."""
    try:
        yield
    except (*_DAMAGE, struct.error, UnicodeError, NotImplementedError, RecursionError) as exc:
        why = " ".join(str(exc).split()).replace(str(path), "it")
        raise InputError(f"the archive is damaged: {why or type(exc).__name__}") from exc


def _inner(folder: Path) -> Path:
    """Go into the one folder that an archive may be wrapped in."""
    for _ in range(MOST_DEPTH):
        inside = list(folder.iterdir())
        if len(inside) != 1 or not inside[0].is_dir():
            break
        folder = inside[0]
    return folder
