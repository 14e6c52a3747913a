"""What communication costs on alike devices: all-to-all, all-reduce, and sends between stages.

A group of devices has `count` members, every `stride`-th device in a row. How many of them share a node, a
rack and so on decides what crosses which tier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from placement.calibration import Calibration, PiecewiseLinear
from placement.errors import InputError
from placement.model_shape import ModelShape
from placement.planning.parallelism.strategy import Exchange
from placement.tier import Tier
from placement.topology import Topology

__all__ = ["MESSAGE_S", "Level", "Network", "members_per_level", "network_of"]

MESSAGE_S = 10e-6
"""What one message between two devices of different nodes costs beside its bytes, seconds: the latency of a
point-to-point message in NVIDIA's aiconfigurator."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Level:
    """One tier, all of whose groups have the same size.

    Parameters
    ----------
    name, size
        Its name, and the devices in each group.
    bandwidth
        Bytes per second and direction that a device achieves over it.
    latency_s
        Launch and latency of one collective phase, seconds.
    dispatch, combine
        Seconds of one exchange against the tokens that a device receives over it.
    """

    name: str
    size: int
    bandwidth: float
    latency_s: float
    dispatch: PiecewiseLinear
    combine: PiecewiseLinear

    def round_trip_s(self, tokens: float) -> float:
        """Return the seconds of dispatch and combine; nothing where nothing travels."""
        return float(self.dispatch(tokens) + self.combine(tokens)) if tokens > 0 else 0.0


def members_per_level(sizes: Sequence[int], *, count: int, stride: int) -> tuple[int, ...]:
    """Return how many members of a group share one group of each level, in the worst place.

    Groups of devices follow each other without gaps, so where neither size divides the other a group may
    begin anywhere on multiples of the greatest common divisor.
    """
    span = count * stride
    members = []
    for size in sizes:
        if size % span == 0:
            members.append(count)
        else:
            members.append(max(1, math.gcd(span, size) // stride))
    return tuple(members)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Network:
    """Levels of a topology, innermost to outermost.

    Parameters
    ----------
    levels
        The levels; the last one joins all devices.
    message_s
        What one message over the network costs beside its bytes, seconds.
    """

    levels: tuple[Level, ...]
    message_s: float = MESSAGE_S

    @property
    def node_size(self) -> int:
        """Devices of a node."""
        return self.levels[0].size

    def members(self, *, count: int, stride: int) -> tuple[int, ...]:
        """Return how many members of a group share one group of each level."""
        return members_per_level([level.size for level in self.levels], count=count, stride=stride)

    def exchange_s(self, pairs: float, *, count: int, stride: int, exchange: Exchange) -> float:
        """Return the seconds in which tokens go to their experts and come back: two all-to-alls.

        Flat: the slower of the node's links and the network's, which carries a message to each remote
        device. Hierarchical: ``max(T_I, T_II + T_III)`` with T_I the exchange inside the node, T_II the
        packed one between nodes, and T_III the redistribution of what arrived (Piper's HALO, arXiv
        2605.05049; the formula is ours).

        Parameters
        ----------
        pairs
            Token-expert pairs that the fullest device receives, its own included.
        """
        members = self.members(count=count, stride=stride)
        outside = [pairs * (count - inner) / count for inner in (1, *members[:-1])]
        node = self.levels[0]
        local_s = node.round_trip_s(outside[0] - (outside[1] if len(outside) > 1 else 0.0))
        if members[0] == count:
            return local_s
        # Whatever leaves the node passes the adapters, however far it goes.
        network_s = max(
            level.round_trip_s(tokens) for level, tokens in zip(self.levels[1:], outside[1:], strict=True)
        )
        if exchange is Exchange.FLAT:
            messages = count - members[0]
            return max(local_s, network_s + 2.0 * messages * self.message_s)
        messages = count // members[0] - 1
        scatter_s = node.round_trip_s(outside[1]) if members[0] > 1 else 0.0
        return max(local_s, network_s + 2.0 * messages * self.message_s + scatter_s)

    def all_reduce_s(self, num_bytes: float, *, count: int, stride: int) -> float:
        """Return the seconds of an all-reduce: rings inside each level, on the part that is left to it.

        A ring over n members moves ``2 (n - 1) / n`` of the bytes through each; the next level then
        reduces 1/n of them.
        """
        seconds, left, before = 0.0, num_bytes, 1
        for level, within in zip(self.levels, self.members(count=count, stride=stride), strict=True):
            ways = within / before
            if ways > 1:
                seconds += 2.0 * (ways - 1) / ways * left / level.bandwidth + 2.0 * level.latency_s
                left, before = left / ways, within
        return seconds

    def send_s(self, num_bytes: float, *, source: int, target: int) -> float:
        """Return the seconds in which one device sends bytes to another one."""
        level = next(level for level in self.levels if source // level.size == target // level.size)
        return level.latency_s + num_bytes / level.bandwidth


def network_of(
    topology: Topology, calibration: Calibration, model: ModelShape, *, message_s: float = MESSAGE_S
) -> Network:
    """Return the levels of a topology of alike devices.

    Raises
    ------
    InputError
        If devices differ, or the calibration has no seconds.
    """
    if not topology.is_homogeneous:
        raise InputError(
            f"topology {topology.name!r} mixes devices or sizes of nodes, and a mesh takes them for alike; "
            "use plan hetero"
        )
    if calibration.unit != "s":
        raise InputError(
            f"the calibration counts in {calibration.unit!r}, not in seconds; leave it out for the data "
            "sheet's curves, or measure some with calibrate"
        )
    levels = [
        _level(tier, int(sizes[0]), calibration, model)
        for tier, sizes in zip(topology.tiers, topology.group_sizes, strict=True)
    ]
    for device_D, level in zip([tier.group_D for tier in topology.tiers], levels, strict=True):
        if (device_D != np.arange(topology.num_devices) // level.size).any():
            raise InputError(
                f"groups of tier {level.name!r} of topology {topology.name!r} are not consecutive devices"
            )
    return Network(levels=tuple(levels), message_s=message_s)


def _level(tier: Tier, size: int, calibration: Calibration, model: ModelShape) -> Level:
    return Level(
        name=tier.name,
        size=size,
        bandwidth=float(tier.effective_bandwidth_D[0]),
        latency_s=tier.latency_s,
        dispatch=calibration.exchange_curve(tier, model, phase="dispatch"),
        combine=calibration.exchange_curve(tier, model, phase="combine"),
    )
