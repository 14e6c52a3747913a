"""Bounds from whole groups of experts, where all that there could be can be listed.

Shape letters: S sets of experts, W windows, L layers, E experts, D devices.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from placement.bounds.columns import GroupColumns, count_columns, group_columns, touching
from placement.bounds.cover import Fullest, cheapest_cover, least_fullest
from placement.bounds.exchanges import entering_of, link_of_devices
from placement.bounds.loads import LayerLoads, max_replicas
from placement.bounds.touched import groups_of_link, touches_of
from placement.cost import CostModel
from placement.problem import PlacementProblem, Semantics

__all__ = ["columns_of", "least_grouped_load", "least_grouped_step", "least_grouped_touches"]

FloatArray = npt.NDArray[np.float64]

MOST_COLUMNS = 50_000
"""Sets of experts beyond which none are listed."""

LIMIT_SLACK = 1e-6
"""What a load may exceed its limit by, relative to it, before its group is left out."""

MOST_COSTS = 10_000_000
"""Costs of sets in windows beyond which sets are not told apart by windows."""


def columns_of(problem: PlacementProblem, *, num_windows: int) -> GroupColumns | None:
    """Return the sets of experts that devices can hold; None if they are too many, or experts have replicas.

    Parameters
    ----------
    num_windows
        Windows in which sets have costs.
    """
    groups = groups_of_link(problem, np.arange(problem.num_devices))
    if max_replicas(problem) > 1 or groups.num_groups == 1:
        return None
    count = count_columns(groups)
    if count > MOST_COLUMNS or count * num_windows > MOST_COSTS:
        return None
    return group_columns(groups)


def least_grouped_load(problem: PlacementProblem, loads: LayerLoads, *, rounds: int) -> float:
    """Bound the mean over windows of a layer's fullest device; 0 if sets of experts are too many."""
    columns = columns_of(problem, num_windows=len(loads.floor_W))
    if columns is None:
        return 0.0
    return least_fullest(columns, [_loads(columns, loads)], rounds=rounds)


def least_grouped_step(
    model: CostModel, layer: int, loads: LayerLoads, exchange_W: FloatArray, *, rounds: int
) -> float:
    """Bound the mean over windows of a layer's step cost; 0 if sets of experts are too many.

    Parameters
    ----------
    exchange_W
        What the exchanges of each window cost at least.
    """
    columns = columns_of(model.problem, num_windows=2 * len(exchange_W))
    if columns is None:
        return 0.0
    entering_SW = _entering(model, layer, columns)
    if entering_SW is None:
        return 0.0
    link = link_of_devices(model)
    assert link is not None
    cost_SW = (link.dispatch(entering_SW) + link.combine(entering_SW)) / len(exchange_W)
    exchange = Fullest(cost_SW=cost_SW, floor_W=exchange_W / len(exchange_W))
    return least_fullest(columns, [_loads(columns, loads), exchange], rounds=rounds)


def least_grouped_touches(problem: PlacementProblem, layer: int, *, rounds: int) -> float:
    """Bound the mean number of devices that a layer's tokens touch; 0 if sets of experts are too many.

    Devices that break the load limit of the traffic objective are no use.
    """
    columns = columns_of(problem, num_windows=1)
    if columns is None:
        return 0.0
    tokens = touches_of(problem.profile, layer, columns.groups, inside_only=False)
    together = replace(tokens, window_T=np.zeros_like(tokens.window_T), floor_W=np.zeros(1))
    cost_S = touching(together, columns, num_windows=1)[:, 0]
    total = float(tokens.weight_T.sum())
    load_E = problem.profile.load_WLE[:, layer].sum(axis=0)
    limit = problem.max_imbalance * float(load_E.sum()) / problem.num_devices
    # A group beyond the limit costs more than any partition, so that no use of it lowers the bound.
    excess_S = columns.sums(np.append(load_E, 0.0)) > limit * (1.0 + LIMIT_SLACK)
    cost_S[excess_S] = total * problem.num_devices
    return cheapest_cover(columns, cost_S, rounds=rounds) / total


def _loads(columns: GroupColumns, loads: LayerLoads) -> Fullest:
    num_windows = len(loads.floor_W)
    cost_EW = np.pad(loads.total_WE, ((0, 0), (0, 1))).T / num_windows
    return Fullest(cost_SW=cost_EW[columns.members_SM].sum(axis=1), floor_W=loads.floor_W / num_windows)


def _entering(model: CostModel, layer: int, columns: GroupColumns) -> FloatArray | None:
    """Return the least that enters a device with each set of experts; None where sets do not tell."""
    profile, semantics = model.problem.profile, model.problem.semantics
    link = link_of_devices(model)
    if link is None:
        return None
    if semantics is Semantics.DISPATCH_NODEDUP and profile.home_T is None:
        load_EW = np.pad(profile.load_WLE[:, layer], ((0, 0), (0, 1))).T
        pairs_SW = load_EW[columns.members_SM].sum(axis=1)
        return np.asarray(pairs_SW * float(link.enter_HG[0].min()))
    if semantics is not Semantics.DISPATCH:
        return None
    entering = entering_of(profile, link)
    if entering.free_W.any():
        return None
    tokens = touches_of(profile, layer, columns.groups, inside_only=True)
    return touching(tokens, columns, num_windows=profile.num_windows) * entering.per_touch
