"""Turns topology, model and calibration into the links over which an exchange is charged.

The exchange of one MoE layer enters nested groups of devices: a node, then a device in it. A link is one
tier; its groups are those of the tier inside it (devices for the innermost). A token that needs a group and
lives outside it enters it once, carried by the group's devices in equal shares (each device forwards what
arrives on its own rail). With homes unknown, a token lives on every device alike, so it lies outside a
group of m of D devices with probability 1 - m / D.

Shape letters: D devices, G groups of a link, H homes (row 0: unknown; row 1 + d: device d).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.calibration import Calibration, PiecewiseLinear
from placement.model import ModelShape
from placement.problem import PlacementProblem, Semantics
from placement.topology import Topology

__all__ = ["Link", "counting_link", "links_of"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Link:
    """One tier as an exchange sees it.

    Parameters
    ----------
    name
        Tier.
    group_D
        Group that each device belongs to, ``[devices]``; a group is entered once per token (or pair).
    enter_HG
        What one token (or pair) that needs a group adds to the group's received volume, by home,
        ``[1 + devices, groups]``; in tokens per device, at the bandwidth of the tier's best device.
    dispatch, combine
        Time of a phase against the volume of the fullest group.
    """

    name: str
    group_D: IntArray
    enter_HG: FloatArray
    dispatch: PiecewiseLinear
    combine: PiecewiseLinear

    @property
    def num_groups(self) -> int:
        """Groups of the link."""
        return int(self.enter_HG.shape[1])


def counting_link(num_devices: int) -> Link:
    """Return a link that counts the devices that tokens touch, for the traffic objective."""
    return Link(
        name="device",
        group_D=np.arange(num_devices),
        enter_HG=np.ones((1 + num_devices, num_devices)),
        dispatch=PiecewiseLinear.line(intercept=0.0, slope=1.0),
        combine=PiecewiseLinear.line(intercept=0.0, slope=0.0),
    )


def links_of(problem: PlacementProblem) -> tuple[Link, ...]:
    """Return the links of a problem's exchanges, innermost first.

    Under `Semantics.DISPATCH_NODEDUP` a pair travels to its device directly, so the groups of every link
    are single devices.
    """
    topology = problem.topology
    if problem.calibration.flat:
        return (_flat_link(problem.calibration, problem.model, topology),)
    per_device = problem.semantics is Semantics.DISPATCH_NODEDUP
    inner = [np.arange(topology.num_devices), *(tier.group_D for tier in topology.tiers[:-1])]
    links = []
    for tier, group_D in zip(topology.tiers, inner, strict=True):
        bandwidth_D = tier.effective_bandwidth_D
        enter_HG = _enter(group_D, bandwidth_D.max() / bandwidth_D, per_device=per_device)
        links.append(
            Link(
                name=tier.name,
                group_D=np.arange(topology.num_devices) if per_device else group_D,
                enter_HG=enter_HG,
                dispatch=problem.calibration.exchange_curve(tier, problem.model, phase="dispatch"),
                combine=problem.calibration.exchange_curve(tier, problem.model, phase="combine"),
            )
        )
    return tuple(links)


def _flat_link(calibration: Calibration, model: ModelShape | None, topology: Topology) -> Link:
    """Every distinct token (or pair) received costs the same, whatever tier or home."""
    num_devices = topology.num_devices
    tier = topology.tiers[0]
    return Link(
        name="device",
        group_D=np.arange(num_devices),
        enter_HG=np.ones((1 + num_devices, num_devices)),
        dispatch=calibration.exchange_curve(tier, model, phase="dispatch"),
        combine=calibration.exchange_curve(tier, model, phase="combine"),
    )


def _enter(group_D: IntArray, slowness_D: FloatArray, *, per_device: bool) -> FloatArray:
    num_devices = group_D.size
    size_G = np.bincount(group_D)
    group_of_column = group_D if per_device else np.arange(size_G.size)
    # A group is as fast as its slowest device; its devices carry equal shares.
    share_G = np.zeros(size_G.size)
    np.maximum.at(share_G, group_D, slowness_D)
    share = slowness_D if per_device else share_G / size_G
    outside = np.empty((1 + num_devices, group_of_column.size))
    outside[0] = 1.0 - size_G[group_of_column] / num_devices
    outside[1:] = group_D[:, None] != group_of_column[None, :]
    return outside * share[None, :]
