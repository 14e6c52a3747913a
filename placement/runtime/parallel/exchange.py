"""Sends tokens to their experts' ranks and brings the results home, in one stage or two.

A stage sends rows of hidden states to the destinations of a group: ``pairs`` one row for each token-expert
pair, ``dedup`` one row for each destination that a token touches, with all of its slots there. What arrives
is handed to the next stage, or to the experts of this rank; what comes back is summed for each token. In two
stages a token crosses to a node once, to the rank of the same place there, which hands it on within the node
and sums what comes back (as DeepEP and Piper's HALO do).

Everything stays on the device but the counts, which the host needs once in each stage.

Shape letters: T tokens, H hidden, K slots of a token, D destinations, N rows sent, R rows received, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist

from placement.runtime.parallel.alltoall import exchange_rows, naming_lost_ranks
from placement.runtime.parallel.control import Control
from placement.runtime.parallel.phases import PhaseClock
from placement.runtime.parallel.route import Entries, Placed, count_rows, place_rows
from placement.runtime.parallel.rows import combine_rows, expand_rows
from placement.runtime.parallel.split import Split

__all__ = ["Arrived", "Inner", "Stage"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrived:
    """Rows that a rank has to compute or to hand on.

    Parameters
    ----------
    hidden_RH
        Hidden states.
    named_RK
        Slots that each row wants, -1 where there is none; experts where there is a `split`. Integers.
    weight_RK
        Weight of each slot's output, anything where there is none; None where outputs are weighed elsewhere.
    num_pairs
        Slots that are wanted, in all.
    split
        Rule by which the rows choose slots of the experts that they name.
    """

    hidden_RH: torch.Tensor
    named_RK: torch.Tensor
    weight_RK: torch.Tensor | None
    num_pairs: int
    split: Split | None = None


class Inner(Protocol):
    """What becomes of the rows that arrive."""

    def __call__(self, arrived: Arrived) -> torch.Tensor:
        """Return the weighed sum of each row's outputs, ``[R, H]``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Route:
    """Which rows go where: everything about one exchange but the hidden states.

    `row_TK` is the row by which a token reaches the destination of its k-th slot, -1 where an earlier slot
    has named it.
    """

    token_N: torch.Tensor
    row_TK: torch.Tensor
    pair_N: torch.Tensor
    message_NW: torch.Tensor
    sent_D: Sequence[int]
    received_D: Sequence[int]
    num_pairs: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stage:
    """One all-to-all and its way back.

    Parameters
    ----------
    group
        Whose ranks are the destinations, in order.
    num_destinations
        Ranks of the group.
    destination_S
        Destination of each slot.
    dedup
        Whether a token is sent once to a destination, whatever its slots there.
    weights_first
        Whether experts want their input weighed, not their output.
    inner
        What becomes of the rows that arrive.
    control
        Whose word goes along with the counts.
    clock
        Told of the phases.
    relays
        Whether this is the second of two stages: it passes on what the first one agreed on.
    """

    group: dist.ProcessGroup
    num_destinations: int
    destination_S: torch.Tensor
    dedup: bool
    weights_first: bool
    inner: Inner
    control: Control
    clock: PhaseClock
    relays: bool = False
    _reader: _Reader = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_reader", _Reader(self.num_destinations, self.destination_S.device))

    def __call__(self, arrived: Arrived) -> torch.Tensor:
        """Exchange rows there and back; return each row's sum, ``[T, H]``."""
        weight_TK = arrived.weight_RK if self.dedup or self.weights_first else None
        learned = weight_TK is not None and weight_TK.requires_grad and torch.is_grad_enabled()
        # Weights go along with the slots, as bits, unless gradients have to come back to them.
        packed = self.dedup and not learned
        route = self._route(arrived, weight_TK if packed else None)
        sent_NH = expand_rows(arrived.hidden_RH, route.token_N, route.row_TK)
        weight_NK = None if weight_TK is None or packed else self._weights(weight_TK, route)
        if weight_NK is not None and not self.dedup:
            sent_NH, weight_NK = sent_NH * weight_NK.to(sent_NH.dtype), None
        self.clock.mark("prepare")
        received = self._sent(route, sent_NH, weight_NK, top_k=arrived.named_RK.shape[1])
        self.clock.mark("dispatch")
        back_NH = exchange_rows(self.inner(received), route.received_D, route.sent_D, self.group)
        self.clock.mark("combine")
        # One row for each pair: outputs are weighed here, so that weights need not travel.
        home_TK = None if self.dedup or self.weights_first else arrived.weight_RK
        home_TH = combine_rows(back_NH, route.token_N, route.row_TK, home_TK)
        self.clock.mark("unpermute")
        return home_TH

    def _weights(self, weight_TK: torch.Tensor, route: _Route) -> torch.Tensor:
        """Weights of each row: those of its token, or the one of its pair."""
        if self.dedup:
            return expand_rows(weight_TK, route.token_N, route.row_TK)
        return expand_rows(weight_TK.reshape(-1, 1), route.pair_N, route.row_TK.reshape(-1, 1))

    @torch.no_grad()
    def _route(self, arrived: Arrived, weight_TK: torch.Tensor | None) -> _Route:
        entries = Entries(
            named_TK=arrived.named_RK,
            split=arrived.split,
            target_S=self.destination_S,
            num_targets=self.num_destinations,
            dedup=self.dedup,
        )
        both_2D3 = self._reader.zeros()
        counted = count_rows(entries, told=both_2D3[0], word=self._word())
        with naming_lost_ranks("an exchange of counts"):
            work = dist.all_to_all_single(both_2D3[1], both_2D3[0], group=self.group, async_op=True)
            # Needs no sizes, so that it runs while the counts are on their way.
            placed = place_rows(counted, message=True, weight_TK=weight_TK)
            work.wait()
        return self._sized(placed, self._reader.read(both_2D3))

    def _sized(self, placed: Placed, told_2D3: Sequence[Sequence[Sequence[int]]]) -> _Route:
        """Cut the tables to their sizes."""
        sent_D, received_D = ([row[0] for row in told_D3] for told_D3 in told_2D3)
        num_rows = sum(sent_D)
        self.control.agreed = min(row[2] for row in told_2D3[1])
        assert placed.message_PW is not None  # it was asked for
        return _Route(
            token_N=placed.token_P[:num_rows],
            row_TK=placed.row_TK,
            pair_N=placed.entry_P[:num_rows],
            message_NW=placed.message_PW[:num_rows],
            sent_D=sent_D,
            received_D=received_D,
            num_pairs=sum(row[1] for row in told_2D3[1]),
        )

    def _word(self) -> int:
        return self.control.agreed if self.relays else self.control.mine

    def _sent(
        self, route: _Route, sent_NH: torch.Tensor, weight_NK: torch.Tensor | None, *, top_k: int
    ) -> Arrived:
        def move(row_N: torch.Tensor) -> torch.Tensor:
            return exchange_rows(row_N, route.sent_D, route.received_D, self.group)

        hidden_RH, message_RW, weight_RK = move(sent_NH), move(route.message_NW), None
        if weight_NK is not None:
            weight_RK = move(weight_NK)
        elif message_RW.shape[1] > top_k:
            weight_RK = message_RW[:, top_k:].view(torch.float32)
        return Arrived(
            hidden_RH=hidden_RH,
            named_RK=message_RW[:, :top_k],
            weight_RK=weight_RK,
            num_pairs=route.num_pairs,
        )


class _Reader:
    """Brings counts to the host: the one place where it waits for the device."""

    def __init__(self, num_destinations: int, device: torch.device) -> None:
        self._shape, self._device = (2, num_destinations, 3), device
        self._pinned: torch.Tensor | None = None
        if device.type == "cuda":
            self._pinned = torch.empty(self._shape, dtype=torch.int64, pin_memory=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def zeros(self) -> torch.Tensor:
        """Return room for what is told and what one is told: rows, pairs and a word for each destination."""
        return torch.zeros(self._shape, dtype=torch.int64, device=self._device)

    def read(self, told_2D3: torch.Tensor) -> list[list[list[int]]]:
        """Return the numbers, as soon as they are there."""
        if self._pinned is not None:
            self._pinned.copy_(told_2D3, non_blocking=True)
            self._copied.record()
            self._copied.synchronize()
            told_2D3 = self._pinned
        numbers: list[list[list[int]]] = told_2D3.tolist()
        return numbers
