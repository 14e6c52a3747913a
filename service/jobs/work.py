"""What the process of a job computes: a solve, an evaluation or a check, exactly as the command line does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placement.errors import InputError
from placement.stopping import AnyOf, Cancellation, Deadline, StoppingCriterion
from service.jobs.channel import Channel
from service.jobs.findings import Findings
from service.jobs.keeper import Keeper
from service.jobs.order import Order
from service.jobs.problem import for_callers, inputs_of, solver_of
from service.state.records import JobKind

if TYPE_CHECKING:
    from placement.plan import Placement
    from placement.problem import PlacementProblem
    from placement.solution import Solution
    from placement.tasks.problem import ProblemInputs

__all__ = ["Stopping", "Work"]

FINAL = "placement.json"


class Stopping:
    """A stop that may come at any time: it reaches the solver, and the keeper once there is one."""

    def __init__(self) -> None:
        self.cancellation = Cancellation()
        self._keeper: Keeper | None = None
        self._turn = threading.Lock()

    def stop(self) -> None:
        """Ask for the end."""
        with self._turn:
            self.cancellation.cancel()
            if self._keeper is not None:
                self._keeper.stop()

    def tell(self, keeper: Keeper) -> None:
        """Have a keeper told, now if the stop came before."""
        with self._turn:
            self._keeper = keeper
            if self.cancellation():
                keeper.stop()


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """One job.

    Parameters
    ----------
    order
        What to do.
    channel
        Where progress and the result go.
    stopping
        When to end early.
    end
        Ends the process.
    notes
        What the packages note about the input, as it comes.
    """

    order: Order
    channel: Channel
    stopping: Stopping
    end: Callable[[], None]
    notes: list[str]
    began_s: float = field(default_factory=time.monotonic)
    names: dict[Path, str] = field(default_factory=dict)

    def run(self) -> None:
        """Compute the job and send its result.

        Raises
        ------
        PlacementError
            As the command line does.
        OSError
            If the scratch folder cannot be written.
        """
        for path, name in (
            (self.order.trace, "the trace"),
            (self.order.start, "the placement"),
            (self.order.incumbent, "the incumbent"),
            (self.order.folder, "scratch"),
        ):
            if path is not None:
                self.names[Path(path)] = name
        self.channel.send("progress", {"phase": "reading"})
        kind = self.order.kind
        message = {
            JobKind.SOLVE: self._solve,
            JobKind.EVALUATION: self._evaluate,
            JobKind.CHECK: self._check,
        }[kind]()
        self.channel.send("result", message)

    @property
    def _options(self) -> Mapping[str, Any]:
        options: Mapping[str, Any] = self.order.spec.get("options") or {}
        return options

    def _inputs(self) -> ProblemInputs:
        """Return the inputs of the problem, with the trace unpacked where it came as an archive."""
        from service.archives import is_dataset_archive, unpack

        path = Path(self.order.trace)
        if is_dataset_archive(path):
            folder = Path(self.order.folder) / "trace"
            folder.mkdir()
            path = unpack(path, folder, max_bytes=self.order.max_unpacked_bytes)
            # The longer path goes first: it begins with that of the scratch folder.
            rest = dict(self.names)
            self.names.clear()
            self.names.update({path: "the trace", **rest})
        return inputs_of(self.order.spec, trace=str(path))

    def _placement(self, path: str | None, problem: PlacementProblem) -> Placement | None:
        from placement.tasks.placements import load_placement

        if path is None:
            return None
        return load_placement(Path(path), model=problem.model, topology=problem.topology)

    def _solve(self) -> dict[str, Any]:
        from placement.tasks.solve import note_few_windows

        options = self._options
        time_limit = options.get("time_limit")
        stop: StoppingCriterion = self.stopping.cancellation
        if time_limit is not None:
            stop = AnyOf(stop, Deadline(time_limit))
        self._check_moves()
        inputs = self._inputs()
        problem, origin = inputs.problem()
        findings = Findings(
            folder=Path(self.order.folder),
            began_s=self.began_s,
            problem=problem,
            inputs=inputs,
            origin=origin,
            solver=options.get("solver", "auto"),
            seed=options.get("seed", 0),
            max_moves=options.get("max_moves"),
            first=self._placement(self.order.start, problem),
            notes=self.notes,
            names=self.names,
        )
        note_few_windows(problem)
        solution = self._search(findings, stop, time_limit)
        self.channel.send("progress", {"phase": "writing"})
        return findings.written(solution, FINAL)

    def _check_moves(self) -> None:
        max_moves = self._options.get("max_moves")
        if max_moves is not None and self.order.start is None:
            raise InputError(f"max_moves is {max_moves}, but there is no start_placement_id to count from")

    def _search(self, findings: Findings, stop: StoppingCriterion, time_limit: float | None) -> Solution:
        from placement.tasks.solve import run_solver

        incumbent = self._placement(self.order.incumbent, findings.problem)
        # A budget of moves is counted from the caller's own start, whatever an earlier attempt had found.
        is_counted = findings.max_moves is not None
        keeper = Keeper(self.channel, findings, self.end)
        self.stopping.tell(keeper)
        solution = run_solver(
            findings.problem,
            solver=findings.solver,
            stop=stop,
            time_limit=time_limit,
            threads=min(self._options.get("threads", 1), self.order.threads),
            seed=findings.seed,
            start=findings.first if is_counted or incumbent is None else incumbent,
            max_moves=findings.max_moves,
            on_incumbent=keeper.offer,
            on_phase=keeper.phase,
        )
        keeper.close()
        return self._better(solution, incumbent, findings) if is_counted else solution

    def _better(self, solution: Solution, incumbent: Placement | None, findings: Findings) -> Solution:
        """Return what an earlier attempt had found where that is better."""
        from placement.cost import CostModel

        if incumbent is None:
            return solution
        breakdown = CostModel(findings.problem).evaluate(incumbent)
        if breakdown.objective >= solution.objective:
            return solution
        return replace(solution, placement=incumbent, breakdown=breakdown)

    def _evaluate(self) -> dict[str, Any]:
        from placement.cost import CostModel
        from placement.tasks.evaluate import evaluation_report
        from placement.tasks.placements import load_placement

        if self.order.start is None:
            raise InputError("there is no placement to score")
        inputs = self._inputs()
        chosen = load_placement(Path(self.order.start), model=inputs.model, topology=inputs.topology)
        problem, origin = inputs.problem(device_of_slot_S=chosen.device_of_slot_S)
        report = evaluation_report(problem, CostModel(problem).evaluate(chosen), origin)
        return {"result": {**report, "notes": self._told_notes(), "elapsed_s": self._elapsed_s}}

    def _check(self) -> dict[str, Any]:
        from placement.tasks.solve import note_few_windows

        solver_of(self._options.get("solver", "auto"))
        self._check_moves()
        inputs = self._inputs()
        problem, _ = inputs.problem()
        first = self._placement(self.order.start, problem)
        if first is not None:
            problem.check_placement(first)
            problem.check_capacity(first)
        note_few_windows(problem)
        result = {
            "layers": problem.num_layers,
            "experts": problem.num_experts,
            "devices": problem.num_devices,
            "slots": problem.num_slots,
            "windows": problem.profile.num_windows,
            "notes": self._told_notes(),
            "elapsed_s": self._elapsed_s,
        }
        return {"result": result}

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self.began_s

    def _told_notes(self) -> list[str]:
        return [for_callers(note, self.names) for note in self.notes]
