"""The cluster: devices of some kinds, and the nested tiers (node, rack, cluster) over which they talk.

Shape letter: D devices. Devices are numbered through all nodes in order. Tiers run from innermost to
outermost: two devices in the same group of a tier, but of different groups of the tier inside it, talk
over that tier.

A topology is written as a shorthand, ``KIND:NODESxDEVICES`` joined by ``+`` (``h100:2x8``,
``a40:1x2+v100:1x2``), or as a YAML file::

    name: two-racks                   # default: the file's name
    device_kinds:                     # optional: kinds of your own, or presets with other figures
      h100-slow-nic:
        base: h100                    # a preset; without it every figure below must be given
        bf16_tflops: 989              # dense peak
        measured_tflops: 794          # achieved; else the base's, or 75 % of a peak given here
        memory_gib: 80
        memory_bandwidth_tbps: 3.35   # TB/s
        scale_up_gbps: 450            # GB/s per direction into a device inside its node
        nic_gbits: 200                # Gb/s of network per device
    nodes:
      - kind: h100-slow-nic           # of device_kinds, or a preset
        devices: 8                    # in each node
        count: 8                      # such nodes; default 1
        slots: 34                     # optional: experts that fit on each device per layer
        memory_gib: 40                # optional: memory for experts on each device
    tiers:                            # optional; default: node, and cluster where there are several nodes
      - name: node                    # the first tier: inside each node
        bandwidth_gbps: 450           # GB/s per device and direction; default: the kind's scale-up link.
        latency_us: 50                #   or a list, one figure per device
        efficiency: 0.55              # achieved share of the bandwidth
      - name: rack
        nodes: 4                      # nodes per group, in order; or groups: [..], one number per node
        bandwidth_gbps: 25            # default: the kind's network adapter
      - name: cluster                 # the last tier joins all nodes
        latency_us: 100
        ports: 8                      # optional: links of one group inside (here a rack) to this tier
    optical_switch: {ports: 500, reconfiguration_ms: 25}   # optional; kept as it is

Where one node mixes kinds, give each kind an entry of ``nodes`` and ``groups`` on the first tier: one node
number per device.
"""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from placement._arrays import FloatArray, IntArray, frozen_ints
from placement._fields import load_yaml, read_text
from placement.devices import DeviceKind, device_kind
from placement.errors import InputError
from placement.tier import Tier

__all__ = [
    "MAX_DEVICES",
    "DeviceKind",
    "Tier",
    "Topology",
    "parse_shorthand",
    "parse_topology",
]

MAX_DEVICES = 1_000_000
"""Largest topology that is accepted; more is a slip of the pen."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Topology:
    """A cluster of devices.

    Parameters
    ----------
    name
        What reports call it.
    kinds, kind_of_device_D
        Kinds of device, and the index into them of each device, ``[devices]``.
    tiers
        Innermost to outermost; the last one joins all devices.
    slots_D
        Experts that fit on each device per layer, ``[devices]``; None where the solver may choose.
    memory_bytes_D
        Memory for experts on each device, bytes, ``[devices]``; None for the kinds' memory.
    optical_switch
        Description of an optical circuit switch, kept as it was given.

    Raises
    ------
    InputError
        On inconsistent shapes, tiers that do not nest or do not join all devices, or names given twice.
    """

    name: str
    kinds: tuple[DeviceKind, ...]
    kind_of_device_D: IntArray
    tiers: tuple[Tier, ...]
    slots_D: IntArray | None = None
    memory_bytes_D: IntArray | None = None
    optical_switch: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "kinds", tuple(self.kinds))
        set_(self, "tiers", tuple(self.tiers))
        set_(self, "kind_of_device_D", frozen_ints(self.kind_of_device_D, name="kind_of_device_D"))
        for name in ("slots_D", "memory_bytes_D"):
            if getattr(self, name) is not None:
                set_(self, name, frozen_ints(getattr(self, name), name=name))
        if self.optical_switch is not None:
            set_(self, "optical_switch", copy.deepcopy(dict(self.optical_switch)))
        self._check_devices()
        self._check_tiers()

    def _check_devices(self) -> None:
        if self.num_devices > MAX_DEVICES:
            raise InputError(f"{self.num_devices} devices; at most {MAX_DEVICES} are accepted")
        if not self.kinds:
            raise InputError("a topology needs a device kind")
        _check_unique([kind.name for kind in self.kinds], what="device kind")
        if self.kind_of_device_D.min() < 0 or self.kind_of_device_D.max() >= len(self.kinds):
            raise InputError(f"kind_of_device_D must lie within 0..{len(self.kinds) - 1}")
        for name, least in (("slots_D", 0), ("memory_bytes_D", 1)):
            limit_D = getattr(self, name)
            if limit_D is None:
                continue
            if limit_D.shape != self.kind_of_device_D.shape:
                raise InputError(f"{name} names {limit_D.size} devices, not {self.num_devices}")
            if limit_D.min() < least:
                device = int(limit_D.argmin())
                raise InputError(
                    f"{name} of device {device} is {limit_D[device]}; it must be {least} or more"
                )

    def _check_tiers(self) -> None:
        if not self.tiers:
            raise InputError("a topology needs a tier")
        _check_unique([tier.name for tier in self.tiers], what="tier")
        for tier in self.tiers:
            if tier.group_D.size != self.num_devices:
                raise InputError(
                    f"tier {tier.name!r} names {tier.group_D.size} devices, the topology {self.num_devices}"
                )
        for inner, outer in itertools.pairwise(self.tiers):
            _check_nested(inner, outer)
        last = self.tiers[-1]
        if last.num_groups > 1:
            raise InputError(
                f"the last tier {last.name!r} has {last.num_groups} groups; add a tier that joins all devices"
            )

    @property
    def num_devices(self) -> int:
        """Devices."""
        return int(self.kind_of_device_D.size)

    @property
    def num_tiers(self) -> int:
        """Tiers."""
        return len(self.tiers)

    @property
    def node_of_device_D(self) -> IntArray:
        """Node (group of the innermost tier) of each device, ``[devices]``."""
        return self.tiers[0].group_D

    @property
    def num_nodes(self) -> int:
        """Nodes (groups of the innermost tier)."""
        return self.tiers[0].num_groups

    @property
    def group_sizes(self) -> tuple[IntArray, ...]:
        """Devices in each group, for every tier."""
        return tuple(tier.group_sizes for tier in self.tiers)

    @cached_property
    def achieved_flops_D(self) -> FloatArray:
        """Achieved FLOP/s of each device, ``[devices]``."""
        return np.array([kind.achieved_flops for kind in self.kinds])[self.kind_of_device_D]

    @cached_property
    def memory_bandwidth_D(self) -> FloatArray:
        """Memory bandwidth of each device, bytes per second, ``[devices]``."""
        return np.array([kind.memory_bandwidth for kind in self.kinds])[self.kind_of_device_D]

    @cached_property
    def expert_memory_bytes_D(self) -> IntArray:
        """Memory for experts on each device: `memory_bytes_D`, or the kinds' memory, ``[devices]``."""
        if self.memory_bytes_D is not None:
            return self.memory_bytes_D
        return np.array([kind.memory_bytes for kind in self.kinds], dtype=np.int64)[self.kind_of_device_D]

    @property
    def is_homogeneous(self) -> bool:
        """True where all devices are alike: kind, limits, bandwidths, and group sizes at every tier."""
        limits = [limit for limit in (self.slots_D, self.memory_bytes_D) if limit is not None]
        bandwidths = [tier.bandwidth_D for tier in self.tiers]
        arrays = (self.kind_of_device_D, *limits, *bandwidths, *self.group_sizes)
        return all(bool((array == array[0]).all()) for array in arrays)

    def kind_of(self, device: int) -> DeviceKind:
        """Return the kind of a device."""
        return self.kinds[int(self.kind_of_device_D[device])]

    def tier_between(self, a: int, b: int) -> int | None:
        """Return the index of the tier over which two devices talk; None for a device and itself.

        Raises
        ------
        InputError
            If there is no such device.
        """
        for device in (a, b):
            if not 0 <= device < self.num_devices:
                raise InputError(f"device {device} of {self.num_devices}")
        if a == b:
            return None
        return next(i for i, tier in enumerate(self.tiers) if tier.group_D[a] == tier.group_D[b])

    def to_dict(self) -> dict[str, Any]:
        """Return the topology in the schema of the YAML file; `from_dict` reads it back."""
        from placement._topology_write import topology_to_dict

        return topology_to_dict(self)

    @classmethod
    def from_dict(cls, values: object, *, source: str = "topology") -> Topology:
        """Build a topology from the schema of the YAML file; `source` starts every error message.

        Raises
        ------
        InputError
            On an unknown key, a wrong type or an inconsistent value, with its place.
        """
        from placement._topology_read import topology_from_dict

        return topology_from_dict(values, source=source)


def _check_unique(names: list[str], *, what: str) -> None:
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(f"{what} {twice!r} is given twice")


def _check_nested(inner: Tier, outer: Tier) -> None:
    _, first_device = np.unique(inner.group_D, return_index=True)
    stray = np.nonzero(outer.group_D != outer.group_D[first_device][inner.group_D])[0]
    if stray.size:
        device = int(stray[0])
        raise InputError(
            f"group {inner.group_D[device]} of tier {inner.name!r} is split over groups of tier "
            f"{outer.name!r} (device {device}); every group must lie inside one group of the next tier"
        )


_PART = re.compile(r"(?P<kind>[^:+]+):(?P<nodes>-?\d+)[x*](?P<devices>-?\d+)", re.IGNORECASE)


def _shorthand_part(part: str, text: str) -> dict[str, Any]:
    match = _PART.fullmatch(part)
    if match is None:
        raise InputError(
            f"topology {text!r}: {part!r} is not KIND:NODESxDEVICES; write for example h100:2x8 "
            "(2 nodes of 8), a40:1x2+v100:1x2, or name a .yaml file"
        )
    nodes, devices = match["nodes"], match["devices"]
    if max(len(nodes), len(devices)) > 18 or int(nodes) * int(devices) > MAX_DEVICES:
        raise InputError(f"topology {text!r}: {nodes} x {devices} is more than {MAX_DEVICES} devices")
    if int(nodes) < 1 or int(devices) < 1:
        raise InputError(f"topology {text!r}: {nodes} x {devices} devices; both counts must be 1 or more")
    return {"kind": device_kind(match["kind"]).name, "devices": int(devices), "count": int(nodes)}


def parse_shorthand(text: str) -> Topology:
    """Build a topology from ``KIND:NODESxDEVICES`` joined by ``+``; touches no file.

    One node gives the single tier "node", several nodes the tiers "node" and "cluster".

    Raises
    ------
    InputError
        If the text is malformed, a kind is unknown, or a count is not in range.
    """
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    compact = "".join(text.split()).lower()
    nodes = [_shorthand_part(part, shown) for part in compact.split("+")]
    return Topology.from_dict({"name": compact, "nodes": nodes}, source=f"topology {shown!r}")


def parse_topology(text_or_path: str | os.PathLike[str]) -> Topology:
    """Build a topology from a YAML file or the shorthand ``KIND:NODESxDEVICES``.

    A text that names an existing file, or ends in ``.yaml`` or ``.yml``, is a path.

    Raises
    ------
    InputError
        If the file cannot be read or a value in it is wrong (with its place), or the shorthand is
        malformed.
    """
    text = os.fspath(text_or_path)
    is_path = not isinstance(text_or_path, str) or text.lower().endswith((".yaml", ".yml"))
    if not is_path and not os.path.isfile(text):
        return parse_shorthand(text)
    values = load_yaml(read_text(text, what="topology file"), source=text)
    if isinstance(values, dict):
        values.setdefault("name", os.path.splitext(os.path.basename(text))[0])
    return Topology.from_dict(values, source=text)
