"""Which bytes of a round travel together: stages of one message for each peer, of a bounded share."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from placement.errors import InputError
from placement.runtime.migration.moves import RowMove

__all__ = [
    "ALIGNMENT",
    "LINE_BYTES",
    "STAGE_BYTES",
    "Content",
    "Message",
    "Piece",
    "Stage",
    "aligned",
    "cut",
    "leaving",
    "peak_bytes",
]

Content: TypeAlias = tuple[tuple[int, ...], ...]
"""Layer, expert, tensor, start and end of each piece of a message."""

STAGE_BYTES = 256 * 2**20
"""Enough for a link to reach its rate while the host prepares the next stage; over in about a millisecond."""

ALIGNMENT = 16
"""Bytes at whose multiples pieces and messages begin."""

LINE_BYTES = 8192
"""A message's content is a whole number of these, so that its checksum is quickly computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes of one tensor of one expert.

    Parameters
    ----------
    move
        Index of the move within the round.
    tensor
        Index within `LayerRows.tensors`.
    start, end
        Bytes of the row.
    place
        Where they begin within the message.
    """

    move: int
    tensor: int
    start: int
    end: int
    place: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What one rank sends another in a stage: pieces, then their checksum in the last `ALIGNMENT` bytes.

    Parameters
    ----------
    source, target
        Ranks.
    pieces
        In order.
    content
        Says what is in the pieces: messages of one rank with the same content have the same bytes.
    """

    source: int
    target: int
    pieces: tuple[Piece, ...]
    content: Content

    @property
    def piece_bytes(self) -> int:
        """Bytes of experts."""
        return sum(piece.end - piece.start for piece in self.pieces)

    @property
    def num_bytes(self) -> int:
        """All bytes: pieces, gaps and checksum."""
        last = self.pieces[-1]
        return -(-(last.place + last.end - last.start) // LINE_BYTES) * LINE_BYTES + ALIGNMENT

    @property
    def number(self) -> int:
        """A number that other contents do not have, but by accident; a part of the checksum."""
        return zlib.crc32(repr(self.content).encode())


Stage = tuple[Message, ...]
"""What travels at a time, the same on all ranks."""


def aligned(size: int) -> int:
    """Return the bytes that a piece takes with the gap behind it."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def cut(
    moves: Sequence[RowMove], sizes: Mapping[int, Sequence[int]], *, chunk_bytes: int | None = None
) -> list[Stage]:
    """Cut a round into stages, the same on every rank.

    A rank's arrivals come peer by peer, beginning with the next higher rank, so that not all ask the same.

    Parameters
    ----------
    moves
        The round's.
    sizes
        By layer: bytes of one expert in each tensor.
    chunk_bytes
        Bytes of experts that a rank receives in a stage, at most; default: one expert, or `STAGE_BYTES` of
        small ones.

    Raises
    ------
    InputError
        If chunks are not positive.
    """
    limit = chunk_bytes
    if limit is None:
        limit = max(STAGE_BYTES, max((sum(sizes[move.layer]) for move in moves), default=0))
    if limit < 1:
        raise InputError(f"chunks of {limit} bytes; they must hold 1 or more")
    stages: list[dict[tuple[int, int], list[Piece]]] = []
    received: dict[int, int] = {}
    for index in sorted(range(len(moves)), key=lambda index: _turn(moves[index])):
        move = moves[index]
        for tensor, size in enumerate(sizes[move.layer]):
            start = 0
            while start < size:
                stage, used = divmod(received.get(move.target, 0), limit)
                end = min(size, start + limit - used)
                while len(stages) <= stage:
                    stages.append({})
                pieces = stages[stage].setdefault((move.source, move.target), [])
                place = aligned(pieces[-1].place + pieces[-1].end - pieces[-1].start) if pieces else 0
                pieces.append(Piece(move=index, tensor=tensor, start=start, end=end, place=place))
                received[move.target] = received.get(move.target, 0) + end - start
                start = end
    return [tuple(_messages(stage, moves)) for stage in stages]


def _turn(move: RowMove) -> tuple[int, bool, int]:
    return move.target, move.source < move.target, move.source


def _messages(
    stage: Mapping[tuple[int, int], Sequence[Piece]], moves: Sequence[RowMove]
) -> Iterator[Message]:
    for (source, target), pieces in stage.items():
        content = tuple(
            (moves[one.move].layer, moves[one.move].expert, one.tensor, one.start, one.end) for one in pieces
        )
        yield Message(source=source, target=target, pieces=tuple(pieces), content=content)


def leaving(stage: Stage, rank: int) -> dict[Content, int]:
    """Bytes of each content that a rank sends in a stage; what goes to several peers is packed once."""
    return {one.content: one.num_bytes for one in stage if one.source == rank}


def peak_bytes(stages: Sequence[Stage], rank: int) -> tuple[int, int, int]:
    """Memory of one rank for a round: all that arrives, and two buffers by turns for what leaves.

    The second buffer takes the next stage while one travels; with one stage there is none.
    """
    arriving = sum(one.num_bytes for stage in stages for one in stage if one.target == rank)
    sent = [size for stage in stages if (size := sum(leaving(stage, rank).values()))]
    return arriving, max(sent[::2], default=0), max(sent[1::2], default=0)
