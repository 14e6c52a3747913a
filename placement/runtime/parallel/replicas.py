"""Gradients of experts that live on several ranks: summed inside backward, the same bits everywhere.

Each replica's gradient comes from the tokens that went to it. Replicas send theirs to the lowest rank that
holds the expert, which adds them up in rank order and sends the sum back.

Shape letters: C rows of this rank, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from placement.runtime.parallel.alltoall import naming_lost_ranks
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.slots import LayerSlots

__all__ = ["GradientSum", "Shared", "shared_rows"]

Rows = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """Rows of a rank whose experts other ranks hold as well.

    Parameters
    ----------
    given
        By owning rank: rows whose gradients it adds up.
    owned
        By other rank: rows that this rank owns and the other holds, too; both in order of expert.
    """

    given: Rows
    owned: Rows


def shared_rows(slots: LayerSlots, rank: int) -> Shared:
    """Return what a rank shares in one layer."""
    given: dict[int, list[int]] = {}
    owned: dict[int, list[int]] = {}
    for expert in np.flatnonzero(slots.replicas_E > 1):
        held = slots.slot_EX[expert, : slots.replicas_E[expert]]
        row_of = dict(
            zip(slots.rank_of_slot_S[held].tolist(), slots.row_of_slot_S[held].tolist(), strict=True)
        )
        owner = min(row_of)
        if rank == owner:
            for other in sorted(set(row_of) - {owner}):
                owned.setdefault(other, []).append(row_of[rank])
        elif rank in row_of:
            given.setdefault(owner, []).append(row_of[rank])
    return Shared(given=_frozen(given), owned=_frozen(owned))


def _frozen(rows: Mapping[int, list[int]]) -> Rows:
    return {rank: tuple(rows[rank]) for rank in sorted(rows)}


class GradientSum:
    """Passes a layer's expert tensors through, and on the way back scales and sums their gradients.

    Every rank that holds a replica has to run backward through the layer, in the same order of layers.

    Parameters
    ----------
    mesh
        The ranks.
    scale
        What gradients are multiplied with.
    shared
        What this rank shares of the layer.
    """

    def __init__(self, mesh: Mesh, shared: Shared, *, scale: float) -> None:
        self._mesh, self._shared, self._scale = mesh, shared, scale

    def through(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the same tensors, ``[C, ...]`` each, whose gradients are summed before they arrive.

        All of a layer's go through together: their gradients are ready in an order that differs from rank to
        rank, and messages must not.
        """
        passed: tuple[torch.Tensor, ...] = _Through.apply(self, *tensors)  # type: ignore[no-untyped-call]
        return passed

    def summed(self, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the gradients of the experts, of all replicas together."""
        sums = [gradient_C * self._scale for gradient_C in gradients]
        shared = self._shared
        if self._mesh.group is None or not (shared.given or shared.owned):
            return sums
        arrived = self._swap(sums, send=shared.given, receive=shared.owned)
        for rank, rows in shared.owned.items():
            for sum_C, part in zip(sums, arrived[rank], strict=True):
                sum_C.index_add_(0, torch.tensor(rows, device=sum_C.device), part)
        totals = self._swap(sums, send=shared.owned, receive=shared.given)
        for rank, rows in shared.given.items():
            for sum_C, total in zip(sums, totals[rank], strict=True):
                sum_C[torch.tensor(rows, device=sum_C.device)] = total
        return sums

    def _swap(
        self, values: Sequence[torch.Tensor], *, send: Rows, receive: Rows
    ) -> dict[int, list[torch.Tensor]]:
        """Send rows of all tensors to ranks and return the rows that come from others."""
        group = self._mesh.group
        peers = dist.get_process_group_ranks(group)
        arrived = {
            rank: [value_C.new_empty((len(rows), *value_C.shape[1:])) for value_C in values]
            for rank, rows in receive.items()
        }
        # Kept until all have been sent.
        leaving = {
            rank: [value_C[torch.tensor(rows, device=value_C.device)].contiguous() for value_C in values]
            for rank, rows in send.items()
        }
        operations = [
            dist.P2POp(operation, part, peers[rank], group)
            for operation, parts_of in ((dist.isend, leaving), (dist.irecv, arrived))
            for rank, parts in parts_of.items()
            for part in parts
        ]
        # A rank may have nothing to send or receive in one of the two rounds.
        with naming_lost_ranks("a sum of gradients"):
            for work in dist.batch_isend_irecv(operations) if operations else ():
                work.wait()
        return arrived


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: GradientSum, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.sums = sums
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.sums.summed(gradients)
