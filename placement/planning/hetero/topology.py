"""A zebra plan in the terms of placement: devices with their speeds, and the experts' slots.

Shape letters: L MoE layers, E experts, S slots, D and G devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from placement._arrays import IntArray
from placement.devices import DeviceKind
from placement.model_shape import ModelShape
from placement.plan import EMPTY, Placement
from placement.planning.hetero.device_class import DeviceClass
from placement.planning.hetero.group import ZebraGroup
from placement.planning.hetero.job import HeteroJob
from placement.tier import ACROSS_EFFICIENCY, ACROSS_LATENCY_S, Tier
from placement.topology import Topology

__all__ = ["group_topology", "placement_of", "topology_of"]


def _kind(its: DeviceClass, model: ModelShape) -> DeviceKind:
    """Return the class's kind with the FLOP/s that its expert time tells, so that both price alike."""
    flops = model.top_k * model.flops_per_pair / its.expert_s
    name = its.name if its.name == its.kind.name else f"{its.name}-{its.kind.name}"
    return replace(its.kind, name=name, measured_flops=flops)


def _topology(
    classes: Sequence[DeviceClass], class_of_device_D: IntArray, model: ModelShape, free_bytes_D: IntArray
) -> Topology:
    bandwidth = np.array([its.bandwidth for its in classes])[class_of_device_D]
    tier = Tier(
        name="cluster",
        group_D=np.zeros(class_of_device_D.size, dtype=np.int64),
        bandwidth_D=bandwidth,
        latency_s=ACROSS_LATENCY_S,
        bandwidth_efficiency=ACROSS_EFFICIENCY,
    )
    return Topology(
        name="+".join(f"{its.name}:{its.count}" for its in classes),
        kinds=tuple(_kind(its, model) for its in classes),
        kind_of_device_D=class_of_device_D,
        tiers=(tier,),
        memory_bytes_D=free_bytes_D,
    )


def topology_of(classes: Sequence[DeviceClass], *, model: ModelShape, reserved_bytes: int = 0) -> Topology:
    """Return all devices as a topology on which `make_problem` and `optimize` place experts.

    Devices are numbered class by class; each achieves on experts what its class's time says.

    Parameters
    ----------
    reserved_bytes
        Memory of every device that is not for experts.
    """
    class_of_device_D = np.repeat(np.arange(len(classes)), [its.count for its in classes])
    memory = np.array([its.memory_bytes for its in classes], dtype=np.int64)[class_of_device_D]
    return _topology(classes, class_of_device_D, model, np.maximum(memory - reserved_bytes, 1))


def group_topology(group: ZebraGroup, job: HeteroJob, *, model: ModelShape) -> Topology:
    """Return one group's devices, attention devices first, with the memory that their role leaves."""
    memory = np.array([its.memory_bytes for its in group.classes], dtype=np.int64)[group.class_of_device_G]
    used = np.where(group.attends_G, job.attention_bytes, job.activation_bytes).astype(np.int64)
    return _topology(group.classes, group.class_of_device_G, model, np.maximum(memory - used, 1))


def placement_of(device_LE: IntArray, *, num_devices: int, model: ModelShape | None = None) -> Placement:
    """Return an assignment as a placement; a device has the slots of its fullest layer, others stay empty.

    Parameters
    ----------
    device_LE
        Device of each expert, ``[layers, experts]``.
    """
    L, n = device_LE.shape
    held_LD = np.stack([np.bincount(device_E, minlength=num_devices) for device_E in device_LE])
    slots_D = held_LD.max(axis=0)
    first_D = np.concatenate([[0], np.cumsum(slots_D)[:-1]])
    map_LS = np.full((L, int(slots_D.sum())), EMPTY, dtype=np.int64)
    for layer, device_E in enumerate(device_LE):
        filled_D = first_D.copy()
        for expert, device in enumerate(device_E):
            map_LS[layer, filled_D[device]] = expert
            filled_D[device] += 1
    return Placement(
        physical_to_logical_map_LS=map_LS,
        device_of_slot_S=np.repeat(np.arange(num_devices), slots_D),
        num_experts=n,
        num_devices=num_devices,
        model_name=None if model is None else model.name,
        moe_layer_ids=None if model is None else model.moe_layer_ids,
    )
