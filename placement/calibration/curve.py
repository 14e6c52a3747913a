"""A curve that never falls: seconds against tokens or bytes, through measured or reckoned points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.errors import InputError

__all__ = ["PiecewiseLinear", "rising_curve"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class PiecewiseLinear:
    """A non-decreasing curve through given points, continued beyond the last with the last slope.

    Parameters
    ----------
    x, y
        Points, ``[points]``, at least two; `x` strictly ascending from 0.

    Raises
    ------
    InputError
        If the points are not finite, not ascending, or do not start at ``x = 0``.
    """

    x: FloatArray
    y: FloatArray

    def __post_init__(self) -> None:
        for name in ("x", "y"):
            array = np.array(getattr(self, name), dtype=np.float64)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if self.x.ndim != 1 or self.x.shape != self.y.shape or self.x.size < 2:
            raise InputError(f"a curve needs two points or more, not {self.x.shape} and {self.y.shape}")
        if not (np.isfinite(self.x).all() and np.isfinite(self.y).all()):
            raise InputError("a curve has a point that is not finite")
        if self.x[0] != 0 or (np.diff(self.x) <= 0).any():
            raise InputError(f"a curve's x must ascend from 0, not {self.x[:4].tolist()}")
        if self.y[0] < 0 or (np.diff(self.y) < 0).any():
            raise InputError("a curve must not fall and not start below 0")

    @classmethod
    def line(cls, *, intercept: float, slope: float) -> PiecewiseLinear:
        """Return ``intercept + slope * x``."""
        return cls(x=np.array([0.0, 1.0]), y=np.array([intercept, intercept + slope]))

    @property
    def last_slope(self) -> float:
        """Slope beyond the last point."""
        return float((self.y[-1] - self.y[-2]) / (self.x[-1] - self.x[-2]))

    def __call__(self, values: npt.ArrayLike) -> FloatArray:
        """Evaluate the curve at any non-negative values."""
        x = np.asarray(values, dtype=np.float64)
        beyond = np.maximum(x - self.x[-1], 0.0) * self.last_slope
        return np.asarray(np.interp(x, self.x, self.y) + beyond, dtype=np.float64)

    def scaled(self, *, x: float = 1.0, y: float = 1.0) -> PiecewiseLinear:
        """Return the curve of ``y * f(value / x)``."""
        return PiecewiseLinear(x=self.x * x, y=self.y * y)


def rising_curve(x: Sequence[float], y: Sequence[float], *, y_at_0: float | None = None) -> PiecewiseLinear:
    """Return the curve through measured points: sorted, noise that falls flattened, starting at x = 0.

    Parameters
    ----------
    y_at_0
        Value at 0 where no point is there; None for that of the first point.

    Raises
    ------
    InputError
        If the points make no curve.
    """
    order = np.argsort(np.asarray(x, dtype=np.float64))
    x_sorted, y_sorted = np.asarray(x, dtype=np.float64)[order], np.asarray(y, dtype=np.float64)[order]
    # A later, larger size that measured faster shows that the earlier time was noise.
    y_sorted = np.minimum.accumulate(y_sorted[::-1])[::-1]
    if x_sorted.size and x_sorted[0] > 0:
        start = float(y_sorted[0]) if y_at_0 is None else y_at_0
        x_sorted, y_sorted = np.append(0.0, x_sorted), np.append(start, y_sorted)
    return PiecewiseLinear(x=x_sorted, y=y_sorted)
