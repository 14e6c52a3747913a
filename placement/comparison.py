"""Every policy side by side: fitted on alternate windows, scored on the rest.

What was fitted says little: a placement is judged on windows that no solver has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.bounds import lower_bound
from placement.cost import CostBreakdown, CostModel
from placement.errors import InfeasibleError, InputError, NoPlacementFoundError
from placement.optimizer import optimize
from placement.plan import Placement
from placement.problem import Objective, PlacementProblem, Risk, Semantics
from placement.solution import Incumbent, Solution
from placement.stopping import AnyOf, Deadline, Never, StoppingCriterion

__all__ = ["Comparison", "CrossValidation", "PolicyResult", "compare", "cross_validate"]

FloatArray = npt.NDArray[np.float64]

FEW_WINDOWS = 10
"""Below so many held-out windows a difference of a few percent may be noise."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyResult:
    """One policy.

    Parameters
    ----------
    name
        Policy: a baseline, or what ``search`` was asked to minimise.
    description
        What it does, in a few words.
    solution
        Its solve on the fitted windows.
    fitted, held_out
        Cost on the fitted windows and on the others, for the problem's own objective.
    """

    name: str
    description: str
    solution: Solution
    fitted: CostBreakdown
    held_out: CostBreakdown

    @property
    def placement(self) -> Placement:
        """The placement."""
        return self.solution.placement


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """All policies on one problem.

    Parameters
    ----------
    problem
        The problem on the fitted windows.
    policies
        Results, baselines first; the last one is ``auto``.
    skipped
        Policies without an answer, and why.
    lower_bound
        Bound on the fitted objective.
    """

    problem: PlacementProblem
    policies: tuple[PolicyResult, ...]
    skipped: dict[str, str]
    lower_bound: float
    num_held_out_windows: int

    @property
    def few_windows(self) -> bool:
        """Whether the held-out windows are too few to trust a small difference."""
        return self.num_held_out_windows < FEW_WINDOWS

    def policy(self, name: str) -> PolicyResult:
        """Return one policy's result.

        Raises
        ------
        InputError
            If it is not among the results.
        """
        for result in self.policies:
            if result.name == name:
                return result
        raise InputError(f"policy {name!r} is not among {[result.name for result in self.policies]}")

    def better_share(self, name: str, other: str) -> float:
        """Return the share of held-out windows in which a policy's step (or balance) is below another's."""
        mine, theirs = (_window_cost(self.problem, self.policy(p).held_out) for p in (name, other))
        return float((mine < theirs).mean())

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "objective": str(self.problem.objective),
            "semantics": str(self.problem.semantics),
            "unit": self.problem.unit,
            "num_devices": self.problem.num_devices,
            "num_slots": self.problem.num_slots,
            "fitted_windows": self.problem.profile.num_windows,
            "held_out_windows": self.num_held_out_windows,
            "few_windows": self.few_windows,
            "lower_bound": self.lower_bound,
            "policies": [_policy_dict(result) for result in self.policies],
            "skipped": self.skipped,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CrossValidation:
    """The same comparison on several splits, every window held out exactly once.

    Parameters
    ----------
    folds
        One comparison for each split.
    """

    folds: tuple[Comparison, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Policies that have an answer in every fold, in order."""
        answered = [{result.name for result in fold.policies} for fold in self.folds]
        return tuple(r.name for r in self.folds[0].policies if all(r.name in names for names in answered))

    def held_out(self, name: str) -> FloatArray:
        """Held-out objective of a policy in each fold, ``[folds]``.

        Raises
        ------
        InputError
            If the policy has no answer in some fold.
        """
        return np.array([fold.policy(name).held_out.objective for fold in self.folds])

    def change(self, name: str, other: str) -> FloatArray:
        """Relative change of a policy's held-out objective against another's in each fold, ``[folds]``."""
        before = self.held_out(other)
        after = self.held_out(name)
        return np.asarray(np.divide(after - before, before, out=np.zeros_like(after), where=before > 0))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "folds": len(self.folds),
            "windows": sum(fold.num_held_out_windows for fold in self.folds),
            "policies": [
                {
                    "name": name,
                    "held_out": self.held_out(name).tolist(),
                    "mean": float(self.held_out(name).mean()),
                    "change_vs_contiguous": (
                        self.change(name, "contiguous").tolist() if "contiguous" in self.names else None
                    ),
                }
                for name in self.names
            ],
        }


def _policy_dict(result: PolicyResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "description": result.description,
        "solver": result.solution.solver,
        "fitted": {"objective": result.fitted.objective, **result.fitted.metrics.as_dict()},
        "held_out": {
            "objective": result.held_out.objective,
            "step": result.held_out.step,
            "step_unit": result.held_out.step_unit,
            **result.held_out.metrics.as_dict(),
        },
    }


def _window_cost(problem: PlacementProblem, breakdown: CostBreakdown) -> FloatArray:
    if problem.objective is Objective.STEP_TIME:
        return breakdown.step_W
    return np.asarray(breakdown.balance_WL.mean(axis=1))


def _policies(problem: PlacementProblem) -> list[tuple[str, str, str, PlacementProblem]]:
    """Name, description, solver and the problem that each policy solves."""
    policies = [
        ("contiguous", "experts in order (engine default)", "contiguous", problem),
        ("greedy", "longest first on average load", "greedy", problem),
        ("eplb", "DeepSeek's balancer on average load", "eplb", problem),
    ]
    parts = [(Objective.BALANCE, "search, load balance alone")]
    if problem.profile.num_sampled_tokens and problem.semantics in (Semantics.DISPATCH, Semantics.STAY_PUT):
        parts.append((Objective.TRAFFIC, "search, traffic alone"))
    for objective, description in parts:
        if objective is not problem.objective:
            part = replace(problem, objective=objective, risk=Risk.MEAN)
            policies.append((f"{objective}-only", description, "search", part))
    policies.append(("auto", f"portfolio, {problem.objective}", "auto", problem))
    return policies


def _ignore(_: object) -> None:
    """Take no notice."""


def compare(
    problem: PlacementProblem,
    *,
    stop: StoppingCriterion | None = None,
    time_limit_s: float | None = None,
    seed: int = 0,
    threads: int = 1,
    work_s: float | None = None,
    on_policy: Callable[[str], None] = _ignore,
    on_incumbent: Callable[[Incumbent], None] = _ignore,
    only: Sequence[str] | None = None,
    fold: int = 1,
    folds: int = 2,
) -> Comparison:
    """Fit every policy on some windows of a problem's profile and score it on the rest.

    By default even windows are fitted and odd ones scored.

    Parameters
    ----------
    problem
        With the profile of all windows.
    stop
        Ends every policy early.
    time_limit_s
        Seconds for each policy; None for no limit.
    seed, threads, work_s
        As in `placement.optimize`, for each policy.
    on_policy, on_incumbent
        Called when a policy begins, and at every incumbent of ``auto``.
    only
        Names of the policies to run; all by default.
    fold, folds
        Which windows are held out: every `folds`-th one from `fold` on.

    Raises
    ------
    InputError
        If there are fewer windows than folds.
    InfeasibleError
        If ``auto`` has no answer.
    NoPlacementFoundError
        If `stop` ended ``auto`` before it had one.
    """
    fit_profile, held_profile = problem.profile.split_fold(fold, folds=folds)
    fit_problem = problem.with_profile(fit_profile)
    fit_model = CostModel(fit_problem)
    held_model = CostModel(problem.with_profile(held_profile))
    results: list[PolicyResult] = []
    skipped: dict[str, str] = {}
    bound: float | None = None
    for name, description, solver, its_problem in _policies(fit_problem):
        if only is not None and name not in only:
            continue
        on_policy(name)
        its_stop = Never() if stop is None else stop
        if time_limit_s is not None:
            its_stop = AnyOf(its_stop, Deadline(time_limit_s))
        try:
            solution = optimize(
                its_problem,
                solver=solver,
                stop=its_stop,
                seed=seed,
                threads=threads,
                work_s=work_s,
                on_incumbent=on_incumbent if name == "auto" else _ignore,
            )
        except (InfeasibleError, NoPlacementFoundError) as exc:
            if name == "auto":
                raise
            skipped[name] = str(exc)
            continue
        # A policy that solves the problem itself has been priced and bounded on it already.
        own = its_problem is fit_problem
        bound = solution.lower_bound if own else bound
        results.append(
            PolicyResult(
                name=name,
                description=description,
                solution=solution,
                fitted=solution.breakdown if own else fit_model.evaluate(solution.placement),
                held_out=held_model.evaluate(solution.placement),
            )
        )
    return Comparison(
        problem=fit_problem,
        policies=tuple(results),
        skipped=skipped,
        lower_bound=lower_bound(fit_model).value if bound is None else bound,
        num_held_out_windows=held_profile.num_windows,
    )


def cross_validate(problem: PlacementProblem, *, folds: int = 2, **options: Any) -> CrossValidation:
    """Compare every policy on as many splits as there are folds, so that every window is held out once.

    Parameters
    ----------
    folds
        Splits, 2 or more: each fits on the other folds' windows and scores on its own.
    options
        As for `compare`.

    Raises
    ------
    InputError, InfeasibleError, NoPlacementFoundError
        As `compare`.
    """
    compared = [compare(problem, fold=fold, folds=folds, **options) for fold in range(folds)]
    return CrossValidation(folds=tuple(compared))
