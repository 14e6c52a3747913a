"""Traces as Arrow tables: one row per token, one fixed-size binary column per MoE layer.

Shape letters: T tokens, L MoE layers, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from placement.errors import InputError
from traces.source import TraceHeader
from traces.store.columns import ColumnBlock
from traces.trace import UNKNOWN_DOMAIN, ExpertArray, IntArray, Trace

__all__ = [
    "TOKEN_COLUMNS",
    "block_of",
    "ids_array",
    "numbers_of",
    "table_of",
    "token_arrays",
    "trace_schema",
]

TOKEN_COLUMNS: dict[str, Any] = {
    "sequence": pa.int64(),
    "position": pa.int64(),
    "rank": pa.int64(),
    "domain": pa.int32(),
}
"""Columns beside the ids; all null where the trace does not know."""


def trace_schema(header: TraceHeader) -> pa.Schema:
    """Return the Arrow schema of a trace's tokens."""
    ids = pa.binary(header.top_k * header.dtype.itemsize)
    fields = [pa.field(name, kind) for name, kind in TOKEN_COLUMNS.items()]
    fields += [pa.field(f"layer_{layer:03}", ids, nullable=False) for layer in range(header.num_layers)]
    return pa.schema(fields)


def token_arrays(tokens: Trace | ColumnBlock) -> list[Any]:
    """Return the columns beside the ids as Arrow arrays; an unknown domain is null."""
    arrays: list[Any] = []
    for name, kind in TOKEN_COLUMNS.items():
        values_T = getattr(tokens, f"{name}_T")
        if values_T is None:
            arrays.append(pa.nulls(tokens.num_tokens, kind))
        else:
            arrays.append(_array_of(values_T, kind))
    return arrays


def _array_of(values_T: IntArray, kind: Any) -> Any:
    """Return numbers as an Arrow array, -1 as null. By its buffers: `pyarrow.array` would import pandas."""
    known_T = values_T >= 0
    valid = None if known_T.all() else pa.py_buffer(np.packbits(known_T, bitorder="little").data)
    content = np.ascontiguousarray(values_T, dtype=kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(values_T), [valid, pa.py_buffer(content.data)])


def _plain(column: Any) -> IntArray:
    """Return a column of numbers, null as -1."""
    chunk = _one_piece(column)
    valid, content = chunk.buffers()
    rows = slice(chunk.offset, chunk.offset + len(chunk))
    numbers_T = np.frombuffer(content, dtype=chunk.type.to_pandas_dtype())[rows].astype(np.int64)
    if chunk.null_count:
        known_T = np.unpackbits(np.frombuffer(valid, dtype=np.uint8), bitorder="little")[rows]
        numbers_T[known_T == 0] = UNKNOWN_DOMAIN
    return numbers_T


def _one_piece(column: Any) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def ids_array(ids: npt.NDArray[Any]) -> Any:
    """Return each token's ids, ``[tokens, ...]``, as an Arrow array of binaries, without a copy."""
    kind = pa.binary(ids[0].nbytes)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(ids), [None, pa.py_buffer(ids.reshape(-1).data)])


def table_of(header: TraceHeader, tokens: Trace | ColumnBlock, ids_LTK: Iterable[ExpertArray]) -> pa.Table:
    """Return tokens as an Arrow table, their ids given layer by layer and not copied."""
    columns = [*token_arrays(tokens), *(ids_array(ids_TK) for ids_TK in ids_LTK)]
    return pa.Table.from_arrays(columns, schema=trace_schema(header))


def block_of(header: TraceHeader, table: Any, recorded: Sequence[str]) -> ColumnBlock:
    """Return an Arrow table as columns of tokens, ids and numbers within their range.

    Raises
    ------
    InputError
        If some are not.
    """
    fields = {f"{name}_T": numbers_of(name, table, header) for name in recorded}
    ids_LTK = tuple(_ids_TK(table[f"layer_{layer:03}"], layer, header) for layer in range(header.num_layers))
    return ColumnBlock(ids_LTK=ids_LTK, **fields)


def _ids_TK(column: Any, layer: int, header: TraceHeader) -> ExpertArray:
    """Return the expert ids of one Arrow column, without a copy where it lies in one piece."""
    chunk = _one_piece(column)
    ids = np.frombuffer(chunk.buffers()[1], dtype=header.dtype)
    first = chunk.offset * header.top_k
    ids_TK: ExpertArray = ids[first : first + len(chunk) * header.top_k].reshape(-1, header.top_k)
    # The rows are as they were written, yet a manifest may say anything.
    if header.num_experts <= np.iinfo(header.dtype).max and int(ids_TK.max(initial=0)) >= header.num_experts:
        raise InputError(
            f"layer {layer} names expert {int(ids_TK.max())}, outside 0..{header.num_experts - 1}"
        )
    return ids_TK


def numbers_of(name: str, table: Any, header: TraceHeader) -> IntArray | None:
    """Return a token column as numbers; `None` if no token has one."""
    column: Any = table[name]
    if column.null_count == len(column):
        return None
    if column.null_count and name != "domain":
        token = int(np.argmax(_plain(column) < 0))
        raise InputError(f"token {token} has no {name}, others have one; restore it from a copy")
    numbers_T = _plain(column)
    least = UNKNOWN_DOMAIN if name == "domain" else 0
    most = len(header.domain_names) - 1 if name == "domain" else np.iinfo(np.int64).max
    if int(numbers_T.min()) < least or int(numbers_T.max()) > most:
        raise InputError(
            f"has a {name} of {int(numbers_T.min())}..{int(numbers_T.max())}, outside {least}..{most}"
        )
    return numbers_T
