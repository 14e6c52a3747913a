"""The composition root: runs one solver or the portfolio, keeps the incumbent, bounds it, checks it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from placement.bounds import LowerBound, lower_bound, tighter
from placement.cost import CostBreakdown, CostModel
from placement.errors import BackendError, InfeasibleError, InputError, NoPlacementFoundError, PlacementError
from placement.plan import Placement
from placement.portfolio import QUICK, num_searches, portfolio
from placement.problem import Objective, PlacementProblem
from placement.solution import Incumbent, Solution, Termination, relative_gap
from placement.solvers.protocol import Solver, SolveRequest
from placement.solvers.registry import make_solver
from placement.solvers.search import default_work_s
from placement.stopping import Never, StoppingCriterion

__all__ = ["PROVING", "optimize"]

OPTIMAL_GAP = 1e-9

BOUND_EFFORT, LEAST_BOUND_EFFORT, MOST_BOUND_EFFORT = 0.6, 0.2, 4.0
BOUND_WORK_S = 10.0
"""Effort of the bound of a solve that takes this long; deeper solves prove more."""

ENOUGH_GAP = 5e-4
"""Gap below which the portfolio runs no further solver: less than any traffic is predicted to."""

FAR_SHARE = 0.2
"""Share of the experts from which a budget of moves is worth an unbudgeted solve to steer towards."""


PROVING = "proving"
"""What runs when the bound is tightened in earnest; before that it is a solver's name."""


def _ignore(_: Incumbent) -> None:
    """Take no notice of progress."""


def _ignore_phase(_: str, __: LowerBound) -> None:
    """Take no notice of what runs."""


def optimize(
    problem: PlacementProblem,
    *,
    solver: str = "auto",
    stop: StoppingCriterion | None = None,
    seed: int = 0,
    threads: int = 1,
    work_s: float | None = None,
    start: Placement | None = None,
    max_moves: int | None = None,
    on_incumbent: Callable[[Incumbent], None] = _ignore,
    on_phase: Callable[[str, LowerBound], None] = _ignore_phase,
    clock: Callable[[], float] = time.monotonic,
) -> Solution:
    """Find a placement for a problem.

    Parameters
    ----------
    problem
        What to solve.
    solver
        ``auto`` for the portfolio: all baselines, then the solvers that suit the problem; never worse than
        any of them on the problem's traffic. Or one solver's name.
    stop
        When to end early and keep the best so far.
    seed, threads
        The same seed on one thread gives the same placement unless `stop` ends the solve.
    work_s
        Effort in seconds of one thread; None for the solver's own choice.
    start
        A placement that the result must not be worse than. Alike devices of the result are exchanged so that
        few expert copies move.
    max_moves
        With `start`: expert copies that devices may receive, over all layers; None for any number. The solver
        then finds what to steer towards where the budget reaches that far, and the result is by ``change``.
    on_incumbent
        Called at every improvement, from the calling thread.
    on_phase
        Called with what runs now (a solver's name, ``start`` or ``proving``) and the bound known, whenever
        either changes, and before the first incumbent.
    clock
        Seconds for the incumbents' times.

    Raises
    ------
    InputError
        If the solver is unknown, `start` does not belong to the problem, or there are moves to count but no
        start to count from.
    InfeasibleError
        If no placement can satisfy the constraints.
    NoPlacementFoundError
        If `stop` ended the solve before there was a placement.
    BackendError
        If the one solver that was asked for needs a backend that fails.
    """
    if threads < 1:
        raise InputError(f"threads is {threads}; it must be 1 or more")
    if work_s is not None and not work_s > 0:
        raise InputError(f"work_s is {work_s}; it must be above 0")
    if start is not None:
        problem.check_placement(start)
        problem.check_capacity(start)
    request = SolveRequest(
        problem=problem,
        model=CostModel(problem),
        stop=Never() if stop is None else stop,
        seed=seed,
        threads=threads,
        work_s=work_s,
        start=start,
    )
    names = portfolio(problem) if solver == "auto" else (solver,)
    solvers = [make_solver(name) for name in names]
    if work_s is not None:
        request = replace(request, work_s=work_s / num_searches(names))
    if max_moves is not None:
        solvers, request = _within(request, solvers, max_moves, clock)
    return _Portfolio(request, on_incumbent, clock, on_phase).run(solvers)


def _within(
    request: SolveRequest, solvers: list[Solver], max_moves: int, clock: Callable[[], float]
) -> tuple[list[Solver], SolveRequest]:
    """Return the solvers of a solve with a budget of moves, and their request."""
    from placement.change.solver import ChangeSolver

    problem = request.problem
    if request.start is None:
        raise InputError(f"max_moves is {max_moves}, but there is no start to count moves from")
    if max_moves < 0:
        raise InputError(f"max_moves is {max_moves}; it must be 0 or more")
    if max_moves >= problem.num_layers * problem.num_slots:
        # More moves than there are copies bind nothing.
        return solvers, request
    if max_moves < FAR_SHARE * problem.num_layers * problem.num_experts:
        return [ChangeSolver(max_moves=max_moves)], request
    work_s = default_work_s(problem) if request.work_s is None else request.work_s
    request = replace(request, work_s=work_s / 2)
    free = _Portfolio(request, _ignore, clock).run(solvers)
    return [ChangeSolver(max_moves=max_moves, prefer=free.placement)], request


def _bound_effort(work_s: float | None) -> float:
    """Choose the effort of the bound by that of the solve: about half of a default solve's time."""
    if work_s is None:
        return BOUND_EFFORT
    return float(np.clip(BOUND_EFFORT * work_s / BOUND_WORK_S, LEAST_BOUND_EFFORT, MOST_BOUND_EFFORT))


@dataclass(eq=False)
class _Portfolio:
    """Solvers run in turn on one problem, each from the best so far."""

    request: SolveRequest
    on_incumbent: Callable[[Incumbent], None]
    clock: Callable[[], float]
    on_phase: Callable[[str, LowerBound], None] = _ignore_phase
    phase: str = ""
    bound: LowerBound = field(init=False)
    counted: bool = False
    best: tuple[Placement, CostBreakdown, str] | None = None
    incumbents: list[Incumbent] = field(default_factory=list)
    candidates: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    stopped: bool = False

    def run(self, solvers: Sequence[Solver]) -> Solution:
        self.began_s = self.clock()
        # No cost is below 0.
        self.bound = LowerBound(value=0.0, layer_L=np.zeros(self.request.problem.num_layers))
        if self.request.start is not None:
            self._begin("start")
            self._offer(self.request.start, "start")
        errors: list[PlacementError] = []
        for solver in solvers:
            if solver.name not in QUICK and not self.request.stop():
                self._bound_by_counting()
            if self.best is not None and (self.request.stop() or self._is_near()):
                self.stopped = self.request.stop()
                break
            try:
                self._run_solver(solver)
            except (InfeasibleError, BackendError, NoPlacementFoundError) as exc:
                # What one solver cannot do another may.
                self.skipped[solver.name] = str(exc)
                errors.append(exc)
        self._bound_by_counting()
        if self.best is not None and not self._is_near() and not self.request.stop():
            self._begin(PROVING)
            self._prove(self._deep_bound())
        return self._solution(errors)

    def _bound_by_counting(self) -> None:
        """Bound the objective as well as that is at once; the first placements need not wait for it."""
        if not self.counted:
            self.counted = True
            self._prove(lower_bound(self.request.model, stop=lambda: True))

    def _deep_bound(self) -> LowerBound:
        """Bound the objective in earnest, last: under a deadline the placement comes first."""
        effort = _bound_effort(self.request.work_s)
        return lower_bound(self.request.model, effort=effort, stop=self.request.stop)

    def _is_near(self) -> bool:
        """Whether the best placement is so near the bound that no other solver is worth its time."""
        assert self.best is not None
        return relative_gap(self.best[1].objective, self.bound.value) <= ENOUGH_GAP

    def _begin(self, phase: str) -> None:
        self.phase = phase
        self.on_phase(phase, self.bound)

    def _run_solver(self, solver: Solver) -> None:
        self._begin(solver.name)

        def report(placement: Placement) -> None:
            self._offer(placement, solver.name)

        # Search starts from the best so far unless the caller's start is to be kept in view.
        start = self.request.start
        if start is None and self.best is not None:
            start = self.best[0]
        placement = solver.solve(replace(self.request, start=start, report=report, prove=self._prove))
        self._offer(placement, solver.name)
        self.stopped = self.stopped or self.request.stop()

    def _prove(self, bound: LowerBound) -> None:
        """Keep what a solver has proved where it is tighter than what is known."""
        known = self.bound.value
        self.bound = tighter(self.request.problem, self.bound, bound)
        if self.bound.value > known:
            self.on_phase(self.phase, self.bound)

    def _offer(self, placement: Placement, name: str) -> None:
        """Evaluate a placement and keep it if it is feasible and better."""
        breakdown = self.request.model.evaluate(placement)
        self.request.problem.check_capacity(placement)
        problem = self.request.problem
        worst = breakdown.metrics.worst_layer_balance
        if problem.objective is Objective.TRAFFIC and worst > problem.max_imbalance * (1 + 1e-9):
            self.skipped.setdefault(name, f"a layer's balance is {worst:.4f}, above {problem.max_imbalance}")
            return
        self.skipped.pop(name, None)
        self.candidates[name] = min(breakdown.objective, self.candidates.get(name, float("inf")))
        if self.best is not None and breakdown.objective >= self.best[1].objective:
            return
        self.best = (placement, breakdown, name)
        incumbent = Incumbent(
            elapsed_s=self.clock() - self.began_s,
            objective=breakdown.objective,
            lower_bound=self.bound.value,
            solver=name,
            placement=placement,
        )
        self.incumbents.append(incumbent)
        self.on_incumbent(replace(incumbent, breakdown=breakdown))

    def _save_moves(self) -> None:
        """Exchange alike devices of the best placement where that saves moves from the start for nothing."""
        from placement.change.relabel import fewest_moves

        start = self.request.start
        if self.best is None or start is None or self.best[2] == "start":
            return
        placement, given, name = self.best
        placement = fewest_moves(self.request.problem, start, placement)
        breakdown = self.request.model.evaluate(placement)
        # Sums in another order may round up: the start must stay the worst case.
        if breakdown.objective <= max(given.objective, self.candidates.get("start", float("inf"))):
            self.best = (placement, breakdown, name)

    def _solution(self, errors: list[PlacementError]) -> Solution:
        if self.best is None:
            if errors and not self.request.stop():
                raise errors[-1]
            if self.request.stop():
                raise NoPlacementFoundError(
                    "the time limit ended the solve before any placement was found; allow more time"
                )
            raise InfeasibleError("; ".join(f"{name}: {why}" for name, why in self.skipped.items()))
        self._save_moves()
        placement, breakdown, name = self.best
        placement.check()
        optimal = breakdown.objective - self.bound.value <= OPTIMAL_GAP * abs(breakdown.objective)
        termination = Termination.STOPPED if self.stopped else Termination.CONVERGED
        return Solution(
            placement=placement,
            breakdown=breakdown,
            bound=self.bound,
            termination=Termination.OPTIMAL if optimal else termination,
            solver=name,
            incumbents=tuple(self.incumbents),
            candidates=dict(self.candidates),
            skipped=dict(self.skipped),
        )
