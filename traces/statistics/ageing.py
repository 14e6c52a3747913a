"""How knowledge of loads ages: the distance of a window's loads from those seen so many windows before.

Distances are total variation, mean over layers: the share of token-expert pairs that would have to go to
other experts. If the order of windows meant nothing, windows seen long ago would be as good as recent ones:
shuffling the windows shows at what distance that is.

Shape letters: W windows, L MoE layers, E experts, N lags, S shuffles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.errors import InputError

__all__ = ["LoadAgeing", "load_ageing"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

NUM_SHUFFLES = 20
_LAGS = 24


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadAgeing:
    """How far windows are from windows before them.

    Parameters
    ----------
    span
        Windows that are seen together: their mean is what is known.
    lag_N
        Windows between a window and the last one that was seen: 1 is the window just before.
    distance_N
        Mean distance of a window from what was seen so long before; the same windows at every lag.
    null_S
        Mean distance with the windows shuffled, at lag 1.
    recent_W, earlier_W
        Distance of each window from the `span` windows before it, and from all before it; NaN where there are
        none.
    """

    span: int
    lag_N: IntArray
    distance_N: FloatArray
    null_S: FloatArray
    recent_W: FloatArray
    earlier_W: FloatArray

    @property
    def null(self) -> float:
        """Mean distance where the order of windows means nothing."""
        return float(self.null_S.mean())

    @property
    def order_matters(self) -> bool:
        """Whether the window before tells more than in every shuffle."""
        return bool(self.distance_N[0] < self.null_S.min())

    @property
    def half_life(self) -> float | None:
        """Lag in windows at which half of what recency tells is lost.

        `None` where the order means nothing, or the half is not lost at any lag looked at.
        """
        if not self.order_matters:
            return None
        half = (self.distance_N[0] + self.null) / 2
        passed = np.flatnonzero(self.distance_N >= half)
        if not passed.size:
            return None
        after = int(passed[0])
        near, far = self.distance_N[after - 1 : after + 1]
        return float(np.interp(half, (near, far), self.lag_N[after - 1 : after + 1]))

    def table(self) -> list[dict[str, float]]:
        """Return a row for each lag: the distance, and that of windows in random order."""
        return [
            {"windows before": lag, "at other experts": distance, "in random order": self.null}
            for lag, distance in zip(self.lag_N.tolist(), self.distance_N.tolist(), strict=True)
        ]


def load_ageing(
    load_WLE: npt.ArrayLike, *, span: int = 4, num_shuffles: int = NUM_SHUFFLES, seed: int = 0
) -> LoadAgeing:
    """Measure how windows differ from windows before them, by how long before.

    Parameters
    ----------
    load_WLE
        Token-expert pairs of consecutive windows, ``[windows, layers, experts]``, in the order of time.
    span
        Windows that are seen together; a quarter of all windows at most.
    num_shuffles
        Shuffles of the windows.
    seed
        Seed of the shuffles.

    Raises
    ------
    InputError
        If there are fewer than four windows.
    """
    load = np.asarray(load_WLE)
    if load.ndim != 3 or 0 in load.shape or len(load) < 4:
        raise InputError(f"loads of shape {load.shape} are no four windows; take smaller windows")
    num_windows, num_layers, _ = load.shape
    span = min(span, num_windows // 4)
    longest = num_windows // 2
    lags = np.unique(np.geomspace(1, longest, _LAGS).round().astype(np.int64))
    judged = np.arange(longest + span - 1, num_windows)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(num_windows) for _ in range(num_shuffles)]
    distance_N, null_S = np.zeros(len(lags)), np.zeros(num_shuffles)
    recent_W, earlier_W = np.zeros(num_windows), np.zeros(num_windows)
    every = np.arange(num_windows)
    for layer in range(num_layers):
        share_WE = _shares(load[:, layer])
        total_WE = _sums(share_WE)
        distance_N += [_mean_distance(share_WE, total_WE, judged, lag, span) for lag in lags.tolist()]
        for shuffle, order in enumerate(orders):
            null_S[shuffle] += _mean_distance(share_WE[order], _sums(share_WE[order]), judged, 1, span)
        recent_W += _distance(share_WE, total_WE, every, np.maximum(every - span, 0), every)
        earlier_W += _distance(share_WE, total_WE, every, np.zeros_like(every), every)
    return LoadAgeing(
        span=span,
        lag_N=lags,
        distance_N=distance_N / num_layers,
        null_S=null_S / num_layers,
        recent_W=recent_W / num_layers,
        earlier_W=earlier_W / num_layers,
    )


def _shares(load_WE: npt.NDArray[np.generic]) -> FloatArray:
    load = load_WE.astype(np.float64)
    return np.asarray(load / np.maximum(load.sum(axis=1, keepdims=True), 1))


def _sums(share_WE: FloatArray) -> FloatArray:
    """Sums of all windows before each, one row more than windows."""
    return np.concatenate([np.zeros((1, share_WE.shape[1])), np.cumsum(share_WE, axis=0)])


def _mean_distance(share_WE: FloatArray, sum_WE: FloatArray, window: IntArray, lag: int, span: int) -> float:
    stop = window - lag + 1
    return float(_distance(share_WE, sum_WE, window, stop - span, stop).mean())


def _distance(
    share_WE: FloatArray, sum_WE: FloatArray, window: IntArray, start: IntArray, stop: IntArray
) -> FloatArray:
    """Distance of each window from the mean of those from `start` to before `stop`; NaN of none."""
    num_seen = (stop - start)[:, np.newaxis]
    seen = (sum_WE[stop] - sum_WE[start]) / np.maximum(num_seen, 1)
    distance = 0.5 * np.abs(share_WE[window] - seen).sum(axis=1)
    return np.where(stop > start, distance, np.nan)
