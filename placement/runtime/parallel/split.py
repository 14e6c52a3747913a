"""Which replica of its experts a token uses: the rules of `placement.cost.split`, carried out.

Shape letters: E experts, X most replicas of one expert, T tokens of this rank's pass, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from placement.cost.split import HASH_MULTIPLIER
from placement.problem import ReplicaSplit
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.slots import LayerSlots, upload

__all__ = ["Choice", "Split", "split_of"]

FloatArray = npt.NDArray[np.float64]

_WORD = 2**32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """Tables of a rule, for those who choose slots without it.

    Parameters
    ----------
    slot_EX
        Slots of each expert's replicas, int64; ``[E, 1]`` where there is nothing to choose.
    replicas_E
        Replicas of each expert, int64, where they take turns: token ``t`` takes the replica
        ``(t * step + first) mod 2**32 mod replicas``.
    cut_EX
        Where one replica's share ends and the next one's begins, float64, for draws by hash.
    """

    slot_EX: torch.Tensor
    replicas_E: torch.Tensor | None = None
    cut_EX: torch.Tensor | None = None
    first: int = 0
    step: int = 0


class Split(Protocol):
    """Chooses a slot for every token-expert pair."""

    @property
    def choice(self) -> Choice:
        """The tables that it goes by."""
        ...

    def __call__(self, expert_TK: torch.Tensor) -> torch.Tensor:
        """Return the slot of each pair, ``[tokens, top-k]``, int64."""
        ...


def split_of(
    rule: ReplicaSplit, slots: LayerSlots, mesh: Mesh, *, share_EX: FloatArray | None = None
) -> Split:
    """Return the rule for one layer on this rank.

    Parameters
    ----------
    rule
        ``even``: the token's place in the pass plus the rank, modulo the replicas. ``hash``: vLLM's hash of
        the place. ``nearest``: the replica on this rank, else one on this node, else any, chosen by the rank.
        ``lp``: each replica with the given share, drawn by a hash of place and expert.
    share_EX
        Shares of ``lp``; even ones where none are given.
    """
    if slots.slot_EX.shape[1] == 1 or rule is ReplicaSplit.NEAREST:
        return _Fixed(_nearest(slots, mesh), mesh.device)
    if rule is ReplicaSplit.LP and share_EX is not None:
        return _Shares(slots, share_EX, mesh.device)
    return _Turns(slots, mesh, hashed=rule is ReplicaSplit.HASH)


def _nearest(slots: LayerSlots, mesh: Mesh) -> npt.NDArray[np.int64]:
    """Slot of each expert for tokens of this rank, ``[experts]``."""
    rank_EX = slots.rank_EX()
    real_EX = np.arange(rank_EX.shape[1]) < slots.replicas_E[:, None]
    here_EX = real_EX & (rank_EX == mesh.rank)
    near_EX = real_EX & (rank_EX // mesh.devices_per_node == mesh.node)
    chosen_EX = np.where(near_EX.any(axis=1, keepdims=True), near_EX, real_EX)
    chosen_EX = np.where(here_EX.any(axis=1, keepdims=True), here_EX, chosen_EX)
    wanted_E = mesh.rank % chosen_EX.sum(axis=1)
    column_E = np.argmax(chosen_EX.cumsum(axis=1) > wanted_E[:, None], axis=1)
    slot_E: npt.NDArray[np.int64] = slots.slot_EX[np.arange(slots.num_experts), column_E]
    return slot_E


class _Fixed:
    """Every expert's tokens of this rank go to one slot."""

    def __init__(self, slot_E: npt.NDArray[np.int64], device: torch.device) -> None:
        self._slot_E = upload(slot_E, device)
        self.choice = Choice(slot_EX=self._slot_E.unsqueeze(1))

    def __call__(self, expert_TK: torch.Tensor) -> torch.Tensor:
        """Return the slot of each pair."""
        return self._slot_E[expert_TK]


class _Turns:
    """Tokens take the replicas in turn."""

    def __init__(self, slots: LayerSlots, mesh: Mesh, *, hashed: bool) -> None:
        self._slot_EX = slots.tensor("slot_EX", mesh.device)
        self._replicas_E = slots.tensor("replicas_E", mesh.device)
        self._first, self._step = (0, HASH_MULTIPLIER) if hashed else (mesh.rank, 1)
        self.choice = Choice(
            slot_EX=self._slot_EX, replicas_E=self._replicas_E, first=self._first, step=self._step
        )

    def __call__(self, expert_TK: torch.Tensor) -> torch.Tensor:
        """Return the slot of each pair."""
        place_T = torch.arange(expert_TK.shape[0], device=expert_TK.device)
        turn_T1 = ((place_T * self._step + self._first) % _WORD).unsqueeze(1)
        return self._slot_EX[expert_TK, turn_T1 % self._replicas_E[expert_TK]]


class _Shares:
    """Each pair takes a replica at random, by the shares."""

    def __init__(self, slots: LayerSlots, share_EX: FloatArray, device: torch.device) -> None:
        self._slot_EX = slots.tensor("slot_EX", device)
        cut_EX = np.cumsum(share_EX, axis=1) / share_EX.sum(axis=1, keepdims=True)
        # The last real replica takes all that is left, whatever rounding says.
        cut_EX[np.arange(cut_EX.shape[1]) >= slots.replicas_E[:, None] - 1] = np.inf
        self._cut_EX = upload(cut_EX, device)
        self.choice = Choice(slot_EX=self._slot_EX, cut_EX=self._cut_EX, step=HASH_MULTIPLIER)

    def __call__(self, expert_TK: torch.Tensor) -> torch.Tensor:
        """Return the slot of each pair."""
        place_T1 = torch.arange(expert_TK.shape[0], device=expert_TK.device).unsqueeze(1)
        word_TK = (place_T1 * HASH_MULTIPLIER + expert_TK * 0x85EBCA6B) % _WORD
        mixed_TK = ((word_TK ^ (word_TK >> 15)) * 0x2C1B3C6D) % _WORD
        drawn_TK1 = (mixed_TK.double() / _WORD).unsqueeze(2)
        replica_TK = (drawn_TK1 >= self._cut_EX[expert_TK]).sum(dim=2)
        return self._slot_EX[expert_TK, replica_TK]
