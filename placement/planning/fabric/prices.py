"""What fabrics cost: components at list prices, counted as MixNet's published calculator counts them.

Prices and counts: MixNet (arXiv 2501.03905) and the data of its project page. Its script forgets to bill the
packet-switch ports of MixNet itself; they are billed here, without which the paper's own cost ratio (2.0 on
average, 2.3 at 400 Gb/s) does not come out. Like the script, one optical port is billed for every network
adapter, also for those that go to packet switches.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from placement.errors import InputError
from placement.planning.fabric.region import FabricRegion

__all__ = ["PRICES", "FabricKind", "Prices", "fabric_cost", "nearest_generation", "prices_of"]

PORTS_PER_ADAPTER = 6
"""Packet-switch ports that one adapter takes in a fat-tree of three tiers, after MixNet's calculator."""

FIBRE_M = 500
"""Length of a fibre, metres, after MixNet's calculator."""


class FabricKind(StrEnum):
    """A network between servers."""

    MIXNET = "mixnet"
    """Optical circuits that are switched, and some packet ports."""
    FAT_TREE = "fat-tree"
    """Packet switches that never block."""
    RAIL = "rail-optimised"
    """The same number of switches, one leaf per rail."""
    OVERSUBSCRIBED = "oversubscribed"
    """A fat-tree with too few uplinks."""
    STATIC = "static circuits"
    """Circuits over patch panels that are set once, as TopoOpt's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Dollars for one of each component at one link rate."""

    transceiver: float
    adapter: float
    packet_port: float
    optical_port: float
    panel_port: float
    fibre_per_m: float = 0.3

    @property
    def fibre(self) -> float:
        """One fibre of the usual length."""
        return FIBRE_M * self.fibre_per_m


def _prices(transceiver: float, adapter: float, packet_port: float) -> Prices:
    return Prices(
        transceiver=transceiver, adapter=adapter, packet_port=packet_port, optical_port=520, panel_port=100
    )


# MixNet (arXiv 2501.03905), component table: dollars per unit by link rate in Gb/s.
PRICES: dict[int, Prices] = {
    100: _prices(99, 659, 187),
    200: _prices(239, 1079, 374),
    400: _prices(659, 1499, 1090),
    800: _prices(1399, 2248, 1400),
}
"""Prices by link rate, Gb/s."""


def prices_of(generation: int) -> Prices:
    """Return the prices of a link rate.

    Raises
    ------
    InputError
        If there are none.
    """
    if generation not in PRICES:
        raise InputError(f"no prices for links of {generation} Gb/s; known: {', '.join(map(str, PRICES))}")
    return PRICES[generation]


def nearest_generation(link_gbits: float) -> int:
    """Return the priced link rate that is nearest, the lower one of two."""
    return min(PRICES, key=lambda generation: (abs(generation - link_gbits), generation))


def fabric_cost(
    kind: FabricKind, region: FabricRegion, prices: Prices, *, oversubscription: float = 1.0
) -> float:
    """Return what the network of a region's servers costs, dollars.

    Parameters
    ----------
    oversubscription
        For an oversubscribed tree: what leaves an adapter keeps its port, all tiers above shrink by this
        factor (ours; the calculator has no such tree).
    """
    adapters = region.num_servers * region.ports
    if kind is FabricKind.STATIC:
        each = prices.adapter + prices.transceiver + prices.panel_port + prices.fibre
        return adapters * each
    if kind is FabricKind.MIXNET:
        return _mixnet_cost(region, prices)
    ports = float(PORTS_PER_ADAPTER * adapters)
    if kind is FabricKind.OVERSUBSCRIBED:
        ports = adapters + (ports - adapters) / oversubscription
    return adapters * prices.adapter + _tree_cost(ports, adapters, prices)


def _tree_cost(ports: float, adapters: int, prices: Prices) -> float:
    transceivers = ports + adapters
    return ports * prices.packet_port + transceivers * prices.transceiver + transceivers / 2 * prices.fibre


def _mixnet_cost(region: FabricRegion, prices: Prices) -> float:
    adapters = region.num_servers * region.ports
    packet_ports = PORTS_PER_ADAPTER * region.num_servers * region.eps_ports
    fibres = packet_ports / 2 + region.num_servers * region.ocs_ports
    return (
        adapters * (prices.adapter + prices.optical_port)
        + packet_ports * prices.packet_port
        + (packet_ports + adapters) * prices.transceiver
        + fibres * prices.fibre
    )
