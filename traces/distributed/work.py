"""A folder of partial results with a manifest, so that a run can end at any moment and go on later.

The manifest is a JSON file that is written whole: what identifies the run, and for every task that is done
its file with size and checksum. A file that the manifest does not name, or that differs from what it says,
does not count as done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placement._fields import brief
from placement.errors import InputError
from traces.files import reading, writing, writing_whole

__all__ = ["MANIFEST", "Checked", "WorkFolder", "checked"]

MANIFEST = "manifest.json"

_SAVE_SHARE = 0.05
"""At most this share of the time goes into writing the manifest, however many tasks it lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A file as it was when it was finished: size in bytes and SHA-256."""

    bytes: int
    sha256: str


def checked(path: Path) -> Checked:
    """Return size and checksum of a file.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    with reading(path), path.open("rb") as file:
        return Checked(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


class WorkFolder:
    """Partial results of one run.

    Parameters
    ----------
    folder
        Where; made if it is not there.
    kind
        What kind of run it is, for instance ``statistics``.
    identity
        What makes two runs the same run, as plain data; a run with another identity is refused.

    Raises
    ------
    InputError
        If the folder holds something else, the results of another run, or another process works in it.
    """

    def __init__(self, folder: Path, *, kind: str, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._format, self._identity = f"moe-placement-{kind}/1", _plain(identity)
        self._done: dict[str, dict[str, Any]] = {}
        self._saved_at_s, self._save_took_s, self._dirty = -float("inf"), 0.0, False
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not self.manifest.exists() and any(entry.name != _LOCK for entry in folder.iterdir()):
                raise InputError(f"{folder}: is not empty, and no work folder; choose another folder")
        self._lock = _locked(folder)
        try:
            self._read()
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def manifest(self) -> Path:
        """The manifest's path."""
        return self.folder / MANIFEST

    def _read(self) -> None:
        if not self.manifest.exists():
            self.save()
            return
        with reading(self.manifest, ValueError, KeyError, TypeError, AttributeError):
            values = json.loads(self.manifest.read_text(encoding="utf-8"))
            its_format, its_identity = values["format"], dict(values["identity"])
            done = {str(key): dict(entry) for key, entry in values["done"].items()}
        if its_format != self._format:
            raise InputError(
                f"{self.manifest}: is of a {its_format!r} run, not {self._format!r}; choose another folder"
            )
        if (differs := _difference(self._identity, its_identity)) is not None:
            raise InputError(
                f"{self.folder}: holds partial results of another run: {differs}; choose another folder, or "
                "delete this one to start anew"
            )
        self._done = done

    def entry(self, key: str) -> Mapping[str, Any] | None:
        """Return what is recorded of a task that is done and whose file is whole; None otherwise."""
        entry = self._done.get(key)
        if entry is None:
            return None
        if "file" in entry:
            path = self.folder / str(entry["file"])
            known = (entry.get("bytes"), entry.get("sha256"))
            # Size first: it tells most damage without reading.
            if not path.is_file() or path.stat().st_size != known[0]:
                return None
            if checked(path).sha256 != known[1]:
                return None
        return entry

    def record(
        self, key: str, *, file: Path | None = None, content: Checked | None = None, **facts: Any
    ) -> None:
        """Note that a task is done, with its file if it has one and whatever else there is to keep of it."""
        entry = dict(facts)
        if file is not None:
            content = checked(file) if content is None else content
            entry |= {
                "file": file.relative_to(self.folder).as_posix(),
                "bytes": content.bytes,
                "sha256": content.sha256,
            }
        self._done[key] = entry
        self._dirty = True
        waited_s = time.monotonic() - self._saved_at_s
        if waited_s >= self._save_took_s / _SAVE_SHARE:
            self.save()

    def forget(self, key: str) -> None:
        """Strike a task off; its file goes as well."""
        entry = self._done.pop(key, None)
        if entry is not None:
            self._dirty = True
            if "file" in entry:
                with writing(self.folder):
                    (self.folder / str(entry["file"])).unlink(missing_ok=True)

    def save(self) -> None:
        """Write the manifest.

        Raises
        ------
        InputError
            If it cannot be written.
        """
        began_s = time.monotonic()
        values = {"format": self._format, "identity": self._identity, "done": self._done}
        with writing_whole(self.manifest) as file:
            file.write((json.dumps(values, allow_nan=False) + "\n").encode())
        self._saved_at_s, self._dirty = time.monotonic(), False
        self._save_took_s = self._saved_at_s - began_s

    def close(self) -> None:
        """Write what is not written yet and let others work here."""
        try:
            if self._dirty:
                self.save()
        finally:
            os.close(self._lock)

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_LOCK = ".lock"


def _locked(folder: Path) -> int:
    """Return a file descriptor that keeps other processes out; the system frees it however we end."""
    with writing(folder):
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(descriptor)
        raise InputError(
            f"{folder}: another process works in it; wait for it or choose another folder"
        ) from exc
    except OSError:
        # Some network file systems have no locks; working without is better than not at all.
        pass
    return descriptor


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def _difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    for name in (*mine, *(name for name in theirs if name not in mine)):
        if mine.get(name) != theirs.get(name):
            return f"{name} was {brief(theirs.get(name))} and is {brief(mine.get(name))} now"
    return None
