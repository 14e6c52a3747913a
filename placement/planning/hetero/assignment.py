"""Which device of a group holds which expert in which layer, and how long either side computes.

Shape letters: L MoE layers, E experts, G devices of a group (attention devices first).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from placement._arrays import FloatArray, IntArray
from placement.planning.hetero.group import ZebraGroup
from placement.planning.hetero.job import HeteroJob
from placement.planning.hetero.zebra import Stages, layer_stages

__all__ = ["GroupTimes", "contiguous_assignment", "placed", "spread"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupTimes:
    """What a group's micro-batches cost before experts are assigned.

    Parameters
    ----------
    group, job, num_micro_batches
        Who computes what, in how many parts.
    """

    group: ZebraGroup
    job: HeteroJob
    num_micro_batches: int

    @property
    def tokens(self) -> float:
        """Tokens of one micro-batch of one group."""
        return self.job.tokens_per_step / (self.group.num_groups * self.num_micro_batches)

    @property
    def attention_s(self) -> float:
        """One layer's attention of one micro-batch."""
        return self.tokens * self.group.attention_time_s()

    @property
    def head_s(self) -> float:
        """The head's forward pass of one micro-batch."""
        return self.tokens * self.group.attention_time_s(head=True)

    @property
    def unit_G(self) -> FloatArray:
        """Seconds of a device for one expert of mean load, ``[devices]``."""
        return self.tokens * self.group.expert_s_G / self.job.num_experts

    @property
    def dispatch_s(self) -> float:
        """One dispatch of one micro-batch."""
        return self.job.dispatch_latency_s + self.group.exchange_s(self.job, tokens=self.tokens)

    @property
    def combine_s(self) -> float:
        """One combine of one micro-batch."""
        return self.job.combine_latency_s + self.group.exchange_s(self.job, tokens=self.tokens)

    def side_times(self, device_LE: IntArray) -> tuple[list[float], list[float]]:
        """Return forward seconds of attention devices and expert devices on experts, ``[layers]`` each.

        Either side is as slow as its slowest device.
        """
        M = self.group.num_attention
        own, experts = [], []
        for device_E, load_E in zip(device_LE, self.job.load_LE, strict=True):
            load_G = np.bincount(device_E, weights=load_E, minlength=self.group.num_devices)
            time_G = load_G * self.unit_G
            own.append(float(time_G[:M].max()))
            experts.append(float(time_G[M:].max()))
        return own, experts

    def stages(self, own_L: Sequence[float], experts_L: Sequence[float]) -> Stages:
        """Return the tasks of one micro-batch, forward and backward."""
        return layer_stages(
            attention_L=[self.attention_s] * self.job.num_layers,
            own_experts_L=own_L,
            experts_L=experts_L,
            dispatch_s=self.dispatch_s,
            combine_s=self.combine_s,
            head_s=self.head_s,
            backward=self.job.backward,
        )


def spread(
    experts: Sequence[int], *, load_E: FloatArray, unit_G: FloatArray, limit_G: IntArray, room_G: IntArray
) -> dict[int, int]:
    """Spread experts over devices: heaviest first, each to the device that would finish first.

    Parameters
    ----------
    experts
        Ids of the experts, heaviest first.
    unit_G
        Seconds of each device per unit of load; infinite on devices that take none.
    limit_G, room_G
        Experts that each device should take, and those that it can: the second counts only once the first
        is used up everywhere.

    Returns
    -------
    dict
        Device of each expert.
    """
    devices = [int(g) for g in np.flatnonzero(np.isfinite(unit_G) & (room_G > 0))]
    unit, room, limit = unit_G.tolist(), room_G.tolist(), limit_G.tolist()
    load, count = [0.0] * len(unit), [0] * len(unit)
    chosen = {}
    for expert in experts:
        weight = float(load_E[expert])
        open_ = [g for g in devices if count[g] < min(limit[g], room[g])]
        open_ = open_ or [g for g in devices if count[g] < room[g]]
        best = min(open_, key=lambda g: ((load[g] + weight) * unit[g], count[g] - room[g], g))
        load[best] += weight
        count[best] += 1
        chosen[expert] = best
    return chosen


def placed(times: GroupTimes, own_experts_L: Sequence[Sequence[int]]) -> IntArray:
    """Return the device of every expert, given which experts attention devices hold in each layer.

    Parameters
    ----------
    own_experts_L
        Ids of the experts on attention devices, ``[layers]``; the sums over layers must fit either side.

    Returns
    -------
    IntArray
        Device in the group, ``[layers, experts]``.
    """
    job, group = times.job, times.group
    M, unit_G = group.num_attention, times.unit_G
    left_G = group.room_G(job).copy()
    attends_G = np.arange(group.num_devices) < M
    device_LE = np.zeros(job.load_LE.shape, dtype=np.int64)
    for layer, own in enumerate(own_experts_L):
        load_E = job.load_LE[layer]
        order = sorted(range(job.num_experts), key=lambda e: (-load_E[e], e))
        mine = set(own)
        # What is left is shared by the layers to come, so that no device is full before the last.
        limit_G = -(-left_G // (job.num_layers - layer))
        for inside, experts in (
            (attends_G, [e for e in order if e in mine]),
            (~attends_G, [e for e in order if e not in mine]),
        ):
            chosen = spread(
                experts,
                load_E=load_E,
                unit_G=np.where(inside, unit_G, np.inf),
                limit_G=limit_G,
                room_G=left_G,
            )
            for expert, device in chosen.items():
                device_LE[layer, expert] = device
        left_G -= np.bincount(device_LE[layer], minlength=group.num_devices)
    return device_LE


def contiguous_assignment(times: GroupTimes, offload_L: Sequence[int]) -> IntArray:
    """Return HeterMoE's assignment: equal blocks on expert devices, of which each offloads its last experts.

    Parameters
    ----------
    offload_L
        Experts that each expert device gives to attention devices, ``[layers]``.
    """
    n, M, N = times.job.num_experts, times.group.num_attention, times.group.num_expert_devices
    block = n // N
    device_LE = np.tile(M + np.arange(n) // block, (times.job.num_layers, 1))
    for layer, count in enumerate(offload_L):
        given = [e for e in range(n) if e % block >= block - count]
        for place, expert in enumerate(given):
            device_LE[layer, expert] = place * M // len(given)
    return device_LE
