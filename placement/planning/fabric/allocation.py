"""Circuits for one demand: every method's, the best of them, and how far from the best possible it can be.

Shape letters: S servers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.errors import InfeasibleError
from placement.planning.fabric.bounds import counting_bound
from placement.planning.fabric.completion import (
    FloatArray,
    IntArray,
    all_to_all_time,
    check_circuits,
    checked_demand,
    optimal_split,
    unsplit_time,
)
from placement.planning.fabric.exact import exact_circuits
from placement.planning.fabric.greedy import balanced_greedy, code_greedy, published_greedy
from placement.planning.fabric.region import FabricRegion
from placement.planning.fabric.search import improve_circuits

__all__ = ["MOST_EXACT_SERVERS", "Allocation", "Effort", "allocate_circuits"]

MOST_EXACT_SERVERS = 32
"""Largest region for which the program is solved; above it only the search and the counting bound run."""

CLOSED = 1e-9
"""Relative gap at which circuits count as the best there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to look for circuits.

    Parameters
    ----------
    nodes
        Nodes of the exact program's search tree; 0 to leave the program out.
    time_limit_s
        Safety limit of one program; None for none. An answer that it ends depends on the machine.
    """

    nodes: int = 500
    time_limit_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Allocation:
    """Circuits and split for one demand.

    Parameters
    ----------
    circuits_SS
        Circuits between servers, ``[servers, servers]``, symmetric.
    split_SS
        Bytes that go through the packet switches, ``[servers, servers]``.
    time_s
        How long the all-to-all takes, by `all_to_all_time`.
    lower_bound_s
        No circuits of this region are faster.
    method
        Which method found the circuits.
    time_of_method_s
        Time of every method's circuits. ``published`` and ``published code`` send a pair's bytes over its
        circuits alone if it has any, as MixNet does; all others split them in the best way.
    """

    circuits_SS: IntArray
    split_SS: FloatArray
    time_s: float
    lower_bound_s: float
    method: str
    time_of_method_s: Mapping[str, float]

    @property
    def gap(self) -> float:
        """Share of the time that a better answer could save at most."""
        return 0.0 if self.time_s == 0 else (self.time_s - self.lower_bound_s) / self.time_s

    @property
    def published_s(self) -> float:
        """Time of MixNet's own answer: Algorithm 1, no split."""
        return self.time_of_method_s["published"]


def allocate_circuits(
    demand: npt.ArrayLike,
    region: FabricRegion,
    *,
    effort: Effort | None = None,
    start_SS: IntArray | None = None,
) -> Allocation:
    """Allocate circuits for a demand: the best of all methods, so never slower than the published greedy.

    Parameters
    ----------
    demand
        Bytes from row to column, or of the pair where symmetric, ``[servers, servers]``.
    effort
        How long to look.
    start_SS
        Circuits that are up; the answer is not slower than they are.

    Raises
    ------
    InputError
        If the demand or the start does not fit the region.
    InfeasibleError
        If pairs have demand and the region can give them neither circuits nor packet ports.
    """
    effort = Effort() if effort is None else effort
    demand_SS = checked_demand(demand, num_servers=region.num_servers)
    greedy = {
        "published": published_greedy(demand_SS, ocs_ports=region.ocs_ports),
        "published code": code_greedy(demand_SS, ocs_ports=region.ocs_ports),
        "balanced": balanced_greedy(demand_SS, ocs_ports=region.ocs_ports),
    }
    time_of_method_s = {
        "published": unsplit_time(greedy["published"], demand_SS, region),
        "published code": unsplit_time(greedy["published code"], demand_SS, region),
    }
    found = {
        "published, split": greedy["published"],
        "balanced": greedy["balanced"],
    }
    if start_SS is not None:
        check_circuits(start_SS, region)
        found["kept"] = start_SS
    found["search"] = _searched([*greedy.values(), *found.values()], demand_SS, region)
    lower_bound_s = counting_bound(demand_SS, region)
    best_s = all_to_all_time(found["search"], demand_SS, region)
    if effort.nodes and region.num_servers <= MOST_EXACT_SERVERS and best_s > lower_bound_s * (1 + CLOSED):
        exact = exact_circuits(
            demand_SS,
            region,
            start_SS=found["search"],
            node_limit=effort.nodes,
            time_limit_s=effort.time_limit_s,
        )
        found["exact"] = exact.circuits_SS
        lower_bound_s = max(lower_bound_s, exact.lower_bound_s)
    time_of_method_s |= {
        name: all_to_all_time(circuits_SS, demand_SS, region) for name, circuits_SS in found.items()
    }
    method = min(found, key=lambda name: time_of_method_s[name])
    time_s = time_of_method_s[method]
    if not np.isfinite(time_s):
        raise _unconnected(demand_SS, region)
    return Allocation(
        circuits_SS=found[method],
        split_SS=optimal_split(found[method], demand_SS, region),
        time_s=time_s,
        lower_bound_s=min(lower_bound_s, time_s),
        method=method,
        time_of_method_s=time_of_method_s,
    )


def _searched(starts: list[IntArray], demand_SS: FloatArray, region: FabricRegion) -> IntArray:
    """Return the best circuits that the search finds from several starts."""
    improved = [improve_circuits(start_SS, demand_SS, region) for start_SS in starts]
    return min(improved, key=lambda circuits_SS: all_to_all_time(circuits_SS, demand_SS, region))


def _unconnected(demand_SS: FloatArray, region: FabricRegion) -> InfeasibleError:
    peers_S = ((demand_SS + demand_SS.T) > 0).sum(axis=1)
    server = int(peers_S.argmax())
    return InfeasibleError(
        f"server {server} talks to {peers_S[server]} peers, and no circuits were found that join all pairs "
        f"that talk with {region.ocs_ports} optical ports and no packet port per server; give every server a "
        f"packet port, or {peers_S[server]} optical ports"
    )
