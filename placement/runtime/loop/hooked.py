"""The model that every rank holds whole: its placement changes between two steps, optimizer state included.

Shape letters: S filled slots of one layer, E logical experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from placement.errors import InputError
from placement.plan import EMPTY, Placement
from placement.runtime.families.registry import family_of, moe_layers_of
from placement.runtime.fit import check_fit
from placement.runtime.hook import AppliedPlacement, SlotMap, apply_placement

__all__ = ["Applied", "HookedModel"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """A change of placement that took no more than one step."""

    done: bool = True
    failed: bool = False
    failure: str = ""

    def advance(self) -> None:
        """Do nothing: it has ended."""


class HookedModel:
    """A model with an applied placement that can be exchanged for another.

    The experts' parameters are other objects afterwards. Their optimizer is given the new ones with the rows
    of its state in the new order; whatever else refers to them (DistributedDataParallel, averages of
    weights) is not. For a moment the experts are in memory twice.

    Parameters
    ----------
    applied
        What runs.
    optimizer
        What trains the model, if anything does. Replicas would be trained apart: no placement has any then.

    Raises
    ------
    InputError
        If the running placement has replicas though there is an optimizer.
    """

    def __init__(self, applied: AppliedPlacement, *, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.applied = applied
        self._optimizer = optimizer
        self.check(applied.placement)

    @property
    def placement(self) -> Placement:
        """What runs."""
        return self.applied.placement

    def check(self, placement: Placement) -> None:
        """Check that a placement can take the place of the one that runs.

        Raises
        ------
        InputError
            If it is for another model, or has replicas that would have to be trained.
        """
        model = self.applied.model
        check_fit(family_of(model), moe_layers_of(model), placement)
        filled = int(np.count_nonzero(placement.physical_to_logical_map_LS != EMPTY))
        experts = placement.num_layers * placement.num_experts
        if self._optimizer is not None and filled > experts:
            raise InputError(
                f"the placement has {filled - experts} replicas, which an optimizer would train apart; "
                "solve without spare slots, or run the model expert-parallel"
            )

    def start(self, placement: Placement, *, version: int | None) -> Applied:
        """Change over, at once.

        Raises
        ------
        InputError
            If the optimizer keeps what cannot be put in order; the old placement runs on.
        """
        before = dict(self._parameters())
        index_of = self._order(placement)
        if self._optimizer is not None:
            _check_state(self._optimizer, before)
        self.applied.detach()
        self.applied = apply_placement(self.applied.model, placement)
        after = dict(self._parameters())
        if self._optimizer is not None:
            replaced = {before[key]: (after[key], index_of[key[0]]) for key in before}
            _replace(self._optimizer, replaced)
        return Applied()

    def close(self) -> None:
        """Leave the placement applied."""

    def _parameters(self) -> Iterator[tuple[tuple[int, str], nn.Parameter]]:
        for index, layer in enumerate(moe_layers_of(self.applied.model)):
            for name in layer.expert_tensors:
                yield (index, name), getattr(layer.experts, name)

    def _order(self, placement: Placement) -> list[torch.Tensor]:
        """Return, layer by layer, the old row of each new one, ``[S]``."""
        found = []
        for layer in range(placement.num_layers):
            old, new = SlotMap.of_layer(self.placement, layer), SlotMap.of_layer(placement, layer)
            found.append(torch.from_numpy(old.slot_ER[new.expert_S, 0]))
        return found


Replaced = dict[nn.Parameter, tuple[nn.Parameter, torch.Tensor]]
"""What takes the place of a parameter, and which old row each of its rows was."""


def _check_state(optimizer: torch.optim.Optimizer, parameters: dict[Any, nn.Parameter]) -> None:
    """Refuse state that has not one row for each row of its parameter.

    Raises
    ------
    InputError
        If there is any.
    """
    for (layer, name), parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] != parameter.shape[0]:
                raise InputError(
                    f"the optimizer keeps {key} of shape {list(value.shape)} for {name} of MoE layer "
                    f"{layer}, not a row for each of {parameter.shape[0]} experts: it cannot be reordered"
                )


def _replace(optimizer: torch.optim.Optimizer, replaced: Replaced) -> None:
    """Give an optimizer other parameters for its own, with rows of gradients and state in their order."""
    for group in optimizer.param_groups:
        group["params"] = [replaced[one][0] if one in replaced else one for one in group["params"]]
    for old, (new, row_S) in replaced.items():
        if old.grad is not None:
            new.grad = _rows(old.grad, row_S)
        state = optimizer.state.pop(old, None)
        if state is not None:
            optimizer.state[new] = {key: _rows(value, row_S) for key, value in state.items()}


def _rows(value: Any, row_S: torch.Tensor) -> Any:
    """Return the rows of a tensor in another order; what is none stays as it is."""
    if not isinstance(value, torch.Tensor) or not value.ndim:
        return value
    return value.detach().index_select(0, row_S.to(value.device))
