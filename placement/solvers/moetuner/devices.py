r"""Stage 2: in every layer, put each cluster on a device of its own, so that few tokens travel far.

.. math:: \min \sum_l \max_{g_1 \ne g_2} \sum_{c_1, c_2}
          \frac{C_{c_1 c_2 l}}{B_{g_1 g_2}} y_{c_1 g_1 l} y_{c_2 g_2 l+1}

The maximum over pairs of devices is the prose of the paper; as printed it is a sum. Both are offered. A
token that stays on its device costs nothing.

The products become variables z of the reformulation-linearisation technique (Adams and Johnson 1994): since
each y of a layer is a permutation matrix, z summed over either index of one layer is y of the other layer,
which is much tighter than ``z >= y + y - 1``.

Without memory limits, cost and constraints join consecutive layers only: a shortest path through the
permutations of each layer is the optimum (`chain_optimum`), which a program with memory limits starts from
and is bounded by.

Shape letters: N transitions, L layers (N + 1), C clusters and G devices (as many), P permutations.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from placement.solvers.milp.formulation import MilpBuilder, MilpProgram
from placement.stopping import StoppingCriterion

__all__ = [
    "DeviceProblem",
    "Reading",
    "better_devices",
    "chain_optimum",
    "device_program",
    "excess_program",
    "fits",
    "memory_excess",
    "part_of",
    "travel_cost",
]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

MOST_CHAIN_DEVICES = 5
"""Devices up to which all permutations of a layer (120) are tried; 6 would take a minute for 32 layers."""

BOUND_SLACK = 1e-9
"""Relative step back from the shortest path, for the rounding of its sum."""


class Reading(StrEnum):
    """How the traffic between pairs of devices is summarised."""

    MAXIMUM = "maximum"
    """The slowest pair of each transition, as the paper's prose says."""
    SUM = "sum"
    """All pairs, as the paper prints it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceProblem:
    """Clusters of all layers to be put on devices.

    Parameters
    ----------
    traffic_NCC
        Tokens that go from a cluster of a layer to one of the next, ``[transitions, clusters, clusters]``.
    slowness_GG
        Fastest bandwidth / bandwidth between two devices, 0 on the diagonal, ``[devices, devices]``.
    size_LC
        Experts of each cluster, ``[layers, clusters]``.
    allowed_LCG
        Whether a cluster may be on a device, ``[layers, clusters, devices]``.
    memory_G
        Experts that each device may hold over all layers, ``[devices]``.
    reading
        How pairs of devices are summarised.
    """

    traffic_NCC: FloatArray
    slowness_GG: FloatArray
    size_LC: IntArray
    allowed_LCG: BoolArray
    memory_G: FloatArray
    reading: Reading

    @property
    def num_layers(self) -> int:
        """Layers."""
        return int(self.size_LC.shape[0])

    @property
    def num_devices(self) -> int:
        """Devices, and clusters of each layer."""
        return int(self.size_LC.shape[1])

    @property
    def memory_may_bind(self) -> bool:
        """Whether some choice of devices would break a memory limit."""
        return bool((self.size_LC.max(axis=1).sum() > self.memory_G).any())

    def summarise(self, cost: FloatArray) -> FloatArray:
        """Reduce the last two axes, pairs of devices."""
        reduced = cost.max(axis=(-2, -1)) if self.reading is Reading.MAXIMUM else cost.sum(axis=(-2, -1))
        return np.asarray(reduced)


def travel_cost(problem: DeviceProblem, cluster_LG: IntArray) -> float:
    """Return the objective of stage 2 when device g of layer l holds cluster ``cluster_LG[l, g]``."""
    return float(_transition_costs(problem, cluster_LG).sum())


def _transition_costs(problem: DeviceProblem, cluster_LG: IntArray) -> FloatArray:
    """Cost of each transition, ``[transitions]``."""
    which = np.arange(problem.num_layers - 1)[:, None, None]
    moved = problem.traffic_NCC[which, cluster_LG[:-1, :, None], cluster_LG[1:, None, :]]
    return problem.summarise(moved * problem.slowness_GG)


def _held(problem: DeviceProblem, cluster_LG: IntArray) -> IntArray:
    """Experts of each device over all layers, ``[devices]``."""
    return np.asarray(np.take_along_axis(problem.size_LC, cluster_LG, axis=1).sum(axis=0))


def memory_excess(problem: DeviceProblem, cluster_LG: IntArray) -> float:
    """Return by how many experts the fullest device is above its memory, 0 or more."""
    return float(np.maximum(0, _held(problem, cluster_LG) - problem.memory_G).max())


def fits(problem: DeviceProblem, cluster_LG: IntArray) -> bool:
    """Return whether all clusters are where they may be and memory holds them."""
    layer_L1, device_G = np.arange(problem.num_layers)[:, None], np.arange(problem.num_devices)
    allowed = problem.allowed_LCG[layer_L1, cluster_LG, device_G].all()
    return bool(allowed) and memory_excess(problem, cluster_LG) <= 1e-9


def chain_optimum(problem: DeviceProblem, stop: StoppingCriterion) -> tuple[FloatArray, IntArray] | None:
    """Minimise without memory limits by a shortest path through the permutations of all layers.

    Returns
    -------
    cost_L, cluster_LG
        Least cost of the transitions up to each layer, ``[layers]``, the last being the optimum; and the
        cluster on each device. None where `stop` came first or there are too many devices.
    """
    if problem.num_devices > MOST_CHAIN_DEVICES:
        return None
    every_PG = np.array(list(itertools.permutations(range(problem.num_devices))), dtype=np.int64)
    devices_G = np.arange(problem.num_devices)
    state_L = [every_PG[allowed_CG[every_PG, devices_G].all(axis=1)] for allowed_CG in problem.allowed_LCG]
    cost_P, cost_L = np.zeros(len(state_L[0])), [0.0]
    came_from: list[IntArray] = []
    for traffic_CC, before_PG, after_PG in zip(problem.traffic_NCC, state_L, state_L[1:], strict=False):
        if stop():
            return None
        moved = traffic_CC[before_PG[:, None, :, None], after_PG[None, :, None, :]]
        total_PP = cost_P[:, None] + problem.summarise(moved * problem.slowness_GG)
        came_from.append(total_PP.argmin(axis=0))
        cost_P = total_PP.min(axis=0)
        cost_L.append(float(cost_P.min()))
    state = int(cost_P.argmin())
    path = [state]
    for before in reversed(came_from):
        path.append(int(before[path[-1]]))
    chosen = [states[i] for states, i in zip(state_L, reversed(path), strict=True)]
    return np.array(cost_L), np.stack(chosen)


def better_devices(problem: DeviceProblem, cluster_LG: IntArray, stop: StoppingCriterion) -> IntArray:
    """Exchange two clusters of a layer wherever that lowers the cost, until nothing does.

    The start must fit; so does the result.
    """
    best_LG, best = cluster_LG.copy(), travel_cost(problem, cluster_LG)
    improved = True
    while improved:
        improved = False
        for layer in range(problem.num_layers):
            for a, b in itertools.combinations(range(problem.num_devices), 2):
                if stop():
                    return best_LG
                trial_LG = best_LG.copy()
                trial_LG[layer, [a, b]] = trial_LG[layer, [b, a]]
                cost = travel_cost(problem, trial_LG)
                if cost < best * (1 - BOUND_SLACK) and fits(problem, trial_LG):
                    best_LG, best, improved = trial_LG, cost, True
    return best_LG


def part_of(problem: DeviceProblem, cluster_LG: IntArray, first: int, end: int) -> DeviceProblem:
    """Return the problem of layers ``first..end - 1`` with their neighbours kept where they are.

    It covers the neighbours too: layers ``max(0, first - 1)`` to ``min(L, end + 1) - 1``. Other layers take
    what memory they hold.
    """
    begin, close = max(0, first - 1), min(problem.num_layers, end + 1)
    kept_LCG = _chosen(problem, cluster_LG) > 0
    kept_LCG[first:end] = True
    outside = np.concatenate([np.arange(begin), np.arange(close, problem.num_layers)])
    held_G = np.take_along_axis(problem.size_LC[outside], cluster_LG[outside], axis=1).sum(axis=0)
    return replace(
        problem,
        traffic_NCC=problem.traffic_NCC[begin : close - 1],
        size_LC=problem.size_LC[begin:close],
        allowed_LCG=(problem.allowed_LCG & kept_LCG)[begin:close],
        memory_G=problem.memory_G - held_G,
    )


def excess_program(problem: DeviceProblem, start_LG: IntArray) -> tuple[MilpProgram, IntArray]:
    """Return the program of the least excess over memory, and its y, ``[layers, clusters, devices]``."""
    builder = MilpBuilder()
    y_LCG = _assignment(builder, problem)
    most = float(problem.size_LC.sum())
    excess = builder.add_variables(1, objective=1.0, upper=most)
    _add_memory(builder, problem, y_LCG, excess)
    start_V = np.concatenate([_chosen(problem, start_LG).ravel(), [memory_excess(problem, start_LG)]])
    return builder.build(start_V=start_V), y_LCG


def device_program(
    problem: DeviceProblem, start_LG: IntArray, chain_cost_L: FloatArray | None
) -> tuple[MilpProgram, IntArray]:
    """Return the program of stage 2 and its variables y, ``[layers, clusters, devices]``.

    Parameters
    ----------
    start_LG
        Cluster on each device to start from, ``[layers, devices]``.
    chain_cost_L
        Least costs up to each layer without memory limits; they bound the objective from below.
    """
    builder = MilpBuilder()
    y_LCG = _assignment(builder, problem)
    z_NCGCG = _add_products(builder, y_LCG)
    most_N = problem.traffic_NCC.sum(axis=(1, 2)) * problem.slowness_GG.max(initial=0.0)
    cost_N = builder.add_variables(problem.num_layers - 1, upper=most_N)
    # The shortest path as a bound of one variable, not as a row: where the start reaches it, solvers are done
    # before their first linear program. Both are sums of the same terms, but for their order.
    start_N = _transition_costs(problem, start_LG)
    least = 0.0 if chain_cost_L is None else min(float(chain_cost_L[-1]), float(start_N.sum()))
    total = builder.add_variables(1, lower=least, upper=max(least, float(most_N.sum())), objective=1.0)
    builder.add_rows((total, 1.0), (cost_N, -1.0), lower=0, upper=0)
    _add_costs(builder, problem, z_NCGCG, cost_N)
    if problem.memory_may_bind:
        _add_memory(builder, problem, y_LCG)
    chosen_LCG = _chosen(problem, start_LG)
    product = np.einsum("ncg,ndh->ncgdh", chosen_LCG[:-1], chosen_LCG[1:])
    start_V = np.concatenate([chosen_LCG.ravel(), product.ravel(), start_N, [start_N.sum()]])
    return builder.build(start_V=start_V), y_LCG


def _assignment(builder: MilpBuilder, problem: DeviceProblem) -> IntArray:
    """Add y: in every layer each cluster on one device and each device with one cluster."""
    y_LCG = builder.add_variables(problem.allowed_LCG.shape, upper=problem.allowed_LCG, integer=True)
    builder.add_rows((y_LCG, 1.0), lower=1, upper=1)
    builder.add_rows((y_LCG.swapaxes(1, 2), 1.0), lower=1, upper=1)
    return y_LCG


def _add_memory(
    builder: MilpBuilder, problem: DeviceProblem, y_LCG: IntArray, excess: IntArray | None = None
) -> None:
    devices = problem.num_devices
    y_GX = y_LCG.transpose(2, 0, 1).reshape(devices, -1)
    terms = [(y_GX, problem.size_LC.ravel().astype(np.float64))]
    if excess is not None:
        terms.append((np.broadcast_to(excess, (devices, 1)), np.array(-1.0)))
    builder.add_rows(*terms, upper=problem.memory_G)


def _add_products(builder: MilpBuilder, y_LCG: IntArray) -> IntArray:
    """Add z = y y' for consecutive layers, ``[transitions, clusters, devices, clusters, devices]``."""
    layers, clusters, devices = y_LCG.shape
    shape = (layers - 1, clusters, devices, clusters, devices)
    z = builder.add_variables(shape, upper=1.0)
    y_from = np.broadcast_to(y_LCG[:-1, :, :, None], (*shape[:3], clusters))
    y_to = np.broadcast_to(y_LCG[1:, None, :, :], (layers - 1, clusters, clusters, devices))
    for summed, y in (
        (z, y_from),  # over the next layer's devices, for each of its clusters
        (z.swapaxes(3, 4), y_from),  # over the next layer's clusters, for each of its devices
        (z.transpose(0, 1, 3, 4, 2), y_to),  # over this layer's devices, for each of its clusters
        (z.transpose(0, 2, 3, 4, 1), y_to),  # over this layer's clusters, for each of its devices
    ):
        builder.add_rows((summed, 1.0), (y[..., None], -1.0), lower=0, upper=0)
    return z


def _add_costs(builder: MilpBuilder, problem: DeviceProblem, z_NCGCG: IntArray, cost_N: IntArray) -> None:
    """Bind the cost of each transition to its products."""
    transitions, devices = z_NCGCG.shape[0], problem.num_devices
    # Pairs of devices first, then the pairs of clusters that may be on them.
    z_NGGX = z_NCGCG.transpose(0, 2, 4, 1, 3).reshape(transitions, devices, devices, -1)
    traffic_N11X = problem.traffic_NCC.reshape(transitions, 1, 1, -1)
    price_NGGX = traffic_N11X * problem.slowness_GG[:, :, None]
    if problem.reading is Reading.SUM:
        z, price = z_NGGX.reshape(transitions, -1), price_NGGX.reshape(transitions, -1)
        builder.add_rows((cost_N[:, None], 1.0), (z, -price), lower=0)
        return
    apart = ~np.eye(devices, dtype=np.bool_)
    z_NRX, price_NRX = z_NGGX[:, apart], price_NGGX[:, apart]
    cost_NR1 = np.broadcast_to(cost_N[:, None, None], (*z_NRX.shape[:2], 1))
    builder.add_rows((cost_NR1, 1.0), (z_NRX, -price_NRX), lower=0)


def _chosen(problem: DeviceProblem, cluster_LG: IntArray) -> FloatArray:
    """Return y of given clusters, ``[layers, clusters, devices]``."""
    clusters = np.arange(problem.num_devices)[None, :, None]
    return np.asarray(cluster_LG[:, None, :] == clusters, dtype=np.float64)
