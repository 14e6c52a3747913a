"""Artifacts behind an fsspec URL: one object each, checked by whoever fetches it."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from placement.errors import ServiceError
from service.errors import UnavailableError

__all__ = ["RemoteFiles"]

_CHUNK_BYTES = 4 << 20
_YOUNG_S = 600.0


class RemoteFiles:
    """A shared store.

    An object is named by a row of the database only after it has been written whole, and is compared with its
    digest when it is fetched: one that a crash left half written is never taken for good.

    Parameters
    ----------
    url
        fsspec URL of its folder.

    Raises
    ------
    ServiceError
        If the URL cannot be opened.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        # Credentials in a URL must not get into messages.
        self.name = _without_secrets(url)
        with _translated(self.name):
            self._system, self._root = fsspec.core.url_to_fs(url)

    def put(self, digest: str, path: Path) -> None:
        """Store a file unless it was lately: an old object is written anew, lest it be cleared away."""
        with _translated(self.name):
            if self._is_young(digest, path.stat().st_size):
                return
            self._system.makedirs(self._name(digest).rpartition("/")[0], exist_ok=True)
            self._system.put_file(str(path), self._name(digest))

    def chunks(self, digest: str) -> Iterator[bytes]:
        """Read an artifact's bytes."""
        with _translated(self.name), self._system.open(self._name(digest), "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk

    def remove(self, digest: str) -> None:
        """Remove an artifact; unknown ones are gone already."""
        with _translated(self.name):
            if self._system.exists(self._name(digest)):
                self._system.rm_file(self._name(digest))

    def remove_unused(self, digest: str, *, unused_s: float) -> bool:
        """Remove an artifact that was not written in the last seconds; return whether it is gone."""
        with _translated(self.name):
            if not self._system.exists(self._name(digest)):
                return True
            if self._found_age_s(digest) < unused_s:
                return False
            self._system.rm_file(self._name(digest))
            return True

    def age_s(self, digest: str) -> float:
        """Return how long ago an artifact was written; infinite for unknown ones."""
        with _translated(self.name):
            self._system.invalidate_cache()
            return self._found_age_s(digest) if self._system.exists(self._name(digest)) else math.inf

    def digests(self) -> Iterator[str]:
        """List what is stored."""
        with _translated(self.name):
            if not self._system.exists(self._root):
                return
            self._system.invalidate_cache()
            for name in self._system.find(self._root):
                last = name.rpartition("/")[2]
                if len(last) == 64:
                    yield f"sha256:{last}"

    def check(self) -> None:
        """Write an object, and remove it again.

        Raises
        ------
        ServiceError
            If the store cannot be written.
        """
        name = f"{self._root}/probe-{secrets.token_hex(8)}"
        with _translated(self.name):
            self._system.makedirs(self._root, exist_ok=True)
            self._system.pipe_file(name, b"can this be written?")
            self._system.rm_file(name)

    def _name(self, digest: str) -> str:
        name = digest.removeprefix("sha256:")
        return f"{self._root}/{name[:2]}/{name}"

    def _is_young(self, digest: str, size_bytes: int) -> bool:
        self._system.invalidate_cache()
        try:
            same_size = self._system.info(self._name(digest))["size"] == size_bytes
        except FileNotFoundError:
            return False
        return same_size and self._found_age_s(digest) < _YOUNG_S

    def _found_age_s(self, digest: str) -> float:
        found: Any = self._system.modified(self._name(digest))
        written = datetime.fromtimestamp(found, UTC) if isinstance(found, float | int) else _aware(found)
        return (datetime.now(UTC) - written).total_seconds()


def _aware(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


def _without_secrets(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Tell the many ways in which remote stores fail as one."""
    try:
        yield
    except FileNotFoundError as exc:
        raise ServiceError(f"not in {name}: {exc}") from exc
    except (OSError, ImportError, ValueError, NotImplementedError) as exc:
        raise UnavailableError(f"{name}: {exc}") from exc
