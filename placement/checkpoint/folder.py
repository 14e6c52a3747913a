"""Writes a folder whole or not at all: it grows under a hidden name and takes its own at the end."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from placement.checkpoint.provenance import FILE_NAME, is_ours
from placement.errors import InputError

__all__ = ["check_room", "writing_folder"]


@contextlib.contextmanager
def writing_folder(out: Path, *, source: Path, overwrite: bool) -> Iterator[Path]:
    """Give an empty folder that becomes `out` when the block ends well, and vanishes when it does not.

    Parameters
    ----------
    source
        Folder that is read meanwhile; `out` may neither be it, hold it, nor lie in it.
    overwrite
        Whether a checkpoint that was written by this package may be replaced. Nothing else ever is.

    Raises
    ------
    InputError
        If `out` may not be replaced, or its parent cannot be written.
    """
    _check_place(out, source=source, overwrite=overwrite)
    place = out.resolve()
    growing = place.parent / f".{place.name}.{secrets.token_hex(6)}.partial"
    try:
        with _writing(out):
            growing.mkdir()
        yield growing
        with _writing(out):
            _sync(growing)
            _put(growing, place)
    except BaseException:
        # Ctrl-C counts too; the first failure is the one to report.
        shutil.rmtree(growing, ignore_errors=True)
        raise


def check_room(out: Path, num_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises
    ------
    InputError
        If less is free where `out` goes.
    """
    with _writing(out):
        free = shutil.disk_usage(out.resolve().parent).free
    if free < num_bytes:
        raise InputError(
            f"{out}: the checkpoint takes {num_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free "
            "there; make room or choose another folder"
        )


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise InputError(f"{out}: cannot be written ({exc.strerror}); choose another folder") from exc


def _check_place(out: Path, *, source: Path, overwrite: bool) -> None:
    here, there = out.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise InputError(f"{out}: overlaps the folder that is read, {source}; choose another folder")
    with _writing(out):
        if not out.exists() and not out.is_symlink():
            if not here.parent.is_dir():
                raise InputError(f"{out}: there is no folder {here.parent}; make it first")
            return
        if not out.is_dir():
            raise InputError(f"{out}: is a file; choose another folder")
        if out.is_symlink():
            raise InputError(f"{out}: is a link; name the folder that it leads to")
        if not any(out.iterdir()):
            return
        if not overwrite:
            raise InputError(f"{out}: is not empty; choose another folder, or ask to overwrite it")
        if not is_ours(out):
            raise InputError(
                f"{out}: holds no {FILE_NAME}, so nothing shows that this command wrote it; "
                "remove it yourself"
            )


def _put(growing: Path, place: Path) -> None:
    """Let the finished folder take its place; an old one goes only when the new one stands."""
    if not place.exists() or not any(place.iterdir()):
        growing.replace(place)
        _sync(place.parent)
        return
    old = growing.with_suffix(".old")
    place.replace(old)
    try:
        growing.replace(place)
    except BaseException:
        old.replace(place)
        raise
    _sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Have the folder's entries on the disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
