"""Folders of data sets: made ready to be written, listed, cleared."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Mapping
from typing import Any

from placement.errors import InputError
from traces.files import reading, writing
from traces.source import TraceHeader
from traces.store.encode import encode_fragment
from traces.store.folder import Folder
from traces.store.manifest import (
    FRAGMENT_NAME,
    MANIFEST_NAME,
    MAX_RANK,
    SPOOL_NAME,
    Fragment,
    Manifest,
    manifest_name,
    spool_name,
)
from traces.store.scratch import Scratch
from traces.store.spool import SpoolContent, read_spool
from traces.trace import Trace

__all__ = [
    "check_fragment_tokens",
    "dataset_files",
    "made_by",
    "prepare_folder",
    "remove_dataset",
    "store",
    "write_manifest",
]


def check_fragment_tokens(fragment_tokens: int) -> None:
    """Refuse fragments of less than one token."""
    if fragment_tokens < 1:
        raise InputError(f"a fragment of {fragment_tokens} tokens is impossible; use at least 1")


def made_by(provenance: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return who makes a data set, where and when, with what the caller adds."""
    from placement import __version__

    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "by": f"moe-placement {__version__}",
        "host": platform.node(),
        "process": os.getpid(),
        **(provenance or {}),
    }


def prepare_folder(
    folder: Folder,
    header: TraceHeader,
    *,
    rank: int,
    overwrite: bool = False,
    append: bool = False,
    resume: bool = False,
) -> tuple[Manifest, SpoolContent | None]:
    """Make a folder ready for a rank to write, or say why it must not.

    Returns
    -------
    manifest, spool
        The rank's manifest to go on from, and what a crash left to recover.

    Raises
    ------
    InputError
        If it cannot be written, holds other files, a data set already that is not to be continued, or a
        spool that is not to be resumed.
    """
    if not 0 <= rank <= MAX_RANK:
        raise InputError(f"{folder}: rank {rank} is outside 0..{MAX_RANK}")
    if overwrite and rank:
        raise InputError(
            f"{folder}: rank {rank} cannot overwrite what other ranks write; clear it beforehand"
        )
    if overwrite:
        remove_dataset(folder)
    with writing(str(folder)):
        folder.create()
    mine = Manifest(header=header, rank=rank)
    for name in dataset_files(folder):
        if MANIFEST_NAME.fullmatch(name):
            manifest = _manifest_of(folder, name)
            _check_same_recording(folder, manifest, header, rank=None if append or resume else rank)
            mine = manifest if manifest.rank == rank else mine
    left = _left_by_a_crash(folder, header, rank, resume=resume)
    _remove_orphans(folder, mine)
    return mine, left


def _manifest_of(folder: Folder, name: str) -> Manifest:
    with reading(folder.locate(name)):
        return Manifest.parse(folder.read(name), name=name)


def _left_by_a_crash(folder: Folder, header: TraceHeader, rank: int, *, resume: bool) -> SpoolContent | None:
    """Return the spool of a recording that ended abruptly; refuse it where nobody asked for it."""
    if folder.path is None or not (folder.path / spool_name(rank)).exists():
        return None
    spool = folder.path / spool_name(rank)
    with writing(spool):
        content = read_spool(spool, header if resume else None)
    if not resume:
        raise InputError(
            f"{spool}: holds {content.num_tokens} tokens of a recording that ended abruptly; resume it, "
            "or overwrite the data set"
        )
    return content


def dataset_files(folder: Folder) -> list[str]:
    """List the files of a data set, manifests first; a folder that holds other files is refused.

    Raises
    ------
    InputError
        If it does.
    """
    with writing(str(folder)):
        names = folder.names() or []
    ours = (MANIFEST_NAME, FRAGMENT_NAME, SPOOL_NAME)
    foreign = [name for name in names if not any(pattern.fullmatch(name) for pattern in ours)]
    if foreign:
        raise InputError(f"{folder}: holds other files ({', '.join(foreign[:3])}); choose an empty folder")
    return names


def remove_dataset(folder: Folder) -> None:
    """Remove all files of a data set; a folder that is not there is left so.

    Raises
    ------
    InputError
        If the folder holds other files too, or cannot be changed.
    """
    for name in dataset_files(folder):
        # Manifests sort before fragments: a reader never meets one that names removed fragments.
        with writing(folder.locate(name)):
            folder.remove(name)


def _check_same_recording(
    folder: Folder, manifest: Manifest, header: TraceHeader, *, rank: int | None
) -> None:
    if manifest.rank == rank:
        raise InputError(
            f"{folder}: holds a data set of rank {rank} already; choose another output or overwrite it"
        )
    difference = header.difference(manifest.header)
    if difference:
        raise InputError(
            f"{folder}: holds another recording ({difference}); choose another output or overwrite it"
        )


def _remove_orphans(folder: Folder, manifest: Manifest) -> None:
    """Remove fragments of this rank that no manifest names: a crash left them."""
    named = {fragment.file for fragment in manifest.fragments}
    for name in dataset_files(folder):
        match = FRAGMENT_NAME.fullmatch(name)
        if match is not None and int(match[1]) == manifest.rank and name not in named:
            with writing(folder.locate(name)):
                folder.remove(name)


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Write a manifest, whole or not at all.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    name = manifest_name(manifest.rank)
    with writing(folder.locate(name)):
        folder.write(name, [manifest.to_bytes()])


def store(
    folder: Folder, header: TraceHeader, traces: Iterable[Trace], name: str, *, room: Scratch
) -> Fragment:
    """Write a fragment, whole or not at all; no manifest names it yet.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    content, fragment = encode_fragment(header, traces, file=name, room=room)
    with writing(folder.locate(name)):
        folder.write(name, [content])
    return fragment
