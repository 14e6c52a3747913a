"""Solvers: one a file, all behind `placement.solvers.protocol.Solver`."""
