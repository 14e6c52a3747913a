"""Where a data set lies: a local folder, or a folder behind a URL that fsspec can open.

Local files appear by an atomic rename. Object stores have no rename, but objects appear whole or not at all;
manifests are written last, so that none ever names what is not there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import unquote, urlsplit

from placement.errors import InputError
from traces.files import one_line, writing_whole

__all__ = ["Folder", "LocalFolder", "UrlFolder", "open_folder"]

Buffer = bytes | memoryview


class Folder(Protocol):
    """Files of one folder; failures are `OSError`, or `InputError` where the place itself is wrong."""

    @property
    def path(self) -> Path | None:
        """The folder where it is local."""
        ...

    def locate(self, name: str) -> str:
        """Return the full name of a file, for messages."""
        ...

    def names(self) -> list[str] | None:
        """Return the names of its files, sorted, without hidden ones; `None` if there is no such folder."""
        ...

    def create(self) -> None:
        """Make the folder if it is not there."""
        ...

    def size(self, name: str) -> int | None:
        """Return a file's length in bytes, or `None` if it is not there."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes of a file, or some of them; fewer where the file ends earlier."""
        ...

    def read_into(self, name: str, start: int, buffer: memoryview) -> int:
        """Fill a buffer with a file's bytes from `start` on; return how many there were."""
        ...

    def write(self, name: str, pieces: Sequence[Buffer]) -> None:
        """Write a file whole or not at all."""
        ...

    def copy(self, source: Folder, name: str, new_name: str) -> None:
        """Take over a file of another folder under a new name, without its bytes where that is possible."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file."""
        ...


class LocalFolder:
    """A folder of this machine's file system."""

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        self._path = path

    def __str__(self) -> str:
        """Return the path."""
        return str(self._path)

    def locate(self, name: str) -> str:
        """See `Folder`."""
        return str(self._path / name)

    def names(self) -> list[str] | None:
        """See `Folder`."""
        if not self._path.exists():
            return None
        if not self._path.is_dir():
            raise InputError("is not a folder")
        return sorted(entry for entry in os.listdir(self._path) if not entry.startswith("."))

    def create(self) -> None:
        """See `Folder`."""
        self._path.mkdir(parents=True, exist_ok=True)

    def size(self, name: str) -> int | None:
        """See `Folder`."""
        try:
            return (self._path / name).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `Folder`."""
        with (self._path / name).open("rb") as file:
            file.seek(start)
            return file.read(-1 if stop is None else stop - start)

    def read_into(self, name: str, start: int, buffer: memoryview) -> int:
        """See `Folder`."""
        read = 0
        with (self._path / name).open("rb", buffering=0) as file:
            file.seek(start)
            # A raw file may give less than was asked for: 2 GiB at once, or a signal came.
            while piece := file.readinto(buffer[read:]):
                read += piece
        return read

    def write(self, name: str, pieces: Sequence[Buffer]) -> None:
        """See `Folder`."""
        with writing_whole(self._path / name) as file:
            file.writelines(pieces)

    def copy(self, source: Folder, name: str, new_name: str) -> None:
        """See `Folder`; a hard link where both lie on one disk."""
        if source.path is None:
            self.write(new_name, [source.read(name)])
            return
        try:
            os.link(source.path / name, self._path / new_name)
        except FileExistsError:
            raise
        except OSError:
            # Another disk, or a file system without links.
            with (source.path / name).open("rb") as old, writing_whole(self._path / new_name) as new:
                shutil.copyfileobj(old, new, 1 << 20)

    def remove(self, name: str) -> None:
        """See `Folder`."""
        (self._path / name).unlink()


class UrlFolder:
    """A folder behind a URL, by way of fsspec.

    Parameters
    ----------
    url
        Such as ``s3://bucket/folder``; options of the file system come from its own configuration.

    Raises
    ------
    InputError
        If the kind of URL is unknown or its package is not installed.
    """

    path: Path | None = None

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            filesystem, root = fsspec.core.url_to_fs(url)
        except ImportError as exc:
            raise InputError(f"{url}: cannot be opened here ({one_line(exc)})") from exc
        except ValueError as exc:
            raise InputError(f"{url}: cannot be opened ({one_line(exc)}); check the URL") from exc
        self._url = url.rstrip("/")
        self._fs: Any = filesystem
        self._root = str(root).rstrip("/")

    def __str__(self) -> str:
        """Return the URL."""
        return self._url

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def locate(self, name: str) -> str:
        """See `Folder`."""
        return f"{self._url}/{name}"

    def names(self) -> list[str] | None:
        """See `Folder`."""
        with _foreign():
            self._fs.invalidate_cache(self._root)
            try:
                entries = self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                return None
        names = (str(entry).rstrip("/").rpartition("/")[2] for entry in entries)
        return sorted(name for name in names if name and not name.startswith("."))

    def create(self) -> None:
        """See `Folder`."""
        with _foreign():
            self._fs.makedirs(self._root, exist_ok=True)

    def size(self, name: str) -> int | None:
        """See `Folder`."""
        with _foreign():
            try:
                return int(self._fs.size(self._at(name)))
            except FileNotFoundError:
                return None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `Folder`."""
        with _foreign():
            return cast(bytes, self._fs.cat_file(self._at(name), start=start or None, end=stop))

    def read_into(self, name: str, start: int, buffer: memoryview) -> int:
        """See `Folder`."""
        content = self.read(name, start, start + len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def write(self, name: str, pieces: Sequence[Buffer]) -> None:
        """See `Folder`."""
        with _foreign():
            self._fs.pipe_file(self._at(name), b"".join(pieces))

    def copy(self, source: Folder, name: str, new_name: str) -> None:
        """See `Folder`; within one store the bytes do not pass through here."""
        if isinstance(source, UrlFolder) and source._fs is self._fs:
            with _foreign():
                self._fs.cp_file(source._at(name), self._at(new_name))
        else:
            self.write(new_name, [source.read(name)])

    def remove(self, name: str) -> None:
        """See `Folder`."""
        with _foreign():
            self._fs.rm_file(self._at(name))


@contextlib.contextmanager
def _foreign() -> Iterator[None]:
    """Turn what the stores' own libraries raise into `OSError`, as fsspec does with most of it."""
    try:
        yield
    except OSError:
        raise
    except _store_errors() as exc:
        raise OSError(one_line(exc)) from exc


def _store_errors() -> tuple[type[Exception], ...]:
    """Errors of the store libraries that are loaded; nobody can raise the others."""
    known = (
        ("botocore.exceptions", "BotoCoreError"),
        ("aiohttp", "ClientError"),
        ("google.auth.exceptions", "GoogleAuthError"),
        ("azure.core.exceptions", "AzureError"),
    )
    return tuple(
        getattr(sys.modules[module], name)
        for module, name in known
        if module in sys.modules and hasattr(sys.modules[module], name)
    )


def open_folder(path: str | Path) -> LocalFolder | UrlFolder:
    """Return the folder of a path or URL; nothing is read or made.

    Raises
    ------
    InputError
        If the URL cannot be opened here.
    """
    text = str(path)
    if isinstance(path, Path) or "://" not in text:
        return LocalFolder(Path(path))
    parts = urlsplit(text)
    if parts.scheme in ("file", "local") and not parts.netloc:
        return LocalFolder(Path(unquote(parts.path)))
    return UrlFolder(text)
