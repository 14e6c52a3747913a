r"""Stage 1: cut one layer's experts into clusters of even load.

.. math:: \min \sum_c |T_c - \bar T|, \qquad T_c = \sum_e P_e x_{c,e},
          \qquad \sum_e x_{c,e} \ge 1, \qquad \sum_c x_{c,e} = 1

The last constraint, each expert in exactly one cluster, is missing from the paper's print; without it
``x = 1`` for any experts of suitable load is a solution that leaves others out. The paper leaves the sizes of
clusters free; a placement has slots, so cluster c holds at most as many experts as one device has.

The relaxation of this program is 0 whatever the loads, so a relative gap alone is never closed: a share of
the layer's load ends the proof as well, and a row says what the hottest expert costs in any case.

Shape letters: C clusters, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.errors import InfeasibleError
from placement.solvers.milp.formulation import MilpBuilder, MilpProgram
from placement.stopping import StoppingCriterion

__all__ = [
    "ClusterProblem",
    "cluster_program",
    "clusters_of",
    "even_clusters",
    "imbalance",
    "least_imbalance",
]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

LEAST_GAIN = 1e-9
"""Share of a layer's load below which a move gains nothing but rounding."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClusterProblem:
    """Experts of one layer to be cut into clusters.

    Parameters
    ----------
    load_E
        Load of each expert, ``[experts]``.
    capacity_C
        Most experts of each cluster, ``[clusters]``.

    Raises
    ------
    InfeasibleError
        If there are fewer experts than clusters, or more than fit.
    """

    load_E: FloatArray
    capacity_C: IntArray

    def __post_init__(self) -> None:
        experts, clusters = self.load_E.size, self.capacity_C.size
        if experts < clusters:
            raise InfeasibleError(
                f"moetuner wants an expert in each of {clusters} clusters, one per device; a layer has "
                f"{experts} experts, {clusters - experts} too few"
            )
        if int(self.capacity_C.sum()) < experts:
            raise InfeasibleError(f"{experts} experts do not fit {int(self.capacity_C.sum())} slots")

    @property
    def mean(self) -> float:
        """Mean load of a cluster."""
        return float(self.load_E.sum()) / self.capacity_C.size

    def cluster_loads(self, cluster_E: IntArray) -> FloatArray:
        """Load of each cluster, ``[clusters]``."""
        return np.bincount(cluster_E, self.load_E, minlength=self.capacity_C.size).astype(np.float64)


def imbalance(problem: ClusterProblem, cluster_E: IntArray) -> float:
    """Return the objective of stage 1."""
    return float(np.abs(problem.cluster_loads(cluster_E) - problem.mean).sum())


def least_imbalance(problem: ClusterProblem) -> float:
    """Bound the objective: the hottest expert's cluster, at its smallest size, is above the mean.

    What is above the mean in some clusters is below it in others, so the excess counts twice.
    """
    # The hottest expert may be in any cluster: the least that any of them holds when all others are full.
    others = int(problem.capacity_C.sum() - problem.capacity_C.min())
    smallest = max(1, problem.load_E.size - others)
    rising_E = np.sort(problem.load_E)
    hottest = float(rising_E[-1] + rising_E[: smallest - 1].sum())
    return max(0.0, 2 * (hottest - problem.mean)) * (1 - LEAST_GAIN)


def even_clusters(problem: ClusterProblem, stop: StoppingCriterion) -> IntArray:
    """Return good clusters: longest first, then the best move or swap until none helps, ``[experts]``."""
    cluster_E = _longest_first(problem)
    least_gain = LEAST_GAIN * float(problem.load_E.sum())
    while not stop():
        gain, first, second = max(_best_swap(problem, cluster_E), _best_move(problem, cluster_E))
        if gain <= least_gain:
            break
        if second >= 0:
            cluster_E[[first, second]] = cluster_E[[second, first]]
        else:
            cluster_E[first] = -1 - second
    return cluster_E


def _longest_first(problem: ClusterProblem) -> IntArray:
    cluster_E = np.empty(problem.load_E.size, dtype=np.int64)
    load_C, free_C = np.zeros(problem.capacity_C.size), problem.capacity_C.copy()
    for i, expert in enumerate(np.argsort(-problem.load_E, kind="stable")):
        # The first experts found the clusters: each needs one, even where loads are zero.
        cluster = i if i < free_C.size else int(np.where(free_C > 0, load_C, np.inf).argmin())
        cluster_E[expert] = cluster
        load_C[cluster] += problem.load_E[expert]
        free_C[cluster] -= 1
    return cluster_E


def _best_swap(problem: ClusterProblem, cluster_E: IntArray) -> tuple[float, int, int]:
    """Return gain and experts of the best exchange between two clusters."""
    over_C = problem.cluster_loads(cluster_E) - problem.mean
    over_E = over_C[cluster_E]
    change_EE = problem.load_E[None, :] - problem.load_E[:, None]
    before = np.abs(over_E)[:, None] + np.abs(over_E)[None, :]
    after = np.abs(over_E[:, None] + change_EE) + np.abs(over_E[None, :] - change_EE)
    gain_EE = np.where(cluster_E[:, None] != cluster_E[None, :], before - after, 0.0)
    first, second = divmod(int(gain_EE.argmax()), cluster_E.size)
    return float(gain_EE[first, second]), first, second


def _best_move(problem: ClusterProblem, cluster_E: IntArray) -> tuple[float, int, int]:
    """Return gain, expert and (as -1 - cluster) target of the best move into a free slot."""
    size_C = np.bincount(cluster_E, minlength=problem.capacity_C.size)
    over_C = problem.cluster_loads(cluster_E) - problem.mean
    load_E1, over_E1 = problem.load_E[:, None], over_C[cluster_E][:, None]
    gain_EC = np.abs(over_E1) - np.abs(over_E1 - load_E1) + np.abs(over_C) - np.abs(over_C + load_E1)
    allowed = (size_C < problem.capacity_C) & (size_C[cluster_E] > 1)[:, None]
    allowed &= cluster_E[:, None] != np.arange(size_C.size)
    gain_EC = np.where(allowed, gain_EC, 0.0)
    expert, cluster = divmod(int(gain_EC.argmax()), size_C.size)
    return float(gain_EC[expert, cluster]), expert, -1 - cluster


def cluster_program(problem: ClusterProblem, start_E: IntArray) -> tuple[MilpProgram, IntArray]:
    """Return the program of stage 1 and its variables x, ``[clusters, experts]``.

    Clusters of equal capacity are interchangeable: the i-th hottest expert may only be in the first i of
    them, which loses nothing.

    Parameters
    ----------
    start_E
        Cluster of each expert to start from, ``[experts]``.
    """
    clusters, experts = problem.capacity_C.size, problem.load_E.size
    order_E = np.argsort(-problem.load_E, kind="stable")
    upper_CE = np.ones((clusters, experts))
    if len(set(problem.capacity_C.tolist())) == 1:
        upper_CE[:, order_E] = np.arange(clusters)[:, None] <= np.arange(experts)
        start_E = _renumbered(start_E, order_E)
    builder = MilpBuilder()
    x_CE = builder.add_variables((clusters, experts), upper=upper_CE, integer=True)
    away_C = builder.add_variables(clusters, objective=1.0, upper=float(problem.load_E.sum()))
    builder.add_rows((x_CE.T, 1.0), lower=1, upper=1)
    builder.add_rows((x_CE, 1.0), lower=1, upper=problem.capacity_C)
    builder.add_rows((away_C[:, None], 1.0), (x_CE, -problem.load_E), lower=-problem.mean)
    builder.add_rows((away_C[:, None], 1.0), (x_CE, problem.load_E), lower=problem.mean)
    builder.add_rows((away_C, 1.0), lower=least_imbalance(problem))
    chosen_CE = (start_E[None, :] == np.arange(clusters)[:, None]).astype(np.float64)
    away = np.abs(problem.cluster_loads(start_E) - problem.mean)
    return builder.build(start_V=np.concatenate([chosen_CE.ravel(), away])), x_CE


def _renumbered(cluster_E: IntArray, order_E: IntArray) -> IntArray:
    """Number clusters in the order in which a sequence of experts first meets them."""
    _, first = np.unique(cluster_E[order_E], return_index=True)
    number_C = np.empty(first.size, dtype=np.int64)
    number_C[np.argsort(first)] = np.arange(first.size)
    return number_C[cluster_E]


def clusters_of(x_CE: IntArray, value_V: FloatArray) -> IntArray:
    """Read the cluster of each expert off a point, ``[experts]``."""
    return np.asarray(value_V[x_CE].argmax(axis=0), dtype=np.int64)
