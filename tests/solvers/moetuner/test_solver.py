"""MoETuner as a solver: what of a problem reaches its two stages, and what comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from instances import LINEAR, cluster, counts_only, random_profile

from placement.cost import CostModel
from placement.errors import InfeasibleError, InputError
from placement.plan import EMPTY, Placement
from placement.problem import PlacementProblem, make_problem
from placement.profile import RoutingProfile
from placement.solvers.moetuner import MoetunerSolver
from placement.solvers.moetuner.devices import Reading
from placement.solvers.protocol import SolveRequest
from placement.stopping import Cancellation


def problem_of(seed: int = 0, **options: Any) -> PlacementProblem:
    """Return 8 experts in 3 layers on two nodes of two devices."""
    profile = random_profile(np.random.default_rng(seed), tokens=300, layers=3, experts=8)
    return make_problem(
        profile, options.pop("topology", cluster([0, 0, 1, 1])), calibration=LINEAR, **options
    )


def solved(problem: PlacementProblem, solver: MoetunerSolver | None = None, **request: Any) -> Placement:
    """Return MoETuner's placement after checking it."""
    request = {"work_s": 1.0, **request}
    solver = MoetunerSolver() if solver is None else solver
    placement = solver.solve(SolveRequest(problem=problem, model=CostModel(problem), **request))
    problem.check_placement(placement)
    problem.check_capacity(placement)
    assert (placement.replicas_LE == 1).all()
    return placement


def hops(problem: PlacementProblem, placement: Placement) -> float:
    """Share of transitions that leave their device."""
    device_LE = placement.first_device_LE
    tokens = [problem.profile.transitions(layer) for layer in range(problem.num_layers - 1)]
    moved = sum(t[a[:, None] != b].sum() for t, a, b in zip(tokens, device_LE, device_LE[1:], strict=False))
    return float(moved / np.sum(tokens))


def paired_profile() -> RoutingProfile:
    """Tokens of expert e go to expert 3 - e in the next layer; all experts are equally hot."""
    experts = np.repeat(np.arange(4), 10)
    experts_TLK = np.stack([experts, 3 - experts, experts], axis=1)[:, :, None].astype(np.uint8)
    load = np.full((1, 3, 4), 10.0)
    return RoutingProfile(
        load_WLE=load,
        window_tokens_W=np.array([40.0]),
        top_k=1,
        experts_TLK=experts_TLK,
        window_of_token_T=np.zeros(40, dtype=np.int64),
    )


@pytest.mark.parametrize("reading", list(Reading))
def test_tokens_stay_where_clusters_allow_it(reading: Reading) -> None:
    """One expert per device: the mirrored layer is mirrored on the devices, and nothing travels."""
    problem = make_problem(paired_profile(), cluster([0, 0, 0, 0]), calibration=LINEAR)
    placement = solved(problem, MoetunerSolver(reading=reading))
    assert hops(problem, placement) == 0.0
    assert placement.first_device_LE.tolist() == [[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize("backend", ["highs", "cp-sat", "mathopt-scip", "pulp-cbc"])
def test_backends_are_interchangeable(backend: str) -> None:
    """On devices in two nodes, where only the first device may be renamed, with a tight gap."""
    problem = problem_of(1)
    solver = MoetunerSolver(backend=backend, reading=Reading.SUM, relative_gap=1e-6, balance_tolerance=1e-6)
    default = solved(problem, MoetunerSolver(reading=Reading.SUM, relative_gap=1e-6, balance_tolerance=1e-6))
    load = problem.profile.load_WLE.sum(axis=0)

    def imbalance(placement: Placement) -> list[float]:
        load_LD = np.einsum("le,led->ld", load, placement.count_LED)
        return list(np.abs(load_LD - load_LD.mean(axis=1, keepdims=True)).sum(axis=1))

    assert imbalance(solved(problem, solver)) == pytest.approx(imbalance(default), abs=1e-3)


def test_spare_slots_stay_empty() -> None:
    """Clusters may be of different size, and memory over all layers stays even where it can."""
    problem = problem_of(2, spare_slots=8)
    placement = solved(problem)
    assert (placement.physical_to_logical_map_LS == EMPTY).sum() == 3 * 8
    held_LD = placement.count_LED.sum(axis=1)
    assert (held_LD >= 1).all()
    assert held_LD.sum(axis=0).max() <= 6 + 2


def test_devices_of_different_size_or_without_slots() -> None:
    """A device without slots gets nothing, a small one a small cluster."""
    topology = cluster([0, 0, 0, 1], slots_D=[4, 0, 1, 4])
    held_LD = solved(problem_of(3, topology=topology)).count_LED.sum(axis=1)
    assert (held_LD <= [4, 0, 1, 4]).all()
    assert (held_LD[:, [0, 2, 3]] >= 1).all()


def test_counts_alone_serve_the_first_stage() -> None:
    """Without transitions no device is better than another, and load is as even as with tokens."""
    full = problem_of(4, objective="balance")
    bare = full.with_profile(counts_only(full.profile))
    with_tokens, without = solved(full), solved(bare)
    load_LE = full.profile.load_WLE.sum(axis=0)
    for layer in range(3):
        loads = [load_LE[layer] @ placement.count_LED[layer] for placement in (with_tokens, without)]
        assert sorted(loads[0]) == pytest.approx(sorted(loads[1]))


def test_more_devices_than_experts_is_infeasible() -> None:
    """The paper wants an expert in each cluster."""
    problem = problem_of(5, topology=cluster([0] * 9, slots_D=[1] * 9))
    with pytest.raises(InfeasibleError, match="each of 9 clusters, one per device; a layer has 8"):
        solved(problem)


def test_many_devices_are_solved_part_by_part() -> None:
    """Eight devices have 4096 products per transition: layers are freed in turn, and hops do not rise."""
    problem = problem_of(7, topology=cluster([0] * 8), objective="balance")
    placement = solved(problem, MoetunerSolver(reading=Reading.SUM))
    # Counts alone leave cluster g on device g.
    untouched = solved(problem.with_profile(counts_only(problem.profile)))
    assert hops(problem, placement) < hops(problem, untouched)


def test_too_many_devices_are_refused() -> None:
    """The products of one transition would fill memory."""
    profile = random_profile(np.random.default_rng(0), tokens=100, layers=2, experts=20)
    with pytest.raises(InputError, match="160,000 products"):
        solved(make_problem(profile, cluster([0] * 20), calibration=LINEAR))


def test_unknown_backends_are_refused() -> None:
    """At the latest where a program is to be solved."""
    with pytest.raises(InputError, match="unknown backend 'gurobi'"):
        solved(problem_of(0), MoetunerSolver(backend="gurobi", balance_tolerance=0.0, relative_gap=0.0))


def test_a_cancelled_solve_returns_a_placement() -> None:
    """Stopped before anything: longest-first clusters, cluster g on device g."""
    stop = Cancellation()
    stop.cancel()
    solved(problem_of(6, spare_slots=4), stop=stop)


def test_names_tell_the_readings_apart() -> None:
    """As in the registry."""
    assert MoetunerSolver().name == "moetuner"
    assert MoetunerSolver(reading=Reading.SUM).name == "moetuner-sum"
