"""CBC through PuLP's command line interface: the ``cbc`` on the path, else the one that PuLP 3 brings.

PuLP gives neither CBC's bound nor what ended it; both are read off its log. CBC tells of no point before the
end, so a solve that is stopped (not one that runs into its time limit) leaves nothing.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from placement.errors import BackendError
from placement.solvers.milp.backend import Limits, Outcome, Watcher
from placement.solvers.milp.formulation import MilpProgram
from placement.solvers.milp.pulp_model import pulp_outcome, pulp_problem
from placement.solvers.milp.result import Limit

__all__ = ["PulpCbcBackend", "bound_in_log"]

_NUMBER = r"(?P<number>[-+]?(?:\d[\d.]*(?:e[-+]?\d+)?|inf))"
_LOWER = re.compile(rf"^Lower bound:\s+{_NUMBER}\s*$", re.MULTILINE | re.IGNORECASE)


class PulpCbcBackend:
    """PuLP's ``COIN_CMD`` solver."""

    name = "pulp-cbc"

    def solve(self, program: MilpProgram, limits: Limits, watcher: Watcher) -> Outcome:
        """Solve a program."""
        import pulp
        from pulp.apis.coin_api import pulp_cbc_path

        problem, variables = pulp_problem(program)
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "cbc.log"
            solver = pulp.COIN_CMD(
                path=shutil.which("cbc") or pulp_cbc_path,
                msg=False,
                timeLimit=limits.time_limit_s,
                maxNodes=limits.node_limit,
                gapRel=limits.relative_gap,
                gapAbs=limits.absolute_gap,
                threads=limits.threads if limits.threads > 1 else None,
                warmStart=program.start_V is not None,
                options=[f"randomSeed {limits.seed % 2**31}", f"randomCbcSeed {limits.seed % 2**31}"],
                logPath=str(log),
            )
            # PuLP puts its files there; a killed process must not leave them behind elsewhere.
            solver.tmpDir = folder
            if not solver.available():
                raise ImportError(f"no cbc on the path, nor at {pulp_cbc_path}")
            try:
                problem.solve(solver)
            except pulp.PulpSolverError as exc:
                raise BackendError(f"{self.name} failed: {exc}") from exc
            said = log.read_text(errors="replace")
        limit = Limit.NODES if "maximum nodes" in said or "node limit" in said.lower() else Limit.TIME
        best = problem.objective.value()
        bound = bound_in_log(said, best, limits)
        return pulp_outcome(self.name, problem, variables, bound=bound, limit=limit)


def bound_in_log(log: str, best: float | None, limits: Limits) -> float:
    """Return CBC's bound from its log.

    Parameters
    ----------
    best
        Objective of the best point, without which an optimum has no value.
    limits
        The gaps that CBC was allowed: "optimal" means within them.
    """
    stated = _LOWER.search(log)
    if stated is not None:
        return float(stated["number"])
    if best is not None and "Optimal solution found" in log:
        return best - max(limits.absolute_gap, limits.relative_gap * abs(best))
    return float("-inf")
