"""HiGHS through PuLP: PuLP builds the model, HiGHS itself is asked how it ended.

PuLP 3.3 calls "unbounded or infeasible" infeasible, does not know HiGHS's status at a node limit (a
KeyError), and has no bound; so its translation of the outcome is not used.
"""

from __future__ import annotations

from placement.solvers.milp.backend import Limits, Outcome, Watcher
from placement.solvers.milp.formulation import MilpProgram
from placement.solvers.milp.highs import highs_options, run_highs
from placement.solvers.milp.pulp_model import pulp_problem

__all__ = ["PulpHighsBackend"]


class PulpHighsBackend:
    """PuLP's ``HiGHS`` solver."""

    name = "pulp-highs"

    def solve(self, program: MilpProgram, limits: Limits, watcher: Watcher) -> Outcome:
        """Solve a program; better points and interrupts go through HiGHS's callbacks."""
        import pulp

        problem, _ = pulp_problem(program)
        solver = pulp.HiGHS(msg=False, **highs_options(limits))
        solver.createAndConfigureSolver(problem)
        solver.buildSolverModel(problem)
        return run_highs(problem.solverModel, program, watcher)
