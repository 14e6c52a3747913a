# Triton compiles the kernels from their source; what they are written in has no types.
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
"""Triton kernels of `route`: a stable counting sort in two launches, slots and targets looked up on the way.

Each program has a block of entries. The first kernel counts its rows for each target, and adds them to the
whole's (integers, so in any order the same); the second knows by these counts where its rows begin.
Importing this file needs Triton, which comes with PyTorch for CUDA; `route` does it for the first GPU.

Sizes are not compiled in, so that other numbers of tokens, targets or replicas compile nothing anew.

Shape letters: T tokens, K entries of a token, P entries in all, D targets, B blocks of entries, S slots,
E experts, X most replicas of one expert, W width of a message.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import triton
from triton import language as tl

from placement.errors import BackendError
from placement.plan import EMPTY, Placement
from placement.problem import ReplicaSplit
from placement.runtime.parallel import route
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.route import Counted, Entries, Placed
from placement.runtime.parallel.slots import LayerSlots
from placement.runtime.parallel.split import Split, split_of

__all__ = ["FAILURES", "check_routing", "count_rows", "place_rows"]

_BLOCK = 256
_TILE = 16
_BLOCKS_AT_ONCE: tl.constexpr = tl.constexpr(64)

_errors: Any = getattr(triton, "errors", None)
FAILURES: tuple[type[Exception], ...] = (_errors.TritonError,) if hasattr(_errors, "TritonError") else ()
"""What Triton raises, beside RuntimeError and OSError, where a kernel cannot be built."""

_SIZES = ["stride", "P", "D", "X", "first", "step"]


@triton.jit
def _target(
    named_TK,
    target_S,
    slot_EX,
    replicas_E,
    cut_EX,
    token,
    k,
    inside,
    stride,
    D,
    X,
    first,
    step,
    RULE: tl.constexpr,
):
    """Slot and target of entries; the target of no slot is D. `split` says the same in torch."""
    name = tl.load(named_TK + token * stride + k, mask=inside, other=0).to(tl.int64)
    slot = name
    if RULE == 1:  # fixed
        slot = tl.load(slot_EX + name, mask=inside, other=0)
    if RULE == 2:  # turns
        turn = (token * step + first) % 0x100000000
        slot = tl.load(slot_EX + name * X + turn % tl.load(replicas_E + name, mask=inside, other=1))
    if RULE == 3:  # shares
        word = (token * step + name * 0x85EBCA6B) % 0x100000000
        mixed = ((word ^ (word >> 15)) * 0x2C1B3C6D) % 0x100000000
        drawn = mixed.to(tl.float64) * (1.0 / 0x100000000)
        replica = tl.zeros_like(name)
        for x in range(X):
            replica += (drawn >= tl.load(cut_EX + name * X + x, mask=inside, other=0.0)).to(tl.int64)
        slot = tl.load(slot_EX + name * X + replica, mask=inside, other=0)
    target = tl.load(target_S + slot, mask=inside & (slot >= 0), other=D).to(tl.int32)
    return slot, target


@triton.jit(do_not_specialize=[*_SIZES, "word"])
def _count_kernel(
    named_TK,
    target_S,
    slot_EX,
    replicas_E,
    cut_EX,
    count_D,
    scratch,
    stride,
    P,
    D,
    X,
    first,
    step,
    word,
    K: tl.constexpr,
    RULE: tl.constexpr,
    DEDUP: tl.constexpr,
    TOLD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    block = tl.program_id(0)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    inside = entry < P
    token = (entry // K).to(tl.int64)
    k = entry % K
    _slot, target = _target(
        named_TK, target_S, slot_EX, replicas_E, cut_EX, token, k, inside, stride, D, X, first, step, RULE
    )
    key = target
    if DEDUP:
        for j in tl.static_range(K - 1):
            before = inside & (j < k)
            _slot, other = _target(
                named_TK,
                target_S,
                slot_EX,
                replicas_E,
                cut_EX,
                token,
                j,
                before,
                stride,
                D,
                X,
                first,
                step,
                RULE,
            )
            key = tl.where(other == target, D, key)
    tl.store(scratch + tl.num_programs(0) * D + entry, key, mask=inside)
    for d0 in range(0, D, TILE):
        d = d0 + tl.arange(0, TILE)
        real = d < D
        rows = tl.sum((key[:, None] == d[None, :]).to(tl.int32), axis=0)
        tl.store(scratch + block * D + d, rows, mask=real)
        if TOLD:
            pairs = tl.sum((target[:, None] == d[None, :]).to(tl.int32), axis=0)
            tl.atomic_add(count_D + d * 3, rows.to(tl.int64), mask=real, sem="relaxed")
            tl.atomic_add(count_D + d * 3 + 1, pairs.to(tl.int64), mask=real, sem="relaxed")
            tl.store(count_D + d * 3 + 2, tl.zeros_like(d) + word, mask=real & (block == 0))
        else:
            tl.atomic_add(count_D + d, rows.to(tl.int64), mask=real, sem="relaxed")


@triton.jit(do_not_specialize=[*_SIZES, "weight_stride"])
def _place_kernel(
    named_TK,
    target_S,
    slot_EX,
    replicas_E,
    cut_EX,
    count_D,
    scratch,
    weight_TK,
    row_TK,
    token_P,
    entry_P,
    message_PW,
    stride,
    P,
    D,
    X,
    first,
    step,
    weight_stride,
    K: tl.constexpr,
    RULE: tl.constexpr,
    DEDUP: tl.constexpr,
    TOLD: tl.constexpr,
    MESSAGE: tl.constexpr,
    WEIGHED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    block = tl.program_id(0)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    inside = entry < P
    token = (entry // K).to(tl.int64)
    key = tl.load(scratch + tl.num_programs(0) * D + entry, mask=inside, other=D)
    row = tl.zeros([BLOCK], dtype=tl.int32)
    carried = tl.sum(tl.zeros([TILE], dtype=tl.int32), axis=0)
    for d0 in range(0, D, TILE):
        d = d0 + tl.arange(0, TILE)
        real = d < D
        total = tl.load(count_D + d * (3 if TOLD else 1), mask=real, other=0).to(tl.int32)
        start = carried + tl.cumsum(total, axis=0) - total
        carried += tl.sum(total, axis=0)
        for b0 in range(0, block, _BLOCKS_AT_ONCE):
            b = b0 + tl.arange(0, _BLOCKS_AT_ONCE)
            there = (b < block)[:, None] & real[None, :]
            start += tl.sum(tl.load(scratch + b[:, None] * D + d[None, :], mask=there, other=0), axis=0)
        hit = (key[None, :] == d[:, None]) & real[:, None]
        number = tl.cumsum(hit.to(tl.int32), axis=1)
        row += tl.sum(tl.where(hit, start[:, None] + number, 0), axis=0)
    placed = key < D
    row = (row - 1).to(tl.int64)  # -1 where nothing was hit
    tl.store(row_TK + entry, row, mask=inside)
    tl.store(token_P + row, token, mask=placed)
    tl.store(entry_P + row, entry.to(tl.int64), mask=placed)
    if MESSAGE:
        if DEDUP:
            width: tl.constexpr = 2 * K if WEIGHED else K
            for j in tl.static_range(K):
                slot, other = _target(
                    named_TK,
                    target_S,
                    slot_EX,
                    replicas_E,
                    cut_EX,
                    token,
                    j,
                    placed,
                    stride,
                    D,
                    X,
                    first,
                    step,
                    RULE,
                )
                here = placed & (other == key)
                tl.store(message_PW + row * width + j, tl.where(here, slot, -1).to(tl.int32), mask=placed)
                if WEIGHED:
                    at = weight_TK + token * weight_stride + j
                    bits = tl.load(at, mask=here, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
                    tl.store(message_PW + row * width + K + j, bits, mask=placed)
        else:
            slot, other = _target(
                named_TK,
                target_S,
                slot_EX,
                replicas_E,
                cut_EX,
                token,
                entry % K,
                placed,
                stride,
                D,
                X,
                first,
                step,
                RULE,
            )
            tl.store(message_PW + row, slot.to(tl.int32), mask=placed)


def count_rows(entries: Entries, *, told: torch.Tensor | None, word: int) -> Counted:
    """Do what `route.count_rows` says, in one kernel."""
    entries = _dense(entries)
    named_TK, count = entries.named_TK, entries.num_targets
    num_blocks = _num_blocks(entries)
    count_D = torch.zeros(count, dtype=torch.int64, device=named_TK.device) if told is None else told
    scratch = named_TK.new_empty(num_blocks * count + entries.num_entries, dtype=torch.int32)
    tables, sizes, rule = _looked_up(entries)
    with torch.cuda.device_of(named_TK):
        _count_kernel[(num_blocks,)](
            *(*tables, count_D, scratch, *sizes, word),
            *(named_TK.shape[1], rule, entries.dedup, told is not None, _BLOCK, _TILE),
        )
    return Counted(entries=entries, count=count_D, scratch=scratch)


def place_rows(counted: Counted, *, message: bool, weight_TK: torch.Tensor | None) -> Placed:
    """Do what `route.place_rows` says, in one kernel."""
    entries = counted.entries
    named_TK = entries.named_TK
    num_tokens, top_k = named_TK.shape
    row_TK, place_2P = (
        named_TK.new_empty(shape, dtype=torch.int64)
        for shape in ((num_tokens, top_k), (2, entries.num_entries))
    )
    token_P, entry_P = place_2P[0], place_2P[1]
    message_PW = None
    if message:
        most = num_tokens * (min(top_k, entries.num_targets) if entries.dedup else top_k)
        width = (top_k if weight_TK is None else 2 * top_k) if entries.dedup else 1
        message_PW = named_TK.new_empty((most, width), dtype=torch.int32)
    if weight_TK is not None and weight_TK.stride(1) != 1:
        weight_TK = weight_TK.contiguous()
    tables, sizes, rule = _looked_up(entries)
    with torch.cuda.device_of(named_TK):
        _place_kernel[(_num_blocks(entries),)](
            *(*tables, counted.count, counted.scratch, row_TK if weight_TK is None else weight_TK),
            *(row_TK, token_P, entry_P, row_TK if message_PW is None else message_PW),
            *(*sizes, top_k if weight_TK is None else weight_TK.stride(0)),
            *(top_k, rule, entries.dedup, counted.count.ndim == 2),
            *(message, weight_TK is not None, _BLOCK, _TILE),
        )
    return Placed(row_TK=row_TK, token_P=token_P, entry_P=entry_P, message_PW=message_PW)


def _dense(entries: Entries) -> Entries:
    """Have the entries of a token side by side; tokens may be apart."""
    if entries.named_TK.stride(1) == 1:
        return entries
    return replace(entries, named_TK=entries.named_TK.contiguous())


def _num_blocks(entries: Entries) -> int:
    return max(-(-entries.num_entries // _BLOCK), 1)


def _looked_up(entries: Entries) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...], int]:
    """Tables, sizes and rule as the kernels take them; tables that a rule does not use are another's."""
    named_TK, target_S = entries.named_TK, entries.target_S
    sizes = named_TK.stride(0), entries.num_entries, entries.num_targets
    if entries.split is None:
        return (named_TK, target_S, target_S, target_S, target_S), (*sizes, 1, 0, 0), 0
    choice = entries.split.choice
    slot_EX, replicas_E, cut_EX = choice.slot_EX, choice.replicas_E, choice.cut_EX
    rule = 3 if cut_EX is not None else 2 if replicas_E is not None else 1
    tables = (
        *(named_TK, target_S, slot_EX),
        *(slot_EX if replicas_E is None else replicas_E, slot_EX if cut_EX is None else cut_EX),
    )
    return tables, (*sizes, slot_EX.shape[1], choice.first, choice.step), rule


_TOKENS = (0, 1, 5, 300)
_SHAPES = ((1, 3), (2, 8), (33, 8))
"""Targets and entries of a token: less than a tile and more; few, because each number of entries compiles."""
_FORMS = ((False, False, False), (False, True, False), (True, True, False), (True, True, True))
"""Dedup, whether counts are told and messages written, whether weights go along: as a rank's own rows are
sorted, then as pairs and with dedup, with gradients and without."""


def check_routing(device: torch.device | str) -> int:
    """Compare the kernels with the torch code they stand for, bit by bit; return how many cases agreed.

    Parameters
    ----------
    device
        A CUDA device; with the environment's ``TRITON_INTERPRET=1``, the CPU.

    Raises
    ------
    BackendError
        If a kernel gives anything else than torch.
    """
    cases = list(_cases(torch.device(device)))
    for entries, told, weight_TK in cases:
        _check(entries, told, weight_TK)
    return len(cases)


def _cases(device: torch.device) -> Iterator[tuple[Entries, bool, torch.Tensor | None]]:
    for number, (num_tokens, (num_targets, top_k)) in enumerate(product(_TOKENS, _SHAPES)):
        generator = torch.Generator().manual_seed(number)
        target_S, splits = _splits(num_targets, device, generator)
        for split, (dedup, told, weighed) in product(splits, _FORMS):
            least, most = (-1, target_S.numel()) if split is None else (0, split.choice.slot_EX.shape[0])
            # As they arrive: slots beside the bits of weights.
            wide_T2K = torch.randint(least, most, (num_tokens, 2 * top_k), generator=generator).to(device)
            weight_TK = torch.rand(num_tokens, 2 * top_k, generator=generator).to(device)[:, top_k:]
            entries = Entries(
                named_TK=(wide_T2K.int() if split is None else wide_T2K)[:, :top_k],
                split=split,
                target_S=target_S,
                num_targets=num_targets,
                dedup=dedup,
            )
            yield entries, told, weight_TK if weighed else None


def _splits(
    num_targets: int, device: torch.device, generator: torch.Generator
) -> tuple[torch.Tensor, list[Split | None]]:
    """Target of each slot of a random layer, and every rule for it."""
    num_experts = 3 * num_targets
    # Three experts on each device; the first device's are on all others, too, one on each.
    more_D1 = torch.randint(0, 3, (num_targets, 1), generator=generator)
    more_D1[0] = EMPTY
    expert_D4 = torch.cat([torch.arange(num_experts).view(num_targets, 3), more_D1], dim=1)
    placement = Placement(
        physical_to_logical_map_LS=expert_D4.view(1, -1).numpy(),
        device_of_slot_S=torch.arange(num_targets).repeat_interleave(4).numpy(),
        num_experts=num_experts,
        num_devices=num_targets,
    )
    slots = LayerSlots.of_layer(placement, 0)
    mesh = replace(Mesh.single(device), world_size=num_targets, rank=num_targets - 1)
    share_EX = torch.rand(slots.slot_EX.shape, generator=generator).numpy() + 1e-3
    splits = [split_of(rule, slots, mesh, share_EX=share_EX) for rule in ReplicaSplit]
    return slots.tensor("rank_of_slot_S", device), [None, *splits]


def _check(entries: Entries, told: bool, weight_TK: torch.Tensor | None) -> None:
    told_2D3 = torch.zeros(2, entries.num_targets, 3, dtype=torch.int64, device=entries.named_TK.device)
    mine, other = told_2D3.unbind() if told else (None, None)
    actual = count_rows(entries, told=mine, word=7)
    expected = route._torch_count(entries, other, 7)
    placed = place_rows(actual, message=told, weight_TK=weight_TK)
    wanted = route._torch_place(expected, told, weight_TK)
    num_rows = int((wanted.row_TK >= 0).sum())
    _agree("counts", entries, actual.count, expected.count)
    _agree("rows", entries, placed.row_TK, wanted.row_TK)
    for name in ("token_P", "entry_P", "message_PW") if told else ("token_P", "entry_P"):
        _agree(name, entries, getattr(placed, name)[:num_rows], getattr(wanted, name)[:num_rows])


def _agree(what: str, entries: Entries, actual: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(actual, expected):
        raise BackendError(
            f"the Triton kernel gives other {what} than torch for {list(entries.named_TK.shape)} entries and "
            f"{entries.num_targets} targets; do not use it on this machine"
        )
