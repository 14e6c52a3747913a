"""A trace that lies in many pieces (files, passes, responses), read piece by piece.

A reader of a format says how many tokens each piece holds and how a piece is read; blocks, ranges, digests
and checks are the same for all of them.
Shape letters: N pieces, T tokens, L MoE layers, K top-k.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.files import reading
from traces.source import BLOCK_TOKENS, TraceHeader, TraceSource, check_token_range
from traces.trace import Trace

__all__ = [
    "PieceReader",
    "PieceSource",
    "TokenFields",
    "content_digest",
    "interleaved",
    "joined_fields",
    "naming",
]

IntArray = npt.NDArray[np.int64]

_FIELDS = ("sequence_T", "position_T", "rank_T", "domain_T")
_SPOOL_BYTES = 1 << 24


@contextlib.contextmanager
def naming(path: Path, *foreign: type[Exception]) -> Iterator[None]:
    """Name `path` in failures as `traces.files.reading` does, unless they name it or a file in it already.

    Raises
    ------
    InputError
        Instead of what was raised inside.
    """
    try:
        with reading(path, *foreign):
            yield
    except InputError as exc:
        inner = exc.__cause__
        if isinstance(inner, InputError) and str(inner).startswith(str(path)):
            raise inner from inner.__cause__
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFields:
    """Consecutive tokens of a piece: what `Trace` holds of them, not yet checked.

    Parameters
    ----------
    experts_TLK
        Logical expert ids, integers.
    sequence_T, position_T, rank_T, domain_T
        As in `Trace`; either all pieces of a source know one or none does.
    """

    experts_TLK: npt.NDArray[Any]
    sequence_T: IntArray | None = None
    position_T: IntArray | None = None
    rank_T: IntArray | None = None
    domain_T: IntArray | None = None

    def cut(self, start: int, stop: int) -> TokenFields:
        """Return some of the tokens."""
        if start == 0 and stop == len(self.experts_TLK):
            return self
        given = {name: getattr(self, name) for name in ("experts_TLK", *_FIELDS)}
        return TokenFields(**{name: all_T[start:stop] for name, all_T in given.items() if all_T is not None})


def joined_fields(parts: Sequence[TokenFields]) -> TokenFields:
    """Return consecutive tokens as one piece."""
    if len(parts) == 1:
        return parts[0]
    return TokenFields(
        experts_TLK=np.concatenate([part.experts_TLK for part in parts]),
        **{name: _joined([getattr(part, name) for part in parts]) for name in _FIELDS},
    )


def interleaved(parts: Sequence[TokenFields]) -> TokenFields:
    """Return what several ranks routed at the same time, each rank's tokens spread evenly over the piece.

    So a window that is shorter than the piece still holds every rank's share, as in `Trace.interleave_ranks`.
    """
    if len(parts) == 1:
        return parts[0]
    sizes = [len(part.experts_TLK) for part in parts]
    progress_T = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    order_T = np.argsort(progress_T, kind="stable")
    whole = joined_fields(parts)
    given = {name: getattr(whole, name) for name in ("experts_TLK", *_FIELDS)}
    return TokenFields(**{name: all_T[order_T] for name, all_T in given.items() if all_T is not None})


PieceReader = Callable[[int], TokenFields]
"""Reads one piece by its number; it may keep files open from call to call."""


class PieceSource:
    """A trace of many pieces as a source.

    Parameters
    ----------
    path
        File or folder, named in messages.
    header
        What all tokens have in common.
    tokens_N
        Tokens of each piece, in the order in which they were routed.
    open_pieces
        Returns a fresh reader of pieces; called once per pass over the trace.
    name_piece
        Says which piece a number is (``"line 7"``), for messages.
    advice
        What may be the matter where a piece is no valid trace.
    same_domain
        Whether the header's domain, if it has one, is every token's; otherwise pieces tell theirs.

    Raises
    ------
    InputError
        If there is no token.
    """

    def __init__(
        self,
        *,
        path: Path,
        header: TraceHeader,
        tokens_N: npt.ArrayLike,
        open_pieces: Callable[[], PieceReader],
        name_piece: Callable[[int], str],
        advice: str = "",
        same_domain: bool = True,
    ) -> None:
        self.path = path
        self.header = header
        self._end_N = np.cumsum(np.asarray(tokens_N, dtype=np.int64))
        self._open_pieces = open_pieces
        self._name_piece = name_piece
        self._advice = advice
        self._same_domain = same_domain
        self.num_tokens = int(self._end_N[-1]) if len(self._end_N) else 0
        if not self.num_tokens:
            raise InputError("holds no token")

    @cached_property
    def digest(self) -> str:
        """``"sha256:..."`` of the content, the same as that of `traces.source.read_all`'s trace."""
        return content_digest(self)

    def blocks(
        self, start: int = 0, stop: int | None = None, *, max_tokens: int = BLOCK_TOKENS
    ) -> Iterator[Trace]:
        """Yield blocks of tokens; pieces outside of the range are not read. See `TraceSource.blocks`."""
        start, stop = check_token_range(start, stop, self.num_tokens)
        parts: list[tuple[int, TokenFields]] = []
        held = 0
        for piece, fields in self._pieces(start, stop):
            taken, size = 0, len(fields.experts_TLK)
            while taken < size:
                end = min(size, taken + max_tokens - held)
                parts.append((piece, fields.cut(taken, end)))
                held, taken = held + end - taken, end
                if held == max_tokens:
                    yield self._block(parts)
                    parts, held = [], 0
        if parts:
            yield self._block(parts)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, TokenFields]]:
        """Yield the pieces that overlap a range of tokens, cut to it."""
        if start == stop:
            return
        with naming(self.path):
            read = self._open_pieces()
        for piece in range(int(np.searchsorted(self._end_N, start, side="right")), len(self._end_N)):
            end = int(self._end_N[piece])
            begin = int(self._end_N[piece - 1]) if piece else 0
            if begin >= stop:
                return
            if begin == end:
                continue
            with naming(self.path):
                fields = read(piece)
                if len(fields.experts_TLK) != end - begin:
                    raise InputError(
                        f"{self._name_piece(piece)} has {len(fields.experts_TLK)} tokens, not the "
                        f"{end - begin} counted when it was opened; it has changed since"
                    )
            yield piece, self._narrow(fields.cut(max(start - begin, 0), min(stop, end) - begin))

    def _narrow(self, fields: TokenFields) -> TokenFields:
        """Keep ids in as few bytes as they need: engines send four, and a block holds many pieces."""
        experts_TLK = fields.experts_TLK
        if experts_TLK.dtype == self.header.dtype or experts_TLK.dtype.kind not in "iu":
            return fields
        if int(experts_TLK.min()) < 0 or int(experts_TLK.max()) >= self.header.num_experts:
            # Left as it is, for the message to name the id.
            return fields
        return replace(fields, experts_TLK=experts_TLK.astype(self.header.dtype))

    def _block(self, parts: Sequence[tuple[int, TokenFields]]) -> Trace:
        try:
            return self._trace([fields for _, fields in parts])
        except InputError:
            # Something is wrong somewhere in the block: look for the piece, to say where.
            for piece, fields in parts:
                with naming(self.path):
                    try:
                        self._trace([fields])
                    except InputError as exc:
                        advice = self._advice and f" ({self._advice})"
                        raise InputError(f"{self._name_piece(piece)}: {exc}{advice}") from exc
            raise

    def _trace(self, parts: Sequence[TokenFields]) -> Trace:
        header = self.header
        fields: dict[str, Any] = {
            name: _joined([getattr(part, name) for part in parts]) for name in ("experts_TLK", *_FIELDS)
        }
        if self._same_domain and header.domain_names:
            fields["domain_T"] = np.zeros(len(fields["experts_TLK"]), dtype=np.int64)
        return Trace(
            **fields,
            num_experts=header.num_experts,
            domain_names=header.domain_names,
            model_name=header.model_name,
            moe_layer_ids=header.moe_layer_ids,
        )


def content_digest(source: TraceSource) -> str:
    """Return the digest that a source's tokens have as a `Trace`, in one pass and bounded memory.

    Raises
    ------
    InputError
        If the source is damaged.
    """
    header = source.header
    spools: dict[str, IO[bytes]] = {}
    digest = hashlib.sha256()
    about: dict[str, Any] = {
        "shape": (source.num_tokens, header.num_layers, header.top_k),
        "num_experts": header.num_experts,
        "domain_names": header.domain_names,
        "model_name": header.model_name,
        "moe_layer_ids": header.moe_layer_ids,
    }
    with contextlib.ExitStack() as stack:
        for block in source.blocks():
            if "fields" not in about:
                about["fields"] = {name: getattr(block, name) is not None for name in _FIELDS}
                digest.update(json.dumps(about, sort_keys=True).encode())
                known = [name for name, given in about["fields"].items() if given]
                spools = {name: stack.enter_context(_spool()) for name in known}
            digest.update(_little(block.experts_TLK))
            for name, spool in spools.items():
                # The digest takes one field of all tokens after another.
                spool.write(_little(getattr(block, name)))
        for spool in spools.values():
            spool.seek(0)
            while chunk := spool.read(1 << 20):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def _spool() -> IO[bytes]:
    return tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)


def _little(array: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data


def _joined(parts: Sequence[npt.NDArray[Any] | None]) -> npt.NDArray[Any] | None:
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return known[0] if len(known) == 1 else np.concatenate(known)
