"""Stage 2 of MoETuner: program and shortest path against all assignments of clusters to devices."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from placement.solvers.milp import BACKENDS, MilpStatus, solve_milp
from placement.solvers.moetuner.devices import (
    DeviceProblem,
    Reading,
    better_devices,
    chain_optimum,
    device_program,
    excess_program,
    fits,
    memory_excess,
    part_of,
    travel_cost,
)
from placement.stopping import Never

SLOWNESS = np.array([[0.0, 1, 5], [1, 0, 5], [5, 5, 0]])


def random_problem(seed: int, reading: Reading, *, layers: int = 3, devices: int = 3) -> DeviceProblem:
    """Return clusters of 1 to 3 experts, without memory limits, on devices of which one is far away."""
    rng = np.random.default_rng(seed)
    slowness_GG = np.full((devices, devices), 5.0)
    slowness_GG[:-1, :-1] = 1.0
    np.fill_diagonal(slowness_GG, 0.0)
    return DeviceProblem(
        traffic_NCC=rng.geometric(0.05, (layers - 1, devices, devices)).astype(float),
        slowness_GG=slowness_GG,
        size_LC=rng.integers(1, 4, (layers, devices)),
        allowed_LCG=np.ones((layers, devices, devices), dtype=np.bool_),
        memory_G=np.full(devices, np.inf),
        reading=reading,
    )


def every_assignment(problem: DeviceProblem) -> list[np.ndarray]:
    """Return all cluster-on-device tables."""
    rows = list(itertools.permutations(range(problem.num_devices)))
    return [np.array(choice) for choice in itertools.product(rows, repeat=problem.num_layers)]


def least(problem: DeviceProblem) -> float:
    """Return the optimum over all assignments that fit."""
    costs = [travel_cost(problem, table) for table in every_assignment(problem) if fits(problem, table)]
    return min(costs)


def identity(problem: DeviceProblem) -> np.ndarray:
    """Return cluster g on device g everywhere."""
    return np.tile(np.arange(problem.num_devices), (problem.num_layers, 1))


def minimised(problem: DeviceProblem, backend: str = "highs", *, bounded: bool = False) -> np.ndarray:
    """Return the program's optimum; `bounded` hands the shortest path's bound over."""
    chain = chain_optimum(problem, Never()) if bounded else None
    program, y_LCG = device_program(problem, identity(problem), None if chain is None else chain[0])
    result = solve_milp(program, backend=backend, relative_gap=0, in_process=True)
    assert result.status is MilpStatus.OPTIMAL
    assert result.value_V is not None
    table_LG = result.value_V[y_LCG].argmax(axis=1)
    assert result.objective == pytest.approx(travel_cost(problem, table_LG), rel=1e-5)
    return table_LG


@pytest.mark.parametrize("reading", list(Reading))
def test_a_case_to_check_by_hand(reading: Reading) -> None:
    """All tokens go from cluster i to cluster 1 - i: crossing the second layer's clusters costs nothing."""
    problem = replace(
        random_problem(0, reading, layers=2, devices=2),
        traffic_NCC=np.array([[[1.0, 7.0], [6.0, 2.0]]]),
        slowness_GG=np.array([[0.0, 1.0], [1.0, 0.0]]),
    )
    straight, crossed = np.array([[0, 1], [0, 1]]), np.array([[0, 1], [1, 0]])
    summed = reading is Reading.SUM
    assert travel_cost(problem, straight) == (13 if summed else 7)
    assert travel_cost(problem, crossed) == (3 if summed else 2)
    chain = chain_optimum(problem, Never())
    assert chain is not None
    assert chain[0].tolist() == [0, 3 if summed else 2]
    assert travel_cost(problem, minimised(problem)) == (3 if summed else 2)


@pytest.mark.parametrize("reading", list(Reading))
@pytest.mark.parametrize("seed", range(4))
def test_path_and_programs_find_the_optimum(seed: int, reading: Reading) -> None:
    """Without memory limits, all 216 assignments tried."""
    problem = random_problem(seed, reading)
    optimum = least(problem)
    chain = chain_optimum(problem, Never())
    assert chain is not None
    assert chain[0][-1] == pytest.approx(optimum)
    assert travel_cost(problem, chain[1]) == pytest.approx(optimum)
    for bounded in (False, True):
        assert travel_cost(problem, minimised(problem, bounded=bounded)) == pytest.approx(optimum)


@pytest.mark.parametrize("reading", list(Reading))
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree(backend: str, reading: Reading) -> None:
    """Two random instances each."""
    for seed in (7, 8):
        problem = random_problem(seed, reading)
        assert travel_cost(problem, minimised(problem, backend)) == pytest.approx(least(problem))


@pytest.mark.parametrize(
    ("devices", "layers", "reading"), [(4, 2, Reading.MAXIMUM), (4, 3, Reading.SUM), (5, 2, Reading.SUM)]
)
def test_the_program_equals_the_path_on_more_devices(devices: int, layers: int, reading: Reading) -> None:
    """24 and 120 permutations for each layer; no bound is handed over."""
    problem = random_problem(devices, reading, layers=layers, devices=devices)
    chain = chain_optimum(problem, Never())
    assert chain is not None
    assert travel_cost(problem, minimised(problem)) == pytest.approx(chain[0][-1])


@pytest.mark.parametrize("reading", list(Reading))
@pytest.mark.parametrize("seed", range(4))
def test_memory_limits_couple_all_layers(seed: int, reading: Reading) -> None:
    """The program keeps them at the least cost; the path without them is a bound."""
    problem = random_problem(seed, reading)
    even = np.full(3, problem.size_LC.sum() / 3)
    problem = replace(problem, memory_G=even)
    excess = min(memory_excess(problem, table) for table in every_assignment(problem))
    program, y_LCG = excess_program(problem, identity(problem))
    result = solve_milp(program, relative_gap=0, in_process=True)
    assert result.value_V is not None
    assert result.objective == pytest.approx(excess, abs=1e-5)
    limited = replace(problem, memory_G=even + excess)
    assert fits(limited, result.value_V[y_LCG].argmax(axis=1))
    optimum = least(limited)
    for bounded in (False, True):
        table = minimised(limited, bounded=bounded)
        assert fits(limited, table)
        assert travel_cost(limited, table) == pytest.approx(optimum)
    chain = chain_optimum(limited, Never())
    assert chain is not None
    assert chain[0][-1] <= optimum * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_forbidden_devices_are_not_used(seed: int) -> None:
    """A cluster that is too large for a device goes elsewhere, by path and by program."""
    problem = random_problem(seed, Reading.SUM)
    slots = np.array([3, 3, problem.size_LC.min(axis=1).max()])
    problem = replace(problem, allowed_LCG=problem.size_LC[:, :, None] <= slots)
    chain = chain_optimum(problem, Never())
    assert chain is not None
    assert fits(problem, chain[1])
    assert chain[0][-1] == pytest.approx(least(problem))
    assert travel_cost(problem, minimised(problem)) == pytest.approx(least(problem))


@pytest.mark.parametrize("reading", list(Reading))
def test_exchanges_never_worsen_and_keep_limits(reading: Reading) -> None:
    """From an assignment that just fits."""
    problem = random_problem(3, reading, layers=6)
    start = identity(problem)
    problem = replace(problem, memory_G=np.full(3, problem.size_LC.sum(axis=0).max()))
    better = better_devices(problem, start, Never())
    assert fits(problem, better)
    assert travel_cost(problem, better) <= travel_cost(problem, start)
    np.testing.assert_array_equal(better_devices(problem, start, lambda: True), start)


@pytest.mark.parametrize("reading", list(Reading))
def test_a_part_of_the_layers_is_solved_against_the_rest(reading: Reading) -> None:
    """Layers 1 and 2 of four: what lies around them is kept, memory counts what all others hold."""
    problem = random_problem(4, reading, layers=4)
    start = identity(problem)
    problem = replace(problem, memory_G=np.full(3, float(problem.size_LC.sum(axis=0).max())))
    part = part_of(problem, start, 1, 3)
    assert part.num_layers == 4
    found = start.copy()
    found[0:4] = minimised(part)
    np.testing.assert_array_equal(found[[0, 3]], start[[0, 3]])
    assert fits(problem, found)
    around = [t for t in every_assignment(problem) if (t[[0, 3]] == start[[0, 3]]).all() and fits(problem, t)]
    assert travel_cost(problem, found) == pytest.approx(min(travel_cost(problem, t) for t in around))
    # The first layer alone has a neighbour on one side only.
    assert part_of(problem, start, 0, 1).num_layers == 2


def test_the_path_gives_up_on_many_devices_and_on_a_stop() -> None:
    """720 permutations and more are left to the program."""
    assert chain_optimum(random_problem(0, Reading.SUM, devices=6), Never()) is None
    assert chain_optimum(random_problem(0, Reading.SUM), lambda: True) is None


@pytest.mark.parametrize("reading", list(Reading))
def test_the_start_is_a_feasible_point_of_the_program(reading: Reading) -> None:
    """Products and costs of a given assignment satisfy all rows."""
    problem = random_problem(5, reading, layers=4)
    start = np.random.default_rng(0).permuted(identity(problem), axis=1)
    chain = chain_optimum(problem, Never())
    assert chain is not None
    program, _ = device_program(problem, start, chain[0])
    assert program.start_V is not None
    activity_R = program.activity_R(program.start_V)
    assert (activity_R >= program.row_lower_R - 1e-9).all()
    assert (activity_R <= program.row_upper_R + 1e-9).all()
    assert (program.start_V >= program.lower_V).all()
    assert (program.start_V <= program.upper_V).all()
    assert program.objective_at(program.start_V) == pytest.approx(travel_cost(problem, start))
