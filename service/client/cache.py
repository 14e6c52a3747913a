"""The last good placement of each deployment on disk, for the day on which the service is down.

One file each: a line that says what follows and gives its digest, then the placement as it was received. It
is written whole, and believed only where the digest fits.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from placement.errors import InputError
from service.client.results import DeploymentPlacement

__all__ = ["Kept", "PlacementCache"]

FORMAT = "moe-placement-cache/1"
MOST_BYTES = 1 << 30
MOST_HEAD_BYTES = 4096
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is kept under a name.

    Parameters
    ----------
    label
        Whose it is, and of which run; must fit when it is read again.
    """

    label: str
    content: bytes = field(repr=False)
    version: int | None = None
    etag: str | None = None

    def encode(self) -> str:
        """Return the text of the file."""
        head = {
            "format": FORMAT,
            "label": self.label,
            "version": self.version,
            "etag": self.etag,
            "sha256": hashlib.sha256(self.content).hexdigest(),
        }
        return f"{json.dumps(head)}\n{self.content.decode()}"

    @classmethod
    def decode(cls, data: bytes, *, label: str) -> Kept:
        """Read a file.

        Raises
        ------
        InputError
            If it is damaged, or another's.
        """
        line, _, content = data.partition(b"\n")
        try:
            head = json.loads(line) if len(line) <= MOST_HEAD_BYTES else None
        except (ValueError, RecursionError):
            head = None
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise InputError("is no kept placement")
        if head.get("sha256") != hashlib.sha256(content).hexdigest():
            raise InputError("is damaged: its digest does not fit")
        if head.get("label") != label:
            raise InputError(f"belongs to {str(head.get('label'))[:80]!r}")
        version, etag = head.get("version"), head.get("etag")
        return cls(
            label=label,
            content=content,
            version=version if type(version) is int else None,
            etag=etag if isinstance(etag, str) else None,
        )

    def as_answer(self) -> DeploymentPlacement:
        """Return it as the service answered it."""
        return DeploymentPlacement(content=self.content, etag=self.etag, version=self.version)


class PlacementCache:
    """A folder with one file for each deployment.

    Parameters
    ----------
    folder
        It is made when something is first kept.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)

    def path(self, name: str) -> Path:
        """Return the file of a deployment.

        Raises
        ------
        InputError
            If that is no name for one.
        """
        if _PLAIN.fullmatch(name) is None:
            raise InputError(
                f"{name!r} is no name of a deployment: letters, digits, '.', '_' and '-' are taken"
            )
        return self._folder / f"{name}.placement"

    def read(self, name: str, *, label: str | None = None) -> Kept | None:
        """Return what is kept under a name, None for nothing.

        Raises
        ------
        InputError
            If the file cannot be read, is damaged, or belongs to another.
        """
        path = self.path(name)
        try:
            data = _read(path)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise InputError(f"{path}: cannot be read: {exc.strerror}") from exc
        try:
            return Kept.decode(data, label=name if label is None else label)
        except InputError as exc:
            raise InputError(f"{path}: {exc}") from exc

    def write(self, name: str, kept: Kept) -> None:
        """Keep a placement, whole or not at all.

        Raises
        ------
        InputError
            If the file cannot be written.
        """
        from placement.io import write_text

        path = self.path(name)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise InputError(f"{self._folder}: cannot be made: {exc.strerror}") from exc
        write_text(path, kept.encode())


def _read(path: Path) -> bytes:
    """Read a plain file; nothing else is waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(file.fileno())
        if not stat.S_ISREG(mode.st_mode):
            raise InputError(f"{path}: is no plain file")
        if mode.st_size > MOST_BYTES:
            raise InputError(f"{path}: is {mode.st_size:,} bytes; no placement is that large")
        return file.read()
