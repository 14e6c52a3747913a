"""Bounds on the exchanges of step time: in each window, and in the mean over windows.

A group of devices receives, at the least, an equal share of what all groups receive together; a token with k
experts touches at least ``ceil(k / slots)`` groups, and on average as many as `touches.least_touches` proves;
the group of a window's hottest expert receives all of its tokens.

Shape letters: W windows, L layers, E experts, D devices, K top-k, T tokens, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.bounds.curves import convex_minorant, tangent
from placement.bounds.hops import least_hops
from placement.bounds.loads import max_replicas
from placement.bounds.partition import Groups
from placement.bounds.terms import Touches
from placement.bounds.touched import groups_of_link, least_touches, touches_of
from placement.calibration import PiecewiseLinear
from placement.cost import CostModel
from placement.cost.links import Link
from placement.problem import PlacementProblem, Semantics
from placement.profile import RoutingProfile

__all__ = [
    "Entering",
    "entering_of",
    "exchange_floors",
    "has_one_line",
    "joint_exchange",
    "least_mean_exchange",
    "least_mean_moves",
    "least_mean_volumes",
    "link_of_devices",
]

FloatArray = npt.NDArray[np.float64]


def exchange_floors(model: CostModel) -> FloatArray:
    """Bound the exchanges of each window and layer, ``[windows, layers]``."""
    problem = model.problem
    profile = problem.profile
    bound_WL = np.zeros((profile.num_windows, profile.num_layers))
    if problem.semantics is Semantics.STAY_PUT:
        first = 0 if profile.home_T is not None else 1
        for link in model.links:
            # At the least nothing moves; the phase itself is run all the same.
            bound_WL[:, first:] = np.maximum(bound_WL[:, first:], link.dispatch(0.0))
        return bound_WL
    volumes = [_volume_floors(problem, link) for link in model.links]
    for phase in ("dispatch", "combine"):
        curves: list[PiecewiseLinear] = [getattr(link, phase) for link in model.links]
        bound_WL += np.max([curve(v) for curve, v in zip(curves, volumes, strict=True)], axis=0)
    return bound_WL


def _volume_floors(problem: PlacementProblem, link: Link) -> FloatArray:
    """Bound what the fullest group of a link receives in each window and layer."""
    profile, semantics = problem.profile, problem.semantics
    if semantics is Semantics.ALLGATHER:
        volume_W = profile.window_tokens_W * float(link.enter_HG[0].max())
        return np.repeat(volume_W[:, None], profile.num_layers, axis=1)
    enter = _least_entering(profile, link)
    single = max_replicas(problem) == 1
    if semantics is Semantics.DISPATCH_NODEDUP:
        pairs_WL = profile.load_WLE.sum(axis=2)
        if profile.home_T is not None:
            pairs_WL = np.broadcast_to(profile.top_k * _sampled_windows(profile)[:, None], pairs_WL.shape)
        volume_WL = pairs_WL * enter / link.num_groups
        if single and profile.home_T is None:
            volume_WL = np.maximum(volume_WL, profile.load_WLE.max(axis=2) * enter)
        return np.asarray(volume_WL)
    tokens_WL = np.repeat(_sampled_windows(profile)[:, None], profile.num_layers, axis=1)
    touched = -(-profile.top_k // groups_of_link(problem, link.group_D).slots)
    entering = entering_of(profile, link)
    paid_WL = np.maximum(tokens_WL * touched - entering.free_W[:, None], 0.0)
    volume_WL = paid_WL * (entering.per_touch / link.num_groups)
    if single:
        # All tokens of the hottest expert go to its one group.
        volume_WL = np.maximum(volume_WL, _hottest_loads(profile) * enter)
    return np.asarray(volume_WL)


def _least_entering(profile: RoutingProfile, link: Link) -> float:
    """Return the least that a token (or pair) adds to a group that it needs.

    With homes known a token may live where it goes, and a group may receive nothing.
    """
    enter_G = link.enter_HG.min(axis=0) if profile.home_T is not None else link.enter_HG[0]
    return float(enter_G.min())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entering:
    """What tokens add to the groups that they touch: ``per_touch`` for each, save for some that are free.

    Parameters
    ----------
    per_touch
        Least volume of a touch that is not free.
    free_W
        Touches of each window that may be free: one of each token whose home is known, for it may lie in
        a group that the token touches.
    """

    per_touch: float
    free_W: FloatArray


def entering_of(profile: RoutingProfile, link: Link) -> Entering:
    """Return what tokens add to the groups that they touch under dispatch."""
    free_W = np.zeros(profile.num_windows)
    if profile.home_T is None:
        return Entering(per_touch=float(link.enter_HG[0].min()), free_W=free_W)
    home_H = np.unique(profile.home_T)
    away_HG = link.group_D[home_H][:, None] != np.arange(link.num_groups)
    # A token of unknown home enters every group in part.
    away_HG |= home_H[:, None] < 0
    enter_HG = link.enter_HG[home_H + 1]
    if float(enter_HG.min()) > 0:
        return Entering(per_touch=float(enter_HG.min()), free_W=free_W)
    assert profile.window_of_token_T is not None
    known_T = profile.token_weight_T * (profile.home_T >= 0)
    count_W = np.bincount(profile.window_of_token_T, weights=known_T, minlength=profile.num_windows + 1)
    free_W = np.asarray(count_W[:-1], dtype=np.float64)
    per_touch = float(enter_HG.min(where=away_HG, initial=np.inf))
    return Entering(per_touch=per_touch if np.isfinite(per_touch) else 0.0, free_W=free_W)


def least_mean_volumes(model: CostModel, layer: int, *, steps: int) -> list[float]:
    """Bound the mean over windows of what each link's fullest group receives under dispatch."""
    problem = model.problem
    tokens = float(_sampled_windows(problem.profile).mean())
    volumes = []
    for link in model.links:
        entering = entering_of(problem.profile, link)
        groups = groups_of_link(problem, link.group_D)
        touched = 0.0
        if entering.per_touch > 0:
            touched = least_touches(problem, layer, groups, inside_only=True, steps=steps)
        paid = max(0.0, touched * tokens - float(entering.free_W.mean()))
        volumes.append(paid * entering.per_touch / link.num_groups)
    return volumes


def least_mean_exchange(model: CostModel, volume_J: Sequence[float]) -> float:
    """Bound the mean over windows of a layer's exchanges, given bounds on the links' mean volumes."""
    total = 0.0
    for phase in ("dispatch", "combine"):
        curves: list[PiecewiseLinear] = [getattr(link, phase) for link in model.links]
        total += max(float(convex_minorant(c)(v)) for c, v in zip(curves, volume_J, strict=True))
    return total


def least_mean_moves(model: CostModel, layer: int, *, steps: int) -> float:
    """Bound the mean over windows of a layer's dispatch of stay-put tokens, from the layer before."""
    if layer == 0:
        return 0.0
    problem = model.problem
    tokens = float(_sampled_windows(problem.profile).mean())
    best = 0.0
    for link in model.links:
        groups = groups_of_link(problem, link.group_D)
        hops = least_hops(problem, layer, groups, inside_only=True, steps=steps)
        elsewhere = link.group_D[:, None] != np.arange(link.num_groups)
        enter = float(link.enter_HG[1:].min(where=elsewhere, initial=np.inf))
        if hops > 0:
            volume = hops * tokens * enter / link.num_groups
            best = max(best, float(convex_minorant(link.dispatch)(volume)))
    return best


def link_of_devices(model: CostModel) -> Link | None:
    """Return the link whose groups are single devices, if there is one."""
    singles = [link for link in model.links if link.num_groups == model.problem.num_devices]
    return singles[0] if singles else None


def has_one_line(model: CostModel) -> bool:
    """Whether exchanges cost a line in the volume of the fullest device, so that nothing else bounds them."""
    if len(model.links) > 1 or model.links[0].num_groups != model.problem.num_devices:
        return False
    return all(_is_line(curve) for curve in (model.links[0].dispatch, model.links[0].combine))


def _is_line(curve: PiecewiseLinear) -> bool:
    slopes = np.diff(curve.y) / np.diff(curve.x)
    return bool((slopes == slopes[0]).all())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JointExchange:
    """A layer's exchanges as a term that depends on which experts share a device.

    Parameters
    ----------
    constant
        To be added to `term`.
    term, groups
        Touches of devices, and the devices.
    """

    constant: float
    term: Touches
    groups: Groups


def joint_exchange(
    model: CostModel, layer: int, *, floor_W: FloatArray, near_J: Sequence[float]
) -> JointExchange | None:
    """Return a layer's exchanges under dispatch as a term of which experts share a device.

    The term lies below their mean over windows, on a line below the curves of both phases.

    Parameters
    ----------
    floor_W
        What the exchanges of each window cost at least.
    near_J
        Mean volume of each link at which to touch its curves; at 0 if left out.

    Returns
    -------
    JointExchange or None
        None if no link enters single devices, or entering them costs nothing more.
    """
    problem, profile = model.problem, model.problem.profile
    link = link_of_devices(model)
    if link is None:
        return None
    near = near_J[model.links.index(link)] if near_J else 0.0
    lines = [tangent(convex_minorant(curve), near) for curve in (link.dispatch, link.combine)]
    intercept, slope = (float(sum(column)) for column in zip(*lines, strict=True))
    entering = entering_of(profile, link)
    per_touch = slope * entering.per_touch / (link.num_groups * profile.num_windows)
    if per_touch == 0.0:
        return None
    groups = groups_of_link(problem, link.group_D)
    # Free touches are paid for here and given back in the constant.
    free_W = per_touch * entering.free_W
    above_W = np.maximum(floor_W - intercept, 0.0) / profile.num_windows + free_W
    term = touches_of(profile, layer, groups, inside_only=True, cost_per_touch=per_touch, floor_W=above_W)
    return JointExchange(constant=intercept - float(free_W.sum()), term=term, groups=groups)


def _sampled_windows(profile: RoutingProfile) -> FloatArray:
    """Real tokens that each window's sampled tokens stand for: none where none was sampled, ``[windows]``."""
    assert profile.window_of_token_T is not None
    count_W = np.bincount(
        profile.window_of_token_T, weights=profile.token_weight_T, minlength=profile.num_windows + 1
    )
    return np.asarray(count_W[:-1], dtype=np.float64)


def _hottest_loads(profile: RoutingProfile) -> FloatArray:
    """Tokens of each window's hottest expert, ``[windows, layers]``.

    Counted on the sampled tokens, as the volumes of an exchange are, not on the exact loads.
    """
    assert profile.experts_TLK is not None
    assert profile.window_of_token_T is not None
    num_windows, num_experts = profile.num_windows, profile.num_experts
    row_T = profile.window_of_token_T * num_experts
    weight = np.repeat(profile.token_weight_T, profile.top_k)
    hottest_WL = np.empty((num_windows, profile.num_layers))
    for layer in range(profile.num_layers):
        cell = (row_T[:, None] + profile.experts_TLK[:, layer].astype(np.int64)).ravel()
        count = np.bincount(cell, weights=weight, minlength=(num_windows + 1) * num_experts)
        hottest_WL[:, layer] = count.reshape(-1, num_experts)[:num_windows].max(axis=1)
    return hottest_WL
