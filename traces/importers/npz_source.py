"""Large NumPy archives as a stream: arrays are mapped; what is compressed is unpacked to the disk once.

Shape letters: T tokens.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.files import writing
from traces.importers.npy_header import NpyHeader
from traces.importers.records import PieceSource, TokenFields
from traces.source import BLOCK_TOKENS, TraceHeader
from traces.trace import UNKNOWN_DOMAIN, Trace

__all__ = ["NpzSource", "RankOrder", "mapped_array"]

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]

_LOCAL_HEADER = struct.Struct("<26xHH")
_COPIED_AT_ONCE = 1 << 22
_TOKEN_FIELDS = ("sequence_T", "position_T", "rank_T", "domain_T")


def mapped_array(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, header: NpyHeader
) -> npt.NDArray[Any]:
    """Return an array of an archive, mapped from the archive or, if it is compressed, from a temporary file.

    The temporary file has no name and goes with the array.

    Raises
    ------
    InputError
        If there is no room for the temporary file.
    """
    order: Any = "F" if header.fortran_order else "C"
    if info.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as file:
            file.seek(info.header_offset)
            name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            start = file.tell() + name_bytes + extra_bytes + header.num_bytes
            return np.memmap(file, header.dtype, "r", start, header.shape, order)
    folder = Path(tempfile.gettempdir())
    # Kept open by the map; closing our handle frees nothing.
    with tempfile.TemporaryFile() as unpacked:
        with archive.open(info) as file, writing(folder):
            shutil.copyfileobj(file, unpacked, _COPIED_AT_ONCE)
            unpacked.flush()
        return np.memmap(unpacked, header.dtype, "r", header.num_bytes, header.shape, order)


class RankOrder:
    """The order in which ranks routed their tokens, in pieces; see `Trace.interleave_ranks`.

    Parameters
    ----------
    rank_T
        Rank of each token as stored; `None` where unknown.
    num_tokens, piece_tokens
        Tokens in all, and of a piece, about.
    """

    def __init__(self, rank_T: Array | None, num_tokens: int, piece_tokens: int) -> None:
        self._num_pieces = -(-num_tokens // piece_tokens)
        self._order_T: IntArray | None = None
        self._first_R = np.zeros(1, dtype=np.int64)
        self._count_R = np.array([num_tokens])
        if rank_T is not None:
            self._learn(rank_T)
        self.tokens_N = np.diff([int(self._before(piece).sum()) for piece in range(self._num_pieces + 1)])

    def _learn(self, rank_T: Array) -> None:
        starts = [np.zeros(1, dtype=np.int64)]
        for begin in range(0, len(rank_T) - 1, BLOCK_TOKENS):
            stretch = rank_T[begin : begin + BLOCK_TOKENS + 1]
            starts.append(begin + 1 + np.nonzero(stretch[1:] != stretch[:-1])[0])
        start_R = np.concatenate(starts)
        ranks = rank_T[start_R]
        if len(np.unique(ranks)) == len(ranks):
            # Rank after rank, as recorders write them: nothing has to be remembered per token.
            count_R = np.diff(np.append(start_R, len(rank_T)))
            by_rank = np.argsort(ranks)
            self._first_R, self._count_R = start_R[by_rank], count_R[by_rank]
            return
        self._order_T = np.argsort(rank_T, kind="stable")
        _, self._first_R, self._count_R = np.unique(
            np.asarray(rank_T)[self._order_T], return_index=True, return_counts=True
        )

    def _before(self, piece: int) -> IntArray:
        """Return how many tokens of each rank come before a piece: those of less progress."""
        if piece == self._num_pieces:
            return self._count_R
        progress = piece / self._num_pieces
        before_R = np.clip(np.round(progress * self._count_R).astype(np.int64), 0, self._count_R)
        # The very rounding of the sort decides, so that no token is taken twice or left out.
        before_R -= (before_R > 0) & ((before_R - 1 + 0.5) / self._count_R >= progress)
        before_R += (before_R < self._count_R) & ((before_R + 0.5) / self._count_R < progress)
        return before_R

    def tokens(self, piece: int) -> slice | IntArray:
        """Return the stored places of a piece's tokens, in order."""
        begin_R, end_R = self._before(piece), self._before(piece + 1)
        if len(begin_R) == 1:
            start = int(self._first_R[0])
            return slice(start + int(begin_R[0]), start + int(end_R[0]))
        spans = [np.arange(begin, end) for begin, end in zip(begin_R, end_R, strict=True)]
        progress_T = np.concatenate(
            [(span + 0.5) / count for span, count in zip(spans, self._count_R, strict=True)]
        )
        place_T = np.concatenate([first + span for first, span in zip(self._first_R, spans, strict=True)])
        place_T = place_T[np.argsort(progress_T, kind="stable")]
        return place_T if self._order_T is None else self._order_T[place_T]


class NpzSource(PieceSource):
    """A mapped archive as a source.

    Parameters
    ----------
    path
        The archive.
    fields
        Arrays of tokens, by the names that `Trace` has for them.
    about
        What all tokens have in common, by the names that `Trace` has for it.

    Raises
    ------
    InputError
        If arrays differ in length or are no arrays of a trace.
    """

    def __init__(self, path: Path, fields: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        num_tokens = len(fields["experts_TLK"])
        for name, array in fields.items():
            if len(array) != num_tokens:
                raise InputError(f"{name} has shape {array.shape}, the trace {num_tokens} tokens")
        # One token shows whether the arrays make a trace.
        first = Trace(**{name: array[:1] for name, array in fields.items()}, **about)
        order = RankOrder(fields.get("rank_T"), num_tokens, BLOCK_TOKENS)

        def read(piece: int) -> TokenFields:
            places = order.tokens(piece)
            return TokenFields(**{name: array[places] for name, array in fields.items()})

        super().__init__(
            path=path,
            header=TraceHeader.of(first),
            tokens_N=order.tokens_N,
            open_pieces=lambda: read,
            name_piece=lambda piece: f"from token {int(order.tokens_N[:piece].sum())}",
            same_domain=False,
        )
        self._fields = fields

    @cached_property
    def digest(self) -> str:
        """Digest of the trace as stored, the same as that of a small archive read whole."""
        header, fields = self.header, dict(self._fields)
        domain_T = fields.get("domain_T")
        if domain_T is not None and int(domain_T.max()) == UNKNOWN_DOMAIN:
            del fields["domain_T"]
        about = {
            "shape": self._fields["experts_TLK"].shape,
            "num_experts": header.num_experts,
            "domain_names": header.domain_names,
            "model_name": header.model_name,
            "moe_layer_ids": header.moe_layer_ids,
            "fields": {name: name in fields for name in _TOKEN_FIELDS},
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for name in ("experts_TLK", *(name for name in _TOKEN_FIELDS if name in fields)):
            dtype = header.dtype if name == "experts_TLK" else np.dtype("<i8")
            for begin in range(0, self.num_tokens, BLOCK_TOKENS):
                digest.update(np.ascontiguousarray(fields[name][begin : begin + BLOCK_TOKENS], dtype).data)
        return f"sha256:{digest.hexdigest()}"
