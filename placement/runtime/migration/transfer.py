"""One round's copies between ranks: one message for each peer and stage, checked on arrival.

A sender packs the pieces of a message and their checksum into a buffer; a receiver takes it into waiting
memory, out of which the rows are written when the round is switched over. While one stage travels, the next
one is packed into a second buffer and the last one is checked, each on a stream of its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from placement.runtime.migration.arrival import Arrival, EventArrival, ThreadArrival, record_event
from placement.runtime.migration.checksum import RowChecksum
from placement.runtime.migration.link import MigrationError, MigrationLink, first_line
from placement.runtime.migration.moves import RowMove
from placement.runtime.migration.rows import LayerRows
from placement.runtime.migration.stages import ALIGNMENT, Content, Message, Piece, Stage, cut, peak_bytes
from placement.runtime.migration.staging import Staging

__all__ = ["Fault", "RoundTransfer", "Traffic"]

Fault: TypeAlias = Callable[[Sequence[RowMove], torch.Tensor], None]
"""May spoil the bytes of an arrived message, with pieces of some experts, before its check; for tests."""

_WORD_BYTES = 8
_WORDS = 2**64
_AT_ONCE = 2
"""Stages under way while they are waited for: one travels, one is ready to."""


@dataclass(slots=True)
class Traffic:
    """What the transfers of this rank came to.

    Parameters
    ----------
    sent_bytes, received_bytes
        Of experts, without gaps and checksums.
    seconds
        Time in which stages were on their way: each from when it was packed, or the last one was through, to
        its last byte.
    checks
        Messages whose checksums were right.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    seconds: float = 0.0
    checks: int = 0

    @property
    def gb_per_s(self) -> float:
        """Rate of the busier direction, GB per second; 0 where nothing was sent."""
        busier = max(self.sent_bytes, self.received_bytes)
        return busier / self.seconds / 1e9 if self.seconds else 0.0


class _Memory:
    """Bytes that are also words."""

    def __init__(self, content: torch.Tensor) -> None:
        self.bytes, self.words = content, content.view(torch.int64)

    def like(self, row: torch.Tensor, start: int) -> torch.Tensor:
        """Return as much memory as some piece of a row takes, of its type."""
        width = row.element_size()
        return (self.words if width == _WORD_BYTES else self.bytes)[start // width :][: row.numel()]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Buffer:
    """A message in memory."""

    message: Message
    memory: _Memory
    start: int

    @property
    def bytes(self) -> torch.Tensor:
        return self.memory.bytes[self.start : self.start + self.message.num_bytes]

    @property
    def content(self) -> torch.Tensor:
        """All words but the checksum's."""
        end = self.start + self.message.num_bytes - ALIGNMENT
        return self.memory.words[self.start // _WORD_BYTES : end // _WORD_BYTES]

    @property
    def check(self) -> torch.Tensor:
        """The checksum, a number."""
        return self.memory.words[(self.start + self.message.num_bytes - ALIGNMENT) // _WORD_BYTES]


@dataclass(slots=True, kw_only=True, eq=False)
class _Share:
    """What this rank sends and receives in one stage."""

    tag: int
    leaving: list[Message]
    arriving: list[_Buffer]
    memory: _Memory
    arrival: Arrival | None = None
    packed: dict[Content, _Buffer] = field(default_factory=dict)


class RoundTransfer:
    """A rank's share of a round's copies; making it starts them.

    Copies go in stages. Each call of `poll` starts the next one if the last is through; `wait` keeps the next
    one ready while one travels.

    Parameters
    ----------
    link
        Groups and streams.
    rows
        By layer: tensors that move along.
    moves
        The round's, the same on every rank.
    staging
        Memory for what arrives and for what leaves.
    checksum
        Of this device.
    traffic
        Counted on.
    chunk_bytes
        Bytes that a rank receives in a stage, at most; default: as of `cut`.
    fault
        For tests.

    Raises
    ------
    MigrationError
        If a peer is gone, or there is no memory for what is to come.
    """

    def __init__(
        self,
        link: MigrationLink,
        rows: Mapping[int, LayerRows],
        moves: Sequence[RowMove],
        staging: Staging,
        checksum: RowChecksum,
        traffic: Traffic,
        *,
        chunk_bytes: int | None = None,
        fault: Fault | None = None,
    ) -> None:
        self._link, self._rows, self._moves = link, rows, moves
        self._checksum, self._traffic, self._fault = checksum, traffic, fault
        self._deadline_s = 0.0
        self._last: Arrival | None = None
        self._verdict: _Verdict | None = None
        self._differences: list[torch.Tensor] = []
        self._arrived: list[_Buffer] = []
        self._under_way: deque[_Share] = deque()
        self._is_through = False
        sizes = {move.layer: list(rows[move.layer].tensor_bytes.values()) for move in moves}
        with _on(link.stream, after=link.compute_stream):
            self._shares = self._open(cut(moves, sizes, chunk_bytes=chunk_bytes), staging)
            self._depart()

    @property
    def complete(self) -> bool:
        """Whether no copy of this rank is under way or still to come."""
        return not (self._under_way or self._shares)

    def poll(self) -> bool:
        """Whether everything has arrived and is right; never waits.

        Raises
        ------
        MigrationError
            If it came too late, a copy failed, or a checksum is wrong.
        """
        if self._is_through:
            return True
        if self._under_way:
            if not self._has_landed():
                return False
            with _on(self._link.stream):
                self._depart()
            if self._under_way:
                return False
        return self._is_right()

    def wait(self) -> None:
        """Return once everything has arrived and is right.

        Raises
        ------
        MigrationError
            As of `poll`.
        """
        while not self._is_through:
            with _on(self._link.stream):
                while self._shares and len(self._under_way) < _AT_ONCE:
                    self._depart()
            if self._under_way:
                if not self._has_landed():
                    self._pause()
            elif not self._is_right():
                time.sleep(0)

    @torch.no_grad()
    def write_rows(self) -> None:
        """Overwrite the rows of this rank with what has arrived, on the current stream."""
        targets, sources = [], []
        for buffer in self._arrived:
            for piece in buffer.message.pieces:
                move = self._moves[piece.move]
                target = self._row(move.layer, move.target_row, piece)
                targets.append(target)
                sources.append(buffer.memory.like(target, buffer.start + piece.place))
        if targets:
            torch._foreach_copy_(targets, sources)

    def _row(self, layer: int, row: int, piece: Piece) -> torch.Tensor:
        return self._rows[layer].tensors[piece.tensor].piece(row, piece.start, piece.end)

    def _open(self, stages: Sequence[Stage], staging: Staging) -> deque[_Share]:
        """Memory for all stages, and what of them is this rank's."""
        rank = self._link.mesh.rank
        try:
            arena, *sending = (_Memory(one) for one in staging.take(peak_bytes(stages, rank)))
        except torch.OutOfMemoryError as exc:
            raise self._no_memory(peak_bytes(stages, rank)) from exc
        self._checksum.prepare(max((one.num_bytes for stage in stages for one in stage), default=0))
        self._keep()
        shares: deque[_Share] = deque()
        start = turn = 0
        for tag, stage in enumerate(stages):
            share = _Share(
                tag=tag,
                leaving=[one for one in stage if one.source == rank],
                arriving=[],
                memory=sending[turn % _AT_ONCE],
            )
            for message in (one for one in stage if one.target == rank):
                share.arriving.append(_Buffer(message=message, memory=arena, start=start))
                start += message.num_bytes
            turn += bool(share.leaving)
            if share.leaving or share.arriving:
                shares.append(share)
        return shares

    def _no_memory(self, sizes: Sequence[int]) -> MigrationError:
        rank = self._link.mesh.rank
        arriving = sum(move.target == rank for move in self._moves)
        return MigrationError(
            f"rank {rank} has no memory for {arriving} waiting experts ({sizes[0]} bytes) and those that it "
            f"sends ({sum(sizes[1:])}); migrate with less staging, or switch over after each round"
        )

    def _keep(self) -> None:
        """Tell the allocator that the side stream reads what the compute stream may give up (gradients)."""
        if self._link.stream is None:
            return
        rank = self._link.mesh.rank
        for layer in {move.layer for move in self._moves if move.source == rank}:
            for tensor in self._rows[layer].tensors:
                tensor.values_C.record_stream(self._link.stream)

    def _depart(self) -> None:
        """Pack the next stage in which this rank takes part and start it."""
        if not self._shares:
            return
        share = self._shares.popleft()
        self._pack(share)
        operations = list(self._operations(share))
        self._deadline_s = time.monotonic() + self._link.timeout_s
        self._under_way.append(share)
        try:
            share.arrival = self._start(operations)
        except RuntimeError as exc:
            raise self._lost(exc) from exc
        if self._link.stream is not None:
            # Queued behind the copies, so that one look at the last tells all.
            with _on(self._link.arrival_stream):
                self._check(share)

    def _pack(self, share: _Share) -> None:
        targets, sources, start = [], [], 0
        for message in share.leaving:
            if message.content in share.packed:
                continue
            share.packed[message.content] = _Buffer(message=message, memory=share.memory, start=start)
            for piece in message.pieces:
                move = self._moves[piece.move]
                source = self._row(move.layer, move.source_row, piece)
                sources.append(source)
                targets.append(share.memory.like(source, start + piece.place))
            start += message.num_bytes
        if targets:
            torch._foreach_copy_(targets, sources)
        for buffer in share.packed.values():
            torch.add(self._checksum.of(buffer.content), buffer.message.number, out=buffer.check)

    def _operations(self, share: _Share) -> Iterator[dist.P2POp]:
        peers, group = self._link.peers, self._link.group
        for message in share.leaving:
            self._traffic.sent_bytes += message.piece_bytes
            content = share.packed[message.content].bytes
            yield dist.P2POp(dist.isend, content, peers[message.target], group, share.tag)
        for buffer in share.arriving:
            self._traffic.received_bytes += buffer.message.piece_bytes
            yield dist.P2POp(dist.irecv, buffer.bytes, peers[buffer.message.source], group, share.tag)

    def _start(self, operations: list[dist.P2POp]) -> Arrival:
        stream = self._link.stream
        if stream is None:
            start_s = time.perf_counter()
            return ThreadArrival(dist.batch_isend_irecv(operations), start_s)
        start = record_event(stream, timing=True)
        works = dist.batch_isend_irecv(operations)
        with _on(self._link.arrival_stream):
            for work in works:
                work.wait()  # this stream waits: not the host, and not the one that packs the next stage
        return EventArrival(start, self._link.arrival_stream)

    def _has_landed(self) -> bool:
        """Whether the oldest stage under way is through; then it is no longer under way."""
        share = self._under_way[0]
        assert share.arrival is not None
        try:
            if not share.arrival.done():
                self._check_time()
                return False
        except RuntimeError as exc:
            self._check_time()  # the group's own limit is as long
            raise self._lost(exc) from exc
        self._traffic.seconds += share.arrival.seconds(self._last)
        self._last = share.arrival
        self._deadline_s = time.monotonic() + self._link.timeout_s
        self._under_way.popleft()
        if self._link.stream is None:
            with _on(None):
                self._check(share)
        return True

    def _pause(self) -> None:
        arrival = self._under_way[0].arrival
        assert arrival is not None
        arrival.pause()

    def _check(self, share: _Share) -> None:
        """Compare what has arrived with its checksums; the verdict follows the last stage."""
        for buffer in share.arriving:
            if self._fault is not None:
                moves = {piece.move: self._moves[piece.move] for piece in buffer.message.pieces}
                self._fault(list(moves.values()), buffer.bytes)
            self._differences.append(buffer.check - self._checksum.of(buffer.content))
        self._arrived += share.arriving
        if not self._shares and (self._link.stream is not None or not self._under_way):
            self._verdict = _Verdict(self._differences, self._link.arrival_stream)

    def _is_right(self) -> bool:
        """Whether all checksums are known; they are right then."""
        if self._verdict is None:  # of a rank that takes no part
            self._verdict = _Verdict([], None)
        if not self._verdict.done():
            return False
        for buffer, difference in zip(self._arrived, self._verdict.differences(), strict=True):
            if difference != buffer.message.number:
                raise self._wrong(buffer.message)
            self._traffic.checks += 1
        self._is_through = True
        return True

    def _wrong(self, message: Message) -> MigrationError:
        moves = {piece.move: self._moves[piece.move] for piece in message.pieces}.values()
        names = ", ".join(f"{move.expert} of MoE layer {move.layer}" for move in moves)
        return MigrationError(
            f"{'expert' if len(moves) == 1 else 'experts'} {names} came from rank {message.source} to rank "
            f"{message.target} with a wrong checksum"
        )

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline_s:
            raise MigrationError(
                f"experts from or for rank {self._link.mesh.rank} were not through within "
                f"{self._link.timeout_s:g} s"
            )

    def _lost(self, exc: RuntimeError) -> MigrationError:
        return MigrationError(f"rank {self._link.mesh.rank} could not exchange experts: {first_line(exc)}")


class _Verdict:
    """By how much checksums differ, on its way to the host."""

    def __init__(self, differences: Sequence[torch.Tensor], stream: Any) -> None:
        self._event: Any = None
        self._difference = torch.zeros(0, dtype=torch.int64)
        if differences:
            self._difference = torch.stack(list(differences))
        if differences and stream is not None:
            pinned = torch.empty(self._difference.shape, dtype=torch.int64, pin_memory=True)
            self._difference = pinned.copy_(self._difference, non_blocking=True)
            self._event = record_event(stream)

    def done(self) -> bool:
        return self._event is None or bool(self._event.query())

    def differences(self) -> list[int]:
        """Return them, modulo 2**64."""
        return [int(one) % _WORDS for one in self._difference.tolist()]


@contextmanager
def _on(stream: Any, *, after: Any = None) -> Iterator[None]:
    """Queue what follows on a stream, if there is one; behind all that another has been given so far."""
    with torch.no_grad():
        if stream is None:
            yield
            return
        if after is not None:
            stream.wait_stream(after)
        with torch.cuda.stream(stream):
            yield
