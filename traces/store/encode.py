"""Encodes fragments: rows into Parquet, checksums and counts into its footer.

Shape letters: T tokens, L MoE layers, E experts, K top-k.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from traces.source import TraceHeader
from traces.store.arrow import TOKEN_COLUMNS, table_of, trace_schema
from traces.store.columns import turn_to_layers
from traces.store.footer import FOOTER_KEY, FragmentContent
from traces.store.manifest import Fragment, RankShare
from traces.store.scratch import Scratch
from traces.trace import UNKNOWN_DOMAIN, ExpertArray, IntArray, Trace

__all__ = ["PARQUET", "encode_fragment", "row_group_tokens"]

_ROW_GROUP_BYTES = 4 << 20
_MAX_RANKS = 4096
_FEW_IDS = 1 << 19

# Ids compress best plain, ascending numbers as differences, constants through a dictionary.
PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": ["rank", "domain"],
    "column_encoding": {"sequence": "DELTA_BINARY_PACKED", "position": "DELTA_BINARY_PACKED"},
    "write_statistics": False,
}
"""How fragments are written."""


def row_group_tokens(header: TraceHeader) -> int:
    """Return the tokens of a row group: a power of two, some 4 MB of ids."""
    token_bytes = header.num_layers * header.top_k * header.dtype.itemsize
    return 1 << min(max((_ROW_GROUP_BYTES // token_bytes).bit_length() - 1, 8), 17)


def encode_fragment(
    header: TraceHeader, traces: Iterable[Trace], *, file: str, room: Scratch
) -> tuple[memoryview, Fragment]:
    """Return the bytes of a fragment, which lie in `room`, and its entry for the manifest.

    Parameters
    ----------
    header
        What the data set holds.
    traces
        Consecutive tokens; all know the same of their tokens, domains apart.
    file
        Its name.
    room
        Where it is put together.
    """
    traces, tokens = list(traces), row_group_tokens(header)
    tally = _Tally(header)
    content = room.take(_most_bytes(header, sum(trace.num_tokens for trace in traces)))
    sink = pa.FixedSizeBufferWriter(pa.py_buffer(content))
    row_groups: list[tuple[int, int, int]] = []
    with pq.ParquetWriter(sink, trace_schema(header), **PARQUET) as writer:
        written = 0
        for trace in _regrouped(traces, tokens):
            ids_LTK = turn_to_layers(trace.experts_TLK.astype(header.dtype, copy=False))
            tally.add(trace, ids_LTK)
            writer.write_table(table_of(header, trace, ids_LTK), row_group_size=tokens)
            # Summed up while it is in the cache.
            length, start = sink.tell(), written
            row_groups.append((trace.num_tokens, length - start, zlib.crc32(content[start:length])))
            written = length
        writer.add_key_value_metadata({FOOTER_KEY: tally.content(row_groups).to_bytes()})
    length = sink.tell()
    fragment = Fragment(
        file=file,
        tokens=tally.num_tokens,
        bytes=length,
        footer_bytes=length - written,
        sha256=hashlib.sha256(content[written:length]).hexdigest(),
        recorded=tally.recorded,
        ranks=tally.ranks(),
    )
    return content[:length], fragment


def _most_bytes(header: TraceHeader, num_tokens: int) -> int:
    """Return what no fragment exceeds: twice the plain data and a large footer; unused room costs nothing."""
    ids_bytes = header.num_layers * header.top_k * header.dtype.itemsize
    groups = 1 + num_tokens // row_group_tokens(header)
    footer_bytes = 1024 * (groups + 1) * (header.num_layers + 8) + 8 * header.num_layers * header.num_experts
    return 2 * num_tokens * (ids_bytes + 32) + footer_bytes + (1 << 20)


def _regrouped(traces: Iterable[Trace], tokens: int) -> Iterator[Trace]:
    """Cut consecutive traces into row groups: small enough to stay in the cache while they are worked on."""
    waiting: list[Trace] = []
    missing = tokens
    for trace in traces:
        start = 0
        while trace.num_tokens - start >= missing:
            yield _gathered([*waiting, trace.select_tokens(slice(start, start + missing))])
            start, missing, waiting = start + missing, tokens, []
        if start < trace.num_tokens:
            waiting.append(trace.select_tokens(slice(start, None)))
            missing -= trace.num_tokens - start
    if waiting:
        yield _gathered(waiting)


def _gathered(traces: Sequence[Trace]) -> Trace:
    """Join valid pieces of one trace."""
    first = traces[0]
    if len(traces) == 1:
        return first
    columns = {}
    for name in (f"{column}_T" for column in TOKEN_COLUMNS):
        if any(getattr(trace, name) is not None for trace in traces):
            columns[name] = np.concatenate([_known(trace, name) for trace in traces])
    return Trace.trusted(
        experts_TLK=np.concatenate([trace.experts_TLK for trace in traces]),
        num_experts=first.num_experts,
        domain_names=first.domain_names,
        **columns,
    )


def _known(trace: Trace, name: str) -> IntArray:
    values_T: IntArray | None = getattr(trace, name)
    return np.full(trace.num_tokens, UNKNOWN_DOMAIN) if values_T is None else values_T


class _Tally:
    """Counts what goes into a fragment."""

    def __init__(self, header: TraceHeader) -> None:
        self._header = header
        self._load_LE = np.zeros((header.num_layers, header.num_experts), dtype=np.int64)
        self._domain_D = np.zeros(len(header.domain_names), dtype=np.int64)
        self._sequences: list[IntArray] = []
        self._ranks: dict[int, int] = {}
        self._columns: set[str] = set()
        self.num_tokens = 0

    def add(self, block: Trace, ids_LTK: ExpertArray) -> None:
        """Count the tokens of a row group."""
        self._load_LE += _load_LE(ids_LTK, self._header.num_experts)
        self.num_tokens += block.num_tokens
        self._columns |= {name for name in TOKEN_COLUMNS if getattr(block, f"{name}_T") is not None}
        if block.sequence_T is not None:
            self._sequences.append(_distinct(block.sequence_T))
        if block.rank_T is not None:
            self._add_ranks(block.rank_T)
        if block.domain_T is not None:
            self._domain_D += np.bincount(block.domain_T + 1, minlength=len(self._domain_D) + 1)[1:]

    def _add_ranks(self, rank_T: IntArray) -> None:
        if (rank_T == rank_T[0]).all():
            self._ranks[int(rank_T[0])] = self._ranks.get(int(rank_T[0]), 0) + len(rank_T)
            return
        ranks, tokens = np.unique(rank_T, return_counts=True)
        for rank, number in zip(ranks.tolist(), tokens.tolist(), strict=True):
            self._ranks[rank] = self._ranks.get(rank, 0) + number

    @property
    def recorded(self) -> tuple[str, ...]:
        """Columns that some token has."""
        return tuple(name for name in TOKEN_COLUMNS if name in self._columns)

    def ranks(self) -> tuple[RankShare, ...] | None:
        """Whose tokens these are; `None` if there are too many ranks to list."""
        if "rank" not in self._columns:
            return (RankShare(stored=None, shown=None, tokens=self.num_tokens),)
        if len(self._ranks) > _MAX_RANKS:
            return None
        listed = sorted(self._ranks.items())
        return tuple(RankShare(stored=rank, shown=rank, tokens=tokens) for rank, tokens in listed)

    def content(self, row_groups: Sequence[tuple[int, int, int]]) -> FragmentContent:
        """Return what the footer tells."""
        found = np.unique(np.concatenate(self._sequences)) if self._sequences else None
        return FragmentContent(
            row_groups=tuple(row_groups),
            load_LE=self._load_LE,
            sequences=None if found is None else (int(found[0]), int(found[-1]), len(found)),
            domain_tokens=tuple(self._domain_D.tolist()) if self._domain_D.any() else (),
        )


def _load_LE(ids_LTK: ExpertArray, num_experts: int) -> IntArray:
    if ids_LTK.size < _FEW_IDS:
        # Not worth waiting for a compiler to load.
        return np.stack([np.bincount(ids_TK.ravel(), minlength=num_experts) for ids_TK in ids_LTK])
    from traces.store.kernels import count_layers

    load_LE: IntArray = count_layers(ids_LTK, num_experts)
    return load_LE


def _distinct(sequence_T: IntArray) -> IntArray:
    """Return the sequence numbers that occur, ascending; most often they ascend anyway."""
    step_T = np.diff(sequence_T)
    if (step_T >= 0).all():
        return np.concatenate([sequence_T[:1], sequence_T[1:][step_T > 0]])
    return np.unique(sequence_T)
