"""``moe-placement plan fabric``: optical circuits for a placement's traffic, and both together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from placement.cli.inputs import JsonOption
from placement.cli.planning import HtmlOption, OutputOption, SpecArgument, TraceOption, tell, text_table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from placement.report.plan_page import PlanPage
    from placement.tasks.plan_fabric import FabricTask

__all__ = ["plan_fabric"]


def plan_fabric(
    spec: SpecArgument,
    trace: TraceOption = None,
    json: JsonOption = False,
    html: HtmlOption = None,
    output: OutputOption = None,
) -> None:
    """Allocate optical circuits per layer, say when to change them, and place experts to suit them."""
    from placement.tasks.plan_fabric import fabric_task
    from placement.tasks.plan_spec import read_spec

    task = fabric_task(read_spec(spec), trace=trace)

    def page() -> PlanPage:
        from placement.report.plan_fabric import page_of

        return page_of(task.plan, title=f"Fabric plan: {task.source}", traffic=task.traffic)

    tell(task.plan, json=json, output=output, html=html, page=page, text=lambda: _text(task))


def _text(task: FabricTask) -> list[RenderableType]:
    from placement.report.plan_fabric import fabric_rows, headline, method_rows, paragraph

    plan = task.plan
    tables = (("Circuits", method_rows(plan)), ("Fabrics", fabric_rows(plan)))
    return [
        headline(plan),
        paragraph(plan),
        *plan.notes,
        *(text_table(columns, rows, title=title) for title, (columns, rows) in tables),
    ]
