"""``moe-placement evaluate``: score a placement on a trace."""

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
    SemanticsOption,
    TopologyOption,
    TraceArgument,
    WindowOption,
)
from placement.cli.placements import load_placement
from placement.tasks.evaluate import evaluation_report
from placement.tasks.problem import ProblemInputs

if TYPE_CHECKING:
    from placement.cost import CostBreakdown

__all__ = ["evaluate"]


def evaluate(
    placement: Annotated[
        Path, typer.Argument(help="Placement file, ours or that of an engine.", show_default=False)
    ],
    trace: TraceArgument,
    topology: TopologyOption,
    model: ModelOption = None,
    semantics: SemanticsOption = "dispatch",
    objective: ObjectiveOption = "step-time",
    window: WindowOption = None,
    max_imbalance: MaxImbalanceOption = 1.05,
    risk: RiskOption = "mean",
    calibration: CalibrationOption = None,
    replica_split: ReplicaSplitOption = "even",
    sample: SampleOption = None,
    source_format: FromOption = None,
    physical_map: PhysicalMapOption = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Report with pictures to write.", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> None:
    """Score PLACEMENT on TRACE: predicted step cost, its parts, balance, fanout, hops."""
    from placement.cost import CostModel
    from placement.io import dump_json

    chosen = load_placement(placement, model=model, topology=topology)
    problem, read = ProblemInputs(
        trace=trace,
        topology=topology,
        model=model,
        semantics=semantics,
        objective=objective,
        window=window,
        max_imbalance=max_imbalance,
        risk=risk,
        calibration=calibration,
        replica_split=replica_split,
        sample=sample,
        source_format=source_format,
        physical_map=physical_map,
    ).problem(device_of_slot_S=chosen.device_of_slot_S)
    breakdown = CostModel(problem).evaluate(chosen)
    report = evaluation_report(problem, breakdown, read)
    if html is not None:
        from placement.report.evaluation import write_evaluation

        told = {
            "placement": placement.name,
            "trace": f"{Path(trace).name} ({read.digest})",
            "window": f"{int(problem.profile.window_tokens_W[0])} tokens",
        }
        write_evaluation(problem, chosen, html, trace=read.digest, provenance=told)
    typer.echo(dump_json(report) if json else _lines(breakdown))


def _lines(breakdown: CostBreakdown) -> str:
    lines = [f"objective              {breakdown.objective:.6g} {breakdown.unit}"]
    step_W = breakdown.step_W
    if step_W[0] == step_W[0]:
        parts = {
            name: float(getattr(breakdown, f"{name}_WL").sum(axis=1).mean())
            for name in ("experts", "dispatch", "combine")
        }
        shares = ", ".join(f"{name} {value:.6g}" for name, value in parts.items())
        lines.append(f"step                   {breakdown.step:.6g} {breakdown.step_unit}  ({shares})")
    lines += [f"{name:<22} {value:.4f}" for name, value in breakdown.metrics.as_dict().items()]
    return "\n".join(lines)
