"""Tokens as columns: one contiguous array per layer, as fragments lie on the disk and as they count fastest.

What counts ids layer by layer (loads, pairs, transitions) should ask for `columns_of`: a recorded data
set hands out the arrays of its fragments without turning them round.
Shape letters: T tokens, L MoE layers, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from traces.source import BLOCK_TOKENS, TraceSource
from traces.trace import ExpertArray, IntArray, Trace

__all__ = [
    "ColumnBlock",
    "ColumnSource",
    "columns_of",
    "turn_to_layers",
    "turn_to_tokens",
    "turned",
    "words_of",
]

_TURNED_AT_ONCE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnBlock:
    """Consecutive tokens of a trace, layer by layer; ids are valid, arrays are read-only.

    Parameters
    ----------
    ids_LTK
        One C-contiguous array ``[tokens, k]`` per MoE layer, of the header's `dtype`.
    sequence_T, position_T, rank_T, domain_T
        As in `Trace`; `None` where the trace does not know.
    """

    ids_LTK: tuple[ExpertArray, ...]
    sequence_T: IntArray | None = None
    position_T: IntArray | None = None
    rank_T: IntArray | None = None
    domain_T: IntArray | None = None

    def __post_init__(self) -> None:
        for array in (*self.ids_LTK, self.sequence_T, self.position_T, self.rank_T, self.domain_T):
            if array is not None:
                array.setflags(write=False)

    @property
    def num_tokens(self) -> int:
        """Tokens of the block."""
        return int(self.ids_LTK[0].shape[0])

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return len(self.ids_LTK)


@runtime_checkable
class ColumnSource(Protocol):
    """A source that has its tokens as columns anyway."""

    def columns(
        self, start: int = 0, stop: int | None = None, *, max_tokens: int = BLOCK_TOKENS
    ) -> Iterator[ColumnBlock]:
        """Yield the tokens of `TraceSource.blocks`, in the same order and the same blocks."""
        ...


def columns_of(
    source: TraceSource, start: int = 0, stop: int | None = None, *, max_tokens: int = BLOCK_TOKENS
) -> Iterator[ColumnBlock]:
    """Yield tokens `start` to `stop` of any source as columns, in the order of `TraceSource.blocks`.

    Parameters
    ----------
    source
        The trace.
    start, stop, max_tokens
        As for `TraceSource.blocks`.

    Raises
    ------
    InputError
        As `TraceSource.blocks` does.
    """
    if isinstance(source, ColumnSource):
        yield from source.columns(start, stop, max_tokens=max_tokens)
        return
    for block in source.blocks(start, stop, max_tokens=max_tokens):
        yield turned(block)


def turned(trace: Trace) -> ColumnBlock:
    """Return a trace in memory as columns; ids are copied."""
    return ColumnBlock(
        ids_LTK=tuple(turn_to_layers(trace.experts_TLK)),
        sequence_T=trace.sequence_T,
        position_T=trace.position_T,
        rank_T=trace.rank_T,
        domain_T=trace.domain_T,
    )


def words_of(ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """View the last axis of ids, the k of one record, as one machine word where a machine has such a word.

    NumPy moves words many times faster than short rows.
    """
    size = ids.shape[-1] * ids.dtype.itemsize
    word = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}.get(size, f"V{size}")
    return ids.view(word)[..., 0]


def turn_to_layers(experts_TLK: ExpertArray) -> ExpertArray:
    """Copy ids ``[tokens, layers, k]`` into a read-only array ``[layers, tokens, k]``."""
    num_tokens, num_layers, top_k = experts_TLK.shape
    ids_LTK = np.empty((num_layers, num_tokens, top_k), dtype=experts_TLK.dtype)
    from_TL, to_LT = words_of(np.ascontiguousarray(experts_TLK)), words_of(ids_LTK)
    # In tiles that fit the cache: either side is strided.
    for start in range(0, num_tokens, _TURNED_AT_ONCE):
        rows = slice(start, start + _TURNED_AT_ONCE)
        to_LT[:, rows] = from_TL[rows].T
    ids_LTK.setflags(write=False)
    return ids_LTK


def turn_to_tokens(ids_LTK: Sequence[ExpertArray], out_TLK: ExpertArray | None = None) -> ExpertArray:
    """Copy one array ``[tokens, k]`` per layer into ids ``[tokens, layers, k]``."""
    num_tokens, top_k = ids_LTK[0].shape
    if out_TLK is None:
        out_TLK = np.empty((num_tokens, len(ids_LTK), top_k), dtype=ids_LTK[0].dtype)
    to_TL = words_of(out_TLK)
    from_LT = [words_of(ids_TK) for ids_TK in ids_LTK]
    for start in range(0, num_tokens, _TURNED_AT_ONCE):
        rows = slice(start, start + _TURNED_AT_ONCE)
        for layer, words_T in enumerate(from_LT):
            to_TL[rows, layer] = words_T[rows]
    return out_TLK
