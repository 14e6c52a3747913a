"""Exact steps for one layer: a linear assignment to slots, an integer program where a load limit binds.

Given its neighbours, a layer of a stay-put chain decides nothing but which expert sits where: each expert
keeps the tokens that it shares with the neighbours on its device, whatever the other experts do.

Shape letters: E experts, D devices.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["assign_layer", "level_layer"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

NODE_LIMIT = 500
"""Nodes of one integer program: counted, so that results do not depend on the machine."""


def assign_layer(kept_ED: FloatArray, slots_D: IntArray, load_E: FloatArray, limit: float) -> IntArray | None:
    """Put every expert on a device so that most tokens stay, within slots and a load limit.

    Parameters
    ----------
    kept_ED
        Tokens that stay if an expert sits on a device, ``[experts, devices]``.
    slots_D
        Slots of each device.
    load_E, limit
        Load of each expert, and what a device may carry.

    Returns
    -------
    IntArray or None
        Device of each expert; None if there is no such placement, or none was found within `NODE_LIMIT`.
        Optimal where the limit does not bind, or the integer program ended by itself.
    """
    device_E = _assign_freely(kept_ED, slots_D)
    load_D = np.bincount(device_E, weights=load_E, minlength=slots_D.size)
    if load_D.max() <= limit:
        return device_E
    return _assign_within(kept_ED, slots_D, load_E, limit)


def _assign_freely(kept_ED: FloatArray, slots_D: IntArray) -> IntArray:
    """Assign experts to slots, whatever the loads: a linear assignment with a column per slot."""
    from scipy.optimize import linear_sum_assignment

    device_S = np.repeat(np.arange(slots_D.size), slots_D)
    _, slot_E = linear_sum_assignment(kept_ED[:, device_S], maximize=True)
    return np.asarray(device_S[slot_E], dtype=np.int64)


def _assign_within(
    kept_ED: FloatArray, slots_D: IntArray, load_E: FloatArray, limit: float
) -> IntArray | None:
    """Assign experts to devices under a load limit: a generalised assignment, as an integer program."""
    num_experts, num_devices = kept_ED.shape
    return _solve(
        cost=-kept_ED.ravel(),
        weight_D=np.zeros(num_devices),
        slots_D=slots_D,
        load_E=load_E,
        limit=limit,
        highest=limit,
        num_experts=num_experts,
    )


def level_layer(load_E: FloatArray, slots_D: IntArray, limit: float) -> IntArray | None:
    """Spread a layer's load so that the fullest device keeps a limit, or comes as near to it as possible.

    Returns
    -------
    IntArray or None
        Device of each expert; None if the integer program found nothing within `NODE_LIMIT`.
    """
    return _solve(
        cost=np.zeros(load_E.size * slots_D.size),
        weight_D=np.ones(slots_D.size),
        slots_D=slots_D,
        load_E=load_E,
        limit=limit,
        highest=float(load_E.sum()),
        num_experts=load_E.size,
    )


def _solve(
    *,
    cost: FloatArray,
    weight_D: FloatArray,
    slots_D: IntArray,
    load_E: FloatArray,
    limit: float,
    highest: float,
    num_experts: int,
) -> IntArray | None:
    """Minimise cost x + the load of the fullest device, which lies between `limit` and `highest`."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_array, coo_array, eye_array, kron

    num_devices = slots_D.size
    ones_D, ones_E = np.ones((1, num_devices)), np.ones((1, num_experts))
    each_once = kron(eye_array(num_experts), ones_D)
    slots = kron(ones_E, eye_array(num_devices))
    loads = kron(load_E[None, :] / limit, eye_array(num_devices))
    peak = coo_array(-np.ones((num_devices, 1)))
    matrix = block_array([[each_once, None], [slots, None], [loads, peak]])
    low = np.concatenate([np.ones(num_experts), np.zeros(num_devices), np.full(num_devices, -np.inf)])
    high = np.concatenate([np.ones(num_experts), slots_D, np.zeros(num_devices)])
    result = milp(
        np.append(cost, weight_D.max()),
        integrality=np.append(np.ones(cost.size), 0),
        bounds=Bounds(np.append(np.zeros(cost.size), 1.0), np.append(np.ones(cost.size), highest / limit)),
        constraints=LinearConstraint(matrix.tocsc(), low, high),
        options={"node_limit": NODE_LIMIT},
    )
    if result.x is None:
        return None
    share_ED = result.x[:-1].reshape(num_experts, num_devices)
    device_E = np.asarray(share_ED.argmax(axis=1), dtype=np.int64)
    if (np.bincount(device_E, minlength=num_devices) > slots_D).any():
        return None
    return device_E
