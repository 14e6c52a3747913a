"""Writes data sets: what was flushed is always a valid one, and what was appended survives a crash.

Every rank writes its own fragments, spool and manifest, so parallel ranks share a folder without a lock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.files import writing
from traces.source import TraceHeader
from traces.store.folder import open_folder
from traces.store.fragment import read_content
from traces.store.manifest import Fragment, Manifest, fragment_name, spool_name
from traces.store.prepare import check_fragment_tokens, made_by, prepare_folder, store, write_manifest
from traces.store.scratch import Scratch
from traces.store.spool import Recovery, Spool, SpoolContent
from traces.trace import Trace

__all__ = ["FRAGMENT_TOKENS", "DatasetWriter", "cut"]

FRAGMENT_TOKENS = 1 << 17
"""Tokens that a fragment holds unless told otherwise: some 10 to 100 MB."""

_ALL_OR_NONE = ("sequence", "position", "rank")


class DatasetWriter:
    """Appends tokens to a recorded data set; what was flushed is always a valid data set.

    Several processes may write into one folder at the same time, each as its own `rank`. In a local folder
    every appended batch goes to a spool first, from where `resume` recovers it after a crash; readers see
    fragments alone.

    Parameters
    ----------
    path
        Folder or URL of the data set; created if it is not there.
    num_layers, num_experts, top_k
        Shape of the routing.
    model_name, moe_layer_ids, domain_names
        As in `Trace`.
    rank
        Process rank that records.
    fragment_tokens
        Tokens after which a fragment is written and readers see them.
    overwrite
        Remove a data set that is there. Not for several ranks, which could not tell an old data set from
        each other's new one: `clear_dataset` in one of them, before any other opens the folder.
    append
        Continue this rank's data set if it is there, which must be of the same shape, model and domains.
    resume
        Continue it also after a crash: what the spool holds is recovered first, and `recovered` tells how
        much that was.
    spool
        Keep a spool. By default in local folders; object stores cannot append to a file.
    spool_tokens
        Tokens that may wait until they are spooled together: as many at most are lost when the process dies.
        By default every batch is spooled at once.
    fsync_s
        Seconds between forcing the spool to the disk: what may be lost when the machine dies. 0 does so with
        every batch, `None` never.
    provenance
        What the manifest says of where the tokens come from.

    Raises
    ------
    InputError
        If the folder cannot be written, holds other files, holds a data set already, or a spool that a
        crash left and that is neither to be resumed nor overwritten.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        num_layers: int,
        num_experts: int,
        top_k: int,
        model_name: str | None = None,
        moe_layer_ids: Sequence[int] | None = None,
        domain_names: Sequence[str] = (),
        rank: int = 0,
        fragment_tokens: int = FRAGMENT_TOKENS,
        overwrite: bool = False,
        append: bool = False,
        resume: bool = False,
        spool: bool | None = None,
        spool_tokens: int = 1,
        fsync_s: float | None = 5.0,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        check_fragment_tokens(fragment_tokens)
        if overwrite and (append or resume):
            raise InputError("a data set is either overwritten or continued; choose one")
        self._header = TraceHeader(
            num_layers=num_layers,
            num_experts=num_experts,
            top_k=top_k,
            model_name=model_name,
            moe_layer_ids=None if moe_layer_ids is None else tuple(int(layer) for layer in moe_layer_ids),
            domain_names=tuple(domain_names),
        )
        self._folder = open_folder(path)
        self._rank = rank
        self._fragment_tokens = fragment_tokens
        self._spool_tokens = spool_tokens
        self._buffer: list[Trace] = []
        self._waiting: list[Trace] = []
        self._room = Scratch()
        self._buffered_tokens = 0
        self._closed = False
        self.recovered: Recovery | None = None
        """What `resume` found in a spool; `None` if there was none."""
        self._manifest, left = prepare_folder(
            self._folder, self._header, rank=rank, overwrite=overwrite, append=append, resume=resume
        )
        if not self._manifest.provenance:
            self._manifest = _with(self._manifest, provenance=made_by(provenance))
        self._recorded = _recorded_before(self._manifest)
        self._spool = self._open_spool(spool, fsync_s)
        if left is not None:
            self._recover(left)
        self._write_manifest()

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank, those that are not flushed yet included."""
        return self._manifest.num_tokens + self._buffered_tokens

    @property
    def next_sequence(self) -> int:
        """Number that no flushed sequence of this rank has; reads the footers of what was appended to."""
        greatest = -1
        for fragment in self._manifest.fragments:
            content = read_content(self._folder, fragment, self._header)
            if content is not None and content.sequences is not None:
                greatest = max(greatest, content.sequences[1] + fragment.sequence_offset)
        return greatest + 1

    def append(
        self,
        experts_TLK: npt.ArrayLike,
        *,
        sequence_T: npt.ArrayLike | None = None,
        position_T: npt.ArrayLike | None = None,
        domain_T: npt.ArrayLike | None = None,
    ) -> None:
        """Add tokens that this rank routed, in recorded order; the arrays are copied.

        Parameters
        ----------
        experts_TLK
            Expert ids, ``[tokens, layers, k]``.
        sequence_T, position_T, domain_T
            As in `Trace`; sequences are numbered per rank.

        Raises
        ------
        InputError
            If the tokens are no valid trace or do not fit the data set, or the disk takes no more.
        """
        experts = np.array(experts_TLK)
        self.append_trace(
            Trace(
                experts_TLK=experts,
                num_experts=self._header.num_experts,
                sequence_T=_given(sequence_T),
                position_T=_given(position_T),
                rank_T=np.full(experts.shape[:1], self._rank),
                domain_T=_given(domain_T),
                domain_names=self._header.domain_names,
                model_name=self._header.model_name,
                moe_layer_ids=self._header.moe_layer_ids,
            )
        )

    def append_trace(self, trace: Trace) -> None:
        """Add a trace whose tokens keep the ranks they have, or have none.

        Where the disk is full the tokens that were taken stay in memory, and the next `append`, `flush` or
        `close` tries again.

        Raises
        ------
        InputError
            If shapes, model or domains differ from the data set's, the writer is closed, or the disk takes
            no more.
        """
        if self._closed:
            raise InputError(f"{self._folder}: is closed; nothing can be appended")
        difference = TraceHeader.of(trace).difference(self._header)
        if difference:
            raise InputError(
                f"{self._folder}: the data set and the tokens appended to it differ: {difference}"
            )
        self._check_recorded(trace)
        if self._buffered_tokens >= self._fragment_tokens:
            self.flush()  # the flush that was due failed; try again before more is taken
        for piece in cut(trace, self._fragment_tokens - self._buffered_tokens, self._fragment_tokens):
            self._buffer.append(piece)
            self._waiting.append(piece)
            self._buffered_tokens += piece.num_tokens
            if self._buffered_tokens >= self._fragment_tokens:
                self.flush()
            else:
                self._spool_waiting()

    def _check_recorded(self, trace: Trace) -> None:
        """Refuse now what could not be read back: a column that only some tokens have."""
        recorded = _recorded(trace)
        if self._recorded is None:
            self._recorded = recorded
        if recorded != self._recorded:
            raise InputError(
                f"{self._folder}: tokens appended before came with {', '.join(self._recorded) or 'nothing'}, "
                f"these with {', '.join(recorded) or 'nothing'}; give the same for all"
            )

    def _spool_waiting(self, *, all_of_it: bool = False) -> None:
        """Spool what waits, once there is enough of it."""
        if self._spool is None or not self._waiting:
            return
        if not all_of_it and sum(piece.num_tokens for piece in self._waiting) < self._spool_tokens:
            return
        with writing(self._folder.locate(spool_name(self._rank))):
            if not self._spool.begun:
                self._spool.begin(len(self._manifest.fragments))
            self._spool.append(self._waiting)
        self._waiting = []

    def flush(self) -> None:
        """Write what was appended since the last fragment, and the manifest.

        Raises
        ------
        InputError
            If the disk takes no more; what was flushed before stays valid, and what was not stays in memory
            and in the spool.
        """
        if not self._buffer:
            return
        name = fragment_name(self._rank, len(self._manifest.fragments))
        try:
            fragment = store(self._folder, self._header, self._buffer, name, room=self._room)
            self._write_manifest(fragment)
        except InputError:
            self._spool_waiting(all_of_it=True)
            raise
        self._buffer, self._waiting, self._buffered_tokens = [], [], 0
        if self._spool is not None:
            with writing(self._folder.locate(spool_name(self._rank))):
                self._spool.remove()

    def close(self) -> None:
        """Flush; nothing can be appended afterwards. Closing twice does nothing."""
        self._closed = True
        try:
            self.flush()
        finally:
            if self._spool is not None:
                self._spool.close()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; what was appended before a failure is kept."""
        self.close()

    def _open_spool(self, wanted: bool | None, fsync_s: float | None) -> Spool | None:
        path = self._folder.path
        if path is None and wanted:
            raise InputError(f"{self._folder}: cannot hold a spool; record into a local folder and copy it")
        if path is None or wanted is False:
            return None
        return Spool(path / spool_name(self._rank), self._header, fsync_s=fsync_s)

    def _recover(self, left: SpoolContent) -> None:
        """Take over what a spool holds, unless a fragment holds it already."""
        stored = self._manifest.num_tokens
        batches = left.batches if left.fragment == len(self._manifest.fragments) else ()
        self._buffer, self._waiting = list(batches), list(batches)
        self._buffered_tokens = sum(batch.num_tokens for batch in batches)
        if batches and self._recorded is None:
            self._recorded = _recorded(batches[0])
        self.recovered = Recovery(
            tokens=self._buffered_tokens,
            batches=len(batches),
            dropped_bytes=left.torn_bytes,
            stored_tokens=stored,
        )
        # A fragment makes them visible and lets go of the old spool in one step.
        if batches:
            self.flush()
        elif self._folder.path is not None:
            with writing(self._folder.locate(spool_name(self._rank))):
                self._folder.remove(spool_name(self._rank))

    def _write_manifest(self, *more: Fragment) -> None:
        manifest = _with(self._manifest, fragments=(*self._manifest.fragments, *more))
        write_manifest(self._folder, manifest)
        self._manifest = manifest


def _with(manifest: Manifest, **changes: Any) -> Manifest:
    kept = {name: getattr(manifest, name) for name in ("header", "rank", "fragments", "provenance")}
    return Manifest(**{**kept, **changes})


def _given(values: npt.ArrayLike | None) -> npt.NDArray[Any] | None:
    return None if values is None else np.array(values)


def _recorded(trace: Trace) -> tuple[str, ...]:
    return tuple(name for name in _ALL_OR_NONE if getattr(trace, f"{name}_T") is not None)


def _recorded_before(manifest: Manifest) -> tuple[str, ...] | None:
    known = [fragment.recorded for fragment in manifest.fragments if fragment.recorded is not None]
    return tuple(name for name in _ALL_OR_NONE if name in known[-1]) if known else None


def cut(trace: Trace, first_tokens: int, tokens: int) -> Iterator[Trace]:
    """Cut a trace into consecutive pieces: the first of `first_tokens`, the others of `tokens`."""
    start, stop = 0, first_tokens
    while start < trace.num_tokens:
        yield trace if (start, stop) == (0, trace.num_tokens) else trace.select_tokens(slice(start, stop))
        start, stop = stop, stop + tokens
