"""Layers that share nothing, solved one by one.

Shape letters: L layers, E experts, P positions, S slots, N rows of all tables, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from placement.cost import CostModel
from placement.errors import InfeasibleError
from placement.plan import Placement
from placement.problem import Objective
from placement.solvers.exact.layout import Layout, make_layout
from placement.solvers.exact.partition import Partition, best_partition, least_level, least_partition
from placement.solvers.exact.proof import LIMIT_SLACK
from placement.solvers.exact.rows import masks_of_layer, row_of_masks
from placement.solvers.exact.subsets import Subsets
from placement.solvers.exact.tables import (
    LayerTables,
    count_touching,
    expert_order,
    make_tables,
    token_masks,
)

__all__ = ["SeparateLayers", "check_levels", "device_limit"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class SeparateLayers:
    """The best layer of a problem whose layers share nothing.

    Parameters
    ----------
    model
        Cost model of the problem.
    stop
        Asked often.
    """

    def __init__(self, model: CostModel, stop: Callable[[], bool]) -> None:
        self.model, self.stop = model, stop
        self.layout = make_layout(model)
        self.subsets = Subsets(model.problem.num_experts)

    def improve(self, placement: Placement, layer: int) -> tuple[Placement, bool]:
        """Return the placement with its layer replaced by the best one, and whether that is proved."""
        order_E = expert_order(self.model.problem.profile, layer)
        if self.model.problem.objective is Objective.TRAFFIC:
            found = self._least_touched(layer, order_E)
        else:
            found = self._branch(placement, layer)
        if found.mask_P is None:
            return placement, found.proved
        rows_LS = np.array(placement.physical_to_logical_map_LS)
        rows_LS[layer] = row_of_masks(self.model.problem, self.layout, order_E, found.mask_P)
        return placement.with_layers(rows_LS), found.proved

    def _branch(self, placement: Placement, layer: int) -> Partition:
        problem = self.model.problem
        tables = make_tables(self.model, layer, self.layout, self.subsets)
        mask_P = masks_of_layer(placement, layer, self.layout, tables.order_E)
        return best_partition(
            self.layout,
            self.subsets,
            tables,
            risk=problem.risk,
            below=_price(self.model, self.layout, self.subsets, tables, mask_P),
            stop=self.stop,
        )

    def _least_touched(self, layer: int, order_E: IntArray) -> Partition:
        """Least fanout: each device costs the tokens that touch it, unless it is loaded above the limit."""
        profile = self.model.problem.profile
        mask_T = token_masks(profile, layer, order_E)
        sizes = frozenset(part.slots for part in self.layout.devices)
        touching = count_touching(
            mask_T, np.zeros_like(mask_T), profile.token_weight_T, 1, self.subsets, sizes
        )
        load_E = profile.load_WLE[:, layer].sum(axis=0)[order_E]
        slots = {part.kind: part.slots for part in self.layout.devices}
        limit = device_limit(self.model, load_E)
        value_N = np.concatenate(
            [
                np.where(
                    self.subsets.members(slots[kind]) @ load_E <= limit, touching[slots[kind]][:, 0], np.inf
                )
                for kind in sorted(slots)
            ]
        )
        found = least_partition(self.layout, self.subsets, value_N)
        if found.mask_P is None:
            check_level(self.model, layer, least_level(self.layout, self.subsets, load_E))
        return found


def device_limit(model: CostModel, load_E: FloatArray) -> float:
    """Largest summed load that a device may have."""
    problem = model.problem
    return float(problem.max_imbalance * LIMIT_SLACK * load_E.sum() / problem.num_devices)


def check_levels(model: CostModel) -> None:
    """Verify that every layer can keep the load limit."""
    layout, subsets = make_layout(model), Subsets(model.problem.num_experts)
    for layer in range(model.problem.num_layers):
        load_E = model.problem.profile.load_WLE[:, layer].sum(axis=0)
        check_level(model, layer, least_level(layout, subsets, load_E))


def check_level(model: CostModel, layer: int, least_load: float) -> None:
    """Verify that a layer can keep the load limit.

    Raises
    ------
    InfeasibleError
        With the least balance that any placement has.
    """
    problem = model.problem
    mean = problem.profile.load_WLE[:, layer].sum() / problem.num_devices
    balance = least_load / mean
    if balance > problem.max_imbalance * LIMIT_SLACK:
        raise InfeasibleError(
            f"layer {layer}: every placement loads its fullest device with {balance:.6f} of the mean or more "
            f"(proved), {balance - problem.max_imbalance:.6f} above --max-imbalance {problem.max_imbalance}; "
            f"allow {np.ceil(balance * 1000) / 1000:.3f} or add spare slots for replicas"
        )


def _price(
    model: CostModel, layout: Layout, subsets: Subsets, tables: LayerTables, mask_P: IntArray
) -> float:
    """Cost of one layer's partition by its tables."""
    parts = (*layout.devices, *layout.groups)
    costs_YW = []
    for part in parts:
        held = int(np.bitwise_or.reduce(mask_P[part.first : part.last + 1]))
        costs_YW.append(tables.kind_RYW[part.kind][subsets.rank_M[held]])
    return model.problem.risk.summarise(np.max(costs_YW, axis=0).sum(axis=0))
