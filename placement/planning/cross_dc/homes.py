"""Where each expert lives: the data centre that uses it most, as far as room and links allow.

Shape letters: L MoE layers, C data centres, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from placement.errors import InfeasibleError
from placement.planning.cross_dc.solve import CrossSolution, Effort, solve_cross
from placement.planning.cross_dc.traffic import CrossTraffic, FloatArray, IntArray

__all__ = ["choose_homes", "most_local_homes", "relieved_homes"]

MOST_SWAPS = 500
"""Swaps per layer after which the search of homes ends."""


def most_local_homes(tokens_CE: FloatArray, room_C: IntArray) -> IntArray:
    """Return the homes that keep the most tokens where they are, ``[experts]``: an assignment problem.

    Parameters
    ----------
    tokens_CE
        Tokens of one layer, ``[centres, experts]``.
    room_C
        Experts that each data centre is home to at most; enough in all.
    """
    centre_of_place = np.repeat(np.arange(room_C.size), room_C)
    place, expert = linear_sum_assignment(tokens_CE[centre_of_place], maximize=True)
    home_E = np.empty(tokens_CE.shape[1], dtype=np.int64)
    home_E[expert] = centre_of_place[place]
    return home_E


def relieved_homes(tokens_CE: FloatArray, home_E: IntArray, token_s_C: FloatArray) -> IntArray:
    """Return homes after swaps that relieve the fullest link while all tokens travel.

    Each swap exchanges an expert of the data centre whose link is busiest with one of another's.
    """
    home_E = home_E.copy()
    for _ in range(MOST_SWAPS):
        time_C = _exchange_s_C(tokens_CE, home_E, token_s_C)
        slow = int(time_C.argmax())
        swap = _best_swap(tokens_CE, home_E, token_s_C, slow)
        if swap is None or swap[0] >= time_C[slow] * (1 - 1e-9):
            break
        _, a, b = swap
        home_E[[a, b]] = home_E[[b, a]]
    return home_E


def _exchange_s_C(tokens_CE: FloatArray, home_E: IntArray, token_s_C: FloatArray) -> FloatArray:
    centres = tokens_CE.shape[0]
    kept_CE = np.where(np.arange(centres)[:, None] == home_E, tokens_CE, 0.0)
    received_C = np.bincount(home_E, tokens_CE.sum(axis=0), minlength=centres) - kept_CE.sum(axis=1)
    sent_C = tokens_CE.sum(axis=1) - kept_CE.sum(axis=1)
    return np.asarray(np.maximum(received_C, sent_C) * token_s_C)


def _best_swap(
    tokens_CE: FloatArray, home_E: IntArray, token_s_C: FloatArray, slow: int
) -> tuple[float, int, int] | None:
    """Return the swap after which the slower of the two links is fastest: its time and both experts."""
    mine, theirs = np.nonzero(home_E == slow)[0], np.nonzero(home_E != slow)[0]
    if not (mine.size and theirs.size):
        return None
    centres = tokens_CE.shape[0]
    total_E = tokens_CE.sum(axis=0)
    kept_CE = np.where(np.arange(centres)[:, None] == home_E, tokens_CE, 0.0)
    kept_C = kept_CE.sum(axis=1)
    hosted_C = np.bincount(home_E, total_E, minlength=centres)
    used_C = tokens_CE.sum(axis=1)
    a, b = mine[:, None], theirs[None, :]
    other = home_E[b]

    def link_s(centre: IntArray | int, leaving: IntArray, coming: IntArray) -> FloatArray:
        kept = kept_C[centre] - tokens_CE[centre, leaving] + tokens_CE[centre, coming]
        hosted = hosted_C[centre] - total_E[leaving] + total_E[coming]
        return np.asarray(np.maximum(hosted - kept, used_C[centre] - kept) * token_s_C[centre])

    worst = np.maximum(link_s(slow, a, b), link_s(other, b, a))
    first, second = np.unravel_index(int(worst.argmin()), worst.shape)
    return float(worst[first, second]), int(mine[first]), int(theirs[second])


def _candidates(traffic: CrossTraffic, layer: int, room_C: IntArray) -> Iterator[IntArray]:
    tokens_CE, given_E = traffic.tokens_LCE[layer], traffic.home_LE[layer]
    yield given_E
    local_E = most_local_homes(tokens_CE, room_C)
    yield local_E
    yield relieved_homes(tokens_CE, local_E, traffic.token_s_C)


def choose_homes(
    traffic: CrossTraffic, *, room: int | None = None, effort: Effort | None = None
) -> tuple[CrossTraffic, CrossSolution]:
    """Choose the homes of all experts and who prefetches what; never worse than with the homes given.

    Parameters
    ----------
    traffic
        Routing, with homes to start from.
    room
        Experts of a layer that a data centre is home to at most; None for the fewest that house all, or
        as many as the fullest has now.

    Returns
    -------
    The traffic with the homes that were chosen, and the solution.

    Raises
    ------
    InfeasibleError
        If the rooms do not house all experts.
    """
    fullest = max(int(np.bincount(home_E).max()) for home_E in traffic.home_LE)
    most = max(fullest, -(-traffic.num_experts // traffic.num_centres)) if room is None else room
    if most * traffic.num_centres < traffic.num_experts:
        raise InfeasibleError(
            f"{traffic.num_centres} data centres with room for {most} experts of a layer house "
            f"{most * traffic.num_centres} of {traffic.num_experts}; give each room for "
            f"{-(-traffic.num_experts // traffic.num_centres)}"
        )
    room_C = np.full(traffic.num_centres, most, dtype=np.int64)
    home_LE = np.empty_like(traffic.home_LE)
    for layer in range(traffic.num_layers):
        one = traffic.layer(layer)
        tried = [replace(one, home_LE=home_E[None]) for home_E in _candidates(traffic, layer, room_C)]
        quick = Effort(starts=1, node_limit=0)
        best = min(tried, key=lambda trial: solve_cross(trial, effort=quick).step_s)
        home_LE[layer] = best.home_LE[0]
    moved = replace(traffic, home_LE=home_LE)
    before, after = solve_cross(traffic, effort=effort), solve_cross(moved, effort=effort)
    return (moved, after) if after.step_s < before.step_s else (traffic, before)
