"""Writes the files of a permuted checkpoint: headers with new names, rows in new order, the rest as it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from placement.checkpoint.copying import Copier, copy_file, copying
from placement.checkpoint.header import Header, read_header
from placement.checkpoint.index import with_other_files
from placement.checkpoint.plan import Plan, Reorder
from placement.checkpoint.shards import Shards
from placement.errors import InputError

__all__ = ["CheckpointWriter", "Progress"]

Progress = Callable[[int, int], None]
"""Is told the bytes written so far, and those to write in all."""


class CheckpointWriter:
    """Writes all files of a checkpoint into an empty folder.

    Parameters
    ----------
    plan
        What happens to each tensor.
    shards
        The checkpoint.
    folder
        Where to write.
    leave
        Name of a file that is not copied: it will be written anew, if at all.
    progress
        Is told the bytes written so far, and those to write in all.

    Attributes
    ----------
    total_bytes
        What will be written, give or take the headers' padding.
    num_renamed, num_reordered
        Tensors written so far with another name, with another order of rows.
    """

    def __init__(
        self, *, plan: Plan, shards: Shards, folder: Path, leave: str, progress: Progress | None
    ) -> None:
        self._plan = plan
        self._shards = shards
        self._folder = folder
        self._progress = progress
        self._done_bytes = 0
        self.num_renamed = self.num_reordered = 0
        self._file_of: dict[str, str] = {}
        self._others = [name for name in shards.others if name != leave]
        names = (*shards.files, *self._others)
        self.total_bytes = sum((shards.folder / name).stat().st_size for name in names)

    def write(self) -> None:
        """Write everything.

        Raises
        ------
        InputError
            If a file changed since it was looked at, or cannot be read or written.
        """
        for name in self._shards.files:
            self._write_shard(name)
        if self._shards.index is not None:
            self._write_index(self._shards.index)
        for name in self._others:
            target = self._folder / name
            with copying(self._shards.folder / name, target):
                target.parent.mkdir(parents=True, exist_ok=True)
            copy_file(self._shards.folder / name, target, advance=self._advance)

    def _advance(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if self._progress is not None:
            self._progress(self._done_bytes, self.total_bytes)

    def _write_shard(self, name: str) -> None:
        source, target = self._shards.folder / name, self._folder / name
        header = read_header(source)
        new_names, steps = self._steps(header)
        start = header.renamed(new_names)
        for entry in header.tensors:
            new_name = new_names.get(entry.name, entry.name)
            if self._shards.weight_map.get(new_name, name) != name:
                self._file_of[new_name] = name
        with (
            copying(source, target),
            source.open("rb", buffering=0) as file,
            target.open("xb", buffering=0) as out,
        ):
            copier = Copier(file.fileno(), out.fileno(), advance=self._advance)
            copier.write(start)
            self._advance(header.data_begin)
            try:
                for begin, count, reorder in steps:
                    if reorder is None:
                        copier.copy(begin, count)
                    else:
                        copier.reorder(begin, reorder)
            except InputError as exc:
                raise InputError(f"{source}: {exc}") from exc
            os.fsync(out.fileno())

    def _steps(self, header: Header) -> tuple[dict[str, str], list[tuple[int, int, Reorder | None]]]:
        """Return new names, and the runs of bytes to copy: begin in the file, length, new order if any."""
        new_names: dict[str, str] = {}
        steps: list[tuple[int, int, Reorder | None]] = []
        run_begin = run_end = header.data_begin
        for entry in header.tensors:
            action = self._plan.action(entry)
            if action is not None and action.name != entry.name:
                new_names[entry.name] = action.name
            if action is not None and action.reorder is not None:
                self.num_reordered += 1
                steps += [(run_begin, run_end - run_begin, None)]
                steps += [(header.data_begin + entry.begin, entry.num_bytes, action.reorder)]
                run_begin = header.data_begin + entry.end
            run_end = header.data_begin + entry.end
        steps += [(run_begin, run_end - run_begin, None)]
        self.num_renamed += len(new_names)
        return new_names, steps

    def _write_index(self, name: str) -> None:
        """Say in which file each name is now; the names are the same as before, only in other files."""
        source, target = self._shards.folder / name, self._folder / name
        with copying(source, target), target.open("xb") as file:
            # Bytes, not text: line ends stay as they are.
            text = source.read_bytes().decode()
            for piece in with_other_files(text, self._file_of):
                file.write(piece.encode())
            file.flush()
            os.fsync(file.fileno())
