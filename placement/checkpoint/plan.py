"""What a permutation does to each tensor of a checkpoint; all that could go wrong is found out here.

Shape letters: L MoE layers, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from placement.checkpoint.config import ModelFacts
from placement.checkpoint.header import BITS_OF_DTYPE, TensorEntry, quoted
from placement.checkpoint.layouts import Kind, Match, match_tensor, sounds_like_experts
from placement.checkpoint.survey import LayerSurvey, Survey
from placement.errors import InputError
from placement.formats.permutation import Permutation

__all__ = ["Action", "Plan", "Reorder", "make_plan"]

IntArray = npt.NDArray[np.int64]

_INTEGERS = frozenset({"U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reorder:
    """How the bytes of a tensor change.

    Parameters
    ----------
    old_of_new_E
        Old place of what comes to each new place.
    outer, inner_bytes
        The bytes are ``[outer, places, inner_bytes]``; the middle axis is put in the new order.
    ids_dtype
        Where values are expert ids: their type; `old_of_new_E` then says which value becomes which.
    """

    old_of_new_E: IntArray
    outer: int
    inner_bytes: int
    ids_dtype: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Action:
    """What happens to one tensor: another name, another order of its bytes, or neither."""

    name: str
    reorder: Reorder | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A permutation for a checkpoint that was found to fit.

    Parameters
    ----------
    stem
        Stack of decoder layers that it is for.
    permutation
        Order of the experts.
    """

    stem: str
    permutation: Permutation

    @cached_property
    def _moved_rows(self) -> dict[int, tuple[IntArray, IntArray]]:
        """Old expert of each new place and the inverse, by decoder layer; layers that stay are left out."""
        given = self.permutation
        identity_E = np.arange(given.num_experts)
        return {
            layer: (old_E, new_E)
            for layer, old_E, new_E in zip(
                given.moe_layer_ids, given.old_expert_of_new_LE, given.new_position_of_old_LE, strict=True
            )
            if (old_E != identity_E).any()
        }

    def action(self, entry: TensorEntry) -> Action | None:
        """Return what happens to a tensor; None where nothing does."""
        match = match_tensor(entry.name)
        if match is None or match.rule is None or match.stem != self.stem:
            return None
        rows = self._moved_rows.get(match.layer)
        if rows is None or match.rule.kind is Kind.KEPT:
            return None
        old_E, new_E = rows
        if match.rule.kind is Kind.NUMBERED:
            # Experts beyond the placed ones (LongCat's without weights) keep their numbers.
            new = int(new_E[match.expert]) if match.expert < new_E.size else match.expert
            return None if new == match.expert else Action(name=match.renumbered(entry.name, new))
        reorder = _reorder(entry, match, old_E)
        return None if reorder is None else Action(name=entry.name, reorder=reorder)


def make_plan(survey: Survey, permutation: Permutation, facts: ModelFacts) -> Plan:
    """Check that a permutation fits a checkpoint, tensor by tensor.

    Raises
    ------
    InputError
        If layers or experts differ in number, a layer lacks experts or its router, or a tensor of a MoE block
        follows no rule.
    """
    if facts.num_experts not in (None, permutation.num_experts):
        raise InputError(
            f"the placement is for {permutation.num_experts} experts per layer, config.json says "
            f"{facts.num_experts}; use the placement of this model"
        )
    _check_layers(survey, permutation, facts)
    for layer in permutation.moe_layer_ids:
        _check_layer(f"{survey.stem}.{layer}", survey.layers[layer], permutation, facts)
    return Plan(stem=survey.stem, permutation=permutation)


def _check_layers(survey: Survey, permutation: Permutation, facts: ModelFacts) -> None:
    wanted, found = set(permutation.moe_layer_ids), set(survey.layers)
    missing = sorted(wanted - found)
    if missing:
        raise InputError(
            f"the placement is for decoder layer {missing[0]} and {len(wanted) - 1} others; the checkpoint "
            f"has no experts there, its {len(found)} MoE layers are {_ranges(found)}; use the placement "
            "of this model, with its own layer numbers"
        )
    # Layers for speculative decoding follow the decoder's; router and experts as they were stay right.
    last = math.inf if facts.num_decoder_layers is None else facts.num_decoder_layers
    extra = sorted(layer for layer in found - wanted if layer < last)
    if extra:
        raise InputError(
            f"the checkpoint has experts in decoder layer {extra[0]}, the placement is for layers "
            f"{_ranges(wanted)} only; use the placement of this model, with its own layer numbers"
        )


def _ranges(layers: set[int]) -> str:
    """Return layers as text: 3 to 60, or 1, 3, 5 and so on."""
    ordered = sorted(layers)
    if ordered == list(range(ordered[0], ordered[-1] + 1)):
        return str(ordered[0]) if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(str(layer) for layer in ordered[:8]) + (" ..." if len(ordered) > 8 else "")


def _check_layer(name: str, layer: LayerSurvey, permutation: Permutation, facts: ModelFacts) -> None:
    num_experts = permutation.num_experts
    for rest, held in layer.numbered.items():
        _check_numbers(f"{name}.{rest}", held, num_experts, facts.num_zero_experts)
    if not layer.has_router:
        raise InputError(
            f"{name} has experts and no router of a known layout; without it the order of the experts cannot "
            "change"
        )
    for entry, match in layer.stacked:
        _check_stacked(entry, match, num_experts, facts.num_zero_experts)
    blocks = layer.blocks
    for entry, rest in layer.unknown:
        inside = any(block and rest.startswith(f"{block}.") for block in blocks)
        if sounds_like_experts(rest, blocks=blocks) or (inside and num_experts in entry.shape):
            raise InputError(
                f"tensor {quoted(entry.name)} ({entry.dtype} {list(entry.shape)}) belongs to a MoE block and "
                "follows no known layout; nothing is written, as leaving it alone might break the model"
            )


def _check_numbers(name: str, held: int, num_experts: int, num_zero: int) -> None:
    complete = (1 << num_experts) - 1
    with_zero = (1 << num_experts + num_zero) - 1
    if held in (complete, with_zero):
        return
    if held & ~with_zero:
        raise InputError(
            f"{name}: the checkpoint has experts up to {held.bit_length() - 1}, the placement is for "
            f"{num_experts}; use the placement of this model"
        )
    missing = next(expert for expert in range(num_experts) if not held >> expert & 1)
    raise InputError(
        f"{name}: expert {missing} is missing, the placement is for {num_experts}; use the placement of this "
        "model and a checkpoint that is whole (not one rank's part)"
    )


def _check_stacked(entry: TensorEntry, match: Match, num_experts: int, num_zero: int) -> None:
    assert match.rule is not None  # what follows no rule is not stacked
    kind = match.rule.kind
    where = f"tensor {quoted(entry.name)} ({entry.dtype} {list(entry.shape)})"
    if kind is Kind.IDS:
        if entry.dtype not in _INTEGERS:
            raise InputError(f"{where} holds no expert ids: they would be integers")
        return
    if _is_scalar(entry):
        return
    if kind in (Kind.ROWS, Kind.LAST):
        found = entry.shape[0 if kind is Kind.ROWS else -1]
        if found not in (num_experts, num_experts + num_zero):
            raise InputError(
                f"{where} has {found} {'rows' if kind is Kind.ROWS else 'columns'}, the placement is "
                f"for {num_experts} experts; use the placement of this model, and a checkpoint whose "
                "quantisation keeps the experts apart"
            )
    elif kind is Kind.CHUNKS and entry.shape[0] % num_experts:
        raise InputError(
            f"{where} does not divide into {num_experts} experts; use the placement of this model"
        )
    places = _places(entry, kind, num_experts)
    if entry.num_bytes % places:
        raise InputError(f"{where} does not divide into {num_experts} experts at whole bytes")


def _is_scalar(entry: TensorEntry) -> bool:
    return math.prod(entry.shape) == 1


def _places(entry: TensorEntry, kind: Kind, num_experts: int) -> int:
    """Return into how many equal runs the bytes fall, counted over all outer axes."""
    if kind is Kind.ROWS:
        return entry.shape[0]
    return math.prod(entry.shape) if kind is Kind.LAST else num_experts


def _reorder(entry: TensorEntry, match: Match, old_E: IntArray) -> Reorder | None:
    assert match.rule is not None  # the caller has seen its kind
    kind = match.rule.kind
    if kind is Kind.IDS:
        itemsize = BITS_OF_DTYPE[entry.dtype] // 8
        return Reorder(
            old_of_new_E=old_E, outer=entry.num_bytes // itemsize, inner_bytes=itemsize, ids_dtype=entry.dtype
        )
    if _is_scalar(entry) or entry.num_bytes == 0:
        return None
    inner = entry.num_bytes // _places(entry, kind, old_E.size)
    outer = math.prod(entry.shape[:-1]) if kind is Kind.LAST else 1
    axis = {Kind.ROWS: 0, Kind.LAST: -1}.get(kind)
    places = old_E.size if axis is None else entry.shape[axis]
    # Rows beyond the placed experts (LongCat's experts without weights) stay at the end.
    old = np.concatenate([old_E, np.arange(old_E.size, places)])
    return Reorder(old_of_new_E=old, outer=outer, inner_bytes=inner)
