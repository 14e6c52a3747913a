"""Lower bounds on the objective that no placement can beat, computed without any solver.

Every bound holds for the windows, costs and slots of the problem, whatever the placement:

- a device carries at least the mean; the hottest expert's device at least that expert (split over as many
  replicas as spare slots allow) and, with all slots filled, the coldest experts beside it; of the
  ``j * D + 1`` hottest experts some device holds ``j + 1``;
- a token with k experts touches at least ``ceil(k / slots)`` devices, and the co-activation that a
  partition into equal parts can keep inside them is at most Donath and Hoffman's eigenvalue bound
  (IBM J. Res. Dev. 17, 1973), tightened over a diagonal.

Shape letters: W windows, L layers, E experts, D devices, K top-k, T tokens, G groups.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.bounds.inside import most_inside
from placement.bounds.value import LowerBound
from placement.calibration import PiecewiseLinear
from placement.cost import CostModel
from placement.cost.links import Link
from placement.problem import Objective, PlacementProblem, Risk, Semantics
from placement.profile import RoutingProfile

__all__ = ["lower_bound"]

FloatArray = npt.NDArray[np.float64]


def lower_bound(model: CostModel) -> LowerBound:
    """Bound the objective of a problem from below.

    Risk measures are bounded by the mean over windows for ``cvar95``, and window by window for ``p95``:
    a quantile of step costs is at least the same quantile of their bounds.
    """
    problem = model.problem
    if problem.objective is Objective.TRAFFIC:
        layer_L = _traffic_bounds(problem)
        return LowerBound(value=float(layer_L.mean()), layer_L=layer_L)
    bound_WL = np.stack([_window_bounds(model, layer) for layer in range(problem.num_layers)], axis=1)
    if problem.objective is Objective.BALANCE:
        value = problem.risk.summarise(bound_WL.ravel())
        return LowerBound(value=value, layer_L=bound_WL.mean(axis=0))
    exchange_WL, mean_L = _exchange_bounds(model)
    total_WL = bound_WL + exchange_WL
    value = problem.risk.summarise(total_WL.sum(axis=1))
    layer_L = total_WL.mean(axis=0)
    if problem.risk is not Risk.P95:
        # Bounds on the mean over windows may exceed the mean of window-wise bounds.
        layer_L = bound_WL.mean(axis=0) + np.maximum(exchange_WL.mean(axis=0), mean_L)
        value = max(value, float(layer_L.sum()))
    return LowerBound(value=value, layer_L=layer_L)


def _max_replicas(problem: PlacementProblem) -> int:
    return int(min(problem.num_devices, 1 + problem.num_slots - problem.num_experts))


def _window_bounds(model: CostModel, layer: int) -> FloatArray:
    """Bound the fullest device's expert cost in each window, ``[windows]``."""
    problem = model.problem
    load_WE = problem.profile.load_WLE[:, layer]
    replicas = np.arange(1, _max_replicas(problem) + 1)
    if problem.objective is Objective.BALANCE:
        mean_W = load_WE.sum(axis=1, keepdims=True) / problem.num_devices
        cost_WE = np.divide(load_WE, mean_W, out=np.zeros_like(load_WE), where=mean_W > 0)
        total_WE, least_WE = cost_WE, cost_WE / replicas[-1]
        # A window without tokens counts as balanced.
        floor_W = np.ones(len(load_WE))
    else:
        per_replica = load_WE[None] / replicas[:, None, None]
        cost_KRWE = np.stack([curve(per_replica) for curve in model.expert_curves])
        total_WE = (cost_KRWE * replicas[:, None, None]).min(axis=(0, 1))
        least_WE = cost_KRWE.min(axis=(0, 1))
        floor_W = np.zeros(len(load_WE))
    bound_W = np.maximum(floor_W, total_WE.sum(axis=1) / problem.num_devices)
    bound_W = np.maximum(bound_W, least_WE.max(axis=1))
    if problem.num_slots > problem.num_experts:
        return np.asarray(bound_W)
    return np.asarray(np.maximum(bound_W, _cardinality_bounds(total_WE, problem.slots_D)))


def _cardinality_bounds(cost_WE: FloatArray, slots_D: npt.NDArray[np.int64]) -> FloatArray:
    """Bound the fullest device by counting, where every slot holds exactly one expert."""
    sorted_WE = -np.sort(-cost_WE, axis=1)
    num_experts, num_devices = cost_WE.shape[1], slots_D.size
    bound_W = np.zeros(len(cost_WE))
    # The hottest expert shares its device with at least the coldest of the rest.
    beside = int(slots_D.min()) - 1
    if beside > 0:
        bound_W = sorted_WE[:, 0] + sorted_WE[:, num_experts - beside :].sum(axis=1)
    prefix_WE = np.concatenate([np.zeros((len(cost_WE), 1)), np.cumsum(sorted_WE, axis=1)], axis=1)
    for j in range(1, (num_experts - 1) // num_devices + 1):
        last = j * num_devices + 1
        bound_W = np.maximum(bound_W, prefix_WE[:, last] - prefix_WE[:, last - j - 1])
    return bound_W


def _exchange_bounds(model: CostModel) -> tuple[FloatArray, FloatArray]:
    """Bound the exchanges: in each window and layer, and their mean over windows in each layer."""
    problem = model.problem
    profile = problem.profile
    shape = (profile.num_windows, profile.num_layers)
    bound_WL, mean_L = np.zeros(shape), np.zeros(profile.num_layers)
    if problem.semantics is Semantics.STAY_PUT:
        first = 0 if profile.home_T is not None else 1
        for link in model.links:
            # At the least nothing moves; the phase itself is run all the same.
            bound_WL[:, first:] = np.maximum(bound_WL[:, first:], link.dispatch(0.0))
        return bound_WL, mean_L
    hottest_WL = _hottest_loads(profile) if problem.semantics is Semantics.DISPATCH else np.zeros(shape)
    volumes = [_volume_bounds(problem, link, hottest_WL) for link in model.links]
    for phase in ("dispatch", "combine"):
        phase_WL, phase_mean_L = np.zeros(shape), np.zeros(profile.num_layers)
        for link, (volume_WL, volume_mean_L) in zip(model.links, volumes, strict=True):
            curve: PiecewiseLinear = getattr(link, phase)
            phase_WL = np.maximum(phase_WL, curve(volume_WL))
            phase_mean_L = np.maximum(phase_mean_L, _convex_minorant(curve)(volume_mean_L))
        bound_WL += phase_WL
        mean_L += phase_mean_L
    return bound_WL, mean_L


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


def _volume_bounds(
    problem: PlacementProblem, link: Link, hottest_WL: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Bound what the fullest group of a link receives: by window and layer, and in the mean by layer."""
    profile, semantics = problem.profile, problem.semantics
    known_homes = profile.home_T is not None
    # With homes known a token may live where it goes, and a group may receive nothing.
    enter_G = link.enter_HG.min(axis=0) if known_homes else link.enter_HG[0]
    enter = float(enter_G.min())
    if semantics is Semantics.ALLGATHER:
        volume_W = profile.window_tokens_W * float(link.enter_HG[0].max())
        volume_WL = np.repeat(volume_W[:, None], profile.num_layers, axis=1)
        return volume_WL, volume_WL.mean(axis=0)
    num_groups = link.num_groups
    if semantics is Semantics.DISPATCH_NODEDUP:
        pairs_WL = profile.load_WLE.sum(axis=2)
        if known_homes:
            pairs_WL = np.broadcast_to(profile.top_k * _sampled_windows(profile)[:, None], pairs_WL.shape)
        volume_WL = pairs_WL * enter / num_groups
        return volume_WL, volume_WL.mean(axis=0)
    tokens_W = _sampled_windows(profile)
    tokens_WL = np.repeat(tokens_W[:, None], profile.num_layers, axis=1)
    slots_G = np.bincount(link.group_D, weights=problem.slots_D, minlength=num_groups)
    least_touched = -(-profile.top_k // int(slots_G.max()))
    volume_WL = tokens_WL * enter * least_touched / num_groups
    if _max_replicas(problem) == 1:
        # All tokens of the hottest expert go to its one group.
        volume_WL = np.maximum(volume_WL, hottest_WL * enter)
    touched_L = np.array(
        [_least_fanout(problem, layer, num_groups, int(slots_G.max())) for layer in range(profile.num_layers)]
    )
    mean_L = touched_L * float(tokens_W.mean()) * enter / num_groups
    return volume_WL, np.maximum(mean_L, volume_WL.mean(axis=0))


def _convex_minorant(curve: PiecewiseLinear) -> PiecewiseLinear:
    """Return the largest convex curve below a curve: Jensen's inequality holds for it."""
    points = [(float(x), float(y)) for x, y in zip(curve.x, curve.y, strict=True)]
    far = 1e6 * points[-1][0]
    points.append((far, float(curve(far))))
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and _turns_down(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return PiecewiseLinear(x=np.array([p[0] for p in hull]), y=np.array([p[1] for p in hull]))


def _turns_down(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - b[0]) >= (c[1] - b[1]) * (b[0] - a[0])


def _traffic_bounds(problem: PlacementProblem) -> FloatArray:
    """Bound fanout, or hops, of each layer; `mean` over layers bounds the objective."""
    layers = range(problem.num_layers)
    if problem.semantics is Semantics.STAY_PUT:
        return _least_hops(problem)
    slots = int(problem.slots_D.max())
    return np.array(
        [_least_fanout(problem, layer, problem.num_devices, slots, inside_only=False) for layer in layers]
    )


def _least_hops(problem: PlacementProblem) -> FloatArray:
    """Bound hops into each layer by what the device of an expert can keep at most.

    An expert's device holds `slots` experts of the next layer, so at most its `slots` strongest
    transitions stay. With replicas, experts may follow a token anywhere: no bound.
    """
    num_layers = problem.num_layers
    hops_L = np.zeros(num_layers)
    if _max_replicas(problem) > 1 or num_layers < 2:
        return hops_L
    slots = int(problem.slots_D.max())
    for layer in range(1, num_layers):
        count_EE = problem.profile.transitions(layer - 1)
        kept_out = -np.sort(-count_EE, axis=1)[:, :slots].sum()
        kept_in = -np.sort(-count_EE, axis=0)[:slots].sum()
        hops_L[layer] = max(0.0, 1.0 - min(kept_out, kept_in) / count_EE.sum())
    # The objective is a mean over the boundaries between layers, the bound one over layers.
    return hops_L * num_layers / (num_layers - 1)


def _least_fanout(
    problem: PlacementProblem, layer: int, num_groups: int, slots: int, *, inside_only: bool = True
) -> float:
    """Bound the mean number of groups that a token touches.

    Parameters
    ----------
    num_groups, slots
        Groups, and the most experts that one holds.
    inside_only
        Leave out the tail of the trace, which belongs to no window.
    """
    top_k = problem.profile.top_k
    least = float(-(-top_k // slots))
    if _max_replicas(problem) > 1:
        return least
    coactivation_EE, tokens = _coactivation(problem, layer, inside_only=inside_only)
    # A group that holds n of a token's experts saves n - 1 touches and keeps n (n - 1) / 2 pairs inside,
    # which is as many or more,
    # so the touches saved are at most the pairs kept.
    inside = most_inside(coactivation_EE, num_groups=num_groups, slots=slots)
    return max(least, top_k - inside / tokens)


def _coactivation(problem: PlacementProblem, layer: int, *, inside_only: bool) -> tuple[FloatArray, float]:
    """Weighted count of tokens that select both experts of a pair, ``[experts, experts]``, and of tokens."""
    profile = problem.profile
    assert profile.experts_TLK is not None
    assert profile.window_of_token_T is not None
    experts_TK = profile.experts_TLK[:, layer].astype(np.int64)
    weight_T = profile.token_weight_T
    if inside_only:
        inside = profile.window_of_token_T < profile.num_windows
        experts_TK, weight_T = experts_TK[inside], weight_T[inside]
    count = np.zeros(profile.num_experts**2)
    for first in range(profile.top_k):
        for second in range(first + 1, profile.top_k):
            key = experts_TK[:, first] * profile.num_experts + experts_TK[:, second]
            count += np.bincount(key, weights=weight_T, minlength=count.size)
    count_EE = count.reshape(profile.num_experts, profile.num_experts)
    return count_EE + count_EE.T, float(weight_T.sum())
