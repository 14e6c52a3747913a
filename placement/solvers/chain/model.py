"""A stay-put problem as a chain: transitions between layers, loads, limits, and rows of slots.

Shape letters: L layers, B boundaries between layers (L - 1), E experts, Q load situations, S slots,
D devices, W windows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from placement.cost.incremental import layer_row
from placement.plan import Placement
from placement.problem import PlacementProblem

if TYPE_CHECKING:
    from placement.solvers.chain.kernels import Chain

__all__ = ["devices_of", "make_chain", "placement_of", "price_loads", "rows_of", "tokens_kept"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

LIMIT_SLACK = 5e-10
"""Sums that equal a limit stay inside it; half of the slack that placements are judged with."""

MOST_WINDOWS = 32
"""Windows whose loads are priced; more cost time and differ little."""


def make_chain(problem: PlacementProblem, *, max_imbalance: float) -> Chain:
    """Count transitions and loads, and turn the limit into a load per device, not to be exceeded.

    Parameters
    ----------
    max_imbalance
        Largest load of a device over the mean, in each layer.
    """
    from placement.solvers.chain.kernels import Chain

    profile = problem.profile
    size = (problem.num_experts, problem.num_experts)
    ahead = [profile.transitions(layer) for layer in range(problem.num_layers - 1)]
    ahead_BEE = np.stack(ahead) if ahead else np.zeros((0, *size))
    load_LE = profile.load_WLE.sum(axis=0)
    return Chain(
        ahead_BEE=ahead_BEE,
        back_BEE=np.ascontiguousarray(ahead_BEE.transpose(0, 2, 1)),
        load_LEQ=load_LE[:, :, None],
        limit_LQ=max_imbalance * load_LE.sum(axis=1)[:, None] / problem.num_devices * (1 + LIMIT_SLACK),
        price=np.inf,
        # A copy: compiled code is specialised for writable arrays.
        device_S=np.array(problem.device_of_slot_S),
    )


def price_loads(chain: Chain, problem: PlacementProblem, *, price: float) -> Chain:
    """Return the chain with a price, in tokens kept, on every load beyond the mean in every window."""
    load_WLE = problem.profile.load_WLE
    chosen_Q = np.linspace(0, len(load_WLE) - 1, min(len(load_WLE), MOST_WINDOWS)).round().astype(np.int64)
    load_LEQ = np.ascontiguousarray(load_WLE[chosen_Q].transpose(1, 2, 0)) * (len(load_WLE) / chosen_Q.size)
    return chain._replace(
        load_LEQ=load_LEQ, limit_LQ=load_LEQ.sum(axis=1) / problem.num_devices, price=float(price)
    )


def devices_of(device_S: IntArray, expert_LS: IntArray, num_experts: int) -> IntArray:
    """Device of each expert, one copy each, ``[layers, experts]``."""
    device_LE = np.zeros((expert_LS.shape[0], num_experts), dtype=np.int64)
    layer, slot = np.nonzero(expert_LS >= 0)
    device_LE[layer, expert_LS[layer, slot]] = device_S[slot]
    return device_LE


def rows_of(device_S: IntArray, device_LE: IntArray) -> IntArray:
    """Expert of each slot (-1: empty), each device's in ascending order, ``[layers, slots]``."""
    experts = np.arange(device_LE.shape[1])
    return np.stack([layer_row(experts, device_E, device_S) for device_E in device_LE])


def placement_of(problem: PlacementProblem, expert_LS: IntArray) -> Placement:
    """Return the placement of some rows on a problem's slots."""
    return Placement(
        physical_to_logical_map_LS=expert_LS,
        device_of_slot_S=problem.device_of_slot_S,
        num_experts=problem.num_experts,
        num_devices=problem.num_devices,
    )


def tokens_kept(chain: Chain, device_LE: IntArray) -> float:
    """Count the tokens that stay where they are, over all boundaries, one copy of each expert."""
    same_BEE = device_LE[:-1, :, None] == device_LE[1:, None, :]
    return float(chain.ahead_BEE[same_BEE].sum())
