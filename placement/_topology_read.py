"""Reads the topology file: a mapping in the units people quote (TFLOP/s, GiB, GB/s, Gb/s, us).

The schema is described in `placement.topology`. Shape letters: D devices, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from placement._arrays import FloatArray, IntArray
from placement._fields import Fields, as_number, brief
from placement._suggest import did_you_mean
from placement.devices import DEVICE_KINDS, DeviceKind, device_kind
from placement.errors import InputError
from placement.tier import ACROSS_EFFICIENCY, ACROSS_LATENCY_S, NODE_EFFICIENCY, NODE_LATENCY_S, Tier
from placement.topology import MAX_DEVICES, Topology

__all__ = ["GB", "GIB", "KIND_KEYS", "Block", "block_node_D", "default_bandwidth_D", "topology_from_dict"]

GB = 1e9
GIB = 2.0**30

# Key of the file -> field of DeviceKind and the file's unit in SI.
KIND_KEYS = {
    "bf16_tflops": ("peak_flops", 1e12),
    "measured_tflops": ("measured_flops", 1e12),
    "memory_gib": ("memory_bytes", GIB),
    "memory_bandwidth_tbps": ("memory_bandwidth", 1e12),
    "scale_up_gbps": ("scale_up_bandwidth", GB),
    "nic_gbits": ("nic_bandwidth", GB / 8),
}
_TOP_KEYS = ("name", "device_kinds", "nodes", "tiers", "optical_switch")
_NODE_KEYS = ("kind", "devices", "count", "slots", "memory_gib")
_TIER_KEYS = ("name", "nodes", "groups", "bandwidth_gbps", "latency_us", "efficiency", "ports")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One entry of `nodes`: `count` equal runs of `devices` equal devices."""

    kind: str
    devices: int
    count: int
    slots: int | None
    memory_bytes: int | None

    @property
    def num_devices(self) -> int:
        """Devices of all runs."""
        return self.devices * self.count


def topology_from_dict(values: object, *, source: str) -> Topology:
    """Build a topology from a parsed file.

    Raises
    ------
    InputError
        On an unknown key, a wrong type or an inconsistent value, with its place.
    """
    top = Fields(values, source=source, known=_TOP_KEYS, required=("nodes",))
    own_kinds = _own_kinds(top)
    blocks = _blocks(top, own_kinds)
    kinds = {block.kind: own_kinds.get(block.kind) or DEVICE_KINDS[block.kind] for block in blocks}
    kinds |= {name: kind for name, kind in own_kinds.items() if name not in kinds}
    names = list(kinds)
    kind_D = _per_device([names.index(block.kind) for block in blocks], blocks)
    switch = top.mapping("optical_switch") if "optical_switch" in top else None
    return Topology(
        name=top.text("name") or "topology",
        kinds=tuple(kinds.values()),
        kind_of_device_D=kind_D,
        tiers=_tiers(top, blocks, [kinds[name] for name in names], kind_D),
        slots_D=_limits(top, blocks, [block.slots for block in blocks], key="slots"),
        memory_bytes_D=_memory_limits(blocks, kinds),
        optical_switch=switch,
    )


def _own_kinds(top: Fields) -> dict[str, DeviceKind]:
    return {name: _own_kind(top, name, values) for name, values in top.mapping("device_kinds").items()}


def _own_kind(top: Fields, name: str, values: object) -> DeviceKind:
    place = f"{top.at('device_kinds')}.{name}"
    fields = Fields(values, source=top.source, place=place, known=("base", *KIND_KEYS))
    base_name = fields.text("base")
    base = None if base_name is None else _known_kind(fields, "base", base_name, {})
    figures: dict[str, Any] = {}
    for key, (field, unit) in KIND_KEYS.items():
        given = fields.number(key)
        if given is not None:
            figures[field] = round(given * unit) if field == "memory_bytes" else given * unit
        elif base is not None:
            figures[field] = getattr(base, field)
        elif field != "measured_flops":
            raise InputError(f"{top.source}: {fields.at(key)} is missing; give it, or a base")
    if fields.number("bf16_tflops") is not None and fields.number("measured_tflops") is None:
        # What the preset's own chip achieves says nothing of another peak.
        figures["measured_flops"] = None
    return DeviceKind(name=name, **figures)


def _known_kind(fields: Fields, key: str, name: str, own: dict[str, DeviceKind]) -> DeviceKind:
    if name in own:
        return own[name]
    try:
        return device_kind(name)
    except InputError as exc:
        hint = did_you_mean(name, [*own, *DEVICE_KINDS])
        raise InputError(
            f"{fields.source}: {fields.at(key)} is the unknown device kind {name!r}; {hint}"
        ) from exc


def _blocks(top: Fields, own: dict[str, DeviceKind]) -> list[Block]:
    blocks = [_block(top, f"nodes[{i}]", values, own) for i, values in enumerate(top.items("nodes"))]
    total = sum(block.num_devices for block in blocks)
    if total > MAX_DEVICES:
        raise InputError(f"{top.source}: nodes hold {total} devices; at most {MAX_DEVICES} are accepted")
    return blocks


def _block(top: Fields, place: str, values: object, own: dict[str, DeviceKind]) -> Block:
    fields = Fields(values, source=top.source, place=place, known=_NODE_KEYS, required=("kind", "devices"))
    memory_gib = fields.number("memory_gib")
    return Block(
        kind=_known_kind(fields, "kind", fields.text("kind") or "", own).name,
        devices=fields.integer("devices") or 0,
        count=fields.integer("count") or 1,
        slots=fields.integer("slots", minimum=0),
        memory_bytes=None if memory_gib is None else round(memory_gib * GIB),
    )


def _per_device(values: list[int], blocks: list[Block]) -> IntArray:
    return np.repeat(np.array(values, dtype=np.int64), [block.num_devices for block in blocks])


def _limits(top: Fields, blocks: list[Block], limits: list[int | None], *, key: str) -> IntArray | None:
    given = [limit for limit in limits if limit is not None]
    if not given:
        return None
    if len(given) < len(limits):
        missing = limits.index(None)
        raise InputError(
            f"{top.source}: nodes[{missing}].{key} is missing; give it for all nodes or for none"
        )
    return _per_device(given, blocks)


def _memory_limits(blocks: list[Block], kinds: dict[str, DeviceKind]) -> IntArray | None:
    if all(block.memory_bytes is None for block in blocks):
        return None
    limits = [
        kinds[block.kind].memory_bytes if block.memory_bytes is None else block.memory_bytes
        for block in blocks
    ]
    return _per_device(limits, blocks)


def _tiers(top: Fields, blocks: list[Block], kinds: list[DeviceKind], kind_D: IntArray) -> tuple[Tier, ...]:
    node_D = block_node_D(blocks)
    entries = top.items("tiers")
    if not entries:
        entries = [{"name": "node"}] + ([{"name": "cluster"}] if node_D[-1] > 0 else [])
    tiers: list[Tier] = []
    for index, values in enumerate(entries):
        fields = Fields(
            values, source=top.source, place=f"tiers[{index}]", known=_TIER_KEYS, required=("name",)
        )
        if index == 0:
            node_D = _node_groups(fields, node_D)
            group_D = node_D
        else:
            group_D = _outer_groups(fields, node_D, is_last=index == len(entries) - 1)
        tiers.append(_tier(fields, group_D, default_bandwidth_D(kinds, kind_D, index), is_node=index == 0))
    return tuple(tiers)


def block_node_D(blocks: list[Block]) -> IntArray:
    """Node of each device where every run is a node, ``[devices]``."""
    sizes = np.repeat([block.devices for block in blocks], [block.count for block in blocks])
    return np.repeat(np.arange(sizes.size, dtype=np.int64), sizes)


def _node_groups(fields: Fields, node_D: IntArray) -> IntArray:
    if "nodes" in fields:
        raise InputError(
            f"{fields.source}: {fields.at('nodes')} is given, but the first tier is inside each node; "
            "begin with a tier for the node, or use groups"
        )
    return _given_groups(fields, node_D.size, "device") if "groups" in fields else node_D


def _outer_groups(fields: Fields, node_D: IntArray, *, is_last: bool) -> IntArray:
    num_nodes = int(node_D.max()) + 1
    if "groups" in fields and "nodes" in fields:
        raise InputError(f"{fields.source}: {fields.place} gives both nodes and groups; keep one")
    if "groups" in fields:
        return _given_groups(fields, num_nodes, "node")[node_D]
    nodes_per_group = fields.integer("nodes")
    if nodes_per_group is not None:
        return node_D // nodes_per_group
    if not is_last:
        raise InputError(
            f"{fields.source}: {fields.at('nodes')} is missing; a tier between the first and the last says "
            "how many nodes a group has"
        )
    return np.zeros_like(node_D)


def _given_groups(fields: Fields, num_members: int, member: str) -> IntArray:
    groups = fields.integers("groups")
    if len(groups) != num_members:
        raise InputError(
            f"{fields.source}: {fields.at('groups')} has {len(groups)} numbers; "
            f"there are {num_members} {member}s"
        )
    if max(groups) >= num_members:
        raise InputError(
            f"{fields.source}: {fields.at('groups')} names group {max(groups)}; "
            f"{num_members} {member}s have at most groups 0..{num_members - 1}"
        )
    return np.array(groups, dtype=np.int64)


def default_bandwidth_D(kinds: list[DeviceKind], kind_D: IntArray, tier: int) -> FloatArray:
    """Data-sheet bandwidth of each device at a tier: scale-up link inside the node, adapter outside."""
    link = [kind.nic_bandwidth if tier else kind.scale_up_bandwidth for kind in kinds]
    return np.array(link, dtype=np.float64)[kind_D]


def _tier(fields: Fields, group_D: IntArray, default_D: FloatArray, *, is_node: bool) -> Tier:
    latency_us = fields.number("latency_us", zero=True)
    efficiency = fields.number("efficiency")
    if efficiency is not None and efficiency > 1:
        raise fields.wrong("efficiency", "a share of at most 1")
    latency_s = NODE_LATENCY_S if is_node else ACROSS_LATENCY_S
    return Tier(
        name=fields.text("name") or "",
        group_D=group_D,
        bandwidth_D=_bandwidth_D(fields, default_D),
        latency_s=latency_s if latency_us is None else latency_us / 1e6,
        bandwidth_efficiency=efficiency or (NODE_EFFICIENCY if is_node else ACROSS_EFFICIENCY),
        ports=fields.integer("ports"),
    )


def _bandwidth_D(fields: Fields, default_D: FloatArray) -> FloatArray:
    if not isinstance(fields.raw("bandwidth_gbps"), list):
        given = fields.number("bandwidth_gbps")
        return default_D if given is None else np.full(default_D.shape, given * GB)
    values = fields.items("bandwidth_gbps")
    if len(values) != default_D.size:
        raise InputError(
            f"{fields.source}: {fields.at('bandwidth_gbps')} has {len(values)} figures; "
            f"there are {default_D.size} devices"
        )
    numbers = [as_number(value) for value in values]
    for index, number in enumerate(numbers):
        if number is None or number <= 0:
            raise InputError(
                f"{fields.source}: {fields.at('bandwidth_gbps')}[{index}] must be a positive number, "
                f"not {brief(values[index])}"
            )
    return np.array(numbers, dtype=np.float64) * GB
