"""Stay-put placements: all layers of the chain at once."""

from placement.solvers.chain.solver import ChainSolver

__all__ = ["ChainSolver"]
