"""Puts arrived experts into their rows and lets the model go by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from placement.plan import EMPTY
from placement.runtime.migration.moves import RowShift
from placement.runtime.migration.rows import LayerRows
from placement.runtime.migration.schedule import Round
from placement.runtime.migration.staging import Staging
from placement.runtime.migration.transfer import RoundTransfer
from placement.runtime.parallel.model import ParallelModel

__all__ = ["switch_over"]


@torch.no_grad()
def switch_over(
    parallel: ParallelModel,
    one: Round,
    rows: Mapping[int, LayerRows],
    transfer: RoundTransfer,
    staging: Staging,
) -> None:
    """Carry a round out on this rank: weights, gradients and optimizer state, then the routing tables.

    Everything is queued on the stream that computes, behind the passes that still use the old rows.

    Parameters
    ----------
    rows
        Tensors of each layer that changes.
    transfer
        Of the round; all has arrived.
    staging
        Memory for shifts of rows.
    """
    transfer.write_rows()
    for shift in one.shifts:
        if shift.rank == parallel.mesh.rank:
            _shift(rows[shift.layer], shift, staging)
    for layer, row in sorted(_emptied(parallel, one)):
        rows[layer].clear(row)
    for layer, expert_S in one.expert_LS.items():
        parallel.set_layer(layer, expert_S)


def _emptied(parallel: ParallelModel, one: Round) -> set[tuple[int, int]]:
    """Layers and rows of this rank that held something, before or on the way, and hold nothing now."""
    rank = parallel.mesh.rank
    own_C = np.flatnonzero(parallel.layers[0].slots.rank_of_slot_S == rank)
    empty = {
        (layer, row)
        for layer, expert_S in one.expert_LS.items()
        for row, expert in enumerate(expert_S[own_C].tolist())
        if expert == EMPTY
    }
    if not empty:
        return empty
    touched = {(move.layer, move.target_row) for move in one.moves if move.target == rank}
    touched |= {(shift.layer, row) for shift in one.shifts if shift.rank == rank for row in shift.rows}
    before_LS = parallel.expert_LS
    return {
        (layer, row)
        for layer, row in empty
        if (layer, row) in touched or before_LS[layer, own_C[row]] != EMPTY
    }


def _shift(rows: LayerRows, shift: RowShift, staging: Staging) -> None:
    aside: Sequence[torch.Tensor] = ()
    if shift.closed:
        (buffer,) = staging.take([rows.staged_bytes])
        aside = rows.parts(buffer)
        rows.read(shift.rows[-1], aside)
    for source, target in shift.copies():
        rows.write(target, rows.row(source))
    if shift.closed:
        rows.write(shift.rows[0], aside)
