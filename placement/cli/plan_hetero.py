"""``moe-placement plan hetero``: which devices of a mixed cluster attend, and which hold experts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placement.cli.inputs import JsonOption, warn
from placement.cli.planning import HtmlOption, OutputOption, SpecArgument, TraceOption, tell, text_table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from placement.planning.hetero import HeteroPlan

__all__ = ["plan_hetero"]

PlacementOption = Annotated[
    Path | None,
    typer.Option("--placement", help="Placement of one group to write, JSON.", show_default=False),
]


def plan_hetero(
    spec: SpecArgument,
    trace: TraceOption = None,
    placement: PlacementOption = None,
    json: JsonOption = False,
    html: HtmlOption = None,
    output: OutputOption = None,
) -> None:
    """Give devices of different age their roles: attention, experts, or both, and each expert a device."""
    from placement.report.plan_hetero import page_of
    from placement.tasks.plan_hetero import plan_hetero_from
    from placement.tasks.plan_spec import read_spec

    plan = plan_hetero_from(read_spec(spec), trace=trace)
    for warning in plan.warnings:
        warn(warning)
    if placement is not None:
        from placement.io import placement_to_dict, write_json
        from placement.planning.hetero import placement_of

        found = placement_of(plan.answer.device_LE, num_devices=plan.group.num_devices)
        write_json(placement, placement_to_dict(found))
    tell(plan, json=json, output=output, html=html, page=lambda: page_of(plan), text=lambda: _text(plan))


def _text(plan: HeteroPlan) -> list[RenderableType]:
    from placement.report.plan_hetero import contender_rows, headline, paragraph

    columns, rows = contender_rows(plan)
    held = ", ".join(map(str, plan.answer.own_count_L))
    return [
        headline(plan),
        paragraph(plan),
        f"Experts on attention devices, layer by layer: {held} of {plan.job.num_experts}",
        "",
        text_table(columns, rows, left=(0, len(columns) - 1)),
    ]
