"""How many groups of devices a layer's tokens touch at least, on average.

Shape letters: E experts, D devices, K top-k, T tokens, G groups, W windows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.bounds.loads import max_replicas
from placement.bounds.partition import Groups, relax
from placement.bounds.terms import Touches
from placement.problem import PlacementProblem
from placement.profile import RoutingProfile

__all__ = ["groups_of_link", "least_touches", "touches_of"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

WIDEST = 4
"""Relaxations are tried where the places, all groups as large as the largest, are at most so many times the
experts: beyond that, dummies rule."""


def groups_of_link(problem: PlacementProblem, group_D: IntArray) -> Groups:
    """Return groups of devices as equal groups, each as large as the largest."""
    slots_G = np.bincount(group_D, weights=problem.slots_D)
    slots = min(int(slots_G.max()), problem.num_experts)
    # On one device all slots but the experts' stay empty.
    spare_slots = problem.num_slots - problem.num_experts if max_replicas(problem) > 1 else 0
    spare_slots = min(spare_slots, slots_G.size * slots - problem.num_experts)
    return Groups(
        num_groups=int(slots_G.size), slots=slots, num_experts=problem.num_experts, spare_slots=spare_slots
    )


def touches_of(
    profile: RoutingProfile,
    layer: int,
    groups: Groups,
    *,
    inside_only: bool,
    cost_per_touch: float = 1.0,
    floor_W: FloatArray | None = None,
) -> Touches:
    """Return the touches of a layer's tokens as a term.

    Parameters
    ----------
    inside_only
        Leave out the tail of the trace, which belongs to no window.
    cost_per_touch
        What one touch of one real token costs.
    floor_W
        What each window's touches cost at least for some other reason; nothing by default.
    """
    assert profile.experts_TLK is not None
    assert profile.window_of_token_T is not None
    tokens = slice(0, len(profile.experts_TLK))
    if inside_only:
        tokens = slice(0, int(np.searchsorted(profile.window_of_token_T, profile.num_windows)))
    floors = np.zeros(profile.num_windows + 1)
    if floor_W is not None:
        floors[:-1] = floor_W
    return Touches(
        experts_TK=profile.experts_TLK[tokens, layer],
        weight_T=profile.token_weight_T[tokens] * cost_per_touch,
        window_T=profile.window_of_token_T[tokens],
        floor_W=floors,
        num_experts=groups.num_experts,
        most_mates=min(groups.slots, profile.top_k) - 1,
    )


def least_touches(
    problem: PlacementProblem, layer: int, groups: Groups, *, inside_only: bool, steps: int
) -> float:
    """Bound the mean number of groups that a layer's tokens touch.

    Parameters
    ----------
    groups
        Groups of devices.
    inside_only
        Leave out the tail of the trace, which belongs to no window.
    steps
        Eigenvalue decompositions to spend.
    """
    least = float(-(-problem.profile.top_k // groups.slots))
    if groups.num_groups == 1 or groups.num_places > WIDEST * groups.num_experts:
        return least
    tokens = touches_of(problem.profile, layer, groups, inside_only=inside_only)
    total = float(tokens.weight_T.sum())
    return max(least, relax([tokens], groups, steps=steps) / total)
