"""A region: servers on one optical circuit switch, each with some ports to it and some to packet switches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.errors import InfeasibleError, InputError

__all__ = ["OPTICAL_SWITCHES", "FabricRegion", "OpticalSwitch"]

BITS_PER_BYTE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class OpticalSwitch:
    """An optical circuit switch.

    Parameters
    ----------
    name
        What reports call it.
    ports
        Duplex ports.
    reconfiguration_s
        Time during which no circuit that changes carries data, seconds.

    Raises
    ------
    InputError
        If a figure is out of range.
    """

    name: str
    ports: int
    reconfiguration_s: float

    def __post_init__(self) -> None:
        if self.ports < 2:
            raise InputError(f"optical switch {self.name!r} has {self.ports} ports; it must be 2 or more")
        if not (math.isfinite(self.reconfiguration_s) and self.reconfiguration_s >= 0):
            raise InputError(
                f"optical switch {self.name!r} takes {self.reconfiguration_s} s to reconfigure; it must be "
                "finite and 0 or more"
            )


def _preset(name: str, ports: int, reconfiguration_s: float) -> OpticalSwitch:
    return OpticalSwitch(name=name, ports=ports, reconfiguration_s=reconfiguration_s)


# MixNet (arXiv 2501.03905), its table of switches; the slower end where it gives a range. "mixnet" is what
# its simulations assume. Telescent's robot takes "minutes": one minute here; the table lacks Palomar's delay.
OPTICAL_SWITCHES: dict[str, OpticalSwitch] = {
    switch.name: switch
    for switch in (
        _preset("mixnet", 500, 25e-3),
        _preset("telescent", 1008, 60.0),
        _preset("polatis", 576, 25e-3),
        _preset("calient", 320, 15e-3),
        _preset("rotornet", 128, 10e-6),
        _preset("lightmatter", 32, 7e-6),
        _preset("plzt", 16, 10e-9),
    )
}
"""Preset switches by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricRegion:
    """Servers of one expert-parallel group on one optical switch.

    Every link is full duplex and carries `link_gbits` in each direction.

    Parameters
    ----------
    num_servers
        Servers.
    ocs_ports, eps_ports
        Links of each server to the optical switch, and to packet switches that never block.
    link_gbits
        Rate of one link, Gb/s per direction.
    switch
        The optical switch.

    Raises
    ------
    InputError
        If a figure is out of range.
    InfeasibleError
        If the switch has too few ports for all servers.
    """

    num_servers: int
    ocs_ports: int = 6
    eps_ports: int = 2
    link_gbits: float = 400.0
    switch: OpticalSwitch = OPTICAL_SWITCHES["mixnet"]

    def __post_init__(self) -> None:
        for name, least in (("num_servers", 2), ("ocs_ports", 1), ("eps_ports", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        if not (math.isfinite(self.link_gbits) and self.link_gbits > 0):
            raise InputError(f"link_gbits is {self.link_gbits}; it must be positive and finite")
        self._check_switch()

    def _check_switch(self) -> None:
        needed, there = self.num_servers * self.ocs_ports, self.switch.ports
        if needed > there:
            raise InfeasibleError(
                f"{self.num_servers} servers x {self.ocs_ports} optical ports need {needed} ports, the "
                f"switch {self.switch.name} has {there}: {needed - there} are missing; it joins at most "
                f"{there // self.ocs_ports} such servers, or {self.num_servers} servers with "
                f"{there // self.num_servers} ports each"
            )

    @property
    def bytes_per_s(self) -> float:
        """Rate of one link, bytes per second and direction."""
        return self.link_gbits * 1e9 / BITS_PER_BYTE

    @property
    def ports(self) -> int:
        """Links of one server."""
        return self.ocs_ports + self.eps_ports
