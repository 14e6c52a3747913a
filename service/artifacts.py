"""Bytes under their digest, on local disk or behind an fsspec URL; written whole, never changed.

Layout below the data directory: ``artifacts/ab/<hex>`` (the store itself, or the local copies of a remote
one), ``scratch/`` for what is on its way in. A draft's file is locked as long as its writer lives, so that
what dead processes left behind is told from work in progress, on any machine that shares the folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from placement.errors import InputError, ServiceError
from service.errors import UnavailableError

if TYPE_CHECKING:
    from service.remote import RemoteFiles

__all__ = ["ArtifactFiles", "DiskFullError", "Draft", "digest_of", "private_folder"]

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_AGAIN_S = 0.05
_ASIDE_S = 60.0


class DiskFullError(UnavailableError):
    """There is no room for what is to be kept."""


def digest_of(content: bytes) -> str:
    """Return ``sha256:<hex>`` of some bytes."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def private_folder(path: Path) -> Path:
    """Make a folder, and those above it, that nobody else may look into; leave those that exist.

    Raises
    ------
    InputError
        If there is something else, or it may not be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as exc:
        why = "is no folder" if not isinstance(exc, PermissionError) else "may not be made"
        raise InputError(f"{path} {why}; name another folder with --data-dir") from exc
    return path


class Draft:
    """A file on its way in: bytes go to a scratch file and into the digest as they come.

    Parameters
    ----------
    folder
        Folder of the scratch file.
    """

    path: Path
    """Where the bytes are until they are kept or dropped; complete after every `write`."""
    size_bytes: int

    def __init__(self, folder: Path) -> None:
        self.path, self._file = _locked_file(folder)
        self.size_bytes = 0
        self._hash = hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        """Take some bytes.

        Raises
        ------
        DiskFullError
            If there is no room.
        """
        rest = memoryview(chunk)
        with _telling_full_disks(self.path.parent):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._hash.update(chunk)
        self.size_bytes += len(chunk)

    @property
    def digest(self) -> str:
        """Digest of what was written so far."""
        return f"sha256:{self._hash.hexdigest()}"

    @property
    def stream(self) -> BinaryIO:
        """The scratch file, to look into; what is written goes to its end in any case."""
        return self._file

    def close(self) -> None:
        """Give up the file; what was not kept is removed."""
        self.path.unlink(missing_ok=True)
        self._file.close()


class ArtifactFiles:
    """The store of files.

    Parameters
    ----------
    data_dir
        Folder for artifacts, scratch files and the local copies of remote ones.
    url
        fsspec URL of a shared store (``s3://bucket/prefix``); None for `data_dir` itself.
    """

    def __init__(self, data_dir: Path, *, url: str | None = None) -> None:
        private_folder(data_dir)
        self._scratch = private_folder(data_dir / "scratch")
        self._folder = private_folder(data_dir / "artifacts")
        self._url = url
        self._opened: RemoteFiles | None = None
        self._verified: dict[str, tuple[int, int, int]] = {}
        self._sweep()

    @property
    def scratch(self) -> Path:
        """Folder for files of the moment."""
        return self._scratch

    @property
    def is_remote(self) -> bool:
        """Whether the store lies behind a URL, and the local files are only copies."""
        return self._url is not None

    @contextmanager
    def draft(self) -> Iterator[Draft]:
        """Give a scratch file; what was not kept by the end is removed."""
        draft = Draft(self._scratch)
        try:
            yield draft
        finally:
            draft.close()

    def keep(self, draft: Draft) -> str:
        """Make a draft durable under its digest (fsync, rename); bytes known before are left as they are.

        Raises
        ------
        DiskFullError
            If there is no room.
        ServiceError
            If the remote store does not take it.
        """
        digest = draft.digest
        if not self._is_kept(digest):
            with _telling_full_disks(self._folder):
                self._place(draft, self._path(digest))
        if self._remote is not None:
            self._remote.put(digest, self._path(digest))
        return digest

    def put(self, content: bytes) -> str:
        """Keep some bytes; return their digest."""
        with self.draft() as draft:
            draft.write(content)
            return self.keep(draft)

    def local(self, digest: str) -> Path:
        """Return a local file with an artifact's bytes, fetched and verified first where the store is remote.

        A file is read through and compared with its digest when this process sees it for the first time, or
        changed.

        Raises
        ------
        ServiceError
            If it is not there or damaged.
        """
        path = self._path(digest)
        if not self._exists(path):
            self._fetch(digest)
        elif self.is_remote:
            os.utime(path)  # copies that are used stay
        if not self._verify(digest, path):
            # Out of the way, so that the same bytes can be stored again.
            path.replace(path.with_suffix(".damaged"))
            raise ServiceError(f"artifact {digest} is damaged: its bytes have another digest; store it again")
        return path

    def read(self, digest: str) -> bytes:
        """Return an artifact's bytes.

        Raises
        ------
        ServiceError
            If it is not there or damaged.
        """
        return self.local(digest).read_bytes()

    def remove(self, digest: str) -> None:
        """Remove an artifact's bytes; unknown ones are gone already."""
        self._verified.pop(digest, None)
        self._path(digest).unlink(missing_ok=True)
        if self._remote is not None:
            self._remote.remove(digest)

    def remove_unused(self, digest: str, *, unused_s: float) -> bool:
        """Remove an artifact's bytes unless they were kept again in the last seconds; return whether.

        The local file is moved aside first: whoever keeps the same bytes meanwhile either made the file
        younger before, and it is put back, or does not find it any more, and stores its own.
        """
        path = self._path(digest)
        aside = self._scratch / f"{path.name}.{secrets.token_hex(4)}.removed"
        with suppress(FileNotFoundError):
            path.rename(aside)
            if time.time() - aside.stat().st_mtime < unused_s:
                aside.rename(path)
                return False
            aside.unlink()
        if self._remote is not None and not self._remote.remove_unused(digest, unused_s=unused_s):
            return False
        self._verified.pop(digest, None)
        return True

    def age_s(self, digest: str) -> float:
        """Return for how long an artifact's bytes were not kept (again); infinite for unknown ones."""
        if self._remote is not None:
            return self._remote.age_s(digest)
        try:
            return time.time() - self._path(digest).stat().st_mtime
        except FileNotFoundError:
            return math.inf

    def drop_copies(self, *, unused_s: float) -> int:
        """Remove local copies of remote artifacts that were not used for some time; return their bytes."""
        if self._url is None:
            return 0
        dropped = 0
        for path in self._files():
            about = path.stat()
            if time.time() - about.st_mtime > unused_s:
                path.unlink(missing_ok=True)
                dropped += about.st_size
        return dropped

    def digests(self) -> Iterator[str]:
        """List what is stored."""
        if self._remote is not None:
            yield from self._remote.digests()
        else:
            yield from (f"sha256:{path.name}" for path in self._files())

    def check(self) -> None:
        """Write a file, and remove it again.

        Raises
        ------
        ServiceError
            If the store cannot be written.
        """
        try:
            with self.draft() as draft:
                draft.write(b"can this be written?")
                os.fsync(draft.stream.fileno())
        except OSError as exc:
            raise UnavailableError(f"{self._folder} cannot be written: {exc.strerror}") from exc
        if self._remote is not None:
            self._remote.check()

    @property
    def free_bytes(self) -> int:
        """Room that is left on the disk of the data directory."""
        return shutil.disk_usage(self._folder).free

    @property
    def _remote(self) -> RemoteFiles | None:
        if self._url is not None and self._opened is None:
            from service.remote import RemoteFiles

            self._opened = RemoteFiles(self._url)
        return self._opened

    def _path(self, digest: str) -> Path:
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise ServiceError(f"{digest[:80]!r} is not the id of an artifact (sha256:<64 hex digits>)")
        return self._folder / match[1][:2] / match[1]

    def _files(self) -> Iterator[Path]:
        for folder in sorted(self._folder.iterdir()):
            yield from (path for path in sorted(folder.iterdir()) if len(path.name) == 64)

    def _exists(self, path: Path) -> bool:
        if path.exists():
            return True
        # One that is being cleared away may come back: see `remove_unused`.
        time.sleep(_AGAIN_S)
        return path.exists()

    def _is_kept(self, digest: str) -> bool:
        """Whether the bytes are there, whole; if so they count as used now."""
        path = self._path(digest)
        try:
            os.utime(path)
            return self._verify(digest, path)
        except FileNotFoundError:
            return False

    def _verify(self, digest: str, path: Path) -> bool:
        about = path.stat()
        # A change of time alone is our own doing: being used makes a file young.
        seen = (about.st_ino, about.st_size, about.st_dev)
        if self._verified.get(digest) == seen:
            return True
        if _file_digest(path) != digest:
            return False
        self._verified[digest] = seen
        return True

    def _place(self, draft: Draft, path: Path) -> None:
        os.fsync(draft.stream.fileno())
        if not path.parent.exists():
            private_folder(path.parent)
            _sync_folder(path.parent.parent)
        draft.path.replace(path)
        _sync_folder(path.parent)

    def _fetch(self, digest: str) -> None:
        if self._remote is None:
            raise ServiceError(f"artifact {digest} is not in {self._folder}")
        with self.draft() as draft:
            for chunk in self._remote.chunks(digest):
                draft.write(chunk)
            if draft.digest != digest:
                raise ServiceError(f"artifact {digest} is damaged in {self._remote.name}; store it again")
            with _telling_full_disks(self._folder):
                self._place(draft, self._path(digest))

    def _sweep(self) -> None:
        """Remove what writers that are gone left in the scratch folder, and put back what was moved aside."""
        for path in self._scratch.glob("*.draft"):
            with suppress(FileNotFoundError, BlockingIOError, PermissionError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        for path in self._scratch.glob("*.removed"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_ctime > _ASIDE_S:
                    path.replace(self._path(f"sha256:{path.name.partition('.')[0]}"))


def _locked_file(folder: Path) -> tuple[Path, BinaryIO]:
    while True:
        path = folder / f"{secrets.token_hex(16)}.draft"
        with _telling_full_disks(folder):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        file = open(descriptor, "a+b", buffering=0)  # noqa: SIM115 - closed by the draft
        fcntl.flock(file, fcntl.LOCK_EX)
        # Between the two a sweep of another process may have taken it for an orphan.
        if os.fstat(descriptor).st_nlink > 0:
            return path, file
        file.close()


@contextmanager
def _telling_full_disks(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno not in _FULL:
            raise
        raise DiskFullError(f"no room in {folder}: {exc.strerror}; free some space, or run vacuum") from exc


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
