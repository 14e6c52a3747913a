"""Even loads in milliseconds: replicas and places of experts chosen on counts, all layers at once."""

from placement.solvers.balance.layers import TOLERANCE, balance_layers
from placement.solvers.balance.solver import BalanceSolver

__all__ = ["TOLERANCE", "BalanceSolver", "balance_layers"]
