"""The routing of an instance: windows to fit on, held-out windows, and which replica and rank tokens reach.

Shape letters: T tokens, L layers, K top-k, E experts, X most replicas of one expert, S slots, D devices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.environment import data_folder
from benchmarks.gpu.instances import SYNTHETIC, Instance
from placement.cost.split import Replicas, even_shares, least_fullest_shares, number_replicas
from placement.plan import EMPTY, Placement
from traces.readers import read_trace
from traces.synthesize import synthesize
from traces.trace import Trace

__all__ = [
    "SEED",
    "choose_slots",
    "expert_loads",
    "held_out_windows",
    "received_tokens",
    "trace_of",
    "window_experts",
]

SEED = 0
SYNTHETIC_WINDOWS = 32

GOLDEN_RATIO = 0.6180339887498949
"""Multiples of it, without their whole part, spread evenly over [0, 1) however many there are."""

ExpertArray = npt.NDArray[np.unsignedinteger[Any]]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def trace_of(instance: Instance) -> Trace:
    """Return the instance's layers of its traffic.

    Raises
    ------
    InputError
        If the trace is not at hand or not of the instance's shape.
    """
    if instance.traffic == SYNTHETIC:
        return _drawn(instance)
    whole = read_trace(data_folder() / "traces" / f"{instance.traffic}.npz")
    return Trace(
        experts_TLK=whole.experts_TLK[:, list(instance.layers)],
        num_experts=whole.num_experts,
        sequence_T=whole.sequence_T,
    )


def _drawn(instance: Instance) -> Trace:
    return synthesize(
        num_tokens=SYNTHETIC_WINDOWS * instance.window_tokens,
        num_layers=len(instance.layers),
        num_experts=instance.shape.num_experts,
        top_k=instance.shape.top_k,
        sequence_tokens=min(1024, instance.window_tokens // 4),
        seed=SEED,
    )


def held_out_windows(num_windows: int, wanted: int) -> IntArray:
    """Return up to `wanted` odd windows, evenly spaced; even ones are fitted on."""
    odd = np.arange(1, num_windows, 2)
    if odd.size <= wanted:
        return odd.astype(np.int64)
    return odd[np.linspace(0, odd.size - 1, wanted).round().astype(np.int64)].astype(np.int64)


def window_experts(trace: Trace, window: int, window_tokens: int) -> ExpertArray:
    """Return the expert ids of one window, ``[tokens, layers, k]``."""
    return trace.experts_TLK[window * window_tokens : (window + 1) * window_tokens]


def expert_loads(experts_TLK: ExpertArray, num_experts: int) -> IntArray:
    """Return the pairs of each expert, ``[layers, experts]``."""
    per_layer = [
        np.bincount(of_layer.ravel(), minlength=num_experts) for of_layer in experts_TLK.swapaxes(0, 1)
    ]
    return np.stack(per_layer).astype(np.int64)


def _slot_of_replica(row_S: IntArray, replicas: Replicas) -> IntArray:
    """Slot of each replica, numbered as `number_replicas` does, ``[experts, replicas]``."""
    slots = np.argsort(row_S, kind="stable")[np.count_nonzero(row_S == EMPTY) :]
    number = np.arange(slots.size) - (np.cumsum(replicas.replicas_E) - replicas.replicas_E)[row_S[slots]]
    slot_EX = np.full(replicas.replica_EX.shape, -1, dtype=np.int64)
    slot_EX[row_S[slots], number] = slots
    return slot_EX


def _shares(load_E: FloatArray, replicas: Replicas, *, split: str, num_devices: int) -> FloatArray:
    if split == "lp":
        return np.asarray(least_fullest_shares(load_E[None], replicas, num_devices=num_devices)[0])
    return even_shares(replicas)


def choose_slots(
    experts_TK: ExpertArray, placement: Placement, layer: int, *, split: str, recent_E: IntArray
) -> IntArray:
    """Return the slot that each pair uses, ``[tokens, k]``.

    Pairs of an expert are dealt to its replicas in recorded order and in the split's shares.

    Parameters
    ----------
    experts_TK
        Expert ids of a batch in one layer.
    split
        ``even``, or ``lp``: the shares that make the fullest device as light as can be under recent loads.
    recent_E
        Loads of the window before, which is what an engine knows, ``[experts]``.
    """
    row_S = placement.physical_to_logical_map_LS[layer]
    replicas = number_replicas(row_S, placement.device_of_slot_S, placement.num_experts)
    expert_P = experts_TK.astype(np.int64).ravel()
    load_E = np.bincount(expert_P, minlength=placement.num_experts)
    share_EX = _shares(recent_E.astype(np.float64), replicas, split=split, num_devices=placement.num_devices)
    order_P = np.argsort(expert_P, kind="stable")
    place_P = np.empty_like(expert_P)
    place_P[order_P] = np.arange(expert_P.size) - (np.cumsum(load_E) - load_E)[expert_P[order_P]]
    point_P = ((place_P + 0.5) * GOLDEN_RATIO) % 1.0
    replica_P = (point_P[:, None] >= np.cumsum(share_EX, axis=1)[expert_P]).sum(axis=1)
    replica_P = np.minimum(replica_P, replicas.replicas_E[expert_P] - 1)
    slot_P = _slot_of_replica(row_S, replicas)[expert_P, replica_P]
    return np.asarray(slot_P.reshape(experts_TK.shape))


def received_tokens(slot_TK: IntArray, placement: Placement) -> IntArray:
    """Return the distinct tokens of other devices that each device receives, ``[devices]``.

    The batch lies on the devices in order, equally many tokens on each.
    """
    num_tokens = slot_TK.shape[0]
    touched_TD = np.zeros((num_tokens, placement.num_devices), dtype=bool)
    token_T = np.arange(num_tokens)
    touched_TD[token_T[:, None], placement.device_of_slot_S[slot_TK]] = True
    touched_TD[token_T, token_T * placement.num_devices // num_tokens] = False
    return np.asarray(touched_TD.sum(axis=0, dtype=np.int64))
