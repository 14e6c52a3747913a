"""Placement on several nodes: experts of one token together on few nodes, loads even all the same."""

from placement.solvers.hierarchy.solver import HierarchySolver

__all__ = ["HierarchySolver"]
