"""Lower bounds on the objective that no placement can beat, computed without any solver.

Every bound holds for the windows, costs and slots of the problem, whatever the placement. Balance and traffic
pull against each other, so where every expert has one replica the fullest load and the tokens' touches are
bounded together: over all partitions of experts at once, by one relaxation for each layer. Where all groups
that there could be can be listed, a program over them proves more.

Shape letters: W windows, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.bounds.exchanges import (
    exchange_floors,
    has_one_line,
    joint_exchange,
    least_mean_exchange,
    least_mean_moves,
    least_mean_volumes,
)
from placement.bounds.grouped import least_grouped_load, least_grouped_step, least_grouped_touches
from placement.bounds.hops import least_chain_hops, least_hops
from placement.bounds.loads import LayerLoads, layer_loads, least_mean_load, max_replicas
from placement.bounds.partition import Groups, relax
from placement.bounds.terms import FullestLoad
from placement.bounds.touched import WIDEST, groups_of_link, least_touches
from placement.bounds.value import LowerBound
from placement.cost import CostModel
from placement.problem import Objective, PlacementProblem, Risk, Semantics
from placement.stopping import Never, StoppingCriterion

__all__ = ["lower_bound"]

FloatArray = npt.NDArray[np.float64]

STEPS = 160
"""Steps of a relaxation of 64 experts at an effort of 1; fewer of larger ones, as each takes longer."""

FEWEST_STEPS = 16

ROUNDS = 5
"""Programs over whole groups at an effort of 1."""

FANOUT_ROUNDS = 4
"""Further ones for fanout, whose programs have no windows and are quick."""


def lower_bound(
    model: CostModel, *, effort: float = 1.0, stop: StoppingCriterion | None = None
) -> LowerBound:
    """Bound the objective of a problem from below.

    Risk measures are bounded by the mean over windows for ``cvar95``, and window by window for ``p95``:
    a quantile of step costs is at least the same quantile of their bounds.

    Parameters
    ----------
    effort
        Relaxations take so many times their usual steps; at 0 as few as are worth it.
    stop
        Once it says so, the layers that are left are bounded by counting alone.
    """
    problem = model.problem
    work = _Work(
        steps=_steps(problem, effort),
        rounds=max(1, round(effort * ROUNDS)),
        stop=Never() if stop is None else stop,
    )
    if problem.objective is Objective.TRAFFIC:
        return _least_traffic(problem, work)
    loads = [layer_loads(model, layer) for layer in range(problem.num_layers)]
    floor_WL = np.stack([load.floor_W for load in loads], axis=1)
    if problem.objective is Objective.BALANCE:
        mean_L = np.array([0.0 if work.stop() else _least_load(problem, load, work) for load in loads])
        return _summarise(problem, floor_WL, floor_WL.ravel(), mean_L)
    exchange_WL = exchange_floors(model)
    mean_L = np.array(
        [
            0.0 if work.stop() else _least_step(model, layer, load, exchange_WL[:, layer], work)
            for layer, load in enumerate(loads)
        ]
    )
    total_WL = floor_WL + exchange_WL
    return _summarise(problem, total_WL, total_WL.sum(axis=1), mean_L)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What to spend on each layer: steps of a relaxation, programs over whole groups; and when to stop."""

    steps: int
    rounds: int
    stop: StoppingCriterion


def _steps(problem: PlacementProblem, effort: float) -> int:
    places = groups_of_link(problem, np.arange(problem.num_devices)).num_places
    return max(FEWEST_STEPS, round(effort * STEPS * min(1.0, 64 / places)))


def _summarise(
    problem: PlacementProblem, floor_WL: FloatArray, scenario_X: FloatArray, mean_L: FloatArray
) -> LowerBound:
    """Combine bounds on each window and bounds on layers' means over windows."""
    layer_L = np.maximum(floor_WL.mean(axis=0), mean_L)
    value = problem.risk.summarise(scenario_X)
    if problem.risk is not Risk.P95:
        # The mean over windows is bounded better than window by window, and the worst are above it.
        mean = layer_L.sum() if problem.objective is Objective.STEP_TIME else layer_L.mean()
        value = max(value, float(mean))
    return LowerBound(value=value, layer_L=layer_L)


def _can_relax(problem: PlacementProblem) -> bool:
    """Whether experts are a partition, of devices that are not too uneven."""
    places = groups_of_link(problem, np.arange(problem.num_devices)).num_places
    return max_replicas(problem) == 1 < problem.num_devices and places <= WIDEST * problem.num_experts


def _fullest_load(loads: LayerLoads) -> FullestLoad:
    num_windows = len(loads.floor_W)
    return FullestLoad(load_WE=loads.total_WE / num_windows, floor_W=loads.floor_W / num_windows)


def _least_load(problem: PlacementProblem, loads: LayerLoads, work: _Work) -> float:
    """Bound the mean over windows of a layer's fullest device."""
    if not _can_relax(problem):
        return least_mean_load(loads, spare_slots=problem.num_slots - problem.num_experts)
    groups = groups_of_link(problem, np.arange(problem.num_devices))
    return max(
        float(loads.floor_W.mean()),
        relax([_fullest_load(loads)], groups, steps=work.steps),
        least_grouped_load(problem, loads, rounds=work.rounds),
    )


def _least_step(
    model: CostModel, layer: int, loads: LayerLoads, exchange_W: FloatArray, work: _Work
) -> float:
    """Bound the mean over windows of a layer's step cost."""
    grouped = least_grouped_step(model, layer, loads, exchange_W, rounds=work.rounds)
    return max(grouped, _least_relaxed_step(model, layer, loads, exchange_W, work))


def _least_relaxed_step(
    model: CostModel, layer: int, loads: LayerLoads, exchange_W: FloatArray, work: _Work
) -> float:
    problem = model.problem
    if problem.semantics is Semantics.STAY_PUT:
        moves = least_mean_moves(model, layer, steps=work.steps)
        return _least_load(problem, loads, work) + max(float(exchange_W.mean()), moves)
    if problem.semantics is not Semantics.DISPATCH:
        return _least_load(problem, loads, work) + float(exchange_W.mean())
    if _can_relax(problem) and has_one_line(model):
        return _least_joint(model, layer, loads, exchange_W, steps=work.steps)
    volumes = least_mean_volumes(model, layer, steps=work.steps)
    exchange = max(float(exchange_W.mean()), least_mean_exchange(model, volumes))
    apart = _least_load(problem, loads, work) + exchange
    if not _can_relax(problem):
        return apart
    return max(apart, _least_joint(model, layer, loads, exchange_W, near_J=volumes, steps=work.steps))


def _least_joint(
    model: CostModel,
    layer: int,
    loads: LayerLoads,
    exchange_W: FloatArray,
    *,
    near_J: Sequence[float] = (),
    steps: int,
) -> float:
    """Bound experts and exchanges together; zero where exchanges do not depend on devices."""
    joint = joint_exchange(model, layer, floor_W=exchange_W, near_J=near_J)
    if joint is None:
        return 0.0
    return joint.constant + relax([_fullest_load(loads), joint.term], joint.groups, steps=steps)


def _least_traffic(problem: PlacementProblem, work: _Work) -> LowerBound:
    """Bound fanout, or hops, of each layer, and their mean."""
    groups = groups_of_link(problem, np.arange(problem.num_devices))
    layers = range(problem.num_layers)
    if problem.semantics is Semantics.DISPATCH:
        # A token touches a device at least.
        fanout_L = np.array([1.0 if work.stop() else _least_fanout(problem, i, groups, work) for i in layers])
        return LowerBound(value=float(fanout_L.mean()), layer_L=fanout_L)
    hops = [
        0.0 if work.stop() else least_hops(problem, layer, groups, inside_only=False, steps=work.steps)
        for layer in layers[1:]
    ]
    boundaries = max(1, problem.num_layers - 1)
    # The objective is a mean over the boundaries between layers, a layer's share one over layers.
    hops_L = np.array([0.0, *hops]) * (problem.num_layers / boundaries)
    chained = 0.0 if work.stop() else least_chain_hops(problem, groups, steps=work.steps) / boundaries
    return LowerBound(value=max(float(hops_L.mean()), chained), layer_L=hops_L)


def _least_fanout(problem: PlacementProblem, layer: int, groups: Groups, work: _Work) -> float:
    """Bound the mean number of devices that a token touches in a layer."""
    return max(
        least_touches(problem, layer, groups, inside_only=False, steps=work.steps),
        least_grouped_touches(problem, layer, rounds=2 * work.rounds + FANOUT_ROUNDS),
    )
