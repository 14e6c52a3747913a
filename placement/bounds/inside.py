"""How much co-activation a partition of experts can keep inside its groups at most.

Shape letters: E experts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["most_inside"]

FloatArray = npt.NDArray[np.float64]

DIAGONAL_STEPS = 40


def most_inside(coactivation_EE: FloatArray, *, num_groups: int, slots: int) -> float:
    """Bound the pairs that a partition into groups of at most `slots` experts keeps inside groups.

    The smaller of two bounds: every expert keeps at most its ``slots - 1`` strongest partners; and the
    eigenvalue bound ``slots / 2 * (sum of the num_groups largest eigenvalues of C + diag(u)) - sum(u) / 2``
    for groups of equal size, which holds for every diagonal u and is tightened by subgradient steps.
    """
    num_experts = len(coactivation_EE)
    partners = -np.sort(-coactivation_EE, axis=1)[:, : slots - 1].sum() / 2
    if num_groups * slots != num_experts or num_groups >= num_experts:
        return float(partners)
    from threadpoolctl import threadpool_limits

    # The matrices are small: threads would only wait for each other, and change the rounding.
    with threadpool_limits(limits=1, user_api="blas"):
        inside = _eigenvalue_bound(coactivation_EE, num_groups=num_groups, slots=slots)
    return min(float(partners), inside)


def _eigenvalue_bound(coactivation_EE: FloatArray, *, num_groups: int, slots: int) -> float:
    """Donath and Hoffman's bound on the pairs inside, the best over the diagonals tried."""
    num_experts = len(coactivation_EE)
    scale = float(np.abs(coactivation_EE).sum(axis=1).mean()) or 1.0
    matrix = coactivation_EE / scale
    diagonal = -matrix.sum(axis=1)
    best = np.inf
    for step in range(DIAGONAL_STEPS):
        values, vectors = np.linalg.eigh(matrix + np.diag(diagonal))
        top = vectors[:, -num_groups:]
        best = min(best, slots / 2 * values[-num_groups:].sum() - diagonal.sum() / 2)
        gradient = slots / 2 * (top**2).sum(axis=1) - 0.5
        diagonal = diagonal - 0.5 / (1 + step) ** 0.5 * gradient
    # Eigenvalues are rounded: step back by far more than their error.
    return float(best * scale + 1e-9 * scale * num_experts)
