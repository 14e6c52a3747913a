"""``moe-placement solve``: find a placement for a trace and a cluster, and write it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placement.cli.inputs import (
    CalibrationOption,
    FillMemoryOption,
    FromOption,
    JsonOption,
    MaxImbalanceOption,
    ModelOption,
    ObjectiveOption,
    PhysicalMapOption,
    ReplicaSplitOption,
    RiskOption,
    SampleOption,
    SeedOption,
    SemanticsOption,
    SpareSlotsOption,
    ThreadsOption,
    TimeLimitOption,
    TopologyOption,
    TraceArgument,
    WindowOption,
)
from placement.cli.placements import (
    ExportOption,
    check_exports,
    parse_exports,
    warn_of_moves,
    write_exports,
)
from placement.errors import InputError
from placement.tasks.placements import load_placement, moves_entry, note_fillers
from placement.tasks.problem import ProblemInputs, labelled

if TYPE_CHECKING:
    from placement.plan import Placement
    from placement.solution import Solution

__all__ = ["solve"]


def solve(
    trace: TraceArgument,
    topology: TopologyOption,
    out: Annotated[Path, typer.Option("-o", "--out", help="Placement file to write.")] = Path(
        "placement.json"
    ),
    model: ModelOption = None,
    semantics: SemanticsOption = "dispatch",
    objective: ObjectiveOption = "step-time",
    window: WindowOption = None,
    spare_slots: SpareSlotsOption = 0,
    max_imbalance: MaxImbalanceOption = 1.05,
    risk: RiskOption = "mean",
    calibration: CalibrationOption = None,
    replica_split: ReplicaSplitOption = "even",
    fill_memory: FillMemoryOption = False,
    start: Annotated[
        Path | None,
        typer.Option("--start", help="Placement that the result must not be worse than.", show_default=False),
    ] = None,
    max_moves: Annotated[
        int | None,
        typer.Option(
            "--max-moves", help="With --start: most expert copies to move. Default: any.", show_default=False
        ),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", help="Another trace to score the result on.", show_default=False),
    ] = None,
    solver: Annotated[
        str,
        typer.Option(
            "--solver",
            help="auto (chooses by problem), search, chain, balance, hierarchy, split, exact, ilp, lns, "
            "moetuner, moetuner-sum, contiguous, greedy or eplb.",
        ),
    ] = "auto",
    export: ExportOption = None,
    time_limit: TimeLimitOption = None,
    threads: ThreadsOption = 1,
    seed: SeedOption = 0,
    sample: SampleOption = None,
    source_format: FromOption = None,
    physical_map: PhysicalMapOption = None,
    json: JsonOption = False,
) -> None:
    """Find a placement for TRACE on a cluster and write it.

    Ctrl-C stops early and keeps the best placement so far.
    """
    from placement.cli.progress import cancel_on_interrupt, showing_progress
    from placement.io import dump_json, placement_to_dict, write_json
    from placement.stopping import AnyOf, Cancellation, Deadline
    from placement.tasks.solve import note_few_windows, placement_entries, provenance_options, run_solver

    if max_moves is not None and start is None:
        raise InputError(f"--max-moves {max_moves} needs --start PLACEMENT to count moves from")
    exports = parse_exports(export)
    cancellation = Cancellation()
    stop = cancellation if time_limit is None else AnyOf(cancellation, Deadline(time_limit))
    began_s = time.monotonic()
    inputs = ProblemInputs(
        trace=trace,
        topology=topology,
        model=model,
        semantics=semantics,
        objective=objective,
        window=window,
        spare_slots=spare_slots,
        max_imbalance=max_imbalance,
        risk=risk,
        calibration=calibration,
        replica_split=replica_split,
        fill_memory=fill_memory,
        sample=sample,
        source_format=source_format,
        physical_map=physical_map,
    )
    with cancel_on_interrupt(cancellation), showing_progress("reading", limit_s=time_limit) as progress:
        problem, read = inputs.problem()
        check_exports(problem, read, exports)
        first = None if start is None else load_placement(start, model=problem.model, topology=topology)
        progress.task("solving")
        solution = run_solver(
            problem,
            solver=solver,
            stop=stop,
            seed=seed,
            threads=threads,
            time_limit=time_limit,
            start=first,
            max_moves=max_moves,
            on_incumbent=progress.incumbent,
        )
    note_few_windows(problem)
    placement = labelled(solution.placement, problem, read)
    elapsed_s = time.monotonic() - began_s
    options = provenance_options(inputs, problem, solver=solver, max_moves=max_moves)
    entries = placement_entries(problem, solution, read, seed=seed, options=options)
    entries["held_out"] = None if held_out is None else _score(inputs, held_out, placement)
    placement = note_fillers(placement, problem, start=first)
    write_json(out, placement_to_dict(placement, **entries))
    filled = write_exports(placement, exports, problem, written=out)
    if filled is not None and first is not None and max_moves is not None:
        warn_of_moves(first, placement, max_moves)
    report = {
        "placement": str(out),
        "termination": str(solution.termination),
        "solver": solution.solver,
        "elapsed_s": elapsed_s,
        "objective": entries["objective"],
        "metrics": entries["metrics"],
        "held_out": entries["held_out"],
        "candidates": solution.candidates,
        "skipped": solution.skipped,
        "moves": None if first is None else moves_entry(first, placement, problem),
        "exports": {str(file.path): file.format for file in exports},
        "exported_objective": filled,
    }
    layers = entries["breakdown"]["layers"]
    typer.echo(dump_json(report) if json else _lines(solution, layers, out, elapsed_s, report["moves"]))
    if not json:
        for file in exports:
            typer.echo(f"written for {file.format} to {file.path}")
        if filled is not None:
            unit = solution.breakdown.unit
            typer.echo(f"  engines have no empty slots; with those filled: {filled:.6g} {unit}")


def _score(inputs: ProblemInputs, held_out: Path, placement: Placement) -> dict[str, Any]:
    """Evaluate a placement on another trace with the same options."""
    from dataclasses import replace

    from placement.cost import CostModel

    problem, trace = replace(inputs, trace=str(held_out)).problem(device_of_slot_S=placement.device_of_slot_S)
    breakdown = CostModel(problem).evaluate(placement)
    return {
        "trace": trace.digest,
        "windows": problem.profile.num_windows,
        "objective": breakdown.objective,
        **breakdown.metrics.as_dict(),
    }


def _lines(
    solution: Solution,
    layers: list[dict[str, Any]],
    out: Path,
    elapsed_s: float,
    moves: dict[str, Any] | None,
) -> str:
    metrics = solution.breakdown.metrics
    lines = [
        f"{solution.objective:.6g} {solution.breakdown.unit}, gap {solution.gap:.1%} "
        f"(bound {solution.lower_bound:.6g}), by {solution.solver} in {elapsed_s:.1f} s, "
        f"{solution.termination}"
    ]
    for name, value in solution.candidates.items():
        if name != solution.solver and value > 0:
            lines.append(f"  {name:<12} {value:.6g}  ({solution.objective / value - 1:+.1%})")
    lines += [f"  {name:<12} no answer: {why}" for name, why in solution.skipped.items()]
    figures = [f"balance {metrics.balance:.3f} (floor {metrics.balance_floor:.3f})"]
    if metrics.fanout is not None:
        figures.append(f"fanout {metrics.fanout:.3f}")
    lines.append(f"  {', '.join(figures)}")
    if len(gaps := [row["gap"] for row in layers if "gap" in row]) > 1:
        widest = max(range(len(gaps)), key=gaps.__getitem__)
        lines.append(f"  gap by layer: {min(gaps):.1%} to {gaps[widest]:.1%} (layer {widest})")
    if moves is not None:
        lines.append(f"  {moves['count']} expert copies move from the start")
    lines.append(f"written to {out}")
    return "\n".join(lines)
