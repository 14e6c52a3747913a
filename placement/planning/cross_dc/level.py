"""The nested network over which devices talk, and where a device sits in it.

Levels run from outermost (data centres) to innermost, as HybridEP (arXiv 2510.19470) numbers them: with
scaling factors ``SF^0, SF^1, ..`` device m sits at ``x_i = floor(m / prod_{j>i} SF^j) mod SF^i``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from placement.errors import InputError
from placement.topology import MAX_DEVICES, Topology

__all__ = ["Level", "divisors", "levels_of", "location", "num_devices"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One level of the network.

    Parameters
    ----------
    name
        What its members are called: data centre, node, GPU.
    size
        Members of one group (the scaling factor ``SF^l``).
    bandwidth
        Of one device over this level, bytes per second and direction.
    latency_s
        Of one message, seconds; 0 as in the paper.

    Raises
    ------
    InputError
        If a figure is out of range; links without bandwidth connect nothing.
    """

    name: str
    size: int
    bandwidth: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise InputError("a level needs a name")
        if self.size < 1:
            raise InputError(f"level {self.name!r}: size is {self.size}; it must be 1 or more")
        if not (math.isfinite(self.bandwidth) and self.bandwidth > 0):
            raise InputError(
                f"level {self.name!r}: bandwidth is {self.bandwidth:g} bytes/s, so its {self.size} members "
                "are disconnected; give a positive bandwidth, or leave out members that no link reaches"
            )
        if not 0 <= self.latency_s < math.inf:
            raise InputError(f"level {self.name!r}: latency is {self.latency_s} s; it must be 0 or more")


def num_devices(levels: Sequence[Level]) -> int:
    """Return the devices of all levels together."""
    return math.prod(level.size for level in levels)


def divisors(number: int) -> tuple[int, ...]:
    """Return the divisors of a number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def location(device: int, levels: Sequence[Level]) -> tuple[int, ...]:
    """Return a device's coordinates, outermost first.

    Raises
    ------
    InputError
        If there is no such device.
    """
    if not 0 <= device < num_devices(levels):
        raise InputError(f"device {device} of {num_devices(levels)}")
    found, rest = [], device
    for level in reversed(levels):
        rest, coordinate = divmod(rest, level.size)
        found.append(coordinate)
    return tuple(reversed(found))


def levels_of(topology: Topology) -> tuple[Level, ...]:
    """Return a topology's tiers as levels: the outermost tier first, its bandwidth as all-to-alls achieve it.

    Raises
    ------
    InputError
        If a tier's groups are not all of one size: the levels of HybridEP are regular.
    """
    levels: list[Level] = []
    members = 1
    for tier in topology.tiers:
        sizes = tier.group_sizes
        if sizes.min() != sizes.max() or int(sizes[0]) % members:
            raise InputError(
                f"topology {topology.name!r}: groups of tier {tier.name!r} have {sizes.min()} to "
                f"{sizes.max()} devices; data centres are planned in groups of one size, so "
                "split it into equal groups"
            )
        size = int(sizes[0]) // members
        bandwidth = float(tier.effective_bandwidth_D.min())
        if size > 1:
            levels.append(Level(name=tier.name, size=size, bandwidth=bandwidth, latency_s=tier.latency_s))
        members *= size
    if not levels or members > MAX_DEVICES:
        raise InputError(f"topology {topology.name!r}: {members} devices; 2 to {MAX_DEVICES} can be planned")
    return tuple(reversed(levels))
