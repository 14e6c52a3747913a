"""The best circuits and split at once, as a mixed-integer linear program.

``D_ij <= B T C_ij + e_ij`` multiplies two unknowns. Divided by T, with ``u = 1/T`` and ``f = e/T``, it is
linear: maximise u so that ``D_ij u <= B C_ij + f_ij`` with ``sum_j C_ij <= alpha`` and
``sum_j f_ij <= eps B`` at every server, both ways.

Shape letters: S servers, P pairs of servers, Q directed pairs with demand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.planning.fabric.bounds import counting_bound
from placement.planning.fabric.completion import FloatArray, IntArray, all_to_all_time
from placement.planning.fabric.region import FabricRegion

__all__ = ["ExactCircuits", "exact_circuits"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExactCircuits:
    """What the program gave.

    Parameters
    ----------
    circuits_SS
        Its best circuits, ``[servers, servers]``; the start's where it found no better ones.
    lower_bound_s
        No circuits of this region are faster, seconds.
    """

    circuits_SS: IntArray
    lower_bound_s: float


def exact_circuits(
    demand_SS: FloatArray,
    region: FabricRegion,
    *,
    start_SS: IntArray,
    node_limit: int = 2000,
    time_limit_s: float | None = None,
) -> ExactCircuits:
    """Return the best circuits that a program finds, and a bound on all.

    Parameters
    ----------
    demand_SS
        Bytes, directed or of pairs, ``[servers, servers]``.
    start_SS
        Circuits to start from.
    node_limit, time_limit_s
        Where the search ends without a proof. Only a time limit makes the result depend on the machine.

    Raises
    ------
    BackendError
        If the solver fails.
    """
    start_s = all_to_all_time(start_SS, demand_SS, region)
    bound_s = counting_bound(demand_SS, region)
    if not demand_SS.any() or start_s <= bound_s or not np.isfinite(start_s):
        return ExactCircuits(circuits_SS=start_SS, lower_bound_s=min(bound_s, start_s))
    program = _Program(demand_SS, region, bound_s=bound_s, start_SS=start_SS, start_s=start_s)
    return program.solve(node_limit=node_limit, time_limit_s=time_limit_s)


class _Program:
    """Demand is in units of what one link carries within the lower bound, so that u is at most 1."""

    def __init__(
        self,
        demand_SS: FloatArray,
        region: FabricRegion,
        *,
        bound_s: float,
        start_SS: IntArray,
        start_s: float,
    ) -> None:
        self.demand_SS, self.region = demand_SS, region
        self.bound_s, self.start_SS, self.start_s = bound_s, start_SS, start_s
        self.relative_SS = demand_SS / (region.bytes_per_s * bound_s)
        self.first_P, self.second_P = np.triu_indices(region.num_servers, 1)
        directed = not np.array_equal(demand_SS, demand_SS.T)
        wanted_SS = self.relative_SS > 0
        self.from_Q, self.to_Q = np.nonzero(wanted_SS if directed else np.triu(wanted_SS))
        self.directed = directed

    def solve(self, *, node_limit: int, time_limit_s: float | None) -> ExactCircuits:
        """Run the program and recompute what it claims."""
        from placement.solvers.milp import MilpBuilder, solve_milp

        builder = MilpBuilder()
        region, relative_SS = self.region, self.relative_SS
        # In the best time that can be, more circuits than carry all of a pair's bytes are never needed.
        most_SS = np.minimum(region.ocs_ports, np.ceil(np.maximum(relative_SS, relative_SS.T) - 1e-9))
        pace = builder.add_variables(1, objective=-1.0, lower=self.bound_s / self.start_s, upper=1.0)
        circuits_P = builder.add_variables(
            self.first_P.size, upper=most_SS[self.first_P, self.second_P], integer=True
        )
        packets_Q = builder.add_variables(self.from_Q.size, upper=float(region.eps_ports))
        column_SS = np.zeros(relative_SS.shape, dtype=np.int64)
        column_SS[self.first_P, self.second_P] = circuits_P
        column_SS += column_SS.T
        builder.add_rows(
            (np.broadcast_to(pace, (self.from_Q.size, 1)), relative_SS[self.from_Q, self.to_Q][:, None]),
            (column_SS[self.from_Q, self.to_Q][:, None], -1.0),
            (packets_Q[:, None], -1.0),
            upper=0.0,
        )
        for server in range(region.num_servers):
            peers = np.delete(column_SS[server], server)
            builder.add_rows((peers, 1.0), upper=float(region.ocs_ports))
            for packets in self._packets_of(server, packets_Q):
                if packets.size:
                    builder.add_rows((packets, 1.0), upper=float(region.eps_ports))
        result = solve_milp(
            builder.build(start_V=self._start()),
            node_limit=node_limit,
            time_limit_s=time_limit_s,
            in_process=True,
        )
        found_SS = self.start_SS
        if result.value_V is not None:
            found_SS = np.rint(result.value_V[column_SS]).astype(np.int64)
            np.fill_diagonal(found_SS, 0)
        # The solver's bound is believed as far as our own point confirms that it is one.
        found_s = all_to_all_time(found_SS, self.demand_SS, region)
        if found_s > self.start_s:
            found_SS, found_s = self.start_SS, self.start_s
        bound_s = self.bound_s / min(1.0, -result.bound)
        return ExactCircuits(circuits_SS=found_SS, lower_bound_s=min(bound_s, found_s))

    def _packets_of(self, server: int, packets_Q: IntArray) -> tuple[IntArray, ...]:
        leaving, entering = self.from_Q == server, self.to_Q == server
        if self.directed:
            return packets_Q[leaving], packets_Q[entering]
        return (packets_Q[leaving | entering],)

    def _start(self) -> FloatArray:
        pace = self.bound_s / self.start_s
        circuits_P = self.start_SS[self.first_P, self.second_P]
        direct_Q = self.start_SS[self.from_Q, self.to_Q]
        packets_Q = np.maximum(0.0, pace * self.relative_SS[self.from_Q, self.to_Q] - direct_Q)
        return np.concatenate([[pace], circuits_P, packets_Q])
