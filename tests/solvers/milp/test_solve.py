"""Every backend gives the same checked answers, or one clear error."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placement.errors import BackendError, InputError
from placement.solvers.milp import (
    BACKENDS,
    Limit,
    MilpBuilder,
    MilpProgram,
    MilpResult,
    MilpStatus,
    backends,
    process,
    solve_milp,
)
from placement.solvers.milp.backend import Limits, Outcome, Unwatched, Watcher
from placement.solvers.milp.cpsat import integer_relaxation
from placement.solvers.milp.pulp_cbc import bound_in_log
from placement.solvers.milp.scaling import make_scaling

HIGHS_LIKE = ("highs", "pulp-highs")
"""Backends that tell of better points as they find them."""


def knapsacks(items: int, seed: int = 0, rows: int = 3) -> MilpProgram:
    """Return a packing program with a few hard rows."""
    rng = np.random.default_rng(seed)
    builder = MilpBuilder()
    x = builder.add_variables(items, upper=1, integer=True, objective=-rng.integers(20, 60, items))
    weights = rng.integers(20, 60, (rows, items))
    builder.add_rows((np.tile(x, (rows, 1)), weights), upper=weights.sum(axis=1) // 2)
    return builder.build()


def mixed(seed: int) -> MilpProgram:
    """Return a program of whole and continuous variables with fractional coefficients."""
    rng = np.random.default_rng(seed)
    builder = MilpBuilder(offset=float(rng.integers(-5, 5)))
    x = builder.add_variables(4, lower=-1, upper=2, integer=True, objective=rng.normal(size=4))
    t = builder.add_variables(2, upper=20, objective=rng.uniform(0.1, 1, 2))
    builder.add_rows(
        (t[:, None], 1.0), (np.tile(x, (2, 1)), rng.normal(size=(2, 4))), lower=rng.normal(size=2)
    )
    builder.add_rows((x, 1.0), lower=-2, upper=3)
    return builder.build()


def least(program: MilpProgram) -> float:
    """Return the optimum of a program of `mixed` by trying all whole numbers: t is as small as rows allow."""
    dense = np.zeros((program.num_rows, program.num_variables))
    dense[program.row_of_N, program.column_N] = program.coefficient_N
    best = np.inf
    for whole in itertools.product(range(-1, 3), repeat=4):
        if not -2 <= sum(whole) <= 3:
            continue
        t = np.maximum(0, program.row_lower_R[:2] - dense[:2, :4] @ whole)
        if (t <= 20).all():
            best = min(best, program.objective_at(np.concatenate([whole, t])))
    return best


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(4))
def test_backends_find_the_optimum_of_mixed_programs(backend: str, seed: int) -> None:
    """Within the tolerances of floating-point solvers, and with a bound that is none too high."""
    program = mixed(seed)
    optimum = least(program)
    result = solve_milp(program, backend=backend, relative_gap=0, in_process=True)
    assert result.status is MilpStatus.OPTIMAL
    assert result.objective == pytest.approx(optimum, abs=1e-4)
    assert result.bound <= optimum + 1e-9
    assert result.bound == pytest.approx(optimum, abs=1e-4)
    assert result.value_V is not None
    assert (result.value_V[:4] == np.rint(result.value_V[:4])).all()
    assert result.objective == program.objective_at(result.value_V)
    assert (result.backend, result.limit) == (backend, Limit.NONE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_child_process_gives_the_same_answer(backend: str) -> None:
    """4 x + 3 y over x + y >= 1.5 whole, x <= 1: y = 2 costs 6, x = y = 1 costs 7."""
    builder = MilpBuilder(offset=1.0)
    x = builder.add_variables(2, upper=[1, 5], integer=True, objective=[4.0, 3.0])
    builder.add_rows((x, 1.0), lower=1.5)
    result = solve_milp(builder.build(start_V=[1, 1]), backend=backend)
    assert result.value_V is not None
    assert (result.status, result.objective, result.value_V.tolist()) == (MilpStatus.OPTIMAL, 7.0, [0, 2])
    assert result.gap <= 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_infeasible_programs_are_told_from_unbounded_ones(backend: str) -> None:
    """Three of two binaries; and a whole number between 0.2 and 0.3 beside a variable that falls forever."""
    builder = MilpBuilder()
    x = builder.add_variables(2, upper=1, integer=True)
    builder.add_rows((x, 1.0), lower=3)
    result = solve_milp(builder.build(), backend=backend, in_process=True)
    assert (result.status, result.objective, result.bound) == (MilpStatus.INFEASIBLE, np.inf, np.inf)
    assert result.value_V is None

    builder = MilpBuilder()
    y = builder.add_variables(2, upper=[10, np.inf], integer=True, objective=[0.0, -1.0])
    falling = builder.build()
    builder.add_rows((y[:1], 1.0), lower=0.2, upper=0.3)
    neither = builder.build()
    if backend == "cp-sat":
        with pytest.raises(BackendError, match=r"bounds within .* those of variable 1 are"):
            solve_milp(falling, backend=backend, in_process=True)
        return
    assert solve_milp(falling, backend=backend, in_process=True).status is MilpStatus.UNBOUNDED
    assert solve_milp(neither, backend=backend, in_process=True).status is MilpStatus.INFEASIBLE


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gap_ends_a_proof_early_and_is_reported(backend: str) -> None:
    """Within half of the objective any point will do; the bound still holds."""
    program = knapsacks(12)
    exact = solve_milp(program, backend=backend, relative_gap=0, in_process=True)
    loose = solve_milp(program, backend=backend, relative_gap=0.5, in_process=True)
    assert exact.objective == solve_milp(program, relative_gap=0, in_process=True).objective
    assert loose.status is MilpStatus.OPTIMAL
    assert loose.bound <= exact.objective <= loose.objective
    assert 0 <= loose.gap <= 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_node_limit_ends_with_a_bound(backend: str) -> None:
    """One node of a hard program: a point, a gap, and the word that nodes ended it."""
    program = knapsacks(60, rows=8)
    result = solve_milp(program, backend=backend, node_limit=1, in_process=True, relative_gap=0)
    assert (result.status, result.limit) == (MilpStatus.FEASIBLE, Limit.NODES)
    assert result.bound < result.objective < 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_time_limit_ends_a_hard_program(backend: str) -> None:
    """Within a fraction of a second there is a point but no proof, nor the claim of one."""
    result = solve_milp(knapsacks(300, rows=30), backend=backend, time_limit_s=0.3, relative_gap=0)
    assert result.status in (MilpStatus.FEASIBLE, MilpStatus.STOPPED)
    assert result.limit is Limit.TIME
    assert result.bound < result.objective


class AfterFirst:
    """Stop once the log of better points is not empty."""

    def __init__(self) -> None:
        self.seen = threading.Event()

    def __call__(self) -> bool:
        """Return whether there was a point."""
        return self.seen.is_set()


@pytest.mark.parametrize("backend", HIGHS_LIKE)
def test_stopping_kills_the_child_and_keeps_its_best_point(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The points told before the stop are there, checked, with the bound of that time."""
    stop = AfterFirst()
    told: list[float] = []
    program = knapsacks(300, rows=30)

    class Listening(Unwatched):
        def stopped(self) -> bool:
            return stop()

        def improved(self, value_V: np.ndarray, bound: float) -> None:
            told.append(program.objective_at(value_V))
            stop.seen.set()

    limits = Limits(relative_gap=0)
    outcome = process.solve_in_child(program, backend, limits, Listening(), memory_bytes=2**33)
    assert outcome.limit is Limit.STOP
    assert outcome.value_V is not None
    assert program.objective_at(outcome.value_V) == told[-1]


def test_a_stop_before_the_start_leaves_nothing() -> None:
    """No process is even started."""
    result = solve_milp(knapsacks(5), stop=lambda: True)
    assert (result.status, result.limit) == (MilpStatus.STOPPED, Limit.STOP)
    assert (result.value_V, result.objective, result.gap) == (None, np.inf, np.inf)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stop_falls_back_on_a_feasible_start(backend: str) -> None:
    """Some backends tell of nothing before the end; a start that does not hold is not returned."""
    program = knapsacks(300, rows=30)
    start_V = (np.arange(300) < 3).astype(np.float64)
    asked = itertools.count()
    result = solve_milp(replace(program, start_V=start_V), backend=backend, stop=lambda: next(asked) > 2)
    assert (result.status, result.limit) == (MilpStatus.FEASIBLE, Limit.STOP)
    assert result.objective <= program.objective_at(start_V)
    full = replace(program, start_V=np.ones(300))
    assert solve_milp(full, backend=backend, stop=lambda: True).status is MilpStatus.STOPPED


def test_no_child_outlives_its_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the child nor the CBC that it started is left when a stop ends the solve."""
    children: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def remember(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        children.append(popen(*args, **options))
        return children[-1]

    monkeypatch.setattr(process.subprocess, "Popen", remember)
    asked = itertools.count()
    solve_milp(knapsacks(300, rows=30), backend="pulp-cbc", stop=lambda: next(asked) > 60)
    (child,) = children
    assert child.returncode == -signal.SIGKILL
    for _ in range(100):
        # The group is gone once the init process has collected its orphans.
        if not Path(f"/proc/{child.pid}").exists() and not group_alive(child.pid):
            break
        time.sleep(0.02)
    assert not group_alive(child.pid)


def group_alive(group: int) -> bool:
    """Return whether a process of a group runs, zombies not counted."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def test_wildly_scaled_rows_are_satisfied_in_their_own_units() -> None:
    """1e-12 x >= 1e-12 wants x = 1, 1e12 y <= 1.5e12 allows y = 1: tolerances do not hide either."""
    builder = MilpBuilder()
    x = builder.add_variables(2, upper=5, integer=True, objective=[1e-9, -1e-9])
    builder.add_rows((x[:1], 1e-12), lower=1e-12)
    builder.add_rows((x[1:], 1e12), upper=1.5e12)
    program = builder.build()
    for backend in BACKENDS:
        result = solve_milp(program, backend=backend, in_process=True)
        assert result.value_V is not None
        assert result.value_V.tolist() == [1, 1]
        assert result.status is MilpStatus.OPTIMAL


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_resolved_is_an_error(backend: str) -> None:
    """A row of 1e12 and 1e-12 whose small term decides: a solver drops it, and we notice."""
    builder = MilpBuilder()
    x = builder.add_variables(2, upper=1, integer=True, objective=1.0)
    builder.add_rows((x, [1e12, 1e-12]), lower=1e-12)
    with pytest.raises(BackendError, match="does not hold: row 0 is 0"):
        solve_milp(builder.build(), backend=backend, in_process=True)
    builder.add_rows((x[:1], 1.0), upper=0)
    with pytest.raises(BackendError, match=r"ten orders of magnitude|does not hold"):
        solve_milp(builder.build(), backend=backend, in_process=True)


class Fake:
    """A backend that says what it is told to."""

    name = "highs"

    def __init__(self, *outcomes: Outcome) -> None:
        self.outcomes = list(outcomes)

    def solve(self, program: MilpProgram, limits: Limits, watcher: Watcher) -> Outcome:
        """Return the next outcome."""
        return self.outcomes.pop(0)


def answer(monkeypatch: pytest.MonkeyPatch, program: MilpProgram, *outcomes: Outcome) -> MilpResult:
    """Solve with a backend that gives some outcomes."""
    real = backends.make_backend("highs")
    fake = Fake(*outcomes)
    monkeypatch.setattr(
        "placement.solvers.milp.solve.make_backend", lambda _: fake if fake.outcomes else real
    )
    return solve_milp(program, in_process=True)


def big_m() -> MilpProgram:
    """Y <= 1e9 x, y >= 5, x binary: with x = 5e-9 nearly whole, y = 5 looks feasible."""
    builder = MilpBuilder()
    x = builder.add_variables(1, upper=1, integer=True, objective=100.0)
    y = builder.add_variables(1, upper=10, objective=1.0)
    free = builder.add_variables(1, upper=1, objective=1.0)
    builder.add_rows((y, 1.0), (x, -1e9), upper=0)
    builder.add_rows((y, 1.0), (free, 20.0), lower=5)
    return builder.build()


def test_a_point_that_rounding_breaks_is_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """X rounds to 0, so y must be 0 and the other variable steps in: 5 / 20."""
    trick = Outcome(status=MilpStatus.OPTIMAL, value_V=np.array([5e-9, 5.0, 0.0]), bound=0.0)
    result = answer(monkeypatch, big_m(), trick)
    assert result.value_V is not None
    assert result.value_V == pytest.approx([0, 0, 0.25])
    assert result.status is MilpStatus.FEASIBLE


def test_a_point_that_cannot_be_repaired_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """All variables are whole, and the rounded point breaks a row."""
    wrong = Outcome(status=MilpStatus.OPTIMAL, value_V=np.ones(5), bound=-1e3)
    with pytest.raises(BackendError, match="gave a point that does not hold: row"):
        answer(monkeypatch, knapsacks(5), wrong)


def test_a_bound_above_the_objective_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minimum of -1 cannot be proved for a point of less."""
    wrong = Outcome(status=MilpStatus.OPTIMAL, value_V=np.array([1.0, 0, 0, 0, 0]), bound=-1.0)
    with pytest.raises(BackendError, match="above its own"):
        answer(monkeypatch, knapsacks(5), wrong)


def test_an_optimum_that_is_none_is_called_feasible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the backend's word, the gap is reckoned from the checked point."""
    lazy = Outcome(status=MilpStatus.OPTIMAL, value_V=np.zeros(5), bound=-2048.0)
    assert answer(monkeypatch, knapsacks(5), lazy).status is MilpStatus.FEASIBLE


def test_a_point_without_a_bound_is_no_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite gap is within no tolerance."""
    unbounded = Outcome(status=MilpStatus.FEASIBLE, value_V=np.zeros(5), limit=Limit.NODES)
    result = answer(monkeypatch, knapsacks(5), unbounded)
    assert (result.status, result.bound, result.gap) == (MilpStatus.FEASIBLE, -np.inf, np.inf)


CRASHES = {
    "os.kill(os.getpid(), 9)": "was ended by SIGKILL",
    "os.abort()": "was ended by SIGABRT",
    "os._exit(7)": "ended with exit code 7",
    "raise KeyError('slot')": "ended with exit code 1 and no answer: KeyError: 'slot'",
    "raise MemoryError": r"ran out of memory \(1024 MiB are allowed\)",
    "np.ones(2**28)": r"ran out of memory \(1024 MiB are allowed\)",
    "raise ModuleNotFoundError('No module named highspy')": "is not installed: No module named highspy",
}


@pytest.mark.parametrize("code", CRASHES)
def test_a_crash_is_one_clear_line(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that dies, lacks a package or asks for too much memory is a BackendError."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, types\n"
        "fake = types.ModuleType('highspy')\n"
        "def fail(name):\n"
        "    import numpy as np\n"
        f"    {code}\n"
        "fake.__getattr__ = fail\n"
        "sys.modules['highspy'] = fake\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(BackendError, match=CRASHES[code]) as caught:
        solve_milp(knapsacks(5), memory_bytes=2**30)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same line without a child."""
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(BackendError, match="highs is not installed"):
        solve_milp(knapsacks(5), in_process=True)


def test_a_missing_cbc_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """CBC is a program, not a package."""
    monkeypatch.setattr("pulp.apis.coin_api.pulp_cbc_path", "/nowhere/cbc")
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(BackendError, match="pulp-cbc is not installed: no cbc on the path"):
        solve_milp(knapsacks(5), backend="pulp-cbc", in_process=True)


def test_unknown_names_and_limits_are_refused() -> None:
    """The nearest backend is named, and limits are positive."""
    with pytest.raises(InputError, match="highs"):
        solve_milp(knapsacks(3), backend="high")
    with pytest.raises(InputError, match=r"time_limit_s is -1\.0"):
        solve_milp(knapsacks(3), time_limit_s=-1.0)
    with pytest.raises(InputError, match="node_limit is 0"):
        solve_milp(knapsacks(3), node_limit=0)
    with pytest.raises(InputError, match="gaps are -1"):
        solve_milp(knapsacks(3), relative_gap=-1.0)


def test_programs_of_constants_are_judged_without_a_solver() -> None:
    """No variables: feasible or not by the limits of the rows alone."""
    builder = MilpBuilder(offset=3.0)
    assert solve_milp(builder.build()).objective == 3.0
    nothing = np.empty(0, dtype=np.int64)
    builder.add_rows((nothing, 1.0), lower=1)
    assert solve_milp(builder.build()).status is MilpStatus.INFEASIBLE


@pytest.mark.parametrize("seed", range(3))
def test_the_same_seed_gives_the_same_point(seed: int) -> None:
    """One thread and no clock: child and caller's process agree as well."""
    program = knapsacks(40, seed)
    first, second = (solve_milp(program, seed=seed, in_process=inside).value_V for inside in (True, False))
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("seed", range(20))
def test_the_integer_relaxation_admits_every_point(seed: int) -> None:
    """Points of the true program, to the nearest step, keep all widened rows and the objective's error."""
    rng = np.random.default_rng(seed)
    program = mixed(seed)
    relaxed = integer_relaxation(program)
    for _ in range(50):
        point_V = np.concatenate([rng.integers(-1, 3, 4), rng.uniform(0, 20, 2)])
        activity_R = program.activity_R(point_V)
        whole_V = np.rint((point_V - relaxed.origin_V) / relaxed.step_V)
        whole_R = np.bincount(program.row_of_N, relaxed.coefficient_N * whole_V[program.column_N])
        inside_R = (activity_R >= program.row_lower_R) & (activity_R <= program.row_upper_R)
        admitted_R = (whole_R >= relaxed.row_lower_R) & (whole_R <= relaxed.row_upper_R)
        assert (admitted_R | ~inside_R).all()
        bound = relaxed.true_bound(float(relaxed.objective_V @ whole_V))
        assert bound <= program.objective_at(point_V) <= bound + 3 * relaxed.objective_error + 1e-9
    assert relaxed.objective_error < 1e-6


@pytest.mark.parametrize("seed", range(10))
def test_scaling_rounds_nothing_and_levels_coefficients(seed: int) -> None:
    """Powers of two: scaled values times their units are the true ones, bit for bit."""
    rng = np.random.default_rng(seed)
    builder = MilpBuilder()
    x = builder.add_variables(6, upper=1e6, objective=np.exp2(rng.uniform(-30, 30, 6)))
    unit_R, unit_V = np.exp2(rng.uniform(-30, 30, (4, 1))), np.exp2(rng.uniform(-30, 30, 6))
    builder.add_rows(
        (np.tile(x, (4, 1)), rng.uniform(1, 2, (4, 6)) * unit_R * unit_V), lower=0, upper=unit_R[:, 0]
    )
    program = builder.build()
    scaling = make_scaling(program)
    scaled = scaling.apply(program)
    back_N = scaled.coefficient_N / scaling.row_R[scaled.row_of_N] / scaling.column_V[scaled.column_N]
    np.testing.assert_array_equal(back_N, program.coefficient_N)
    assert 1 / 8 <= np.abs(scaled.coefficient_N).min() <= np.abs(scaled.coefficient_N).max() <= 8
    assert scaling.resolves
    assert np.abs(scaled.objective_V).max() <= 2**11


def test_the_bound_of_cbc_is_read_off_its_log() -> None:
    """A stated bound counts; "optimal" means within the gaps; else there is none."""
    limits = Limits(relative_gap=0.1)
    stopped = "Result - Stopped on time limit\n\nObjective value:   -10.0\nLower bound:     -1.25e+01\n"
    assert bound_in_log(stopped, -10.0, limits) == -12.5
    assert bound_in_log("Result - Optimal solution found\n", -10.0, limits) == -11.0
    assert bound_in_log("Result - Stopped on time limit\n", None, limits) == -np.inf
