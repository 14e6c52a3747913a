"""One cell of a batch, solved on whatever worker it comes to; the options are those of ``solve``.

With the layers solved one by one the placement of a cell is defined as follows, whoever solves which layer:
layer l is ``optimize(problem.one_layer(l), seed=seed, ...)`` on its own, with an equal share of the time
limit where there is one; the rows are joined, and the cost model prices the whole on all layers. The bound is
the sum (or mean) of the layers' bounds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from placement.errors import PlacementError
from placement.tasks.problem import ProblemInputs, TraceOrigin, collecting_notes, labelled
from placement.tasks.solve import breakdown_entry, run_solver
from traces.distributed.batch import CellAnswer, CellWork
from traces.distributed.spec import Cell

if TYPE_CHECKING:
    from placement.bounds import LowerBound
    from placement.cost import CostBreakdown
    from placement.plan import Placement
    from placement.problem import PlacementProblem

__all__ = ["CELL_WORK"]

_OWN_OPTIONS = ("solver", "time_limit", "threads", "seed")
"""Options of a cell that are no part of its problem."""

_BASELINES = ("contiguous", "eplb")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Stage:
    """What a cell is solved and scored on.

    Parameters
    ----------
    fitted
        Problem on the windows to fit on.
    held_out
        The same on the windows to score on; None where there are none.
    origin
        The trace.
    notes
        What reading it gave to say.
    """

    fitted: PlacementProblem
    held_out: PlacementProblem | None
    origin: TraceOrigin
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Solved:
    placement: Placement
    breakdown: CostBreakdown
    bound: LowerBound
    solver: str
    termination: str


def _inputs(cell: Cell, trace: str) -> ProblemInputs:
    options = {name: value for name, value in cell.options.items() if name not in _OWN_OPTIONS}
    options["model"] = options.get("model", cell.trace.model)
    for name, value in (
        ("calibration", options.pop("calibration", None)),
        ("physical_map", cell.trace.physical_map),
    ):
        options[name] = None if value is None else Path(value)
    return ProblemInputs(
        trace=trace, topology=cell.topology.topology, source_format=cell.trace.source_format, **options
    )


def _stage(cell: Cell) -> _Stage:
    return _read(_inputs(cell, cell.trace.path), cell.held_out, cell.trace.held_out)


@lru_cache(maxsize=1)
def _read(inputs: ProblemInputs, held_out: str, other: str | None) -> _Stage:
    """Read a cell's problem; cells and layers that follow on the same worker often have the same one."""
    with collecting_notes() as notes:
        problem, origin = inputs.problem()
        fitted, held = problem, None
        if other is not None:
            scored = replace(inputs, trace=other)
            held, _ = scored.problem(device_of_slot_S=problem.device_of_slot_S)
        elif held_out == "alternate":
            even, odd = problem.profile.split_alternate()
            fitted, held = problem.with_profile(even), problem.with_profile(odd)
    return _Stage(fitted=fitted, held_out=held, origin=origin, notes=tuple(dict.fromkeys(notes)))


def _solve(cell: Cell, problem: PlacementProblem, *, share: float = 1.0) -> _Solved:
    from placement.stopping import Deadline

    given_s, threads = cell.options.get("time_limit"), cell.options.get("threads", 1)
    limit_s = None if given_s is None else given_s * share
    solution = run_solver(
        problem,
        solver=cell.options.get("solver", "auto"),
        stop=None if limit_s is None else Deadline(limit_s),
        seed=cell.options.get("seed", 0),
        threads=threads,
        time_limit=limit_s,
    )
    return _Solved(
        placement=solution.placement,
        breakdown=solution.breakdown,
        bound=solution.bound,
        solver=solution.solver,
        termination=str(solution.termination),
    )


def solve_cell(cell: Cell) -> CellAnswer:
    """Solve a cell in one go."""
    began_s = time.monotonic()
    stage = _stage(cell)
    return _answer(cell, stage, _solve(cell, stage.fitted), began_s)


def count_layers(cell: Cell) -> int:
    """Return how many layers a cell has."""
    return _stage(cell).fitted.num_layers


def solve_layer(cell: Cell, layer: int) -> dict[str, Any]:
    """Solve one layer of a cell."""
    began_s = time.monotonic()
    problem = _stage(cell).fitted
    solved = _solve(cell, problem.one_layer(layer), share=1 / problem.num_layers)
    return {
        "physical_to_logical": solved.placement.physical_to_logical_map_LS[0].tolist(),
        "device_of_slot": solved.placement.device_of_slot_S.tolist(),
        "lower_bound": solved.bound.value,
        "solver": solved.solver,
        "termination": solved.termination,
        "elapsed_s": time.monotonic() - began_s,
    }


def join_layers(cell: Cell, layers: Sequence[dict[str, Any]]) -> CellAnswer:
    """Join the answers of all layers into the cell's, priced as a whole."""
    from placement.bounds import LowerBound, lower_bound, tighter
    from placement.cost import CostModel
    from placement.plan import Placement
    from placement.solution import Termination

    began_s = time.monotonic()
    stage = _stage(cell)
    problem = stage.fitted
    placement = Placement(
        physical_to_logical_map_LS=np.array([layer["physical_to_logical"] for layer in layers]),
        device_of_slot_S=np.array(layers[0]["device_of_slot"]),
        num_experts=problem.num_experts,
        num_devices=problem.num_devices,
    )
    problem.check_placement(placement)
    problem.check_capacity(placement)
    model = CostModel(problem)
    breakdown = model.evaluate(placement)
    proved = LowerBound(value=0.0, layer_L=np.array([layer["lower_bound"] for layer in layers]))
    bound = tighter(problem, lower_bound(model, stop=lambda: True), proved)
    # Sums in another order may round up; a bound never exceeds what is there.
    bound = replace(bound, value=min(bound.value, breakdown.objective))
    ends = {layer["termination"] for layer in layers}
    worst = next(
        end for end in (Termination.STOPPED, Termination.CONVERGED, Termination.OPTIMAL) if end in ends
    )
    solved = _Solved(
        placement=placement,
        breakdown=breakdown,
        bound=bound,
        solver="+".join(sorted({layer["solver"] for layer in layers})),
        termination=str(worst),
    )
    return _answer(cell, stage, solved, began_s, earlier_s=sum(layer["elapsed_s"] for layer in layers))


def _answer(
    cell: Cell, stage: _Stage, solved: _Solved, began_s: float, *, earlier_s: float = 0.0
) -> CellAnswer:
    from placement.io import placement_to_dict

    problem = stage.fitted
    held_out = _held_out(stage, solved.placement)
    placement = labelled(solved.placement, problem, stage.origin)
    objective = _objective(problem, solved)
    row = {
        "objective": objective,
        "solver": solved.solver,
        "termination": solved.termination,
        "metrics": solved.breakdown.metrics.as_dict(),
        "held_out": held_out,
        "cost": _cost(cell, problem, held_out["step"] if held_out is not None else solved.breakdown.step),
        "windows": problem.profile.num_windows,
        "window": float(problem.profile.window_tokens_W.mean()),
        "num_devices": problem.num_devices,
        "num_slots": problem.num_slots,
        "trace_digest": stage.origin.digest,
        "notes": list(stage.notes),
        "elapsed_s": time.monotonic() - began_s + earlier_s,
    }
    entries = {
        "objective": objective,
        "metrics": row["metrics"],
        "breakdown": breakdown_entry(problem, solved.breakdown, solved.bound),
        "held_out": held_out,
        "provenance": _provenance(cell, stage, solved),
    }
    return CellAnswer(row=row, placement=placement_to_dict(placement, **entries))


def _objective(problem: PlacementProblem, solved: _Solved) -> dict[str, Any]:
    from placement.solution import relative_gap

    value, bound = solved.breakdown.objective, solved.bound.value
    return {
        "name": str(problem.objective),
        "value": value,
        "unit": problem.unit,
        "lower_bound": bound,
        "gap": relative_gap(value, bound),
    }


def _provenance(cell: Cell, stage: _Stage, solved: _Solved) -> dict[str, Any]:
    from placement import __version__

    return {
        "solver": solved.solver,
        "seed": cell.options.get("seed", 0),
        "trace": stage.origin.digest,
        "version": __version__,
        "termination": solved.termination,
        "options": {
            **cell.options,
            "topology": stage.fitted.topology.name,
            "cell": cell.name,
            "split_layers": cell.split_layers,
        },
    }


def _held_out(stage: _Stage, placement: Placement) -> dict[str, Any] | None:
    """Score a placement, and the baselines fitted on the same windows, on the windows held out."""
    if stage.held_out is None:
        return None
    from placement.cost import CostModel

    model = CostModel(stage.held_out)
    breakdown = model.evaluate(placement)
    scores: dict[str, Any] = {
        "windows": stage.held_out.profile.num_windows,
        "objective": breakdown.objective,
        "step": breakdown.step,
        **breakdown.metrics.as_dict(),
    }
    for name in _BASELINES:
        baseline = _baseline(stage.fitted, name)
        scores[name] = None if baseline is None else model.evaluate(baseline).objective
    return scores


def _baseline(problem: PlacementProblem, name: str) -> Placement | None:
    """Return a baseline's placement; None where it has none for such a problem."""
    from placement.cost import CostModel
    from placement.solvers.protocol import SolveRequest
    from placement.solvers.registry import make_solver

    try:
        placement = make_solver(name).solve(SolveRequest(problem=problem, model=CostModel(problem)))
        problem.check_capacity(placement)
    except PlacementError:
        # A figure to compare with is missing; the cell has its answer all the same.
        return None
    return placement


def _cost(cell: Cell, problem: PlacementProblem, step: float) -> dict[str, Any] | None:
    """Return what tokens cost: in time, in device seconds, and in money where devices have a price.

    Of the MoE layers alone, at one window of tokens a step.
    """
    if problem.calibration.unit != "s" or not np.isfinite(step):
        return None
    step_per_token = step / float(problem.profile.window_tokens_W.mean())
    device_seconds = step_per_token * problem.num_devices * 1e6
    price = cell.topology.price_per_device_hour
    return {
        "seconds_per_token": step_per_token,
        "device_seconds_per_million_tokens": device_seconds,
        "price_per_million_tokens": None if price is None else device_seconds / 3600 * price,
    }


CELL_WORK = CellWork(solve=solve_cell, count_layers=count_layers, solve_layer=solve_layer, join=join_layers)
"""How the command solves cells."""
