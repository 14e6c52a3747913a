"""Bytes under their digest, on local disk or behind an fsspec URL; written whole, never changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["ArtifactFiles", "Draft", "digest_of"]


def digest_of(content: bytes) -> str:
    """Return ``sha256:<hex>`` of some bytes."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Draft:
    """A file on its way in: bytes go to a scratch file and into the digest as they come."""

    path: Path
    """Where the bytes are until they are kept or dropped."""
    size_bytes: int

    def write(self, chunk: bytes) -> None:
        """Take some bytes."""
        raise NotImplementedError

    @property
    def digest(self) -> str:
        """Digest of what was written so far."""
        raise NotImplementedError

    @property
    def stream(self) -> BinaryIO:
        """The scratch file."""
        raise NotImplementedError


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
        raise NotImplementedError

    @contextmanager
    def draft(self) -> Iterator[Draft]:
        """Give a scratch file; what was not kept by the end is removed."""
        raise NotImplementedError

    def keep(self, draft: Draft) -> str:
        """Make a draft durable under its digest (fsync, rename); bytes known before are left as they are."""
        raise NotImplementedError

    def put(self, content: bytes) -> str:
        """Keep some bytes; return their digest."""
        raise NotImplementedError

    def local(self, digest: str) -> Path:
        """Return a local file with an artifact's bytes, fetched and verified first where the store is remote.

        Raises
        ------
        ServiceError
            If it is not there or damaged.
        """
        raise NotImplementedError

    def read(self, digest: str) -> bytes:
        """Return an artifact's bytes."""
        raise NotImplementedError

    def remove(self, digest: str) -> None:
        """Remove an artifact's bytes; unknown ones are gone already."""
        raise NotImplementedError

    def digests(self) -> Iterator[str]:
        """List what is stored."""
        raise NotImplementedError
