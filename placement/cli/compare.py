"""``moe-placement compare``: every policy, fitted on alternate windows, scored on the rest."""

from __future__ import annotations

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
    warn,
)
from placement.tasks.problem import ProblemInputs

if TYPE_CHECKING:
    from rich.table import Table

    from placement.comparison import Comparison, CrossValidation, PolicyResult

__all__ = ["compare"]


def compare(
    trace: TraceArgument,
    topology: TopologyOption,
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
    time_limit: TimeLimitOption = None,
    threads: ThreadsOption = 1,
    seed: SeedOption = 0,
    sample: SampleOption = None,
    source_format: FromOption = None,
    physical_map: PhysicalMapOption = None,
    folds: Annotated[
        int | None,
        typer.Option(
            "--folds",
            min=2,
            help="Cross-validate: as many splits, every window held out once.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Report with pictures to write.", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> None:
    """Fit every policy on every other window of TRACE and score it on the windows between.

    A time limit holds for each policy.
    """
    from placement.cli.progress import cancel_on_interrupt, showing_progress
    from placement.comparison import compare as compare_policies
    from placement.comparison import cross_validate
    from placement.io import dump_json
    from placement.stopping import Cancellation
    from placement.tasks.solve import work_of_limit

    cancellation = Cancellation()
    with cancel_on_interrupt(cancellation), showing_progress("reading") as progress:
        problem, read = ProblemInputs(
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
        ).problem()
        options: dict[str, Any] = {
            "stop": cancellation,
            "time_limit_s": time_limit,
            "seed": seed,
            "threads": threads,
            "work_s": work_of_limit(time_limit, threads),
            "on_policy": progress.task,
            "on_incumbent": progress.incumbent,
        }
        validation = None if folds is None else cross_validate(problem, folds=folds, **options)
        # The last fold of two is the usual split: even windows fitted, odd ones scored.
        comparison = compare_policies(problem, **options) if validation is None else validation.folds[-1]
        if html is not None:
            from placement import __version__
            from placement.report import write_report

            progress.task("drawing")
            provenance = {
                "trace": f"{Path(trace).name} ({read.digest})",
                "topology": problem.topology.name,
                "window": f"{int(problem.profile.window_tokens_W[0])} tokens",
                "seed": str(seed),
                "version": __version__,
            }
            write_report(comparison, html, provenance=provenance)
    if comparison.few_windows:
        warn(
            f"only {comparison.num_held_out_windows} held-out windows: differences of a few percent may be "
            "noise; use a longer trace or a smaller --window"
            + (", or --folds to hold every window out once" if validation is None else "")
        )
    if json:
        folded = {} if validation is None else {"cross_validation": validation.to_dict()}
        typer.echo(dump_json({**comparison.to_dict(), **folded}))
    else:
        _print_table(comparison)
        if validation is not None:
            typer.echo(_folds_line(validation))


def _folds_line(validation: CrossValidation) -> str:
    """Say how auto does against the best baseline in every fold."""
    rivals = [name for name in ("contiguous", "greedy", "eplb") if name in validation.names]
    best = min(rivals, key=lambda name: float(validation.held_out(name).mean()))
    change = validation.change("auto", best)
    return (
        f"cross-validated over {len(validation.folds)} folds: auto against {best} {change.mean():+.1%} "
        f"({', '.join(f'{value:+.1%}' for value in change)})"
    )


def _print_table(comparison: Comparison) -> None:
    import shutil
    import sys

    from rich.console import Console

    # Off a terminal the table must not be squeezed into 80 columns.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
    console = Console(width=width)
    console.print(_table(comparison))
    console.print(_verdict(comparison), highlight=False, soft_wrap=True)
    for name, why in comparison.skipped.items():
        console.print(f"{name} has no answer: {why}", highlight=False, soft_wrap=True)


def _table(comparison: Comparison) -> Table:
    from rich.table import Table

    problem = comparison.problem
    table = Table(
        title=(
            f"{comparison.num_held_out_windows} held-out windows of "
            f"{int(problem.profile.window_tokens_W[0])} tokens, {problem.num_devices} devices, "
            f"{problem.semantics}"
        ),
        title_justify="left",
    )
    table.add_column("policy")
    for name in (
        f"{problem.objective} [{problem.unit}]",
        "vs contiguous",
        "balance",
        "p95",
        "fanout",
        "fitted",
    ):
        table.add_column(name, justify="right")
    baseline = comparison.policies[0].held_out.objective
    for result in comparison.policies:
        table.add_row(*_row(result, baseline), style="bold" if result.name == "auto" else None)
    return table


def _row(result: PolicyResult, baseline: float) -> tuple[str, ...]:
    held, metrics = result.held_out, result.held_out.metrics
    change = f"{held.objective / baseline - 1:+.1%}" if baseline > 0 else "-"
    return (
        result.name,
        f"{held.objective:.6g}",
        change,
        f"{metrics.balance:.3f}",
        f"{metrics.balance_p95:.3f}",
        "-" if metrics.fanout is None else f"{metrics.fanout:.3f}",
        f"{result.fitted.objective:.6g}",
    )


def _verdict(comparison: Comparison) -> str:
    auto = comparison.policy("auto")
    bound = f"bound {comparison.lower_bound:.6g}, gap {auto.solution.gap:.1%} on the fitted windows"
    rivals = [result for result in comparison.policies if result.name in ("contiguous", "greedy", "eplb")]
    if not rivals:
        return bound
    best = min(rivals, key=lambda result: result.held_out.objective)
    change = auto.held_out.objective / best.held_out.objective - 1 if best.held_out.objective else 0.0
    share = comparison.better_share("auto", best.name)
    return (
        f"auto against the best baseline ({best.name}): {change:+.1%}, better in {share:.0%} of the held-out "
        f"windows; {bound}"
    )
