"""Reads the tokens of one rank from some token on, whichever fragments they lie in.

Shape letters: T tokens, L MoE layers, K top-k.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from placement.errors import InputError
from traces.source import TraceHeader
from traces.store.columns import ColumnBlock, words_of
from traces.store.folder import Folder
from traces.store.fragment import FragmentReader
from traces.store.manifest import Fragment, FragmentError
from traces.store.scratch import Scratch
from traces.trace import UNKNOWN_DOMAIN, IntArray

__all__ = [
    "SOME_LACK",
    "TOKEN_FIELDS",
    "Cursor",
    "Part",
    "Rows",
    "Stream",
    "chosen",
    "joined_blocks",
    "rows_between",
]

TOKEN_FIELDS = ("sequence_T", "position_T", "rank_T", "domain_T")
"""What is known of tokens beside their ids."""

SOME_LACK = (
    "some tokens lack a sequence, a position or a rank that others have; every rank records it or none does"
)
"""Why some data sets cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The tokens of one rank in a fragment, `rank` being `None` where they are all its tokens."""

    fragment: Fragment
    rank: int | None
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One rank's tokens in recorded order."""

    parts: tuple[Part, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all parts."""
        return sum(part.tokens for part in self.parts)


class Rows:
    """Fetches rows of fragments; keeps the row groups that several ranks share."""

    def __init__(self, folder: Folder, header: TraceHeader) -> None:
        self._folder, self._header = folder, header
        self._scratch = Scratch()
        self._shared: OrderedDict[str, FragmentReader] = OrderedDict()
        self._groups: OrderedDict[tuple[str, int], ColumnBlock] = OrderedDict()
        self._rows_of: OrderedDict[str, dict[int, IntArray]] = OrderedDict()

    def open(self, fragment: Fragment) -> FragmentReader:
        """Open a fragment of which one rank reads everything, so that one reader is enough."""
        return FragmentReader(self._folder, fragment, self._header, scratch=self._scratch)

    def rows_of(self, part: Part) -> IntArray:
        """Return the rows of a fragment that hold one of its ranks' tokens."""
        name = part.fragment.file
        if name not in self._rows_of:
            self._rows_of[name] = self._index(part.fragment)
            _trim(self._rows_of, 64)
        rows = self._rows_of[name].get(-1 if part.rank is None else part.rank)
        if rows is None or len(rows) != part.tokens:
            raise FragmentError(
                f"{self._folder.locate(name)}: holds {0 if rows is None else len(rows)} tokens of rank "
                f"{part.rank}, the manifest says {part.tokens}; restore it from a copy",
                fragment=name,
            )
        return rows

    def _index(self, fragment: Fragment) -> dict[int, IntArray]:
        stored_T = self.shared(fragment).read_ranks()
        if stored_T is None:
            return {}
        shown = {share.stored: share.shown for share in fragment.ranks or ()}
        by_rank = np.argsort(stored_T, kind="stable")
        ranks, start = np.unique(stored_T[by_rank], return_index=True)
        rows = np.split(by_rank, start[1:])
        return {
            shown_rank: rows_T
            for rank, rows_T in zip(ranks.tolist(), rows, strict=True)
            if (shown_rank := shown.get(rank, rank)) is not None
        }

    def shared(self, fragment: Fragment) -> FragmentReader:
        """Open a fragment that several ranks read."""
        if fragment.file not in self._shared:
            self._shared[fragment.file] = self.open(fragment)
            _trim(self._shared, 64)
        return self._shared[fragment.file]

    def group(self, fragment: Fragment, group: int, *, keep: int) -> ColumnBlock:
        """Return a row group, one of the `keep` last ones without reading it again."""
        key = (fragment.file, group)
        if key not in self._groups:
            self._groups[key] = self.shared(fragment).read(group, group)
        self._groups.move_to_end(key)
        _trim(self._groups, keep)
        return self._groups[key]


def _trim(kept: OrderedDict[Any, Any], most: int) -> None:
    while len(kept) > most:
        kept.popitem(last=False)


class Cursor:
    """Reads one stream from some token on."""

    def __init__(self, rows: Rows, stream: Stream, start: int) -> None:
        self._rows, self._parts = rows, stream.parts
        self._part, self._at = 0, start
        while self._part < len(self._parts) and self._at >= self._parts[self._part].tokens:
            self._at -= self._parts[self._part].tokens
            self._part += 1
        self._reader: FragmentReader | None = None
        self._ahead: tuple[int, ColumnBlock] | None = None

    def take(self, tokens: int) -> list[ColumnBlock]:
        """Return the next tokens in pieces."""
        pieces = []
        while tokens:
            part = self._parts[self._part]
            wanted = min(tokens, part.tokens - self._at)
            pieces += self._contiguous(part, wanted) if part.rank is None else self._scattered(part, wanted)
            self._at += wanted
            tokens -= wanted
            if self._at == part.tokens:
                self._part, self._at, self._reader, self._ahead = self._part + 1, 0, None, None
        return pieces

    def _contiguous(self, part: Part, tokens: int) -> list[ColumnBlock]:
        """Consecutive rows; what was read beyond them is kept for the next call."""
        if self._reader is None:
            self._reader = self._rows.open(part.fragment)
        pieces, at, stop = [], self._at, self._at + tokens
        while at < stop:
            if self._ahead is None or at >= self._ahead[0] + self._ahead[1].num_tokens:
                first, last = self._reader.group_of(at), self._reader.group_of(stop - 1)
                # Not the last of many in one go: it would be held whole for the few rows that are wanted.
                if last > first and int(self._reader.first_token_G[last + 1]) > stop:
                    last -= 1
                self._ahead = (int(self._reader.first_token_G[first]), self._reader.read(first, last))
            start, block = self._ahead
            piece = rows_between(block, at - start, min(stop - start, block.num_tokens))
            pieces.append(piece)
            at += piece.num_tokens
        return pieces

    def _scattered(self, part: Part, tokens: int) -> list[ColumnBlock]:
        """Rows of one of several ranks whose tokens lie mixed."""
        rows_T = self._rows.rows_of(part)[self._at : self._at + tokens]
        first_token_G = self._rows.shared(part.fragment).first_token_G
        group_T = np.searchsorted(first_token_G, rows_T, side="right") - 1
        keep = 1 + len(part.fragment.ranks or (0,))
        pieces = []
        for group in np.unique(group_T).tolist():
            block = self._rows.group(part.fragment, group, keep=keep)
            pieces.append(chosen(block, rows_T[group_T == group] - int(first_token_G[group])))
        return pieces


def _each(block: ColumnBlock, change: Any) -> ColumnBlock:
    """Return a block with every array changed alike."""
    kept = {name: getattr(block, name) for name in TOKEN_FIELDS}
    return ColumnBlock(
        ids_LTK=tuple(change(ids_TK) for ids_TK in block.ids_LTK),
        **{name: None if array is None else change(array) for name, array in kept.items()},
    )


def rows_between(block: ColumnBlock, start: int, stop: int) -> ColumnBlock:
    """Return some consecutive tokens of a block, without a copy."""
    if (start, stop) == (0, block.num_tokens):
        return block
    return _each(block, lambda array: array[start:stop])


def chosen(block: ColumnBlock, index_T: IntArray) -> ColumnBlock:
    """Return some rows in the order given; ids move as whole words."""

    def choose(array: Any) -> Any:
        if array.ndim == 1:
            return array[index_T]
        top_k = array.shape[1]
        return words_of(array).take(index_T).view(array.dtype).reshape(-1, top_k)

    return _each(block, choose)


def joined_blocks(pieces: Sequence[ColumnBlock]) -> ColumnBlock:
    """Return consecutive pieces as one block."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    columns: dict[str, Any] = {}
    for name in TOKEN_FIELDS:
        parts = [getattr(piece, name) for piece in pieces]
        if all(part is None for part in parts):
            continue
        if name == "domain_T":
            parts = [
                np.full(piece.num_tokens, UNKNOWN_DOMAIN) if part is None else part
                for piece, part in zip(pieces, parts, strict=True)
            ]
        elif any(part is None for part in parts):
            raise InputError(SOME_LACK)
        columns[name] = np.concatenate(parts)
    ids_LTK = tuple(
        np.concatenate([piece.ids_LTK[layer] for piece in pieces]) for layer in range(first.num_layers)
    )
    return ColumnBlock(ids_LTK=ids_LTK, **columns)
