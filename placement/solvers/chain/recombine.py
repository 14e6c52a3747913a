"""The best chain that can be put together from the layers of several placements.

Devices with as many slots are interchangeable from any layer on, since the contents of its devices, hence
the loads, stay as they are. So what a boundary keeps depends on the two layers' contents alone: the best
matching of the earlier layer's devices to the later one's, a linear assignment. That makes the choice of one
placement per layer a shortest path, and the path is optimal over all choices and all relabellings.

Shape letters: P placements, L layers, B boundaries between layers (L - 1), E experts, D devices,
Q load situations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from placement.solvers.chain.kernels import Chain

__all__ = ["best_matching", "overload", "recombine"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def overload(chain: Chain, device_LE: IntArray) -> FloatArray:
    """Sum what each layer's devices carry beyond the limits, over all load situations, ``[layers]``."""
    held_LED = device_LE[:, :, None] == np.arange(int(chain.device_S.max()) + 1)
    load_LDQ = np.einsum("led,leq->ldq", held_LED, chain.load_LEQ)
    return np.asarray(np.maximum(load_LDQ - chain.limit_LQ[:, None, :], 0.0).sum(axis=(1, 2)))


def best_matching(flow_DD: FloatArray, slots_D: IntArray) -> tuple[float, IntArray]:
    """Match devices of one layer to devices of the next, so that most tokens stay.

    Parameters
    ----------
    flow_DD
        Tokens by device of the earlier layer (row) and of the later one (column).
    slots_D
        Slots of each device; only devices of equal size are matched.

    Returns
    -------
    tuple
        Tokens that stay, and for each device of the later layer the one that takes its place.
    """
    from scipy.optimize import linear_sum_assignment

    renamed_D = np.arange(slots_D.size)
    kept = 0.0
    for size in np.unique(slots_D):
        alike = np.nonzero(slots_D == size)[0]
        row, column = linear_sum_assignment(flow_DD[np.ix_(alike, alike)], maximize=True)
        renamed_D[alike[column]] = alike[row]
        kept += float(flow_DD[alike[row], alike[column]].sum())
    return kept, renamed_D


def recombine(chain: Chain, device_PLE: IntArray) -> IntArray:
    """Choose for every layer one placement's contents, and relabel devices, so that most tokens stay.

    A finite price of loads beyond the limits is taken off the tokens that stay.

    Where the price of a load beyond the limits is infinite, only contents are chosen that exceed them least.

    Returns
    -------
    IntArray
        Device of each expert, ``[layers, experts]``; never worse than any of the placements that keep
        all limits.
    """
    slots_D = np.bincount(chain.device_S)
    over_PL = np.stack([overload(chain, device_LE) for device_LE in device_PLE])
    worth_PL = np.where(over_PL > over_PL.min(axis=0), -chain.price, 0.0)
    if np.isfinite(chain.price):
        worth_PL = -chain.price * over_PL
    value_P = worth_PL[:, 0]
    came_from, renamed = [], []
    for b in range(device_PLE.shape[1] - 1):
        kept_PP, renamed_PPD = _boundary(chain.ahead_BEE[b], device_PLE[:, b], device_PLE[:, b + 1], slots_D)
        reached_PP = value_P[:, None] + kept_PP
        came_from.append(reached_PP.argmax(axis=0))
        renamed.append(renamed_PPD)
        value_P = reached_PP.max(axis=0) + worth_PL[:, b + 1]
    path = [int(value_P.argmax())]
    for earlier_P in reversed(came_from):
        path.append(int(earlier_P[path[-1]]))
    path.reverse()
    return _relabelled(device_PLE, path, renamed)


def _boundary(
    ahead_EE: FloatArray, before_PE: IntArray, after_PE: IntArray, slots_D: IntArray
) -> tuple[FloatArray, IntArray]:
    """Tokens kept, and the relabelling, for every pair of contents before and after a boundary."""
    devices = np.arange(slots_D.size)
    before_PED = (before_PE[:, :, None] == devices).astype(np.float64)
    after_PED = (after_PE[:, :, None] == devices).astype(np.float64)
    flow_PPDD = np.einsum("ped,ef,qfg->pqdg", before_PED, ahead_EE, after_PED, optimize=True)
    kept_PP = np.empty(flow_PPDD.shape[:2])
    renamed_PPD = np.empty(flow_PPDD.shape[:3], dtype=np.int64)
    for p, q in np.ndindex(*kept_PP.shape):
        kept_PP[p, q], renamed_PPD[p, q] = best_matching(flow_PPDD[p, q], slots_D)
    return kept_PP, renamed_PPD


def _relabelled(device_PLE: IntArray, path: list[int], renamed: list[IntArray]) -> IntArray:
    """Device of each expert along a path, every layer's devices named after those before it."""
    rows = [device_PLE[path[0], 0]]
    name_D = np.arange(int(device_PLE.max()) + 1 if not renamed else renamed[0].shape[2])
    for b, renamed_PPD in enumerate(renamed):
        name_D = name_D[renamed_PPD[path[b], path[b + 1]]]
        rows.append(name_D[device_PLE[path[b + 1], b + 1]])
    return np.stack(rows)
