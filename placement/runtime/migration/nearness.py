"""How far apart two ranks are, for the choice of a copy's source.

Shape letter: D devices.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from placement.topology import Topology

__all__ = ["distances"]

IntArray: TypeAlias = npt.NDArray[np.int64]


def distances(
    num_devices: int, *, topology: Topology | None = None, devices_per_node: int | None = None
) -> IntArray:
    """Tiers that two devices do not share, ``[devices, devices]``: 0 in one node, more further out.

    Parameters
    ----------
    topology
        Tiers; without it `devices_per_node` devices in order are a node, by default all of them.

    Raises
    ------
    InputError
        If the topology has another number of devices, or the nodes do not divide them.
    """
    if topology is not None:
        if topology.num_devices != num_devices:
            raise InputError(f"the placement has {num_devices} devices, the topology {topology.num_devices}")
        groups = [tier.group_D for tier in topology.tiers]
    else:
        per_node = devices_per_node or num_devices
        if per_node < 1 or num_devices % per_node:
            raise InputError(f"{num_devices} devices do not fill nodes of {per_node}; give a divisor")
        groups = [np.arange(num_devices) // per_node]
    apart = [group_D[:, None] != group_D[None, :] for group_D in groups]
    distance_DD: IntArray = np.sum(apart, axis=0, dtype=np.int64)
    return distance_DD
