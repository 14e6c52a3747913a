"""Stage 1 of MoETuner: its program, its start and its bound, against all partitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from placement.errors import InfeasibleError
from placement.solvers.milp import BACKENDS, MilpStatus, solve_milp
from placement.solvers.moetuner.clusters import (
    ClusterProblem,
    cluster_program,
    clusters_of,
    even_clusters,
    imbalance,
    least_imbalance,
)
from placement.stopping import Never


def random_problem(seed: int) -> ClusterProblem:
    """Return seven experts for three clusters; with odd seeds, clusters of different capacity."""
    rng = np.random.default_rng(seed)
    capacity = [4, 1, 3] if seed % 2 else [3, 3, 3]
    return ClusterProblem(load_E=rng.geometric(0.05, 7).astype(float), capacity_C=np.array(capacity))


def least(problem: ClusterProblem) -> float:
    """Return the optimum over all clusterings."""
    clusters = range(problem.capacity_C.size)
    best = np.inf
    for choice in itertools.product(clusters, repeat=problem.load_E.size):
        size_C = np.bincount(choice, minlength=problem.capacity_C.size)
        if (size_C >= 1).all() and (size_C <= problem.capacity_C).all():
            best = min(best, imbalance(problem, np.array(choice)))
    return best


def check(problem: ClusterProblem, cluster_E: np.ndarray) -> None:
    """Verify that every cluster has an expert and none too many."""
    size_C = np.bincount(cluster_E, minlength=problem.capacity_C.size)
    assert (size_C >= 1).all()
    assert (size_C <= problem.capacity_C).all()


def test_a_case_to_check_by_hand() -> None:
    """Loads 6, 3, 2, 1 in two clusters of two: 6 + 1 and 3 + 2, each one away from the mean of 6."""
    problem = ClusterProblem(load_E=np.array([6.0, 3, 2, 1]), capacity_C=np.array([2, 2]))
    program, x_CE = cluster_program(problem, np.array([0, 0, 1, 1]))
    result = solve_milp(program, in_process=True)
    assert result.value_V is not None
    assert result.objective == pytest.approx(2.0)
    assert clusters_of(x_CE, result.value_V).tolist() == [0, 1, 1, 0]
    assert imbalance(problem, np.array([0, 1, 1, 0])) == 2.0
    # The hottest expert has company at least: 6 + 1, one above the mean, and one below it elsewhere.
    assert least_imbalance(problem) == pytest.approx(2.0)


@pytest.mark.parametrize("seed", range(6))
def test_every_backend_finds_the_optimum(seed: int) -> None:
    """All clusterings tried; the bound holds, and the start is no better."""
    problem = random_problem(seed)
    optimum = least(problem)
    start_E = even_clusters(problem, Never())
    check(problem, start_E)
    assert least_imbalance(problem) <= optimum * (1 + 1e-12)
    assert imbalance(problem, start_E) >= optimum * (1 - 1e-12)
    program, x_CE = cluster_program(problem, start_E)
    for backend in BACKENDS:
        result = solve_milp(program, backend=backend, in_process=True, relative_gap=0)
        assert result.value_V is not None
        assert result.status is MilpStatus.OPTIMAL
        cluster_E = clusters_of(x_CE, result.value_V)
        check(problem, cluster_E)
        assert imbalance(problem, cluster_E) == pytest.approx(optimum, abs=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_the_start_is_a_feasible_point_of_the_program(seed: int) -> None:
    """Renumbering clusters breaks no row and keeps the objective."""
    problem = random_problem(seed)
    start_E = even_clusters(problem, Never())
    program, _ = cluster_program(problem, start_E)
    assert program.start_V is not None
    activity_R = program.activity_R(program.start_V)
    assert (activity_R >= program.row_lower_R - 1e-9).all()
    assert (activity_R <= program.row_upper_R + 1e-9).all()
    assert (program.start_V <= program.upper_V).all()
    assert program.objective_at(program.start_V) == pytest.approx(imbalance(problem, start_E))


def test_experts_without_load_are_clustered_as_well() -> None:
    """Silent experts fill up, and every cluster gets one even if all but one are silent."""
    problem = ClusterProblem(load_E=np.array([0.0, 9.0, 0, 0, 0, 0]), capacity_C=np.array([2, 2, 2]))
    cluster_E = even_clusters(problem, Never())
    assert np.bincount(cluster_E).tolist() == [2, 2, 2]


def test_a_stop_leaves_the_longest_first_clusters() -> None:
    """Feasible at once."""
    problem = random_problem(0)
    check(problem, even_clusters(problem, lambda: True))


def test_too_few_experts_or_slots_are_infeasible() -> None:
    """The message carries both numbers."""
    with pytest.raises(InfeasibleError, match="2 experts, 1 too few"):
        ClusterProblem(load_E=np.ones(2), capacity_C=np.array([1, 1, 1]))
    with pytest.raises(InfeasibleError, match="5 experts do not fit 4 slots"):
        ClusterProblem(load_E=np.ones(5), capacity_C=np.array([2, 2]))
