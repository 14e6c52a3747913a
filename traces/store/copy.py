"""Writes a stream of tokens as a new data set or archive, whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from placement.errors import InputError
from traces.files import writing
from traces.source import TraceHeader
from traces.store.folder import open_folder
from traces.store.manifest import MAX_RANK
from traces.store.prepare import dataset_files, remove_dataset
from traces.store.whole import write_npz
from traces.store.writer import FRAGMENT_TOKENS, DatasetWriter
from traces.trace import Trace, joined

__all__ = ["write_stream"]

_MOST_WRITERS = 256


def write_stream(
    blocks: Iterable[Trace],
    header: TraceHeader,
    out: str | Path,
    *,
    overwrite: bool = False,
    fragment_tokens: int = FRAGMENT_TOKENS,
    provenance: Mapping[str, Any] | None = None,
) -> int:
    """Write consecutive tokens; ranks get shards of their own, as if each had recorded its own.

    Parameters
    ----------
    blocks
        The tokens.
    header
        What they have in common.
    out
        Folder or URL of a data set, or a file whose name ends in ``.npz``, which has to fit in memory.
    overwrite
        Replace an output that is there.
    fragment_tokens
        Tokens per fragment.
    provenance
        What the manifests say of where the tokens come from.

    Returns
    -------
    int
        Tokens written.

    Raises
    ------
    InputError
        If there are no tokens, or the output is there already or cannot be written.
    """
    if str(out).endswith(".npz") and "://" not in str(out):
        path = Path(out)
        if path.exists() and not overwrite:
            raise InputError(f"{path}: is there already; choose another output or overwrite it")
        trace = joined(list(blocks))
        write_npz(trace, path)
        return trace.num_tokens
    with _new_folder(out, overwrite=overwrite) as folder:
        with ExitStack() as stack:
            shards = _Shards(stack, folder, header, fragment_tokens, provenance)
            tokens = sum(shards.append(block) for block in blocks)
        if not tokens:
            raise InputError("no token is kept, so nothing is written")
    return tokens


class _Shards:
    """A writer for every rank that comes by; one for all where there are no ranks, or too many."""

    def __init__(
        self,
        stack: ExitStack,
        folder: str | Path,
        header: TraceHeader,
        fragment_tokens: int,
        provenance: Mapping[str, Any] | None,
    ) -> None:
        self._stack, self._folder, self._header = stack, folder, header
        self._fragment_tokens, self._provenance = fragment_tokens, provenance
        self._writers: dict[int, DatasetWriter] = {}

    def append(self, block: Trace) -> int:
        """Write a block; return its tokens."""
        for rank, piece in self._by_rank(block):
            self._writer(rank).append_trace(piece)
        return block.num_tokens

    def _by_rank(self, block: Trace) -> Iterator[tuple[int, Trace]]:
        if block.rank_T is None:
            yield 0, block
            return
        for rank in np.unique(block.rank_T).tolist():
            mask_T = block.rank_T == rank
            piece = block if mask_T.all() else block.select_tokens(mask_T)
            # Ranks that get no shard of their own share that of rank 0; readers tell them apart.
            own = rank <= MAX_RANK and (rank in self._writers or len(self._writers) < _MOST_WRITERS)
            yield rank if own else 0, piece

    def _writer(self, rank: int) -> DatasetWriter:
        if rank not in self._writers:
            header = self._header
            self._writers[rank] = self._stack.enter_context(
                DatasetWriter(
                    self._folder,
                    num_layers=header.num_layers,
                    num_experts=header.num_experts,
                    top_k=header.top_k,
                    model_name=header.model_name,
                    moe_layer_ids=header.moe_layer_ids,
                    domain_names=header.domain_names,
                    rank=rank,
                    fragment_tokens=self._fragment_tokens,
                    spool=False,
                    provenance=self._provenance,
                )
            )
        return self._writers[rank]


@contextmanager
def _new_folder(out: str | Path, *, overwrite: bool) -> Iterator[str | Path]:
    """Yield a folder to write into, which becomes `out` when all went well and goes away otherwise."""
    folder = open_folder(out)
    if folder.path is None:
        yield from _remote(str(out), overwrite=overwrite)
        return
    if folder.path.exists():
        # Refused now, not after an hour of reading.
        with writing(folder.path):
            if dataset_files(folder) and not overwrite:
                raise InputError(f"{out}: holds a data set already; choose another output or overwrite it")
    partial = folder.path.parent / f".{folder.path.name}.{secrets.token_hex(6)}.partial"
    try:
        yield partial
        with writing(folder.path):
            if folder.path.exists():
                remove_dataset(folder)
                folder.path.rmdir()
            partial.rename(folder.path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remote(out: str, *, overwrite: bool) -> Iterator[str]:
    folder = open_folder(out)
    if dataset_files(folder):
        if not overwrite:
            raise InputError(f"{out}: holds a data set already; choose another output or overwrite it")
        remove_dataset(folder)
    try:
        yield out
    except BaseException:
        remove_dataset(folder)
        raise
