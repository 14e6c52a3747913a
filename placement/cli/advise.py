"""``moe-placement advise``: is a move worth it, how far to go, when does it pay back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placement.cli.inputs import (
    CalibrationOption,
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
    ThreadsOption,
    TimeLimitOption,
    TopologyOption,
    TraceArgument,
    WindowOption,
    warn,
)
from placement.cli.placements import load_placement
from placement.tasks.problem import ProblemInputs

if TYPE_CHECKING:
    from rich.table import Table

    from placement.change.advise import Advice
    from placement.change.frontier import FrontierPoint

__all__ = ["advise"]


def advise(
    trace: TraceArgument,
    topology: TopologyOption,
    start: Annotated[Path, typer.Option("--start", help="Placement that is running.", show_default=False)],
    model: ModelOption = None,
    semantics: SemanticsOption = "dispatch",
    objective: ObjectiveOption = "step-time",
    window: WindowOption = None,
    replica_split: ReplicaSplitOption = "even",
    max_imbalance: MaxImbalanceOption = 1.05,
    risk: RiskOption = "mean",
    calibration: CalibrationOption = None,
    horizon_steps: Annotated[
        float | None,
        typer.Option("--horizon-steps", help="Steps that a new placement is to serve.", show_default=False),
    ] = None,
    min_gain: Annotated[
        float, typer.Option("--min-gain", help="Least gain worth having, as a share of the objective.")
    ] = 0.01,
    time_limit: TimeLimitOption = None,
    threads: ThreadsOption = 1,
    seed: SeedOption = 0,
    sample: SampleOption = None,
    source_format: FromOption = None,
    physical_map: PhysicalMapOption = None,
    json: JsonOption = False,
) -> None:
    """Say whether to move away from the placement that is running, by the traffic of TRACE.

    Placements are fitted on every other window and judged on the windows between.
    """
    from placement.change.advise import advise as advise_change
    from placement.cli.progress import cancel_on_interrupt, showing_progress
    from placement.io import dump_json
    from placement.stopping import AnyOf, Cancellation, Deadline
    from placement.tasks.solve import work_of_limit

    cancellation = Cancellation()
    stop = cancellation if time_limit is None else AnyOf(cancellation, Deadline(time_limit))
    with cancel_on_interrupt(cancellation), showing_progress("reading", limit_s=time_limit) as progress:
        running = load_placement(start, model=model, topology=topology)
        problem, read = ProblemInputs(
            trace=trace,
            topology=topology,
            model=model,
            semantics=semantics,
            objective=objective,
            window=window,
            replica_split=replica_split,
            max_imbalance=max_imbalance,
            risk=risk,
            calibration=calibration,
            sample=sample,
            source_format=source_format,
            physical_map=physical_map,
        ).problem(device_of_slot_S=running.device_of_slot_S)
        progress.task("solving")
        advice = advise_change(
            problem,
            running,
            horizon_steps=horizon_steps,
            min_gain=min_gain,
            seed=seed,
            threads=threads,
            work_s=work_of_limit(time_limit, threads),
            stop=stop,
        )
    for message in advice.warnings:
        warn(message)
    if json:
        typer.echo(dump_json({**advice.to_dict(), "trace": read.digest}))
    else:
        _print(advice)


def _print(advice: Advice) -> None:
    import shutil
    import sys

    from rich.console import Console

    # Off a terminal the table must not be squeezed into 80 columns.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
    console = Console(width=width)
    console.print(advice.reason, highlight=False, soft_wrap=True)
    tiers = ", ".join(
        f"{count} over {tier}" for tier, count in advice.point.moves.moves_by_tier.items() if count
    )
    if tiers:
        console.print(f"Moves: {tiers}.", highlight=False, soft_wrap=True)
    if advice.worth_it:
        console.print(
            f"Next: moe-placement solve ... --start PLACEMENT --max-moves {advice.point.moves.num_moves}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(_table(advice))


def _table(advice: Advice) -> Table:
    from rich.table import Table

    curve = advice.frontier
    table = Table(
        title=(
            f"fitted on {advice.num_fitted_windows} windows, "
            f"judged on {advice.num_held_out_windows} held-out ones"
        ),
        title_justify="left",
    )
    names = ("moves", "GiB", "transfer s", f"fitted [{curve.unit}]", "held out", "change", "pay-back steps")
    for name in names:
        table.add_column(name, justify="right")
    first = curve.points[0]
    for point in curve.points:
        table.add_row(*_row(point, first), style="bold" if point is advice.point else None)
    return table


def _row(point: FrontierPoint, first: FrontierPoint) -> tuple[str, ...]:
    assert point.held_out is not None
    assert first.held_out is not None
    moves, base = point.moves, first.held_out.objective
    steps = point.pay_back_steps
    return (
        str(moves.num_moves),
        "-" if moves.total_bytes is None else f"{moves.total_bytes / 2**30:.2f}",
        "-" if moves.seconds is None else f"{moves.seconds:.3g}",
        f"{point.fitted.objective:.6g}",
        f"{point.held_out.objective:.6g}",
        f"{point.held_out.objective / base - 1:+.1%}" if base > 0 else "-",
        "-" if steps is None else "never" if steps == float("inf") else f"{steps:.0f}",
    )
