"""Local search on circuits: the server that finishes last gets a circuit, its old ends are joined anew.

A move adds a circuit between the last server and a peer. Where an end has no port free it gives up a circuit;
the two ends that lost one are joined with each other. A move is made only where all the servers that it
touches end up earlier than the last server was: the time falls, or fewer servers take it.

Shape letters: S servers, N moves, M servers that a move touches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from placement.planning.fabric.completion import FloatArray, IntArray, row_times, server_times
from placement.planning.fabric.region import FabricRegion

__all__ = ["improve_circuits"]

MOST_PEERS = 12
"""Peers that the last server tries to be joined with, those with most bytes on packet switches first."""

LEAST_GAIN = 1e-9
"""Relative gain below which a move is not made; rounding gains less."""

NOBODY = -1

Move = tuple[int, int, int, int]
"""Last server, its new peer, and the servers that they give up; `NOBODY` where a port was free."""


def improve_circuits(
    circuits_SS: IntArray, demand_SS: FloatArray, region: FabricRegion, *, max_moves: int = 500
) -> IntArray:
    """Return circuits that take no longer than those given, by moves of one or two circuits.

    Parameters
    ----------
    circuits_SS
        Circuits to start from, ``[servers, servers]``.
    demand_SS
        Bytes, directed or of pairs, ``[servers, servers]``.
    max_moves
        Moves after which to stop.
    """
    circuits_SS = circuits_SS.copy()
    for _ in range(max_moves):
        time_S = server_times(circuits_SS, demand_SS, region)
        move = _best_move(circuits_SS, demand_SS, region, time_S)
        if move is None:
            break
        _apply(circuits_SS, move)
    return circuits_SS


def _best_move(
    circuits_SS: IntArray, demand_SS: FloatArray, region: FabricRegion, time_S: FloatArray
) -> Move | None:
    last = int(time_S.argmax())
    if time_S[last] == 0:
        return None
    moves = list(_moves(circuits_SS, demand_SS, region, last))
    if not moves:
        return None
    after_NM = _times_after(circuits_SS, demand_SS, region, moves)
    worst_N = after_NM.max(axis=1)
    # Where all pairs with the least worst time tie, the sum decides, and then the order of the moves.
    best = int(np.lexsort((after_NM.sum(axis=1), worst_N))[0])
    return moves[best] if worst_N[best] < time_S[last] * (1 - LEAST_GAIN) else None


def _moves(circuits_SS: IntArray, demand_SS: FloatArray, region: FabricRegion, last: int) -> Iterator[Move]:
    free_S = region.ocs_ports - circuits_SS.sum(axis=1)
    per_circuit_S = np.maximum(demand_SS[last], demand_SS[:, last]) / (circuits_SS[last] + 1)
    peers = [int(peer) for peer in np.argsort(-per_circuit_S, kind="stable") if per_circuit_S[peer] > 0]
    for peer in peers[:MOST_PEERS]:
        for mine in _given_up(circuits_SS, free_S, last, but=peer):
            for theirs in _given_up(circuits_SS, free_S, peer, but=last):
                yield last, peer, mine, theirs


def _given_up(circuits_SS: IntArray, free_S: IntArray, server: int, *, but: int) -> list[int]:
    """Return whose circuit a server can give up for a new one; nobody's where it has a port free."""
    if free_S[server] > 0:
        return [NOBODY]
    return [int(other) for other in np.nonzero(circuits_SS[server])[0] if other != but]


def _changes(move: Move) -> list[tuple[int, int, int]]:
    """Return the pairs whose circuits change, and by how much."""
    last, peer, mine, theirs = move
    changes = [(last, peer, 1)]
    if mine != NOBODY:
        changes.append((last, mine, -1))
    if theirs != NOBODY:
        changes.append((peer, theirs, -1))
    if NOBODY not in (mine, theirs) and mine != theirs:
        changes.append((mine, theirs, 1))
    return changes


def _apply(circuits_SS: IntArray, move: Move) -> None:
    for a, b, change in _changes(move):
        circuits_SS[a, b] += change
        circuits_SS[b, a] += change


def _times_after(
    circuits_SS: IntArray, demand_SS: FloatArray, region: FabricRegion, moves: list[Move]
) -> FloatArray:
    """Return the times of the servers that each move touches, ``[moves, 4]``."""
    # Whoever is not there is replaced by the last server, which is touched anyhow.
    server_NM = np.array([[s if s != NOBODY else move[0] for s in move] for move in moves])
    rows_NMS = circuits_SS[server_NM]
    for index, move in enumerate(moves):
        for place, server in enumerate(server_NM[index]):
            for a, b, change in _changes(move):
                if server == a:
                    rows_NMS[index, place, b] += change
                if server == b:
                    rows_NMS[index, place, a] += change
    sent = row_times(rows_NMS, demand_SS[server_NM], eps_ports=region.eps_ports)
    received = row_times(rows_NMS, demand_SS.T[server_NM], eps_ports=region.eps_ports)
    return np.maximum(sent, received) / region.bytes_per_s
