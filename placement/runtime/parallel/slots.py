"""Tables of one layer of a placement: which rank and which row of its tensors each slot is.

Every rank's tensors have one row for each slot of its device, empty ones included, in slot order.

Shape letters: S slots, E experts, X most replicas of one expert, C rows of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from placement.errors import InputError
from placement.plan import EMPTY, Placement

__all__ = ["LayerSlots", "rows_of_rank", "upload"]

IntArray = npt.NDArray[np.int64]


def rows_of_rank(placement: Placement, rank: int) -> IntArray:
    """Return the slots of a rank's device, in the order of its rows, ``[C]``."""
    return np.flatnonzero(placement.device_of_slot_S == rank)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSlots:
    """Where the replicas of one layer's experts are.

    Parameters
    ----------
    expert_S
        Expert of each slot, `EMPTY` where there is none.
    rank_of_slot_S, row_of_slot_S
        Rank of each slot and its row there.
    slot_EX
        Slots of each expert's replicas in slot order, padded with the first.
    replicas_E
        Replicas of each expert.
    """

    expert_S: IntArray
    rank_of_slot_S: IntArray
    row_of_slot_S: IntArray
    slot_EX: IntArray
    replicas_E: IntArray

    @classmethod
    def of_layer(cls, placement: Placement, layer: int) -> LayerSlots:
        """Return the tables of one layer of a placement."""
        rank_S = placement.device_of_slot_S
        row_S = np.zeros_like(rank_S)
        for rank in range(placement.num_devices):
            row_S[rank_S == rank] = np.arange(np.count_nonzero(rank_S == rank))
        expert_S = placement.physical_to_logical_map_LS[layer]
        slot_EX, replicas_E = _replicas(expert_S, placement.num_experts)
        return cls(
            expert_S=expert_S,
            rank_of_slot_S=rank_S,
            row_of_slot_S=row_S,
            slot_EX=slot_EX,
            replicas_E=replicas_E,
        )

    def with_experts(self, expert_S: IntArray) -> LayerSlots:
        """Return the tables with other experts in the same slots.

        Raises
        ------
        InputError
            If they are not an expert or none for each slot, an expert has no slot, or a rank has one twice.
        """
        self._check(expert_S)
        slot_EX, replicas_E = _replicas(expert_S, self.num_experts)
        return replace(self, expert_S=expert_S, slot_EX=slot_EX, replicas_E=replicas_E)

    def _check(self, expert_S: IntArray) -> None:
        if expert_S.shape != self.expert_S.shape:
            raise InputError(f"{expert_S.size} experts for the {self.expert_S.size} slots of a layer")
        if expert_S.min() < EMPTY or expert_S.max() >= self.num_experts:
            raise InputError(f"a slot holds an expert outside 0..{self.num_experts - 1}")
        held_S = expert_S != EMPTY
        cells = (expert_S * (int(self.rank_of_slot_S.max()) + 1) + self.rank_of_slot_S)[held_S]
        if np.bincount(cells).max() > 1:
            raise InputError("a rank has an expert twice in one layer")
        missing = np.flatnonzero(np.bincount(expert_S[held_S], minlength=self.num_experts) == 0)
        if missing.size:
            raise InputError(f"expert {missing[0]} has no slot in a layer")

    @property
    def num_experts(self) -> int:
        """Logical experts."""
        return self.replicas_E.size

    def num_rows(self, rank: int) -> int:
        """Rows of a rank's tensors."""
        return int(np.count_nonzero(self.rank_of_slot_S == rank))

    def experts_of_rank(self, rank: int) -> IntArray:
        """Expert of each row of a rank, ``[C]``."""
        expert_C: IntArray = self.expert_S[self.rank_of_slot_S == rank]
        return expert_C

    def rank_EX(self) -> IntArray:
        """Rank of each replica, padded with the first's, ``[experts, most replicas]``."""
        ranks: IntArray = self.rank_of_slot_S[self.slot_EX]
        return ranks

    def tensor(self, name: str, device: torch.device) -> torch.Tensor:
        """Return one of the tables as an int64 tensor."""
        return upload(np.array(getattr(self, name), dtype=np.int64), device)


def upload(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return an array that nobody changes as a tensor on a device; the host does not wait for it."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _replicas(expert_S: IntArray, num_experts: int) -> tuple[IntArray, IntArray]:
    filled = np.flatnonzero(expert_S != EMPTY)
    replicas_E = np.bincount(expert_S[filled], minlength=num_experts)
    by_expert = filled[np.argsort(expert_S[filled], kind="stable")]
    first_E = np.cumsum(replicas_E) - replicas_E
    slot_EX = np.repeat(by_expert[first_E][:, None], int(replicas_E.max()), axis=1)
    number = np.arange(by_expert.size) - np.repeat(first_E, replicas_E)
    slot_EX[expert_S[by_expert], number] = by_expert
    return slot_EX, replicas_E
