"""Balances all layers of a model on their counts: replicas, then places, then exchanges.

Shape letters: L MoE layers, E experts, S slots, D devices, W windows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.errors import InfeasibleError
from placement.stopping import Never, StoppingCriterion

__all__ = ["TOLERANCE", "balance_layers", "device_starts"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

TOLERANCE = 1e-4
"""Relative distance to the floor at which a layer is even enough: far below the noise of any count."""

WORK_PER_LAYER = 2_000_000
"""Pairs of slots priced per layer before replicas are left as they are: some 10 ms."""

WINDOW_WORK_PER_LAYER = 20_000_000
"""Window terms priced per layer: some 20 ms."""

SHRINK = 0.1
"""Weight of the mean over windows in every window: what is fitted to few windows does not hold on others."""


def device_starts(slots_D: IntArray, num_experts: int) -> tuple[IntArray, IntArray]:
    """First slot of each device, and the slots in use: a device holds no expert twice.

    Parameters
    ----------
    slots_D
        Slots of each device; those beyond one per expert are left out.

    Returns
    -------
    start_D, used_S
        First used slot of each device, then their number, ``[devices + 1]``; their places among all slots.
    """
    used_D = np.minimum(slots_D, num_experts)
    start_D = np.concatenate([[0], np.cumsum(used_D)]).astype(np.int64)
    first_D = np.cumsum(slots_D) - slots_D
    used_S = np.arange(start_D[-1]) + np.repeat(first_D - start_D[:-1], used_D)
    return start_D, used_S.astype(np.int64)


def _scaled(load_E: FloatArray) -> FloatArray:
    """Loads as shares of their sum; even ones for a layer that saw no token."""
    largest = load_E.max()
    if largest == 0:
        return np.full(load_E.size, 1.0 / load_E.size)
    share_E = load_E / largest
    return np.ascontiguousarray(share_E / share_E.sum())


def _scaled_windows(load_WE: FloatArray, *, per_window: bool) -> FloatArray:
    """Loads by expert and window, softened towards their mean, ``[experts, windows]``."""
    largest = load_WE.max()
    share_WE = load_WE / (largest if largest > 0 else 1.0)
    if per_window:
        total_W1 = share_WE.sum(axis=1, keepdims=True)
        share_WE = np.divide(share_WE, total_W1, out=np.zeros_like(share_WE), where=total_W1 > 0)
    softened = (1 - SHRINK) * share_WE + SHRINK * share_WE.mean(axis=0)
    return np.ascontiguousarray(softened.T)


def balance_layers(
    load_LE: FloatArray,
    slots_D: IntArray,
    *,
    speed_D: FloatArray | None = None,
    load_WLE: FloatArray | None = None,
    per_window: bool = True,
    fill: bool = True,
    effort: float = 1.0,
    seed: int = 0,
    stop: StoppingCriterion | None = None,
) -> IntArray:
    """Choose replicas and places so that every layer's fullest device carries little more than the mean.

    Slots beyond one per expert go to the highest load per replica, replicas longest first to the device that
    they fill least; then one or two replicas of the fullest device are exchanged with another device's, and
    where that ends above the floor, replicas are given to other experts at random and exchanged again.

    Parameters
    ----------
    load_LE
        Load of each expert; replicas share it evenly.
    slots_D
        Slots of each device, in total at least one per expert.
    speed_D
        Relative speed of each device; loads are evened out in proportion. Equal by default.
    load_WLE
        Loads by window: if given, the mean over windows of the fullest device is lowered further.
    per_window
        Whether every window counts alike whatever its load (as fullest / mean device does).
    fill
        Whether every slot is to hold a replica, even where an empty one would leave loads more even (which
        only devices with a slot for nearly every expert ask for).
    effort
        Factor on the number of priced changes.
    seed, stop
        Seed of the random changes; when to leave them out.

    Returns
    -------
    IntArray
        Expert of each slot, ``[layers, slots]``, slots device by device; -1 only where a device has more
        slots than there are experts, or `fill` does not ask for a replica.

    Raises
    ------
    InfeasibleError
        If there are fewer slots than experts.
    """
    from placement.solvers.balance.kernels import balance_layer, balance_windows

    stop = Never() if stop is None else stop
    num_layers, num_experts = load_LE.shape
    start_D, used_S = device_starts(slots_D, num_experts)
    if used_S.size < num_experts:
        raise InfeasibleError(
            f"{int(slots_D.sum())} slots cannot hold {num_experts} experts; at least {num_experts} are needed"
        )
    speeds = np.ones(slots_D.size) if speed_D is None else np.ascontiguousarray(speed_D / speed_D.max())
    map_LS = np.full((num_layers, int(slots_D.sum())), -1, dtype=np.int64)
    for layer in range(num_layers):
        layer_seed = int(np.random.SeedSequence([seed, layer]).generate_state(1)[0])
        work = 0 if stop() else int(effort * WORK_PER_LAYER)
        row_S = balance_layer(_scaled(load_LE[layer]), speeds, start_D, TOLERANCE, work, layer_seed, fill)
        if load_WLE is not None and len(load_WLE) > 1 and not stop():
            load_EW = _scaled_windows(load_WLE[:, layer], per_window=per_window)
            window_work = int(effort * WINDOW_WORK_PER_LAYER)
            row_S, _ = balance_windows(load_EW, speeds, start_D, row_S, window_work, layer_seed, fill)
        map_LS[layer, used_S] = row_S
    return map_LS
