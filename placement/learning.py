"""How many windows are enough: what a placement fitted to few of them is worth on windows it has not seen.

Every other window is held out. From the rest so many are drawn, several times over: spread over the whole
time, or consecutive, as somebody gets them who records for a short while. A placement is fitted to them, and
the held-out windows judge it.

Shape letters: W windows, N numbers of windows, R draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.cost import CostModel
from placement.errors import InputError
from placement.optimizer import optimize
from placement.problem import PlacementProblem

__all__ = ["LearningCurve", "learning_curve"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

NUM_DRAWS = 3
WORK_S = 0.02
_LEAST_WINDOWS = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LearningCurve:
    """Objectives by the number of windows fitted.

    Parameters
    ----------
    windows_N
        Numbers of windows fitted, ascending; the last one is all that are not held out.
    spread_RN, consecutive_RN
        Objective on the held-out windows of every draw, of windows spread over time and of consecutive ones.
    fitted_RN
        Objective on the windows fitted themselves, spread over time: what a fit promises.
    unfitted
        Objective on the held-out windows of the placement that puts experts in order, without any fit.
    unit
        Unit of the objectives.
    tolerance
        So much worse, as a share, an objective may be than the last one and still be as good.
    """

    windows_N: IntArray
    spread_RN: FloatArray
    consecutive_RN: FloatArray
    fitted_RN: FloatArray
    unfitted: float
    unit: str
    tolerance: float = 0.02

    @property
    def best(self) -> float:
        """Objective on the held-out windows when all others are fitted."""
        return float(self.spread_RN[:, -1].mean())

    @property
    def num_windows(self) -> int:
        """Windows that are not held out."""
        return int(self.windows_N[-1])

    @property
    def enough_spread(self) -> int:
        """Least number of spread windows that is as good as all, in the mean of its draws."""
        return self._enough(self.spread_RN)

    @property
    def enough_consecutive(self) -> int:
        """Least number of consecutive windows that is."""
        return self._enough(self.consecutive_RN)

    def table(self) -> list[dict[str, float]]:
        """Return a row for each number of windows: means of the draws."""
        return [
            {
                "windows fitted": int(number),
                "spread, held out": float(self.spread_RN[:, at].mean()),
                "consecutive, held out": float(self.consecutive_RN[:, at].mean()),
                "spread, on those fitted": float(self.fitted_RN[:, at].mean()),
            }
            for at, number in enumerate(self.windows_N)
        ]

    def _enough(self, objective_RN: FloatArray) -> int:
        """Return the number from which on the mean stays within the tolerance."""
        worse_N = np.flatnonzero(objective_RN.mean(axis=0) > (1 + self.tolerance) * self.best)
        return int(self.windows_N[worse_N[-1] + 1 if worse_N.size else 0])


def learning_curve(
    problem: PlacementProblem, *, num_draws: int = NUM_DRAWS, work_s: float = WORK_S, seed: int = 0
) -> LearningCurve:
    """Fit placements to more and more windows, and judge them by windows held out.

    Parameters
    ----------
    problem
        With the profile of all windows, in the order of time.
    num_draws
        Draws of windows for each number of them.
    work_s
        Effort of each solve in seconds of one thread.
    seed
        Seed of the draws.

    Raises
    ------
    InputError
        If there are fewer than four windows, or no draw.
    InfeasibleError
        If no placement can satisfy the constraints.
    """
    if problem.profile.num_windows < _LEAST_WINDOWS:
        raise InputError(
            f"{problem.profile.num_windows} windows are too few to see what more would bring: it takes "
            f"{_LEAST_WINDOWS}; use a longer trace or smaller windows"
        )
    if num_draws < 1:
        raise InputError(f"num_draws is {num_draws}; it must be 1 or more")
    fitted, held_out = problem.profile.split_alternate()
    judge = CostModel(problem.with_profile(held_out))
    rng = np.random.default_rng(seed)
    numbers = _numbers(fitted.num_windows)

    def fit(windows: IntArray) -> tuple[float, float]:
        solution = optimize(problem.with_profile(fitted.select_windows(windows)), work_s=work_s)
        return judge.evaluate(solution.placement).objective, solution.objective

    spread, consecutive = np.empty((2, num_draws, len(numbers), 2))
    for draw in range(num_draws):
        for at, number in enumerate(numbers[:-1].tolist()):
            spread[draw, at] = fit(np.sort(rng.choice(fitted.num_windows, number, replace=False)))
            start = int(rng.integers(fitted.num_windows - number + 1))
            consecutive[draw, at] = fit(np.arange(start, start + number))
    spread[:, -1] = consecutive[:, -1] = fit(np.arange(fitted.num_windows))
    in_order = optimize(problem.with_profile(fitted), solver="contiguous").placement
    unfitted = judge.evaluate(in_order)
    return LearningCurve(
        windows_N=numbers,
        spread_RN=spread[..., 0],
        consecutive_RN=consecutive[..., 0],
        fitted_RN=spread[..., 1],
        unfitted=unfitted.objective,
        unit=problem.unit,
    )


def _numbers(most: int) -> IntArray:
    """Return 1, 2, 4, ... and `most`."""
    return np.unique(np.append(2 ** np.arange(int(np.log2(most)) + 1), most))
