"""Fragments: Parquet files of one row per token and one fixed-size binary column per MoE layer.

A row group is the unit of random access. The footer's own metadata holds, under the key ``moe-trace``, the
checksum of every row group, the load of every expert, and what the sequences and domains are; the manifest
holds the digest of the footer. Whatever is read was verified: the footer when a fragment is opened, a row
group when it is fetched. The checksums are CRC-32, against damage and not against forgery, as Parquet's are.
Shape letters: T tokens, L MoE layers, E experts, K top-k.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from placement.errors import InputError
from traces.files import check_size, reading
from traces.source import TraceHeader
from traces.store.arrow import TOKEN_COLUMNS, block_of, numbers_of, trace_schema
from traces.store.columns import ColumnBlock
from traces.store.folder import Folder
from traces.store.footer import FOOTER_KEY, FragmentContent
from traces.store.manifest import Fragment, FragmentError, RankShare
from traces.store.scratch import Scratch
from traces.trace import UNKNOWN_DOMAIN, IntArray

__all__ = ["FragmentReader", "read_content"]

_FOOTER_LIMIT = 1 << 28


class FragmentReader:
    """Reads rows of one fragment, verifying what is fetched.

    Parameters
    ----------
    folder, fragment
        The file.
    header
        What its data set holds.
    scratch
        Room that readers of one thread share.

    Raises
    ------
    FragmentError
        If it is missing, truncated, altered, or not what the manifest says.
    """

    def __init__(
        self, folder: Folder, fragment: Fragment, header: TraceHeader, *, scratch: Scratch | None = None
    ) -> None:
        self._folder, self._fragment, self._header = folder, fragment, header
        self._scratch = scratch or Scratch()
        self._window = _Window(fragment.bytes)
        self._parquet: Any = None
        self._byte_G: list[int] | None = None
        with _fragment_errors(folder, fragment):
            if fragment.footer_bytes is None:
                self._open_1()
            else:
                self._open()
        self.first_token_G: IntArray = np.cumsum([0, *self._tokens_G])
        """First token of each row group, and the end."""

    def _open(self) -> None:
        footer = _footer(self._folder, self._fragment)
        metadata = self._metadata(footer)
        content = FragmentContent.parse(metadata.metadata.get(FOOTER_KEY), self._header, self._fragment)
        self._tokens_G = [tokens for tokens, _, _ in content.row_groups]
        self._crc_G = [crc for _, _, crc in content.row_groups]
        self._byte_G = np.cumsum([0, *(size for _, size, _ in content.row_groups)]).tolist()
        in_file = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if in_file != self._tokens_G or self._byte_G[-1] != self._fragment.bytes - len(footer):
            raise _altered("its row groups are not those of", self._fragment)
        self.recorded = self._fragment.recorded

    def _open_1(self) -> None:
        """Format 1 has one checksum of everything."""
        size = self._folder.size(self._fragment.file)
        if size is None:
            raise InputError("is named by the manifest and not there; restore it from a copy")
        content = self._folder.read(self._fragment.file)
        if hashlib.sha256(content).hexdigest() != self._fragment.sha256:
            raise _altered(f"its {len(content)} bytes are not", self._fragment)
        metadata = self._metadata(content)
        self._tokens_G = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._window.hold(content, 0)
        self.recorded = None

    def _metadata(self, content: bytes) -> Any:
        # Parquet looks for the footer from the end: a file that is nothing else will do.
        metadata = pq.read_metadata(pa.BufferReader(content))
        schema, expected = metadata.schema.to_arrow_schema(), trace_schema(self._header)
        if not schema.equals(expected) or metadata.num_rows != self._fragment.tokens:
            raise InputError(
                f"holds {metadata.num_rows} tokens of {schema.names[:8]}, which is not what the manifest "
                f"says: {self._fragment.tokens} tokens of {self._header.num_layers} layers, "
                f"top-{self._header.top_k}"
            )
        self._parquet_metadata = metadata
        return metadata

    def group_of(self, token: int) -> int:
        """Return the row group that holds a token."""
        return int(np.searchsorted(self.first_token_G, token, side="right")) - 1

    def read(self, first_group: int, last_group: int) -> ColumnBlock:
        """Return the rows of row groups `first_group` to `last_group`, that one included.

        Raises
        ------
        FragmentError
            If the rows are damaged.
        """
        with _fragment_errors(self._folder, self._fragment):
            recorded = tuple(TOKEN_COLUMNS) if self.recorded is None else self.recorded
            layers = [f"layer_{layer:03}" for layer in range(self._header.num_layers)]
            table = self._table(first_group, last_group, [*recorded, *layers])
            return _shown(block_of(self._header, table, recorded), self._fragment)

    def read_ranks(self) -> IntArray | None:
        """Return the rank of every token of the fragment, as stored; `None` where it has none.

        Raises
        ------
        FragmentError
            If the rows are damaged.
        """
        with _fragment_errors(self._folder, self._fragment):
            if self.recorded is not None and "rank" not in self.recorded:
                return None
            pieces = [
                numbers_of("rank", self._table(group, group, ["rank"]), self._header)
                for group in range(len(self._tokens_G))
            ]
            known = [piece for piece in pieces if piece is not None]
            if known and len(known) < len(pieces):
                raise InputError("has ranks for some of its tokens alone; restore it from a copy")
            return np.concatenate(known) if known else None

    def _table(self, first_group: int, last_group: int, columns: list[str]) -> Any:
        if self._parquet is None:
            source = pa.PythonFile(self._window, mode="r")
            self._parquet = pq.ParquetFile(source, metadata=self._parquet_metadata)
        groups = list(range(first_group, last_group + 1))
        if self._byte_G is None:
            return self._parquet.read_row_groups(groups, columns=columns, use_threads=False)
        start, content = self._fetch(self._byte_G, first_group, last_group)
        self._window.hold(content, start)
        table = self._parquet.read_row_groups(groups, columns=columns, use_threads=False)
        self._window.hold(b"", 0)
        return table

    def _fetch(self, byte_G: Sequence[int], first_group: int, last_group: int) -> tuple[int, memoryview]:
        """Return the row groups' bytes, checked, and where they begin."""
        start, stop = byte_G[first_group], byte_G[last_group + 1]
        check_size(
            int(self.first_token_G[last_group + 1] - self.first_token_G[first_group])
            * self._header.num_layers
            * self._header.top_k
            * self._header.dtype.itemsize,
            stop - start,
        )
        content = self._scratch.take(stop - start)
        for group in range(first_group, last_group + 1):
            # One after the other: each is summed up while it is in the cache.
            piece = content[byte_G[group] - start : byte_G[group + 1] - start]
            read = self._folder.read_into(self._fragment.file, byte_G[group], piece)
            if read < len(piece) or zlib.crc32(piece) != self._crc_G[group]:
                raise _altered(f"row group {group} is not that of", self._fragment)
        return start, content


def read_content(folder: Folder, fragment: Fragment, header: TraceHeader) -> FragmentContent | None:
    """Return what a fragment's footer tells, without reading rows; `None` in format 1.

    Raises
    ------
    FragmentError
        If the file is missing, truncated or altered.
    """
    if fragment.footer_bytes is None:
        return None
    with _fragment_errors(folder, fragment):
        footer = _footer(folder, fragment)
        metadata = pq.read_metadata(pa.BufferReader(footer))
        return FragmentContent.parse((metadata.metadata or {}).get(FOOTER_KEY), header, fragment)


class _Window(io.RawIOBase):
    """The part of a file that was fetched last, at the place where it lies in the whole."""

    def __init__(self, length: int) -> None:
        self._length, self._at = length, 0
        self.hold(b"", 0)

    def hold(self, content: bytes | memoryview, start: int) -> None:
        """Take other bytes, which lie in the file from `start` on."""
        self._content, self._start = memoryview(content), start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> Any:
        return bytes(self.read_buffer(size))

    def read_buffer(self, size: int) -> memoryview:
        """Read without a copy; Arrow asks for this where it can."""
        first = self._at - self._start
        if first < 0 or size < 0:
            raise ValueError(f"bytes from {self._at} on are asked for, which no row group holds")
        piece = self._content[first : first + size]
        self._at += len(piece)
        return piece


@contextlib.contextmanager
def _fragment_errors(folder: Folder, fragment: Fragment) -> Iterator[None]:
    try:
        with reading(folder.locate(fragment.file), pa.ArrowException, EOFError):
            yield
    except InputError as exc:
        raise FragmentError(str(exc), fragment=fragment.file) from exc


def _altered(found: str, fragment: Fragment) -> InputError:
    return InputError(
        f"is truncated or altered: {found} the {fragment.bytes} bytes whose checksum the manifest holds; "
        "restore it from a copy or record again"
    )


def _footer(folder: Folder, fragment: Fragment) -> bytes:
    """Return the end of the file, checked."""
    size, length = folder.size(fragment.file), fragment.footer_bytes or 0
    if size is None:
        raise InputError("is named by the manifest and not there; restore it from a copy")
    if size != fragment.bytes:
        raise _altered(f"its {size} bytes are not", fragment)
    if length > _FOOTER_LIMIT:
        raise InputError(f"has a footer of {length} bytes, more than the limit of {_FOOTER_LIMIT}")
    footer = folder.read(fragment.file, fragment.bytes - length, fragment.bytes)
    if hashlib.sha256(footer).hexdigest() != fragment.sha256:
        raise _altered("its footer is not that of", fragment)
    return footer


def _shown(block: ColumnBlock, fragment: Fragment) -> ColumnBlock:
    """Number ranks, sequences and domains as the data set does, if its fragments came from several."""
    changes: dict[str, Any] = {}
    if fragment.ranks is not None and any(share.stored != share.shown for share in fragment.ranks):
        changes["rank_T"] = _shown_ranks(block, fragment.ranks)
    if fragment.sequence_offset and block.sequence_T is not None:
        changes["sequence_T"] = block.sequence_T + fragment.sequence_offset
    if fragment.domain_of is not None and block.domain_T is not None:
        if int(block.domain_T.max()) >= len(fragment.domain_of):
            raise InputError(f"has a domain {int(block.domain_T.max())} that the manifest does not name")
        changes["domain_T"] = np.array([*fragment.domain_of, UNKNOWN_DOMAIN])[block.domain_T]
    return replace(block, **changes) if changes else block


def _shown_ranks(block: ColumnBlock, shares: Sequence[RankShare]) -> IntArray:
    if len(shares) == 1 and shares[0].shown is not None:
        return np.full(block.num_tokens, shares[0].shown)
    if block.rank_T is None or any(share.stored is None or share.shown is None for share in shares):
        raise InputError("has ranks for some of its tokens alone; restore it from a copy")
    stored_R = np.array([share.stored for share in shares])
    shown_R = np.array([share.shown for share in shares])
    order_R = np.argsort(stored_R)
    place_T = np.searchsorted(stored_R[order_R], block.rank_T).clip(max=len(shares) - 1)
    if not (stored_R[order_R][place_T] == block.rank_T).all():
        raise InputError("has ranks that the manifest does not name; restore it from a copy")
    ranks_T: IntArray = shown_R[order_R][place_T]
    return ranks_T
