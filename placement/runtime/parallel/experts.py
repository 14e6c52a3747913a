"""The forward pass that takes the place of an experts module's own: choose slots, exchange, compute.

Shape letters: T tokens of this rank, H hidden, K top-k, R rows that arrived, P pairs to compute, S slots,
C rows of this rank's tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from placement.problem import ReplicaSplit
from placement.runtime.parallel.compute import ExpertMath
from placement.runtime.parallel.control import Control
from placement.runtime.parallel.exchange import Arrived, Inner, Stage
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.phases import NoClock, PhaseClock
from placement.runtime.parallel.replicas import GradientSum, shared_rows
from placement.runtime.parallel.route import Entries, count_rows, place_rows
from placement.runtime.parallel.rows import combine_rows, expand_rows
from placement.runtime.parallel.slots import LayerSlots
from placement.runtime.parallel.split import FloatArray, Split, split_of

__all__ = ["EXCHANGES", "Experts", "LocalExperts"]

EXCHANGES = ("pairs", "dedup", "hierarchical")
"""One row for each token-expert pair; one for each device of a token; one for each node of a token."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Sums:
    """Sums of replicas' gradients, worked out when somebody trains."""

    mesh: Mesh
    scale: float
    slots: LayerSlots
    _made: GradientSum | None = None

    def use(self, slots: LayerSlots) -> None:
        """Go by other tables from now on."""
        self.slots, self._made = slots, None

    @property
    def now(self) -> GradientSum:
        """Of the slots as they are."""
        if self._made is None:
            shared = shared_rows(self.slots, self.mesh.rank)
            self._made = GradientSum(self.mesh, shared, scale=self.scale)
        return self._made


@dataclass(slots=True, kw_only=True, eq=False)
class LocalExperts:
    """Computes rows with the experts of this rank, and weighs and sums them.

    Parameters
    ----------
    experts
        Module with this rank's tensors, ``[C, ...]``.
    math
        What one expert computes.
    row_of_slot_S
        Row of each slot in its rank's tensors.
    num_rows
        Rows of this rank.
    tensors
        Names of the tensors with a row for each slot.
    sums
        Sums the gradients of replicas.
    clock
        Told of the phase.
    """

    experts: nn.Module
    math: ExpertMath
    row_of_slot_S: torch.Tensor
    num_rows: int
    tensors: Sequence[str]
    sums: _Sums
    clock: PhaseClock

    def __call__(self, arrived: Arrived) -> torch.Tensor:
        """Return the weighed sum of each row's outputs, ``[R, H]``."""
        row_P, entry_P, pair_RK, counts_C = self._sorted(arrived)
        hidden_PH = expand_rows(arrived.hidden_RH, row_P, pair_RK)
        weight_RK = arrived.weight_RK
        if self.math.weights_first and weight_RK is not None:
            weight_P1 = expand_rows(weight_RK.reshape(-1, 1), entry_P, pair_RK.reshape(-1, 1))
            hidden_PH, weight_RK = hidden_PH * weight_P1.to(hidden_PH.dtype), None
        with self._summing_gradients():
            output_PH = self.math(self.experts, hidden_PH, counts_C)
        sum_RH = combine_rows(output_PH, row_P, pair_RK, weight_RK)
        self.clock.mark("experts")
        return sum_RH

    @contextmanager
    def _summing_gradients(self) -> Iterator[None]:
        """Have the module compute with tensors whose gradients are summed over replicas."""
        own = self.experts._parameters
        trained = {name: one for name in self.tensors if (one := own[name]) is not None and one.requires_grad}
        if not (trained and torch.is_grad_enabled()):
            yield
            return
        passed: Any = self.sums.now.through(list(trained.values()))
        own.update(zip(trained, passed, strict=True))
        try:
            yield
        finally:
            own.update(trained)

    @torch.no_grad()
    def _sorted(self, arrived: Arrived) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row and entry of each pair, in order of this rank's rows; the inverse; pairs of each row."""
        entries = Entries(
            named_TK=arrived.named_RK,
            split=arrived.split,
            target_S=self.row_of_slot_S,
            num_targets=self.num_rows,
        )
        counted = count_rows(entries)
        placed, num_pairs = place_rows(counted), arrived.num_pairs
        return placed.token_P[:num_pairs], placed.entry_P[:num_pairs], placed.row_TK, counted.count


@dataclass(slots=True, kw_only=True, eq=False)
class Experts:
    """Forward pass of one layer's experts over all ranks.

    Parameters
    ----------
    experts
        Module whose tensors hold this rank's slots.
    math
        What one expert computes.
    mesh, control
        Ranks, and what they agree on.
    exchange
        One of `EXCHANGES`.
    rule
        Replica split.
    tensors
        Names of the tensors with a row for each slot.
    scale
        What gradients of the experts are multiplied with.
    clock
        Told of the phases.
    """

    experts: nn.Module
    math: ExpertMath
    slots: LayerSlots
    mesh: Mesh
    control: Control
    exchange: str
    rule: ReplicaSplit
    tensors: Sequence[str]
    scale: float
    clock: PhaseClock = field(default_factory=NoClock)
    _share_EX: FloatArray | None = field(default=None, init=False)
    _split: Split = field(init=False)
    _sums: _Sums | None = field(default=None, init=False)
    _inner: Inner = field(init=False)

    def __post_init__(self) -> None:
        self.use(self.slots)

    def use(self, slots: LayerSlots, *, share_EX: FloatArray | None = None) -> None:
        """Go by other tables from the next pass on; whoever changes the experts moves their weights."""
        self.slots, self._share_EX = slots, share_EX
        self._split = split_of(self.rule, slots, self.mesh, share_EX=share_EX)
        if self._sums is None:
            self._inner = self._stages()
        else:
            # All other tables are of the slots themselves, which stay where they are.
            self._sums.use(slots)

    def time_with(self, clock: PhaseClock) -> None:
        """Tell a clock of the phases from now on."""
        self.clock = clock
        self._inner = self._stages()

    def __call__(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return what the layer's experts make of this rank's tokens, weighed and summed.

        Parameters
        ----------
        hidden
            ``[T, H]``, or with more dimensions before the last.
        top_k_index, top_k_weights
            Logical experts and their weights, ``[T, K]``.
        """
        self.clock.mark("start")
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        num_tokens = hidden_TH.shape[0]
        # A rank may have no tokens, and then no top-k to be worked out.
        top_k = top_k_index.numel() // num_tokens if num_tokens else top_k_index.shape[-1]
        index_TK = top_k_index.reshape(num_tokens, top_k)
        arrived = Arrived(
            hidden_RH=hidden_TH,
            named_RK=index_TK,
            weight_RK=top_k_weights.reshape(index_TK.shape),
            num_pairs=index_TK.numel(),
            split=self._split,
        )
        # Under autocast experts answer in its dtype.
        return self._inner(arrived).to(hidden.dtype).view_as(hidden)

    def _stages(self) -> Inner:
        mesh, slots = self.mesh, self.slots
        rank_S = slots.tensor("rank_of_slot_S", mesh.device)
        self._sums = _Sums(mesh=mesh, scale=self.scale, slots=slots)
        leaf = LocalExperts(
            experts=self.experts,
            math=self.math,
            row_of_slot_S=slots.tensor("row_of_slot_S", mesh.device),
            num_rows=slots.num_rows(mesh.rank),
            tensors=self.tensors,
            sums=self._sums,
            clock=self.clock,
        )
        if mesh.group is None:
            return leaf
        if self.exchange != "hierarchical":
            return self._stage(mesh.group, mesh.world_size, rank_S, leaf)
        within: Inner = leaf
        if mesh.node_group is not None:
            relays = mesh.rail_group is not None
            place_S = rank_S % mesh.devices_per_node
            within = self._stage(mesh.node_group, mesh.devices_per_node, place_S, leaf, relays=relays)
        if mesh.rail_group is None:
            return within
        return self._stage(mesh.rail_group, mesh.num_nodes, rank_S // mesh.devices_per_node, within)

    def _stage(
        self,
        group: dist.ProcessGroup,
        num_destinations: int,
        destination_S: torch.Tensor,
        inner: Inner,
        *,
        relays: bool = False,
    ) -> Stage:
        return Stage(
            group=group,
            num_destinations=num_destinations,
            destination_S=destination_S,
            dedup=self.exchange != "pairs",
            weights_first=self.math.weights_first,
            inner=inner,
            control=self.control,
            clock=self.clock,
            relays=relays,
        )
