"""How long an all-to-all takes on given circuits, exactly and in closed form.

A pair of servers with demand D and C circuits of rate B may send e bytes through the packet switches. The
shortest T with ``e_ij >= D_ij - B T C_ij`` and, for every server, ``sum_j e_ij <= eps B T`` out of it and
into it, is

    T = max over servers i and sets A of peers of  sum_A D_ij / (B (sum_A C_ij + eps)),

and the worst set is a prefix of the peers ordered by ``D_ij / C_ij``: no linear program is needed.

The demand may be directed (bytes from row to column; links are full duplex) or symmetric, where an entry is
what a pair sends and receives together, as in MixNet (arXiv 2501.03905, Algorithm 1).

Shape letters: S servers, N any number of rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from placement.planning.fabric.region import FabricRegion

__all__ = [
    "all_to_all_time",
    "check_circuits",
    "checked_demand",
    "optimal_split",
    "paired_demand",
    "row_times",
    "server_times",
    "unsplit_time",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def checked_demand(demand: npt.ArrayLike, *, num_servers: int) -> FloatArray:
    """Return demand as a matrix of floats with a zero diagonal: what stays on a server needs no link.

    Raises
    ------
    InputError
        If it is no square matrix of finite numbers of 0 or more for these servers.
    """
    demand_SS = np.array(demand, dtype=np.float64)
    if demand_SS.shape != (num_servers, num_servers):
        raise InputError(f"demand has shape {demand_SS.shape}, not [{num_servers}, {num_servers}]")
    bad = ~np.isfinite(demand_SS) | (demand_SS < 0)
    if bad.any():
        i, j = (int(index[0]) for index in np.nonzero(bad))
        raise InputError(f"demand from server {i} to {j} is {demand_SS[i, j]}; it must be finite, 0 or more")
    np.fill_diagonal(demand_SS, 0.0)
    return demand_SS


def paired_demand(demand_SS: FloatArray) -> FloatArray:
    """Return what every pair sends and receives together, the demand of MixNet's Algorithm 1."""
    return demand_SS + demand_SS.T


def check_circuits(circuits_SS: IntArray, region: FabricRegion) -> None:
    """Verify that circuits can be switched: whole, symmetric, within every server's ports.

    Raises
    ------
    InputError
        Naming what is wrong and where.
    """
    shape = (region.num_servers, region.num_servers)
    if circuits_SS.shape != shape or circuits_SS.dtype.kind not in "iu":
        raise InputError(
            f"circuits are {circuits_SS.dtype}{list(circuits_SS.shape)}, not whole {list(shape)}"
        )
    if (circuits_SS < 0).any() or circuits_SS.diagonal().any() or (circuits_SS != circuits_SS.T).any():
        raise InputError("circuits must be 0 or more, symmetric, and none from a server to itself")
    used_S = circuits_SS.sum(axis=1)
    server = int(used_S.argmax())
    if used_S[server] > region.ocs_ports:
        raise InputError(
            f"server {server} ends {used_S[server]} circuits and has {region.ocs_ports} optical ports"
        )


def row_times(circuits_NS: npt.NDArray[np.generic], demand_NS: FloatArray, *, eps_ports: int) -> FloatArray:
    """Return the shortest time of each row alone, in bytes per link rate, ``[...]``.

    Parameters
    ----------
    circuits_NS, demand_NS
        Circuits and bytes to every peer, ``[..., servers]``.
    eps_ports
        Links to packet switches.
    """
    circuits = np.broadcast_to(circuits_NS.astype(np.float64), demand_NS.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        alone = np.where(demand_NS > 0, demand_NS / circuits, -1.0)
    order = np.argsort(-alone, axis=-1, kind="stable")
    bytes_sum = np.cumsum(np.take_along_axis(demand_NS, order, axis=-1), axis=-1)
    links_sum = np.cumsum(np.take_along_axis(circuits, order, axis=-1), axis=-1) + eps_ports
    never = np.where(bytes_sum > 0, np.inf, 0.0)
    times = np.divide(bytes_sum, links_sum, out=never, where=links_sum > 0)
    return np.asarray(times.max(axis=-1))


def server_times(
    circuits_SS: npt.NDArray[np.generic], demand_SS: FloatArray, region: FabricRegion
) -> FloatArray:
    """Return the shortest time of each server alone, seconds, ``[..., servers]``; other axes are a batch."""
    sent = row_times(circuits_SS, demand_SS, eps_ports=region.eps_ports)
    received = row_times(circuits_SS, np.swapaxes(demand_SS, -1, -2), eps_ports=region.eps_ports)
    return np.maximum(sent, received) / region.bytes_per_s


def all_to_all_time(
    circuits_SS: IntArray, demand_SS: FloatArray, region: FabricRegion, *, split_SS: FloatArray | None = None
) -> float:
    """Return how long an all-to-all takes, seconds.

    Parameters
    ----------
    circuits_SS
        Circuits between servers, ``[servers, servers]``, symmetric.
    demand_SS
        Bytes from row to column, or of the pair where symmetric, ``[servers, servers]``.
    split_SS
        Bytes of the demand that go through the packet switches; the best split by default.

    Returns
    -------
    float
        Infinite where a pair has demand and neither circuits nor packet ports.
    """
    if split_SS is None:
        return float(server_times(circuits_SS, demand_SS, region).max())
    direct_SS = np.maximum(demand_SS - split_SS, 0.0)
    over_circuits = _quotient(direct_SS, circuits_SS.astype(np.float64))
    through_packets = max(
        _quotient(split_SS.sum(axis=axis), np.full(region.num_servers, float(region.eps_ports)))
        for axis in (0, 1)
    )
    return max(over_circuits, through_packets) / region.bytes_per_s


def unsplit_time(circuits_SS: IntArray, demand_SS: FloatArray, region: FabricRegion) -> float:
    """Return the time where a pair uses its circuits alone if it has any, as MixNet's own code sends."""
    split_SS = np.where(circuits_SS > 0, 0.0, demand_SS)
    return all_to_all_time(circuits_SS, demand_SS, region, split_SS=split_SS)


def optimal_split(circuits_SS: IntArray, demand_SS: FloatArray, region: FabricRegion) -> FloatArray:
    """Return the bytes of each pair that go through the packet switches in the shortest time."""
    time_s = all_to_all_time(circuits_SS, demand_SS, region)
    if not np.isfinite(time_s):
        return demand_SS.copy()
    return np.maximum(0.0, demand_SS - region.bytes_per_s * time_s * circuits_SS)


def _quotient(amount: FloatArray, links: FloatArray) -> float:
    """Return the largest amount per link; infinite where there is an amount and no link."""
    never = np.where(amount > 0, np.inf, 0.0)
    return float(np.divide(amount, links, out=never, where=links > 0).max())
