"""Balance against traffic: how even the load can be for every amount of travel, and the other way round.

Fewer devices per token mean experts that are used together on one device, and so fuller devices. Two ways
lead along the edge: the least traffic under a load limit, and the least cost as the price of a visit to a
device rises. Every point is a solve, fitted on alternate windows and scored on the rest.

Shape letters: N placements, M measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from placement.calibration import LinearCalibration
from placement.cost import CostBreakdown, CostModel
from placement.errors import InfeasibleError, InputError, NoPlacementFoundError
from placement.optimizer import optimize
from placement.plan import Placement
from placement.problem import Objective, PlacementProblem, Risk, Semantics
from placement.stopping import StoppingCriterion

__all__ = ["LIMITS", "PRICES", "Tradeoff", "TradeoffPoint", "Way", "efficient", "tradeoff", "traffic_of"]

LIMITS = (1.02, 1.05, 1.1, 1.3)
"""Load limits: fullest device / mean device of each layer's summed load."""

PRICES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Prices of a token's visit to a device, in token-expert pairs computed."""


class Way(StrEnum):
    """What a point is the best of."""

    LIMIT = "load limit"
    """The least traffic under a limit on the imbalance of each layer's summed load."""
    PRICE = "price of a visit"
    """The least cost of a step, if a visit costs so many token-expert pairs."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TradeoffPoint:
    """The best placement found for one amount of imbalance or traffic.

    Parameters
    ----------
    way, value
        What was asked for: a load limit, or a price.
    placement
        The placement.
    fitted, held_out
        Its cost on the fitted windows and on the others, by the problem's own objective.
    """

    way: Way
    value: float
    placement: Placement
    fitted: CostBreakdown
    held_out: CostBreakdown


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tradeoff:
    """Balance against traffic.

    Parameters
    ----------
    points
        Load limits ascending, then prices ascending.
    skipped
        What had no answer, and why.
    semantics
        Whose traffic it is: `traffic_of` reads fanout, or hops under ``stay-put``.
    """

    points: tuple[TradeoffPoint, ...]
    skipped: dict[str, str]
    semantics: Semantics


def traffic_of(breakdown: CostBreakdown, semantics: Semantics) -> float:
    """Return devices that a token visits per layer; under ``stay-put`` the share of tokens that hop.

    Raises
    ------
    InputError
        If the traffic had counts only.
    """
    metrics = breakdown.metrics
    value = metrics.hops if semantics is Semantics.STAY_PUT else metrics.fanout
    if value is None:
        raise InputError("the trace has expert counts only, which do not tell where tokens travel")
    return value


def tradeoff(
    problem: PlacementProblem,
    *,
    limits: Sequence[float] = LIMITS,
    prices: Sequence[float] = PRICES,
    solver: str = "auto",
    seed: int = 0,
    threads: int = 1,
    work_s: float | None = None,
    stop: StoppingCriterion | None = None,
) -> Tradeoff:
    """Solve for several load limits and several prices of a visit.

    Parameters
    ----------
    problem
        With the profile of all windows; its own objective prices the points.
    limits
        Load limits, each 1 or more.
    prices
        Prices of a token's visit to a device, in token-expert pairs, each 0 or more.
    solver, seed, threads, work_s, stop
        As in `placement.optimize`, for each solve.

    Raises
    ------
    InputError
        If no placement changes the problem's traffic, there is only one window, or there is nothing to solve.
    """
    if not (limits or prices):
        raise InputError("there is neither a load limit nor a price to solve for; name at least one")
    fit, held = problem.profile.split_alternate()
    fit_problem = problem.with_profile(fit)
    fit_model, held_model = CostModel(fit_problem), CostModel(problem.with_profile(held))
    points, skipped = [], {}
    for way, value, its_problem in _problems(fit_problem, limits, prices):
        try:
            solution = optimize(
                its_problem, solver=solver, seed=seed, threads=threads, work_s=work_s, stop=stop
            )
        except (InfeasibleError, NoPlacementFoundError) as exc:
            skipped[f"{way} {value:g}"] = str(exc)
            continue
        points.append(
            TradeoffPoint(
                way=way,
                value=value,
                placement=solution.placement,
                fitted=fit_model.evaluate(solution.placement),
                held_out=held_model.evaluate(solution.placement),
            )
        )
    return Tradeoff(points=tuple(points), skipped=skipped, semantics=problem.semantics)


def _problems(
    problem: PlacementProblem, limits: Sequence[float], prices: Sequence[float]
) -> Iterator[tuple[Way, float, PlacementProblem]]:
    """Yield what is asked for, and the problem that asks for it."""
    traffic = replace(problem, objective=Objective.TRAFFIC, risk=Risk.MEAN)
    for limit in sorted({float(limit) for limit in limits}):
        yield Way.LIMIT, limit, replace(traffic, max_imbalance=limit)
    for price in sorted({float(price) for price in prices}):
        linear = LinearCalibration(pair_cost=1.0, token_cost=price)
        priced = replace(problem, objective=Objective.STEP_TIME, risk=Risk.MEAN, calibration=linear)
        yield Way.PRICE, price, priced


def efficient(value_NM: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Return which rows no other row beats: at least as low in every measure and lower in one, ``[rows]``."""
    values = np.asarray(value_NM, dtype=np.float64)
    no_worse_NN = (values[:, None] <= values[None]).all(axis=2)
    better_NN = (values[:, None] < values[None]).any(axis=2)
    return np.asarray(~(no_worse_NN & better_NN).any(axis=0))
