"""One tier of the network: which devices share it, and its bandwidth and latency.

Shape letter: D devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from placement._arrays import FloatArray, IntArray, frozen_floats, frozen_ints
from placement.errors import InputError

__all__ = ["ACROSS_EFFICIENCY", "ACROSS_LATENCY_S", "NODE_EFFICIENCY", "NODE_LATENCY_S", "Tier"]

NODE_LATENCY_S = 50e-6
"""Launch and latency of one collective phase inside a node, seconds: an all-to-all of a few kB takes
0.053 ms over NVLink on two H100."""

ACROSS_LATENCY_S = 100e-6
"""The same through network adapters, seconds."""

NODE_EFFICIENCY = 0.55
"""Share of the nominal bandwidth that expert-parallel all-to-alls achieve inside a node: 250 of 450 GB/s on
two H100."""

ACROSS_EFFICIENCY = 0.45
"""The same across nodes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tier:
    """One level of the network.

    Parameters
    ----------
    name
        What it is called: node, rack, cluster.
    group_D
        Group of each device at this tier, ``[devices]``, numbered from 0 without holes: at tier "node" the
        node, at the outermost tier 0 for all.
    bandwidth_D
        Nominal bandwidth of each device over this tier, bytes per second and direction, ``[devices]``.
    latency_s
        Latency of one collective phase over this tier, seconds.
    bandwidth_efficiency
        Share of the bandwidth that an all-to-all achieves, in (0, 1]; 1 where `bandwidth_D` was measured.
    ports
        Links of one inner group (a device for the innermost tier, a node for the next) to this tier; None
        where unknown. Used by fabric planning only.

    Raises
    ------
    InputError
        On wrong shapes, group numbers with holes, or figures out of range.
    """

    name: str
    group_D: IntArray
    bandwidth_D: FloatArray
    latency_s: float
    bandwidth_efficiency: float = 1.0
    ports: int | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        if not self.name.strip():
            raise InputError("a tier needs a name")
        set_(self, "group_D", frozen_ints(self.group_D, name=f"group_D of tier {self.name!r}"))
        set_(self, "bandwidth_D", frozen_floats(self.bandwidth_D, name=f"bandwidth_D of tier {self.name!r}"))
        self._check()

    def _check(self) -> None:
        if self.bandwidth_D.shape != self.group_D.shape:
            raise InputError(
                f"tier {self.name!r} gives {self.bandwidth_D.size} bandwidths for {self.group_D.size} devices"
            )
        used = np.unique(self.group_D)
        if used[0] != 0 or used[-1] != used.size - 1:
            raise InputError(
                f"groups of tier {self.name!r} must be numbered 0..{used.size - 1} without holes, "
                f"not {used[0]}..{used[-1]}"
            )
        if not 0 <= self.latency_s < float("inf"):
            raise InputError(f"latency of tier {self.name!r} is {self.latency_s} s; it must be 0 or more")
        if not 0 < self.bandwidth_efficiency <= 1:
            raise InputError(
                f"efficiency of tier {self.name!r} is {self.bandwidth_efficiency}; it must lie in (0, 1]"
            )
        if self.ports is not None and self.ports < 1:
            raise InputError(f"tier {self.name!r} has {self.ports} ports; it must be 1 or more")

    @property
    def num_groups(self) -> int:
        """Groups at this tier."""
        return int(self.group_D.max()) + 1

    @cached_property
    def group_sizes(self) -> IntArray:
        """Devices in each group, ``[groups]``."""
        return np.bincount(self.group_D, minlength=self.num_groups).astype(np.int64)

    @cached_property
    def effective_bandwidth_D(self) -> FloatArray:
        """Bandwidth that an all-to-all achieves, bytes per second and direction, ``[devices]``."""
        return self.bandwidth_D * self.bandwidth_efficiency
