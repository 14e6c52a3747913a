"""Who is compared with whom: the proposed policy, the one it would replace, and what is told of both.

Shape letters: W held-out windows, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from placement.comparison import Comparison, PolicyResult
from placement.cost import CostBreakdown
from placement.errors import InputError
from placement.problem import Objective, Risk, Semantics
from placement.report.numbers import Scale
from placement.solution import relative_gap

__all__ = ["PROPOSED", "Story", "effective_windows", "gain_interval", "relative_change"]

FloatArray = npt.NDArray[np.float64]

PROPOSED = "auto"

REFERENCES = ("eplb", "contiguous")
"""What a placement is measured against: the balancer that engines bring, else their default."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Story:
    """A comparison, seen from the policy that it proposes.

    Parameters
    ----------
    comparison
        At least one policy.
    windows
        What the windows are that it is judged on, as figures call them.
    solved
        Whether it was solved for here; an evaluation has no solve to tell of.

    Raises
    ------
    InputError
        If the comparison holds no policy.
    """

    comparison: Comparison
    windows: str = "held-out windows"
    solved: bool = True

    def __post_init__(self) -> None:
        if not self.comparison.policies:
            raise InputError("the comparison holds no policy; there is nothing to report")

    @cached_property
    def proposed(self) -> PolicyResult:
        """``auto``, or the last policy where it was left out."""
        return self._named(PROPOSED) or self.comparison.policies[-1]

    @cached_property
    def replaced(self) -> PolicyResult | None:
        """The reference: ``eplb``, ``contiguous`` or the first other policy; None where there is no other."""
        others = [result for result in self.comparison.policies if result is not self.proposed]
        preferred = [result for name in REFERENCES for result in others if result.name == name]
        return next(iter((*preferred, *others)), None)

    def _named(self, name: str) -> PolicyResult | None:
        return next((result for result in self.comparison.policies if result.name == name), None)

    @property
    def contrast(self) -> tuple[PolicyResult, ...]:
        """Before and after: the replaced policy, where there is one, and the proposed one."""
        return (self.proposed,) if self.replaced is None else (self.replaced, self.proposed)

    @property
    def rivals(self) -> tuple[PolicyResult, ...]:
        """What the proposed policy is measured against: the reference first, then other baselines."""
        first = () if self.replaced is None else (self.replaced,)
        others = (self._named(name) for name in ("contiguous", "greedy", "eplb"))
        return first + tuple(r for r in others if r is not None and r not in (*first, self.proposed))

    @property
    def window(self) -> str:
        """One of `windows`."""
        return self.windows.removesuffix("s")

    @property
    def step_known(self) -> bool:
        """Whether every policy's step cost is known."""
        return all(math.isfinite(result.held_out.step) for result in self.comparison.policies)

    @property
    def why_step_unknown(self) -> str:
        """The reason, for a reader, and how to get the figures."""
        problem = self.comparison.problem
        if problem.model is None and not problem.calibration.flat:
            return "no model was named, so the sizes that costs depend on are not known; name it with --model"
        return (
            "the trace has expert counts only, which do not tell what devices exchange; "
            "record the tokens' experts"
        )

    @property
    def step_label(self) -> str:
        """What a step's cost is called."""
        return "predicted step time" if self.proposed.held_out.step_unit == "s" else "predicted step cost"

    @property
    def objective_label(self) -> str:
        """What the objective is called, its risk measure included."""
        problem = self.comparison.problem
        if problem.objective is Objective.TRAFFIC:
            return "hops" if problem.semantics is Semantics.STAY_PUT else "fanout"
        label = self.step_label if problem.objective is Objective.STEP_TIME else "balance"
        risk = {Risk.P95: "95th percentile of ", Risk.CVAR95: "worst-5 % mean of "}
        return risk.get(problem.risk, "") + label

    @cached_property
    def objective_scale(self) -> Scale:
        """Unit in which objectives are shown."""
        return Scale.of(_largest(r.held_out.objective for r in self.comparison.policies), self._unit)

    @property
    def _unit(self) -> str:
        return self.comparison.problem.unit

    @cached_property
    def step_scale(self) -> Scale:
        """Unit in which step costs are shown."""
        largest = _largest(result.held_out.step for result in self.comparison.policies)
        return Scale.of(largest, self.proposed.held_out.step_unit)

    @property
    def measures_step(self) -> bool:
        """Whether windows are compared by their step cost, not by their balance."""
        return self.comparison.problem.objective is Objective.STEP_TIME

    def window_values_W(self, breakdown: CostBreakdown) -> FloatArray:
        """Return what `Comparison.better_share` compares: each window's step cost, or its balance."""
        return breakdown.step_W if self.measures_step else np.asarray(breakdown.balance_WL.mean(axis=1))

    def gain_over(self, rival: PolicyResult) -> float | None:
        """Share by which the proposed policy's held-out objective is below a rival's."""
        change = relative_change(self.proposed.held_out.objective, rival.held_out.objective)
        return None if change is None else -change

    def interval_over(self, rival: PolicyResult) -> tuple[float, float] | None:
        """95 % confidence interval of `gain_over`, where the objective is a mean over enough windows."""
        problem = self.comparison.problem
        is_mean = problem.risk is Risk.MEAN and problem.objective is not Objective.TRAFFIC
        if self.comparison.few_windows or not is_mean:
            return None
        return gain_interval(*self._paired(rival))

    def effective_windows_over(self, rival: PolicyResult) -> float:
        """Independent windows that the held-out ones are worth when the gain over a rival is judged."""
        mine_W, theirs_W = self._paired(rival)
        return effective_windows(_residual_W(mine_W, theirs_W)) if theirs_W.mean() > 0 else 1.0

    def _paired(self, rival: PolicyResult) -> tuple[FloatArray, FloatArray]:
        mine_W, theirs_W = (self.window_values_W(result.held_out) for result in (self.proposed, rival))
        return mine_W, theirs_W

    def gap_of(self, result: PolicyResult) -> float:
        """(objective - lower bound) / objective of a policy on the fitted windows."""
        return relative_gap(result.fitted.objective, self.comparison.lower_bound)

    def layer_label(self, layer: int) -> str:
        """Return a layer's name: its number among MoE layers and, where that differs, in the decoder."""
        ids = self.layer_ids
        decoder = "" if ids is None or ids[layer] == layer else f" (decoder layer {ids[layer]})"
        return f"MoE layer {layer}{decoder}"

    @property
    def layer_ids(self) -> tuple[int, ...] | None:
        """Decoder layer of each MoE layer, where known."""
        model = self.comparison.problem.model
        return self.proposed.placement.moe_layer_ids if model is None else model.moe_layer_ids


def _largest(values: Iterable[float]) -> float:
    array = np.array(list(values), dtype=np.float64)
    finite = np.abs(array[np.isfinite(array)])
    return float(finite.max(initial=0.0))


def relative_change(value: float, reference: float) -> float | None:
    """Return value / reference - 1; None where the two cannot be compared."""
    if not (math.isfinite(value) and math.isfinite(reference)) or reference <= 0:
        return None
    return value / reference - 1.0


def gain_interval(mine_W: FloatArray, theirs_W: FloatArray) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of ``1 - mean(mine) / mean(theirs)`` over paired windows.

    Cochran's ratio estimator (Sampling Techniques, 3rd ed., section 6.4): a window's residual is
    ``mine - r * theirs``, and Student's t stands for the few windows. Windows of one moment resemble each
    other, so they count as the independent windows that they are worth (`effective_windows`).

    Parameters
    ----------
    mine_W, theirs_W
        Cost of the same windows under two policies, ``[windows]``, in order of time.

    Returns
    -------
    tuple or None
        Lower and upper end; None for fewer than two windows or where there is nothing to gain on.
    """
    num_windows, mean = mine_W.size, float(theirs_W.mean())
    if num_windows < 2 or not mean > 0:
        return None
    # Imported here: a report without an interval needs no scipy.
    from scipy.special import stdtrit

    ratio = float(mine_W.mean()) / mean
    residual_W = _residual_W(mine_W, theirs_W)
    effective = effective_windows(residual_W)
    error = float(residual_W.std(ddof=1)) / (mean * math.sqrt(effective))
    margin = float(stdtrit(max(1.0, effective - 1.0), 0.975)) * error
    return 1.0 - ratio - margin, 1.0 - ratio + margin


def _residual_W(mine_W: FloatArray, theirs_W: FloatArray) -> FloatArray:
    return np.asarray(mine_W - float(mine_W.mean()) / float(theirs_W.mean()) * theirs_W)


def effective_windows(value_W: FloatArray) -> float:
    """Return how many independent values a series is worth when its mean is judged, from 1 to its length.

    Its length over the autocorrelation time, by Geyer's initial positive sequence (Practical Markov Chain
    Monte Carlo, 1992, section 3.3): sums of two neighbouring autocorrelations, up to the first that is not
    positive.

    Parameters
    ----------
    value_W
        Values in order of time, ``[windows]``.
    """
    num_windows = value_W.size
    centred_W = value_W - value_W.mean()
    square = float(centred_W @ centred_W)
    # What is left of equal values is rounding.
    if num_windows < 4 or square <= 1e-24 * float(value_W @ value_W):
        return float(num_windows)
    correlation_W = np.correlate(centred_W, centred_W, mode="full")[num_windows - 1 :] / square
    pair_P = correlation_W[: num_windows // 2 * 2].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pair_P <= 0)
    time = 2.0 * float(pair_P[: negative[0] if negative.size else None].sum()) - 1.0
    return float(num_windows / min(max(time, 1.0), num_windows))
