"""What the tokens of one layer add to the volume of a link's groups, as few patterns instead of many tokens.

Under de-duplicating dispatch a group receives a token once if any of the token's experts sits there. While
only some items may move, all that matters of a token is which of these it selects and which groups the others
touch already; tokens alike in both, in their window and in their home are counted together.

Shape letters: F free items, G groups, I items, K top-k, P patterns, T tokens, W windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.cost.links import Link
from placement.problem import Objective, PlacementProblem
from placement.profile import RoutingProfile
from placement.solvers.ilp.layer import LayerItems

__all__ = ["Patterns", "token_patterns"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Patterns:
    """Tokens of one layer grouped by the free items that they select, for one link.

    Parameters
    ----------
    selects_PF
        Free items of each pattern, ``[patterns, free items]``; at least one.
    volume_PGW
        What the pattern's tokens add to a free group and window if they touch it; nothing where items that
        stay touch it already, ``[patterns, free groups, windows]``.
    fixed_GW
        Volume by items that stay, ``[all groups, windows]``.
    """

    selects_PF: BoolArray
    volume_PGW: FloatArray
    fixed_GW: FloatArray


def token_patterns(
    problem: PlacementProblem, link: Link, items: LayerItems, free_items: IntArray, free_groups: IntArray
) -> Patterns:
    """Group the tokens of a one-layer problem without replicas.

    For `Objective.TRAFFIC` all tokens count, those after the last window too, as one window.

    Parameters
    ----------
    free_items
        Items that may move, by number.
    free_groups
        Groups of the link between which they may move.
    """
    profile = problem.profile
    assert profile.experts_TLK is not None
    window_T, weight_T, inside_T = _windows(problem)
    experts_TK = profile.experts_TLK[inside_T, 0].astype(np.int64)
    column_E, group_E = _columns(profile, link, items, free_items)
    touched_TG = _touched(group_E, experts_TK, link.num_groups)
    enter_TG = link.enter_HG[_home_rows(profile)[inside_T]] * weight_T[:, None]
    num_windows = int(window_T.max()) + 1
    fixed_GW = np.zeros((link.num_groups, num_windows))
    np.add.at(fixed_GW.T, window_T, np.where(touched_TG, enter_TG, 0.0))
    selects_TF = np.zeros((len(experts_TK), free_items.size + 1), dtype=np.bool_)
    np.put_along_axis(selects_TF, column_E[experts_TK], True, axis=1)
    selects_TF = selects_TF[:, :-1]
    any_T = selects_TF.any(axis=1)
    packed = np.packbits(selects_TF[any_T], axis=1)
    _, first, pattern_T = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    volume_PWG = np.zeros((first.size, num_windows, free_groups.size))
    added_TG = np.where(touched_TG, 0.0, enter_TG)[np.ix_(any_T, free_groups)]
    np.add.at(volume_PWG, (pattern_T.ravel(), window_T[any_T]), added_TG)
    return Patterns(
        selects_PF=selects_TF[any_T][first],
        volume_PGW=np.ascontiguousarray(volume_PWG.transpose(0, 2, 1)),
        fixed_GW=fixed_GW,
    )


def _windows(problem: PlacementProblem) -> tuple[IntArray, FloatArray, BoolArray]:
    """Window and real tokens of each sampled token that counts, and which ones do."""
    profile = problem.profile
    assert profile.window_of_token_T is not None
    if problem.objective is Objective.TRAFFIC:
        every = np.ones(profile.num_sampled_tokens, dtype=np.bool_)
        return np.zeros(every.size, dtype=np.int64), profile.token_weight_T, every
    inside_T = profile.window_of_token_T < profile.num_windows
    return profile.window_of_token_T[inside_T], profile.token_weight_T[inside_T], inside_T


def _home_rows(profile: RoutingProfile) -> IntArray:
    if profile.home_T is None:
        return np.zeros(profile.num_sampled_tokens, dtype=np.int64)
    return profile.home_T + 1


def _columns(
    profile: RoutingProfile, link: Link, items: LayerItems, free_items: IntArray
) -> tuple[IntArray, IntArray]:
    """Column of each free expert (one past the last for others), and group of each other one (else -1)."""
    column_E = np.full(profile.num_experts, free_items.size, dtype=np.int64)
    column_E[items.expert_I[free_items]] = np.arange(free_items.size)
    group_E = np.full(profile.num_experts, -1, dtype=np.int64)
    group_E[items.expert_I] = link.group_D[items.device_I]
    group_E[items.expert_I[free_items]] = -1
    return column_E, group_E


def _touched(group_E: IntArray, experts_TK: IntArray, num_groups: int) -> BoolArray:
    """Groups that the items which stay make each token touch, ``[tokens, groups]``."""
    touched = np.zeros((len(experts_TK), num_groups + 1), dtype=np.bool_)
    np.put_along_axis(touched, group_E[experts_TK], True, axis=1)
    return touched[:, :-1]
