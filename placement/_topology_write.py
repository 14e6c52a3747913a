"""Writes the topology file: the mapping that `placement._topology_read` reads back.

Shape letter: D devices.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import numpy as np

from placement._arrays import IntArray
from placement._topology_read import GB, GIB, KIND_KEYS, Block, block_node_D, default_bandwidth_D
from placement.devices import DEVICE_KINDS, DeviceKind
from placement.topology import Topology

__all__ = ["topology_to_dict"]


def topology_to_dict(topology: Topology) -> dict[str, Any]:
    """Return the mapping that `topology_from_dict` reads back to an equal topology.

    Kinds are renumbered in the order of their first device.
    """
    blocks = _blocks_of(topology)
    written: dict[str, Any] = {"name": topology.name}
    own = {kind.name: _kind_to_dict(kind) for kind in topology.kinds if DEVICE_KINDS.get(kind.name) != kind}
    if own:
        written["device_kinds"] = own
    written["nodes"] = [_block_to_dict(block) for block in blocks]
    written["tiers"] = [_tier_to_dict(topology, i, block_node_D(blocks)) for i in range(topology.num_tiers)]
    if topology.optical_switch is not None:
        written["optical_switch"] = copy.deepcopy(dict(topology.optical_switch))
    return written


def _blocks_of(topology: Topology) -> list[Block]:
    """Cut the devices into runs that share node and limits, and join equal neighbouring runs."""
    per_device = [topology.node_of_device_D, topology.kind_of_device_D]
    per_device += [limit for limit in (topology.slots_D, topology.memory_bytes_D) if limit is not None]
    changes = np.any(np.diff(np.stack(per_device), axis=1) != 0, axis=0)
    bounds = [0, *(np.nonzero(changes)[0] + 1).tolist(), topology.num_devices]
    blocks: list[Block] = []
    for start, stop in itertools.pairwise(bounds):
        block = _run(topology, start, stop - start)
        if blocks and replace(blocks[-1], count=1) == block:
            blocks[-1] = replace(block, count=blocks[-1].count + 1)
        else:
            blocks.append(block)
    return blocks


def _run(topology: Topology, device: int, devices: int) -> Block:
    return Block(
        kind=topology.kind_of(device).name,
        devices=devices,
        count=1,
        slots=None if topology.slots_D is None else int(topology.slots_D[device]),
        memory_bytes=None if topology.memory_bytes_D is None else int(topology.memory_bytes_D[device]),
    )


def _in_unit(value: float, unit: float) -> float:
    """Return `value` in a unit, as the short decimal that reads back exactly where there is one."""
    short = float(f"{value / unit:.12g}")
    return short if short * unit == value else value / unit


def _kind_to_dict(kind: DeviceKind) -> dict[str, float]:
    figures = {key: (getattr(kind, field), unit) for key, (field, unit) in KIND_KEYS.items()}
    return {key: _in_unit(value, unit) for key, (value, unit) in figures.items() if value is not None}


def _block_to_dict(block: Block) -> dict[str, Any]:
    written: dict[str, Any] = {"kind": block.kind, "devices": block.devices, "count": block.count}
    if block.slots is not None:
        written["slots"] = block.slots
    if block.memory_bytes is not None:
        written["memory_gib"] = block.memory_bytes / GIB
    return written


def _tier_to_dict(topology: Topology, index: int, run_D: IntArray) -> dict[str, Any]:
    tier = topology.tiers[index]
    written: dict[str, Any] = {"name": tier.name}
    if index == 0:
        if not np.array_equal(tier.group_D, run_D):
            written["groups"] = tier.group_D.tolist()
    elif index < topology.num_tiers - 1:
        _, first_device = np.unique(topology.node_of_device_D, return_index=True)
        written["groups"] = tier.group_D[first_device].tolist()
    default_D = default_bandwidth_D(list(topology.kinds), topology.kind_of_device_D, index)
    if (tier.bandwidth_D == tier.bandwidth_D[0]).all():
        written["bandwidth_gbps"] = _in_unit(float(tier.bandwidth_D[0]), GB)
    elif not np.array_equal(tier.bandwidth_D, default_D):
        written["bandwidth_gbps"] = [_in_unit(value, GB) for value in tier.bandwidth_D.tolist()]
    written["latency_us"] = float(f"{tier.latency_s * 1e6:.15g}")
    written["efficiency"] = tier.bandwidth_efficiency
    if tier.ports is not None:
        written["ports"] = tier.ports
    return written
