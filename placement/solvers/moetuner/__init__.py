"""MoETuner's two integer programs (arXiv 2502.06643): cluster experts, then put clusters on devices."""

from placement.solvers.moetuner.solver import MoetunerSolver

__all__ = ["MoetunerSolver"]
