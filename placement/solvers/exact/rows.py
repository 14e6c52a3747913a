"""Between masks of experts by position and the slots of a placement.

Shape letters: E experts, P positions, S slots.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.cost.incremental import layer_row
from placement.plan import Placement
from placement.problem import PlacementProblem
from placement.solvers.exact.layout import Layout

__all__ = ["masks_of_layer", "row_of_masks"]

IntArray = npt.NDArray[np.int64]


def masks_of_layer(placement: Placement, layer: int, layout: Layout, order_E: IntArray) -> IntArray:
    """Experts at each position, as masks over `order_E`, ``[positions]``."""
    held_DE = placement.count_LED[layer][order_E].T > 0
    mask_D = held_DE @ (np.int64(1) << np.arange(order_E.size))
    return np.asarray(mask_D[layout.device_P], dtype=np.int64)


def row_of_masks(problem: PlacementProblem, layout: Layout, order_E: IntArray, mask_P: IntArray) -> IntArray:
    """Expert in each slot of a layer, ``[slots]``."""
    position_I, bit_I = np.nonzero((mask_P[:, None] >> np.arange(order_E.size)) & 1)
    return layer_row(order_E[bit_I], layout.device_P[position_I], problem.device_of_slot_S)
