"""Mixed-integer linear programs: one formulation, several foreign solvers, checked answers."""

from placement.solvers.milp.backends import BACKENDS
from placement.solvers.milp.formulation import MilpBuilder, MilpProgram
from placement.solvers.milp.result import Limit, MilpResult, MilpStatus
from placement.solvers.milp.solve import solve_milp

__all__ = ["BACKENDS", "Limit", "MilpBuilder", "MilpProgram", "MilpResult", "MilpStatus", "solve_milp"]
