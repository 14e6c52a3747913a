"""A recorded data set as a stream: opened by its manifests, read where asked, in bounded memory.

Memory is what two blocks take, and some 12 MB for every rank whose tokens are interleaved: a row group and
the footer that leads to it.
Shape letters: T tokens, L MoE layers, K top-k, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.files import reading
from traces.source import BLOCK_TOKENS, TraceHeader, check_token_range
from traces.store.columns import ColumnBlock, turn_to_tokens
from traces.store.cursor import (
    SOME_LACK,
    TOKEN_FIELDS,
    Cursor,
    Part,
    Rows,
    Stream,
    chosen,
    joined_blocks,
    rows_between,
)
from traces.store.folder import Folder, open_folder
from traces.store.footer import FragmentContent
from traces.store.fragment import FragmentReader, read_content
from traces.store.manifest import (
    MANIFEST_NAME,
    Fragment,
    Manifest,
    common_header,
    digest_of,
)
from traces.store.order import RankOrder
from traces.trace import Trace

__all__ = ["DatasetSource", "read_manifests"]

FloatArray = npt.NDArray[np.float64]

_MUST_AGREE = ("sequence", "position", "rank")


class DatasetSource:
    """A recorded data set, local or behind a URL, as a `TraceSource` and a `ColumnSource`.

    Opening reads the manifests alone. A fragment's checksums are verified when it is read: a truncated,
    altered or missing one raises a `FragmentError` that names it, and all others stay readable.

    Parameters
    ----------
    path
        Folder or URL. Ranks may still be writing into it: what their manifests name now is read, and what
        lies in a spool is not.

    Raises
    ------
    InputError
        If it is no data set, holds no tokens, or its manifests are damaged or disagree.
    """

    def __init__(self, path: str | Path) -> None:
        self._folder: Folder = open_folder(path)
        self.path = str(path)
        self.manifests = read_manifests(self._folder)
        with reading(str(self._folder)):
            self.header: TraceHeader = common_header(self.manifests)
            self.fragments: tuple[Fragment, ...] = tuple(
                fragment for manifest in self.manifests for fragment in manifest.fragments
            )
            if not self.fragments:
                raise InputError("holds no tokens; nothing was flushed while it was recorded")
            _check_recorded(self.fragments)
        self.num_tokens = sum(fragment.tokens for fragment in self.fragments)
        """Tokens of all ranks."""

    @property
    def digest(self) -> str:
        """``"sha256:..."`` of the header and the fragments' checksums.

        Known without reading a fragment. It is the identity of what is stored, not of the tokens: the same
        tokens cut into other fragments, or read into a `Trace`, have another one.
        """
        return digest_of(self.manifests)

    @property
    def recorded(self) -> frozenset[str]:
        """Columns that tokens have beside their ids, as far as the manifests tell."""
        known = [fragment for fragment in self.fragments if fragment.recorded is not None]
        names = {name for fragment in known for name in fragment.recorded or ()}
        return frozenset(names | {"rank"} if known and _has(known[0], "rank") else names)

    @property
    def is_current(self) -> bool:
        """Tell whether all fragments are of the present format, whose footers tell what the rows are."""
        return all(fragment.footer_bytes is not None for fragment in self.fragments)

    @property
    def size_bytes(self) -> int:
        """Bytes of all fragments on the disk."""
        return sum(fragment.bytes for fragment in self.fragments)

    def content_of(self, fragment: Fragment) -> FragmentContent | None:
        """Return the loads and counts in a fragment's footer; `None` for format 1, which has none.

        Raises
        ------
        FragmentError
            If the file is missing, truncated or its footer altered.
        """
        return read_content(self._folder, fragment, self.header)

    def blocks(
        self, start: int = 0, stop: int | None = None, *, max_tokens: int = BLOCK_TOKENS
    ) -> Iterator[Trace]:
        """Yield tokens `start` to `stop` in routed order; see `TraceSource.blocks`.

        Raises
        ------
        FragmentError
            If a fragment that holds some of them is damaged.
        InputError
            If the range is none of the data set's.
        """
        header = self.header
        for block in self.columns(start, stop, max_tokens=max_tokens):
            # Tokens were checked when they were written, and are what was written then.
            yield Trace.trusted(
                experts_TLK=turn_to_tokens(block.ids_LTK),
                num_experts=header.num_experts,
                domain_names=header.domain_names,
                model_name=header.model_name,
                moe_layer_ids=header.moe_layer_ids,
                **{name: getattr(block, name) for name in TOKEN_FIELDS},
            )

    def columns(
        self, start: int = 0, stop: int | None = None, *, max_tokens: int = BLOCK_TOKENS
    ) -> Iterator[ColumnBlock]:
        """Yield the tokens of `blocks` as one array per layer, without a copy where ranks need no merging.

        Parameters
        ----------
        start, stop, max_tokens
            As for `TraceSource.blocks`.

        Raises
        ------
        FragmentError
            If a fragment that holds some of them is damaged.
        InputError
            If the range is none of the data set's.
        """
        start, stop = check_token_range(start, stop, self.num_tokens)
        if max_tokens < 1:
            raise InputError(f"blocks of {max_tokens} tokens are impossible; use at least 1")
        known: list[bool] | None = None
        for block in self._columns(start, stop, max_tokens):
            found = [getattr(block, f"{name}_T") is not None for name in _MUST_AGREE]
            if known is not None and found != known:
                raise InputError(f"{self._folder}: {SOME_LACK}")
            known = found
            yield block

    def _columns(self, start: int, stop: int, max_tokens: int) -> Iterator[ColumnBlock]:
        if start == stop:
            return
        rows = Rows(self._folder, self.header)
        if len(self._streams) == 1:
            cursor = Cursor(rows, self._streams[0], start)
            for first in range(start, stop, max_tokens):
                yield joined_blocks(cursor.take(min(max_tokens, stop - first)))
            return
        order = RankOrder([stream.num_tokens for stream in self._streams])
        low_R = order.before(start)
        cursors = [Cursor(rows, stream, int(low)) for stream, low in zip(self._streams, low_R, strict=True)]
        for first in range(start, stop, max_tokens):
            high_R = order.before(min(first + max_tokens, stop))
            wanted_R = (high_R - low_R).tolist()
            pieces = [
                piece
                for cursor, tokens in zip(cursors, wanted_R, strict=True)
                for piece in cursor.take(tokens)
            ]
            yield chosen(joined_blocks(pieces), order.order(low_R, high_R))
            low_R = high_R

    def recorded_columns(self, *, max_tokens: int = BLOCK_TOKENS) -> Iterator[ColumnBlock]:
        """Yield all tokens as they lie on the disk: rank after rank, each in recorded order."""
        rows = Rows(self._folder, self.header)
        for fragment in self.fragments:
            cursor = Cursor(
                rows, Stream(parts=(Part(fragment=fragment, rank=None, tokens=fragment.tokens),)), 0
            )
            for first in range(0, fragment.tokens, max_tokens):
                yield joined_blocks(cursor.take(min(max_tokens, fragment.tokens - first)))

    def sample(self, stretches: int, tokens: int) -> Iterator[tuple[FloatArray, ColumnBlock]]:
        """Yield stretches of tokens evenly spread over the fragments, each from one row group alone.

        Parameters
        ----------
        stretches
            How many.
        tokens
            Tokens of each at most, all of one shard.

        Returns
        -------
        Iterator
            How far in its shard each token is, 0 to 1, and the tokens.

        Raises
        ------
        FragmentError
            If a fragment is damaged.
        """
        rows = Rows(self._folder, self.header)
        listed = [
            (start, manifest.num_tokens, fragment)
            for manifest in self.manifests
            for start, fragment in zip(_starts(manifest), manifest.fragments, strict=True)
        ]
        seen: set[tuple[str, int]] = set()
        for number in range(stretches):
            share = (number + 0.5) / stretches
            start, of_tokens, fragment = listed[int(share * len(listed))]
            reader = rows.open(fragment)
            # Elsewhere in every fragment, so that short shards are not always met where they begin.
            row = int(share * fragment.tokens)
            group = reader.group_of(row)
            begin, end = (int(token) for token in reader.first_token_G[group : group + 2])
            row = max(begin, min(row, end - tokens))
            if (fragment.file, row) in seen:
                continue
            seen.add((fragment.file, row))
            stretch = rows_between(reader.read(group, group), row - begin, min(row + tokens, end) - begin)
            yield (start + row + np.arange(stretch.num_tokens)) / of_tokens, stretch

    @cached_property
    def _streams(self) -> tuple[Stream, ...]:
        """Each rank's tokens, ranks ascending; one stream where there are no ranks to tell apart."""
        parts: dict[int | None, list[Part]] = {}
        for fragment in self.fragments:
            for rank, tokens in self._ranks_of(fragment):
                whole = tokens == fragment.tokens
                part = Part(fragment=fragment, rank=None if whole else rank, tokens=tokens)
                parts.setdefault(rank, []).append(part)
        if None in parts and len(parts) > 1:
            raise InputError(
                f"{self._folder}: has tokens with a rank and tokens without; record or merge them apart"
            )
        ranks = sorted(parts, key=lambda rank: -1 if rank is None else rank)
        return tuple(Stream(parts=tuple(parts[rank])) for rank in ranks)

    def _ranks_of(self, fragment: Fragment) -> Sequence[tuple[int | None, int]]:
        """Whose tokens a fragment holds, from the manifest where that says so."""
        if fragment.ranks is not None:
            return [(share.shown, share.tokens) for share in fragment.ranks]
        ranks_T = FragmentReader(self._folder, fragment, self.header).read_ranks()
        if ranks_T is None:
            return [(None, fragment.tokens)]
        ranks, tokens = np.unique(ranks_T, return_counts=True)
        return list(zip(ranks.tolist(), tokens.tolist(), strict=True))


def _starts(manifest: Manifest) -> list[int]:
    """Return how many tokens of its shard come before each fragment."""
    starts, tokens = [], 0
    for fragment in manifest.fragments:
        starts.append(tokens)
        tokens += fragment.tokens
    return starts


def read_manifests(folder: Folder) -> tuple[Manifest, ...]:
    """Read all manifests of a folder, ranks ascending.

    Raises
    ------
    InputError
        If there is no such folder, no manifest in it, or one is damaged.
    """
    with reading(str(folder)):
        names = folder.names()
        if names is None:
            raise InputError("does not exist")
        names = [name for name in names if MANIFEST_NAME.fullmatch(name)]
        if not names:
            raise InputError("is a folder without a manifest.rankNNNNN.json, so no recorded data set")
    manifests = []
    for name in names:
        with reading(folder.locate(name)):
            manifests.append(Manifest.parse(folder.read(name), name=name))
    return tuple(manifests)


def _check_recorded(fragments: Sequence[Fragment]) -> None:
    """Refuse a column that only some tokens have; what only fragments know is found out while reading."""
    known = [fragment for fragment in fragments if fragment.recorded is not None]
    for fragment in known:
        for name in _MUST_AGREE:
            if _has(fragment, name) != _has(known[0], name):
                one, other = (fragment, known[0]) if _has(known[0], name) else (known[0], fragment)
                raise InputError(
                    f"the tokens of {one.file} have no {name}, those of {other.file} have one; every rank "
                    "records it or none does"
                )


def _has(fragment: Fragment, name: str) -> bool:
    if name == "rank" and fragment.ranks:
        return fragment.ranks[0].shown is not None
    return name in (fragment.recorded or ())
