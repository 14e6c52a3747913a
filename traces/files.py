"""The one seam to the file system: foreign failures become `InputError`, files are written whole."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from placement.errors import InputError

__all__ = ["check_size", "one_line", "reading", "writing", "writing_whole"]

_LIMIT_BYTES = 64 * 2**30
_RATIO_MATTERS_BYTES = 2**30
_LIMIT_RATIO = 100


def one_line(failure: BaseException) -> str:
    """Return the message of a foreign failure on one line, or its type where it says nothing."""
    reason = failure.strerror if isinstance(failure, OSError) and failure.strerror else str(failure)
    return " ".join(reason.split()) or type(failure).__name__


@contextlib.contextmanager
def reading(path: Path | str, *foreign: type[Exception]) -> Iterator[None]:
    """Name `path` in every input error raised inside, and turn `OSError` and `foreign` into one.

    Raises
    ------
    InputError
        Instead of what was raised inside.
    """
    try:
        yield
    except InputError as exc:
        raise InputError(f"{path}: {exc}") from exc
    except foreign as exc:
        raise InputError(
            f"{path}: is damaged or incomplete ({one_line(exc)}); restore it from a copy"
        ) from exc
    except OSError as exc:
        raise InputError(
            f"{path}: cannot be read ({one_line(exc)}); check the path and its permissions"
        ) from exc


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into an input error.

    Raises
    ------
    InputError
        Instead of an `OSError` raised inside.
    """
    try:
        yield
    except OSError as exc:
        raise InputError(f"{path}: cannot be written ({one_line(exc)}); choose another output") from exc


@contextlib.contextmanager
def writing_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name when the block ends, or not at all.

    The bytes go to a hidden file of the same folder, which replaces `path` once it is on the disk.

    Raises
    ------
    InputError
        If the folder or the file cannot be written.
    """
    partial = path.parent / f".{path.name}.{secrets.token_hex(6)}.partial"
    try:
        with writing(path):
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    except BaseException:
        # Ctrl-C counts too; the first failure is the one to report, so a failing clean-up stays silent.
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def check_size(content_bytes: int, stored_bytes: int) -> None:
    """Refuse data that would unpack to more than any trace needs (a decompression bomb).

    Parameters
    ----------
    content_bytes
        Size after unpacking, as the file itself declares it.
    stored_bytes
        Size on the disk.

    Raises
    ------
    InputError
        Over 64 GiB, or over 1 GiB when it unpacks to more than 100 times its size.
    """
    if content_bytes > _LIMIT_BYTES:
        raise InputError(
            f"unpacks to {content_bytes} bytes, more than the limit of {_LIMIT_BYTES}; cut the trace in parts"
        )
    if content_bytes > max(_RATIO_MATTERS_BYTES, _LIMIT_RATIO * stored_bytes):
        raise InputError(
            f"unpacks from {stored_bytes} to {content_bytes} bytes, over {_LIMIT_RATIO} times its size; "
            "no routing trace does, so it is not read"
        )
