"""Convex curves and tangents below a cost curve: Jensen's inequality holds for them."""

from __future__ import annotations

import numpy as np

from placement.calibration import PiecewiseLinear

__all__ = ["convex_minorant", "tangent"]


def convex_minorant(curve: PiecewiseLinear) -> PiecewiseLinear:
    """Return the largest convex curve below a curve."""
    points = [(float(x), float(y)) for x, y in zip(curve.x, curve.y, strict=True)]
    far = 1e6 * points[-1][0]
    points.append((far, float(curve(far))))
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and _turns_down(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return PiecewiseLinear(x=np.array([p[0] for p in hull]), y=np.array([p[1] for p in hull]))


def _turns_down(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - b[0]) >= (c[1] - b[1]) * (b[0] - a[0])


def tangent(convex: PiecewiseLinear, at: float) -> tuple[float, float]:
    """Return intercept and slope of a line that a convex curve touches at a value and never goes below.

    The intercept may be negative.
    """
    piece = min(int(np.searchsorted(convex.x, at, side="right")) - 1, convex.x.size - 2)
    slope = float((convex.y[piece + 1] - convex.y[piece]) / (convex.x[piece + 1] - convex.x[piece]))
    return float(convex.y[piece] - slope * convex.x[piece]), slope
