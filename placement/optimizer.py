"""The composition root: runs one solver or the portfolio, keeps the incumbent, bounds it, checks it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from placement.bounds import LowerBound, lower_bound, tighter
from placement.cost import CostBreakdown, CostModel
from placement.errors import InfeasibleError, InputError, NoPlacementFoundError
from placement.plan import Placement
from placement.problem import Objective, PlacementProblem
from placement.solution import Incumbent, Solution, Termination
from placement.solvers.protocol import SolveRequest
from placement.solvers.registry import BASELINES, make_solver
from placement.stopping import Never, StoppingCriterion

__all__ = ["optimize"]

OPTIMAL_GAP = 1e-9


def _ignore(_: Incumbent) -> None:
    """Take no notice of progress."""


def optimize(
    problem: PlacementProblem,
    *,
    solver: str = "auto",
    stop: StoppingCriterion | None = None,
    seed: int = 0,
    threads: int = 1,
    work_s: float | None = None,
    start: Placement | None = None,
    on_incumbent: Callable[[Incumbent], None] = _ignore,
    clock: Callable[[], float] = time.monotonic,
) -> Solution:
    """Find a placement for a problem.

    Parameters
    ----------
    problem
        What to solve.
    solver
        ``auto`` for the portfolio: all baselines, then search; never worse than any of them on the
        problem's traffic. Or one solver's name.
    stop
        When to end early and keep the best so far.
    seed, threads
        The same seed on one thread gives the same placement unless `stop` ends the solve.
    work_s
        Effort in seconds of one thread; None for the solver's own choice.
    start
        A placement that the result must not be worse than.
    on_incumbent
        Called at every improvement, from the calling thread.
    clock
        Seconds for the incumbents' times.

    Raises
    ------
    InputError
        If the solver is unknown or `start` does not belong to the problem.
    InfeasibleError
        If no placement can satisfy the constraints.
    NoPlacementFoundError
        If `stop` ended the solve before there was a placement.
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
    portfolio = _Portfolio(request, on_incumbent, clock)
    names = (*BASELINES, "search") if solver == "auto" else (solver,)
    return portfolio.run(names)


@dataclass(eq=False)
class _Portfolio:
    """Solvers run in turn on one problem, each from the best so far."""

    request: SolveRequest
    on_incumbent: Callable[[Incumbent], None]
    clock: Callable[[], float]
    bound: LowerBound = field(init=False)
    best: tuple[Placement, CostBreakdown, str] | None = None
    incumbents: list[Incumbent] = field(default_factory=list)
    candidates: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    stopped: bool = False

    def run(self, names: tuple[str, ...]) -> Solution:
        self.began_s = self.clock()
        self.bound = lower_bound(self.request.model)
        if self.request.start is not None:
            self._offer(self.request.start, "start")
        errors: list[InfeasibleError] = []
        for name in names:
            if self.best is not None and self.request.stop():
                self.stopped = True
                break
            try:
                self._run_solver(name)
            except InfeasibleError as exc:
                self.skipped[name] = str(exc)
                errors.append(exc)
        return self._solution(errors)

    def _run_solver(self, name: str) -> None:
        solver = make_solver(name)

        def report(placement: Placement) -> None:
            self._offer(placement, name)

        # Search starts from the best so far unless the caller's start is to be kept in view.
        start = self.request.start
        if start is None and self.best is not None:
            start = self.best[0]
        placement = solver.solve(replace(self.request, start=start, report=report, prove=self._prove))
        self._offer(placement, name)
        self.stopped = self.stopped or self.request.stop()

    def _prove(self, bound: LowerBound) -> None:
        """Keep what a solver has proved where it is tighter than what is known."""
        self.bound = tighter(self.request.problem, self.bound, bound)

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
        )
        self.incumbents.append(incumbent)
        self.on_incumbent(incumbent)

    def _solution(self, errors: list[InfeasibleError]) -> Solution:
        if self.best is None:
            if errors and not self.request.stop():
                raise errors[-1]
            if self.request.stop():
                raise NoPlacementFoundError(
                    "the time limit ended the solve before any placement was found; allow more time"
                )
            raise InfeasibleError("; ".join(f"{name}: {why}" for name, why in self.skipped.items()))
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
