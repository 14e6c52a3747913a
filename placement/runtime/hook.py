"""Applies a placement to a loaded model in this process, without changing the model's function.

The router stays as it is. Each MoE layer's expert tensors are index-selected into slot order, the
experts module computes with as many "experts" as there are filled slots, and a forward hook on the
router turns its top-k expert ids into slots. That is exact for every family, grouped routing
included, and replicas and empty slots need nothing more.

Shape letters: E logical experts, S filled slots of one layer, R replicas, T tokens of one forward
pass, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from placement.errors import InputError
from placement.plan import EMPTY, Placement
from placement.runtime.families.protocol import ModelFamily, MoELayer
from placement.runtime.families.registry import family_of, moe_layers_of
from placement.runtime.fit import check_fit, check_tensors

__all__ = ["AppliedPlacement", "SlotMap", "SlotRemap", "apply_placement", "is_applied"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotMap:
    """Filled slots of one layer and the way from an expert to them.

    Parameters
    ----------
    expert_S
        Logical expert of each filled slot, in slot order.
    slot_ER
        Slots of each expert's replicas in slot order, ``[experts, most replicas]``, the unused rest 0.
    replicas_E
        Number of replicas of each expert, at least 1.
    """

    expert_S: IntArray
    slot_ER: IntArray
    replicas_E: IntArray

    @classmethod
    def of_layer(cls, placement: Placement, layer: int) -> SlotMap:
        """Map of one layer of a placement; empty slots are left out and the rest close ranks."""
        map_S = placement.physical_to_logical_map_LS[layer]
        expert_S = map_S[map_S != EMPTY]
        replicas_E = np.bincount(expert_S, minlength=placement.num_experts)
        slot_ER = np.zeros((placement.num_experts, int(replicas_E.max())), dtype=np.int64)
        by_expert_S = np.argsort(expert_S, kind="stable")
        first_E = np.cumsum(replicas_E) - replicas_E
        replica_S = np.arange(expert_S.size) - np.repeat(first_E, replicas_E)
        slot_ER[expert_S[by_expert_S], replica_S] = by_expert_S
        return cls(expert_S=expert_S, slot_ER=slot_ER, replicas_E=replicas_E)

    @property
    def num_slots(self) -> int:
        """Filled slots."""
        return int(self.expert_S.size)


class SlotRemap:
    """Forward hook of a router that turns its top-k expert ids into slots.

    Token `t` of a forward pass goes to replica ``t mod replicas`` of each of its experts: an even
    split that depends on nothing but the token's place in the pass.
    """

    def __init__(self, family: ModelFamily, layer: MoELayer, slots: SlotMap) -> None:
        self._family = family
        self._layer = layer
        self._num_slots = slots.num_slots
        self._slot_ER = torch.from_numpy(slots.slot_ER)
        self._replicas_E = torch.from_numpy(slots.replicas_E)
        self._one_each = slots.slot_ER.shape[1] == 1

    def __call__(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the router's output with slots in place of expert ids."""
        slot_TK = self.slots(self._family.read_top_k(output, self._layer))
        return self._family.replace_top_k(output, slot_TK, self._layer, self._num_slots)

    def slots(self, expert_TK: torch.Tensor) -> torch.Tensor:
        """Slot that serves each token-expert pair, ``[tokens, top-k]``."""
        self._follow(expert_TK.device)
        if self._one_each:
            return self._slot_ER[:, 0][expert_TK]
        token_T1 = torch.arange(expert_TK.shape[0], device=expert_TK.device).unsqueeze(1)
        return self._slot_ER[expert_TK, token_T1 % self._replicas_E[expert_TK]]

    def _follow(self, device: torch.device) -> None:
        if self._slot_ER.device != device:
            self._slot_ER = self._slot_ER.to(device)
            self._replicas_E = self._replicas_E.to(device)


@dataclass(frozen=True, kw_only=True, eq=False)
class AppliedPlacement:
    """A placement at work in a model; `detach` (or leaving the ``with`` block) takes it out again.

    Parameters
    ----------
    model
        The model, changed in place.
    placement
        What was applied.
    """

    model: nn.Module
    placement: Placement
    _undo: ExitStack = field(repr=False)

    @property
    def attached(self) -> bool:
        """Whether the model still runs with the placement."""
        return is_applied(moe_layers_of(self.model))

    def detach(self) -> None:
        """Restore the model bit for bit; does nothing the second time.

        Each expert is taken back from its first replica, so changes made to the slots' weights
        meanwhile survive there and only there.
        """
        self._undo.close()

    def __enter__(self) -> AppliedPlacement:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()


def apply_placement(model: nn.Module, placement: Placement) -> AppliedPlacement:
    """Make a model run with its experts in the slots of a placement; its outputs stay the same.

    Outputs equal the original ones up to the order of floating point sums. The model is changed in
    place, one tensor after the other, so that no second copy of all expert weights ever exists; extra
    memory is that of the replicas. If anything fails, the model is left as it was.

    Parameters
    ----------
    model
        A transformers model of a supported family, on any device, in any floating point type.
    placement
        Any placement of its MoE layers: with replicas, empty slots, uneven devices.

    Raises
    ------
    InputError
        If placement and model do not fit together, the family can only be recorded, a placement is applied
        already, or the experts' tensors are sharded, shared, offloaded or more than the family knows.
    """
    placement.check()
    family, layers = family_of(model), moe_layers_of(model)
    check_fit(family, layers, placement)
    if is_applied(layers):
        raise InputError("the model already runs with a placement; detach it before applying another")
    check_tensors(model, layers, num_rows=placement.num_experts)
    with ExitStack() as undo:
        for index, layer in enumerate(layers):
            _apply_layer(family, layer, SlotMap.of_layer(placement, index), undo)
        return AppliedPlacement(model=model, placement=placement, _undo=undo.pop_all())


def is_applied(layers: Sequence[MoELayer]) -> bool:
    """Whether any of these layers runs with a placement."""
    hooks = (hook for layer in layers for hook in layer.router._forward_hooks.values())
    return any(isinstance(hook, SlotRemap) for hook in hooks)


def _apply_layer(family: ModelFamily, layer: MoELayer, slots: SlotMap, undo: ExitStack) -> None:
    for name in layer.expert_tensors:
        _select_slots(layer.experts, name, slots, undo)
    for module, name in layer.expert_counters:
        undo.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, slots.num_slots)
    undo.callback(layer.router.register_forward_hook(SlotRemap(family, layer, slots)).remove)


def _select_slots(experts: nn.Module, name: str, slots: SlotMap, undo: ExitStack) -> None:
    """Put a parameter in slot order into the place of the original one, which keeps no storage."""
    original: nn.Parameter = getattr(experts, name)
    # Inference tensors could not be saved for a later backward pass, so none is made here.
    with torch.inference_mode(False), torch.no_grad():
        selected = nn.Parameter(_rows(original, slots.expert_S), requires_grad=original.requires_grad)
    undo.callback(_restore, experts, name, original, slots.slot_ER[:, 0])
    setattr(experts, name, selected)
    original.data = original.data.new_empty(0)


def _restore(experts: nn.Module, name: str, original: nn.Parameter, first_slot_E: IntArray) -> None:
    """Give the original parameter its values again and put it back into the module."""
    selected = getattr(experts, name)
    if selected is original:  # the module was never switched over: nothing was taken from it
        return
    with torch.inference_mode(False), torch.no_grad():
        original.data = _rows(selected, first_slot_E)
    setattr(experts, name, original)


def _rows(tensor: torch.Tensor, index: IntArray) -> torch.Tensor:
    return tensor.detach().index_select(0, torch.from_numpy(index).to(tensor.device))
