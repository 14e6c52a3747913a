"""Tables of an exchange: which entry of a table of slots becomes which row of which target.

A target is a rank that rows are sent to, or a row of this rank's tensors. `count_rows` is all that has to
happen before the ranks tell each other how much they send; `place_rows`, which knows no sizes either, can run
meanwhile. Both are integer work in a fixed order: rows of a target are in order of tokens, then of k.

On CUDA each is one Triton kernel (`route_triton`). All else, and all where Triton is missing or fails, goes
through torch with the same results; the first failure is told in a warning and ends the use of the kernels.

Shape letters: T tokens, K entries of a token, P entries in all (T * K), D targets, S slots, E experts,
X most replicas of one expert, W width of a message.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from placement.runtime.parallel.optional import OptionalKernels
from placement.runtime.parallel.split import Split

__all__ = ["Counted", "Entries", "Placed", "count_rows", "place_rows"]

_LookedUp = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_MOST_ENTRIES = 16
_MOST_TARGETS = 1024
"""What the kernels, which go through them one by one, are made for."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entries:
    """Entries to place, and by what.

    Parameters
    ----------
    named_TK
        Slots, -1 where there is none; experts where there is a `split`. Integers.
    split
        Rule by which tokens choose slots of experts.
    target_S
        Target of each slot, int64.
    num_targets
        Targets.
    dedup
        Whether a token has one row for each target, not one for each entry.
    """

    named_TK: torch.Tensor
    split: Split | None
    target_S: torch.Tensor
    num_targets: int
    dedup: bool = False

    @property
    def num_entries(self) -> int:
        """Entries in all."""
        return self.named_TK.numel()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Counted:
    """Entries whose rows have been counted.

    Parameters
    ----------
    entries
        The entries.
    count
        Rows of each target, int64 ``[D]``; or ``[D, 3]`` with rows, entries and a word.
    scratch
        What the kernels left for the next one; None after torch.
    looked_up
        What torch left: slots, their targets and keys.
    """

    entries: Entries
    count: torch.Tensor
    scratch: torch.Tensor | None = None
    looked_up: _LookedUp | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placed:
    """Rows in order of their targets; what lies behind the last row may be anything.

    Parameters
    ----------
    row_TK
        Row of each entry, -1 where it has none: no slot, or a row that an earlier entry has named.
    token_P, entry_P
        Token and entry of each row.
    message_PW
        What a row tells its target, int32: the slot of its entry ``[P, 1]``; with dedup all slots of its
        token, -1 where they are elsewhere, then their weights, if any, as bits of float32.
    """

    row_TK: torch.Tensor
    token_P: torch.Tensor
    entry_P: torch.Tensor
    message_PW: torch.Tensor | None


def count_rows(entries: Entries, *, told: torch.Tensor | None = None, word: int = 0) -> Counted:
    """Count the rows of each target.

    Parameters
    ----------
    entries
        What is to be placed.
    told
        Zeros, int64 ``[D, 3]``, to be filled with rows, entries and the word of each target. Without, rows
        alone are counted.
    word
        The word.
    """
    if _uses_kernels(entries):
        try:
            counted: Counted = _KERNELS.module.count_rows(entries, told=told, word=word)
            return counted
        except _KERNELS.failures as failure:
            _KERNELS.give_up(failure)
            if told is not None:
                told.zero_()
    return _torch_count(entries, told, word)


def place_rows(counted: Counted, *, message: bool = False, weight_TK: torch.Tensor | None = None) -> Placed:
    """Give each entry its row.

    Parameters
    ----------
    counted
        What `count_rows` returned.
    message
        Whether to write messages.
    weight_TK
        Weights to go along with the slots, with dedup only.
    """
    if counted.scratch is not None:
        try:
            placed: Placed = _KERNELS.module.place_rows(counted, message=message, weight_TK=weight_TK)
            return placed
        except _KERNELS.failures as failure:
            _KERNELS.give_up(failure)
    return _torch_place(counted, message, weight_TK)


def _uses_kernels(entries: Entries) -> bool:
    return (
        entries.named_TK.device.type == "cuda"
        and 0 < entries.named_TK.shape[1] <= _MOST_ENTRIES
        and entries.num_targets <= _MOST_TARGETS
        and _KERNELS.load()
    )


@torch.no_grad()
def _torch_count(entries: Entries, told: torch.Tensor | None, word: int) -> Counted:
    looked_up = _look_up(entries)
    _slot_TK, target_TK, key_P = looked_up
    rows_D = _occurrences(key_P, entries.num_targets)
    if told is None:
        return Counted(entries=entries, count=rows_D, looked_up=looked_up)
    told[:, 0], told[:, 1], told[:, 2] = rows_D, _occurrences(target_TK.flatten(), len(rows_D)), word
    return Counted(entries=entries, count=told, looked_up=looked_up)


@torch.no_grad()
def _torch_place(counted: Counted, message: bool, weight_TK: torch.Tensor | None) -> Placed:
    entries = counted.entries
    slot_TK, target_TK, key_P = counted.looked_up or _look_up(entries)
    entry_P = _stable_order(key_P, entries.num_targets)
    place_P = torch.arange(key_P.numel(), device=key_P.device)
    row_P = torch.empty_like(entry_P).scatter_(0, entry_P, place_P)
    token_P = entry_P // max(slot_TK.shape[1], 1)
    message_PW = None
    if message and not entries.dedup:
        message_PW = slot_TK.flatten()[entry_P].unsqueeze(1).to(torch.int32)
    elif message:
        elsewhere_PK = target_TK[token_P] != key_P[entry_P].unsqueeze(1)
        message_PW = slot_TK[token_P].masked_fill(elsewhere_PK, -1).to(torch.int32)
        if weight_TK is not None:
            weight_PK = weight_TK.float()[token_P].masked_fill(elsewhere_PK, 0.0)
            message_PW = torch.cat([message_PW, weight_PK.view(torch.int32)], dim=1)
    return Placed(
        row_TK=row_P.masked_fill(key_P == entries.num_targets, -1).view(slot_TK.shape),
        token_P=token_P,
        entry_P=entry_P,
        message_PW=message_PW,
    )


def _look_up(entries: Entries) -> _LookedUp:
    """Slots; their targets; the target that each entry has a row for. The number of targets means none."""
    named_TK, count = entries.named_TK.long(), entries.num_targets
    slot_TK = named_TK if entries.split is None else entries.split(named_TK)
    target_TK = entries.target_S[slot_TK.clamp(min=0)].masked_fill(slot_TK < 0, count)
    key_TK = target_TK.masked_fill(_named_before(target_TK), count) if entries.dedup else target_TK
    return slot_TK, target_TK, key_TK.flatten()


def _named_before(target_TK: torch.Tensor) -> torch.Tensor:
    """Whether an earlier entry of the same token has the same target."""
    top_k = target_TK.shape[1]
    same_TKK = target_TK.unsqueeze(2) == target_TK.unsqueeze(1)
    earlier_KK = torch.ones(top_k, top_k, dtype=torch.bool, device=target_TK.device).tril(-1)
    return (same_TKK & earlier_KK).any(dim=2)


def _stable_order(key_P: torch.Tensor, largest: int) -> torch.Tensor:
    """The order that sorts keys of 0 to `largest`, equal ones as they come; narrow keys sort faster."""
    return torch.argsort(key_P.to(torch.int16 if largest < 2**15 else torch.int32), stable=True)


def _occurrences(key_P: torch.Tensor, num_keys: int) -> torch.Tensor:
    """How often each key occurs, the last one's occurrences left out; bincount would make the host wait."""
    counts = torch.zeros(num_keys + 1, dtype=torch.int64, device=key_P.device)
    return counts.scatter_add_(0, key_P, torch.ones_like(key_P))[:num_keys]


_KERNELS = OptionalKernels("placement.runtime.parallel.route_triton", "the routing of tokens")
