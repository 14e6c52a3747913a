"""Puts a model's experts on the ranks that a placement names, and runs it there.

Shape letters: C rows of this rank's tensors, S slots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from placement.cost.split import least_fullest_shares, number_replicas
from placement.errors import InputError
from placement.plan import EMPTY, Placement
from placement.problem import ReplicaSplit
from placement.runtime.families.protocol import ModelFamily, MoELayer
from placement.runtime.families.registry import family_of, moe_layers_of
from placement.runtime.fit import check_fit, check_tensors
from placement.runtime.hook import is_applied
from placement.runtime.parallel.compute import expert_math
from placement.runtime.parallel.control import Control
from placement.runtime.parallel.experts import EXCHANGES, Experts
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.phases import PhaseClock
from placement.runtime.parallel.scores import take_over_scores
from placement.runtime.parallel.slots import LayerSlots, rows_of_rank

__all__ = ["Execution", "ParallelLayer", "ParallelModel", "attach_local", "expert_parallel"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a model runs over ranks.

    Parameters
    ----------
    exchange
        ``pairs``, ``dedup``, ``hierarchical``, or ``auto``: hierarchical over several nodes, else dedup.
    split
        Which replica a token uses: ``even``, ``hash``, ``nearest``, ``lp``.
    gradients
        ``mean``: of the mean of all ranks' losses, as DistributedDataParallel has it; ``sum``: of their sum.

    Raises
    ------
    InputError
        If one of them is not among these.
    """

    exchange: str = "auto"
    split: ReplicaSplit | str = ReplicaSplit.EVEN
    gradients: str = "mean"

    def __post_init__(self) -> None:
        if self.exchange not in (*EXCHANGES, "auto"):
            raise InputError(f"exchange {self.exchange!r} is none of {', '.join(EXCHANGES)} or auto")
        if self.split not in list(ReplicaSplit):
            raise InputError(f"replica split {self.split!r} is none of {', '.join(ReplicaSplit)}")
        if self.gradients not in ("mean", "sum"):
            raise InputError(f"gradients {self.gradients!r} is neither 'mean' nor 'sum'")
        object.__setattr__(self, "split", ReplicaSplit(self.split))

    def exchange_on(self, mesh: Mesh) -> str:
        """Return the exchange to use on a mesh."""
        if self.exchange != "auto":
            return self.exchange
        return "hierarchical" if mesh.num_nodes > 1 and mesh.devices_per_node > 1 else "dedup"


@dataclass(slots=True, kw_only=True, eq=False)
class ParallelLayer:
    """One MoE layer on this rank.

    Parameters
    ----------
    layer
        Where router and experts are; the experts' tensors hold this rank's rows, ``[C, ...]``.
    forward
        What runs in the place of the experts' own forward pass.
    """

    layer: MoELayer
    forward: Experts

    @property
    def slots(self) -> LayerSlots:
        """Where every replica is."""
        return self.forward.slots

    def parameters(self) -> dict[str, nn.Parameter]:
        """Tensors with one row for each slot of this rank, by name within the experts module."""
        return {name: getattr(self.layer.experts, name) for name in self.layer.expert_tensors}

    def use(self, slots: LayerSlots, *, share_EX: FloatArray | None = None) -> None:
        """Go by other tables from now on; no weights are touched."""
        self.forward.use(slots, share_EX=share_EX)


class ParallelModel:
    """A model whose experts are spread over ranks; every rank runs its own tokens through it.

    All ranks have to run the same passes: each MoE layer exchanges tokens with every rank. A model that is to
    be compiled runs its experts uncompiled.

    Parameters
    ----------
    model
        The model, changed in place; its other parameters are whole on every rank.
    placement
        What runs.
    mesh
        The ranks.
    layers
        Its MoE layers.
    version
        Number of the placement; whoever changes it says which.
    """

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        mesh: Mesh,
        layers: tuple[ParallelLayer, ...],
        control: Control,
        *,
        version: int = 0,
    ) -> None:
        self.model, self.mesh, self.layers, self.control = model, mesh, layers, control
        self.version = version
        self._placement = placement
        # What runs where single layers have changed; the placement is made of it when somebody asks.
        self._expert_LS = placement.physical_to_logical_map_LS
        self._load_LE: FloatArray | None = None

    @property
    def placement(self) -> Placement:
        """What runs now."""
        if self._expert_LS is not self._placement.physical_to_logical_map_LS:
            self._placement = self._placement.with_layers(self._expert_LS)
            self._expert_LS = self._placement.physical_to_logical_map_LS
        return self._placement

    @property
    def expert_LS(self) -> IntArray:
        """Expert of each slot now, ``[layers, slots]``."""
        return self._expert_LS

    def use(self, placement: Placement, *, version: int | None = None) -> None:
        """Go by another placement from the next pass on, after the weights have been moved.

        Raises
        ------
        InputError
            If its slots lie on other devices.
        """
        self.check_slots(placement)
        for index, row_S in enumerate(placement.physical_to_logical_map_LS):
            if not np.array_equal(row_S, self._expert_LS[index]):
                self._use_row(index, row_S)
        self._placement, self._expert_LS = placement, placement.physical_to_logical_map_LS
        self.version = self.version + 1 if version is None else version

    def set_layer(self, index: int, row_S: IntArray) -> None:
        """Go by other experts in the slots of one layer from the next pass on; no weights are touched.

        Raises
        ------
        InputError
            If they are not an expert or none for each slot, an expert has no slot, or a rank has one twice.
        """
        slots = self.layers[index].slots.with_experts(row_S)
        if self._expert_LS is self._placement.physical_to_logical_map_LS:
            self._expert_LS = self._expert_LS.copy()
        self._expert_LS[index] = slots.expert_S
        self._use_slots(index, slots)

    def _use_row(self, index: int, row_S: IntArray) -> None:
        """Swap the tables of a layer; the last loads, if any were given, share its replicas out anew."""
        self._use_slots(index, self.layers[index].slots.with_experts(row_S))

    def _use_slots(self, index: int, slots: LayerSlots) -> None:
        layer = self.layers[index]
        load_E = None if self._load_LE is None else self._load_LE[index]
        layer.use(slots, share_EX=None if load_E is None else _shares(slots, load_E, self.mesh.world_size))

    def use_loads(self, load_LE: npt.ArrayLike) -> None:
        """Share tokens out over replicas so that the fullest rank is as light as can be under these loads.

        Parameters
        ----------
        load_LE
            Token-expert pairs of a recent window, ``[layers, experts]``, the same on every rank.

        Raises
        ------
        InputError
            If the replica split is not ``lp`` or the shape is another.
        """
        loads = np.asarray(load_LE, dtype=np.float64)
        shape = (len(self.layers), self._placement.num_experts)
        if loads.shape != shape:
            raise InputError(
                f"loads are {loads.shape}; the model has {shape[0]} layers of {shape[1]} experts"
            )
        if any(layer.forward.rule is not ReplicaSplit.LP for layer in self.layers):
            raise InputError("loads decide the split of replicas only with split='lp'")
        self._load_LE = loads
        for load_E, layer in zip(loads, self.layers, strict=True):
            layer.use(layer.slots, share_EX=_shares(layer.slots, load_E, self.mesh.world_size))

    def check_slots(self, placement: Placement) -> None:
        """Check that a placement can take the place of the running one.

        Raises
        ------
        InputError
            If layers, experts or the slots of any device differ.
        """
        old = self._placement
        for what in ("num_layers", "num_experts", "num_devices"):
            if getattr(placement, what) != getattr(old, what):
                raise InputError(
                    f"the placement's {what} is {getattr(placement, what)}, the running one's "
                    f"{getattr(old, what)}; solve for the model and cluster that run"
                )
        if not np.array_equal(placement.device_of_slot_S, old.device_of_slot_S):
            slots = [np.bincount(one.device_of_slot_S, minlength=old.num_devices) for one in (placement, old)]
            raise InputError(
                f"the placement has {slots[0].tolist()} slots on the devices, in an order of its own; the "
                f"running one has {slots[1].tolist()}: solve it with --start, which keeps the slots"
            )

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that hold this rank's slots, by their names in the model."""
        local = {id(one) for layer in self.layers for one in layer.parameters().values()}
        return {name: one for name, one in self.model.named_parameters() if id(one) in local}

    def time_with(self, clock: PhaseClock) -> None:
        """Tell a clock of the phases of every layer."""
        for layer in self.layers:
            layer.forward.time_with(clock)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients down to a norm over all ranks, each expert counted once; return the norm.

        The other parameters' gradients have to be the same on all ranks, or DTensors: as
        DistributedDataParallel and FSDP leave them.
        """
        experts = self._owned_gradients()
        local = {id(one) for layer in self.layers for one in layer.parameters().values()}
        others = [
            one.grad for one in self.model.parameters() if one.grad is not None and id(one) not in local
        ]
        square = _square_sum(experts, self.mesh.device)
        if self.mesh.group is not None:
            dist.all_reduce(square, group=self.mesh.group)
        norm = (square + _square_sum(others, self.mesh.device)).sqrt().float()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale.to(parameter.grad.device))
        return norm

    def _owned_gradients(self) -> list[torch.Tensor]:
        """Gradients of the rows of which this rank has the first replica."""
        gradients: list[torch.Tensor] = []
        for layer in self.layers:
            owned = _first_rows(layer.slots, self.mesh.rank)
            index = torch.from_numpy(owned).to(self.mesh.device)
            found = (parameter.grad for parameter in layer.parameters().values())
            gradients += [gradient[index] for gradient in found if gradient is not None]
        return gradients


def expert_parallel(
    model: nn.Module, placement: Placement, mesh: Mesh, *, execution: Execution | None = None
) -> ParallelModel:
    """Keep this rank's slots of a whole model, drop all other experts, and run it over the ranks.

    `placement.runtime.parallel.loading` does the same from a checkpoint without ever holding all experts.

    Parameters
    ----------
    model
        A transformers model of a supported family, the same on every rank; changed in place and moved to the
        mesh's device.
    placement
        One device for each rank; replicas, empty slots and uneven devices are welcome.
    execution
        How it runs; by default the exchange that suits the mesh, even splits and mean gradients.

    Raises
    ------
    InputError
        On every rank, if placement, model and mesh do not fit together, ranks were given different ones, or
        the experts' tensors are sharded, shared, offloaded or more than the family knows.
    """
    rows_C = rows_of_rank(placement, mesh.rank)
    layers = _checked(model, placement, mesh, execution or Execution(), num_rows=placement.num_experts)
    for index, layer in enumerate(layers):
        _keep_rows(layer, placement.physical_to_logical_map_LS[index][rows_C])
    return _attached(model, layers, placement, mesh, execution or Execution())


def attach_local(
    model: nn.Module, placement: Placement, mesh: Mesh, *, execution: Execution | None = None
) -> ParallelModel:
    """Run a model over the ranks whose experts' tensors hold this rank's slots already.

    Parameters
    ----------
    model
        As for `expert_parallel`, but with tensors of ``[C, ...]``: one row for each slot of this rank's
        device, in slot order, empty slots included.

    Raises
    ------
    InputError
        As for `expert_parallel`.
    """
    num_rows = rows_of_rank(placement, mesh.rank).size
    layers = _checked(model, placement, mesh, execution or Execution(), num_rows=num_rows)
    return _attached(model, layers, placement, mesh, execution or Execution())


def _checked(
    model: nn.Module, placement: Placement, mesh: Mesh, execution: Execution, *, num_rows: int
) -> tuple[MoELayer, ...]:
    """Return the MoE layers, once everything fits on every rank."""
    placement.check()
    mesh.check_devices(placement.num_devices)
    mesh.agree("the placement", _digest(placement))
    mesh.agree("how to run it", execution)
    layers = moe_layers_of(model)
    check_fit(family_of(model), layers, placement)
    if is_applied(layers) or any("forward" in vars(layer.experts) for layer in layers):
        raise InputError("the model already runs with a placement; load it anew to spread its experts")
    check_tensors(model, layers, num_rows=num_rows)
    return layers


def _attached(
    model: nn.Module, layers: tuple[MoELayer, ...], placement: Placement, mesh: Mesh, execution: Execution
) -> ParallelModel:
    model.to(mesh.device)
    family, control = family_of(model), Control()
    attached = tuple(
        _layer(family, layer, LayerSlots.of_layer(placement, index), mesh, control, execution)
        for index, layer in enumerate(layers)
    )
    return ParallelModel(model, placement, mesh, attached, control)


def _layer(
    family: ModelFamily,
    layer: MoELayer,
    slots: LayerSlots,
    mesh: Mesh,
    control: Control,
    execution: Execution,
) -> ParallelLayer:
    forward = Experts(
        experts=layer.experts,
        math=expert_math(family, layer),
        slots=slots,
        mesh=mesh,
        control=control,
        exchange=execution.exchange_on(mesh),
        rule=ReplicaSplit(execution.split),
        tensors=layer.expert_tensors,
        scale=1 / mesh.world_size if execution.gradients == "mean" else 1.0,
    )
    disable: Any = torch.compiler.disable
    run = disable(forward)
    # On the instance: the module stays what it is to everybody who looks for its class or its names.
    layer.experts.forward = take_over_scores(family, layer, run) if forward.math.weights_first else run
    return ParallelLayer(layer=layer, forward=forward)


def _keep_rows(layer: MoELayer, expert_C: IntArray) -> None:
    """Keep the rows of these experts, zeros for empty slots, and let the others go."""
    kept = torch.from_numpy(np.maximum(expert_C, 0))
    empty = torch.from_numpy(np.flatnonzero(expert_C == EMPTY))
    for name in layer.expert_tensors:
        whole: nn.Parameter = getattr(layer.experts, name)
        with torch.inference_mode(False), torch.no_grad():
            local = whole.detach().index_select(0, kept.to(whole.device))
            local[empty.to(whole.device)] = 0
            setattr(layer.experts, name, nn.Parameter(local, requires_grad=whole.requires_grad))


def _shares(slots: LayerSlots, load_E: FloatArray, num_ranks: int) -> FloatArray:
    """Shares of each expert's replicas that make the fullest rank lightest, ``[experts, most replicas]``."""
    replicas = number_replicas(slots.expert_S, slots.rank_of_slot_S, slots.num_experts)
    share_WEX = least_fullest_shares(load_E[None], replicas, num_devices=num_ranks)
    share_EX: FloatArray = share_WEX[0]
    return share_EX


def _first_rows(slots: LayerSlots, rank: int) -> IntArray:
    """Rows of a rank that hold the first replica of their expert."""
    first_E = slots.slot_EX[np.arange(slots.num_experts), slots.rank_EX().argmin(axis=1)]
    rows: IntArray = slots.row_of_slot_S[first_E[slots.rank_of_slot_S[first_E] == rank]]
    return rows


def _square_sum(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        square = torch.linalg.vector_norm(tensor, dtype=torch.float32).double().square()
        total += (square.full_tensor() if hasattr(square, "full_tensor") else square).to(device)
    return total


def _digest(placement: Placement) -> str:
    content = hashlib.sha256(placement.physical_to_logical_map_LS.tobytes())
    content.update(placement.device_of_slot_S.tobytes())
    return content.hexdigest()
