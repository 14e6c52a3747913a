"""What a solve has found, as the files and figures that leave its process."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.jobs.problem import for_callers

if TYPE_CHECKING:
    from placement.bounds import LowerBound
    from placement.plan import Placement
    from placement.problem import PlacementProblem
    from placement.solution import Incumbent, Solution
    from placement.tasks.problem import ProblemInputs, TraceOrigin

__all__ = ["Findings"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """Turns solutions of one solve into what its caller gets.

    Parameters
    ----------
    folder
        Where placement files are written.
    began_s
        When the job began, by the monotonic clock.
    problem, inputs, origin
        What is solved.
    solver, seed, max_moves
        Options of the solve.
    first
        The caller's placement to start from.
    notes
        What the packages have noted so far; grows.
    names
        What local paths are called.
    """

    folder: Path
    began_s: float
    problem: PlacementProblem
    inputs: ProblemInputs
    origin: TraceOrigin
    solver: str
    seed: int
    max_moves: int | None
    first: Placement | None
    notes: list[str]
    names: dict[Path, str]
    candidates: dict[str, float] = field(default_factory=dict)

    def figures(self, incumbent: Incumbent, bound: LowerBound) -> dict[str, Any]:
        """Return what listeners are told of an incumbent."""
        from placement.solution import relative_gap

        value = max(incumbent.lower_bound, bound.value)
        return {
            "objective": incumbent.objective,
            "lower_bound": value,
            "gap": relative_gap(incumbent.objective, value),
            "solver": incumbent.solver,
            "elapsed_s": time.monotonic() - self.began_s,
            "name": str(self.problem.objective),
            "unit": None if incumbent.breakdown is None else incumbent.breakdown.unit,
        }

    def standing(self, incumbent: Incumbent, bound: LowerBound) -> Solution:
        """Return an incumbent as the solution that stands if nothing better comes."""
        from placement.solution import Solution, Termination

        assert incumbent.breakdown is not None
        best = min(incumbent.objective, self.candidates.get(incumbent.solver, incumbent.objective))
        self.candidates[incumbent.solver] = best
        return Solution(
            placement=incumbent.placement,
            breakdown=incumbent.breakdown,
            bound=bound,
            termination=Termination.STOPPED,
            solver=incumbent.solver,
            incumbents=(),
            candidates=dict(self.candidates),
            skipped={},
        )

    def written(self, solution: Solution, name: str) -> dict[str, Any]:
        """Write a solution's placement file, whole or not at all.

        Returns
        -------
        message
            ``file``, ``digest`` and ``size_bytes``, ``summary`` of the placement, and ``result`` as the
            caller sees it.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        from placement.io import dump_json, placement_to_dict
        from placement.tasks.placements import note_fillers
        from placement.tasks.problem import labelled
        from placement.tasks.solve import placement_entries, provenance_options

        problem = self.problem
        options = provenance_options(self.inputs, problem, solver=self.solver, max_moves=self.max_moves)
        entries = placement_entries(problem, solution, self.origin, seed=self.seed, options=options)
        entries["held_out"] = None
        placement = note_fillers(
            labelled(solution.placement, problem, self.origin), problem, start=self.first
        )
        # The bytes of the command line's file.
        content = f"{dump_json(placement_to_dict(placement, **entries))}\n".encode()
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        _write_whole(self.folder / name, content)
        return {
            "file": name,
            "digest": digest,
            "size_bytes": len(content),
            "summary": _summary(placement),
            "result": {**self._result(solution, placement, entries), "placement_id": digest},
        }

    def _result(self, solution: Solution, placement: Placement, entries: dict[str, Any]) -> dict[str, Any]:
        from placement.tasks.placements import moves_entry

        first = self.first
        return {
            "objective": entries["objective"],
            "metrics": entries["metrics"],
            "termination": str(solution.termination),
            "solver": solution.solver,
            "candidates": solution.candidates,
            "skipped": {name: for_callers(why, self.names) for name, why in solution.skipped.items()},
            "moves": None if first is None else moves_entry(first, placement, self.problem),
            "notes": [for_callers(note, self.names) for note in self.notes],
            "elapsed_s": time.monotonic() - self.began_s,
        }


def _summary(placement: Placement) -> dict[str, Any]:
    return {
        "num_layers": placement.num_layers,
        "num_experts": placement.num_experts,
        "num_devices": placement.num_devices,
        "num_slots": len(placement.device_of_slot_S),
        "model_name": placement.model_name,
    }


def _write_whole(path: Path, content: bytes) -> None:
    # The worker makes it durable where it keeps it.
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
