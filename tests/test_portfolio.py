"""Tests of who runs on which problem."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from instances import LINEAR, cluster, counts_only, random_profile

from placement import optimizer
from placement.errors import BackendError
from placement.optimizer import optimize
from placement.plan import Placement
from placement.portfolio import QUICK, num_searches, portfolio
from placement.problem import PlacementProblem, make_problem
from placement.solvers.protocol import SolveRequest
from placement.solvers.registry import BASELINES, make_solver


def problem(experts: int = 24, *, windows: int = 4, nodes: int = 1, **options: object) -> PlacementProblem:
    profile = random_profile(np.random.default_rng(0), tokens=300, experts=experts, windows=windows)
    given: dict[str, object] = {"calibration": LINEAR, **options}
    if given.pop("counts", False):
        profile = counts_only(profile)
    return make_problem(profile, cluster([0, 0, nodes - 1, nodes - 1]), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["search"]),
        ({"semantics": "stay-put"}, ["chain"]),
        ({"semantics": "stay-put", "objective": "balance"}, ["search"]),
        ({"nodes": 2}, ["hierarchy", "search"]),
        ({"windows": 1, "objective": "balance", "counts": True}, ["balance", "search"]),
        ({"spare_slots": 4, "replica_split": "hash"}, ["search", "split"]),
        ({"replica_split": "hash"}, ["search"]),
        ({"experts": 8}, ["exact", "search"]),
        ({"experts": 16, "nodes": 2, "semantics": "stay-put", "objective": "traffic"}, ["exact", "chain"]),
    ],
)
def test_solvers_suit_the_problem(options: dict[str, object], names: list[str]) -> None:
    """The baselines always, then who is best at it."""
    assert portfolio(problem(**options)) == (*BASELINES, *names)  # type: ignore[arg-type]


def test_effort_is_shared_among_searches() -> None:
    """Two searches get half of it each; proofs and baselines take what they take."""
    assert num_searches(("greedy", "search", "split", "exact")) == 2
    assert num_searches(("greedy",)) == 1


class Broken:
    """A solver whose backend fails."""

    name = "search"

    def solve(self, request: SolveRequest) -> Placement:
        """Fail."""
        raise BackendError("highs died of signal 9; install it again")


@contextmanager
def broken_search(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(
        optimizer, "make_solver", lambda name: Broken() if name == "search" else make_solver(name)
    )
    yield


def test_the_portfolio_goes_on_without_a_broken_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others' best stands, and the result says who failed and why."""
    with broken_search(monkeypatch):
        solution = optimize(problem(), work_s=0.1)
        assert solution.solver in BASELINES
        assert "signal 9" in solution.skipped["search"]
        with pytest.raises(BackendError, match="signal 9"):
            optimize(problem(), solver="search", work_s=0.1)


def test_no_search_runs_after_a_proof() -> None:
    """One expert on every device is optimal whoever places it."""
    even = problem(experts=4, objective="balance", windows=1)
    solution = optimize(even, work_s=0.1)
    assert solution.gap == pytest.approx(0.0, abs=1e-9)
    assert set(solution.candidates) <= QUICK
