"""``moe-placement plan parallelism``: which mesh trains a model fastest, and what else was looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from placement.cli.inputs import FromOption, JsonOption
from placement.cli.planning import HtmlOption, OutputOption, SpecArgument, TraceOption, tell, text_table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from placement.planning.parallelism import ParallelismPlan

__all__ = ["plan_parallelism"]

TopOption = Annotated[int, typer.Option("--top", min=1, help="Strategies to show in the terminal.")]


def plan_parallelism(
    spec: SpecArgument,
    trace: TraceOption = None,
    source_format: FromOption = None,
    top: TopOption = 8,
    json: JsonOption = False,
    html: HtmlOption = None,
    output: OutputOption = None,
) -> None:
    """Rank meshes of pipeline, expert, tensor and data parallelism by predicted utilisation.

    With a trace the experts of the best strategies are placed for its loads.
    """
    from placement.report.plan_parallelism import page_of
    from placement.tasks.plan_parallelism import plan_parallelism_of
    from placement.tasks.plan_spec import read_spec

    planned = plan_parallelism_of(read_spec(spec), trace=trace, source_format=source_format)
    plan = planned.plan
    tell(
        plan,
        json=json,
        output=output,
        html=html,
        page=lambda: page_of(plan, trace=planned.trace),
        text=lambda: _text(plan, top),
    )


def _text(plan: ParallelismPlan, top: int) -> list[RenderableType]:
    from placement.report.plan_parallelism import headline, paragraph, rejected_line, strategy_rows

    columns, rows = strategy_rows(plan, top)
    parts: list[RenderableType] = [headline(plan), paragraph(plan), text_table(columns, rows)]
    if plan.best.placed is not None:
        from placement.report.plan_parallelism import policy_rows

        parts.append(text_table(*policy_rows(plan.best.placed)))
    parts.append(rejected_line(plan))
    return parts
