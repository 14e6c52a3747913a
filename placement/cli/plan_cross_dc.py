"""``moe-placement plan cross-dc``: over slow links, whether experts or tokens travel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from placement.cli.inputs import JsonOption
from placement.cli.planning import HtmlOption, OutputOption, SpecArgument, TraceOption, tell, text_table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from placement.planning.cross_dc import CrossDcPlan
    from placement.report.plan_page import PlanTable

__all__ = ["plan_cross_dc"]


def plan_cross_dc(
    spec: SpecArgument,
    trace: TraceOption = None,
    json: JsonOption = False,
    html: HtmlOption = None,
    output: OutputOption = None,
) -> None:
    """Plan whether experts or tokens travel between data centres.

    Exact domain sizes of HybridEP for even routing; for a trace, who prefetches which expert.
    """
    from placement.report.plan_cross_dc import page_of
    from placement.tasks.plan_cross_dc import plan_cross_dc_from
    from placement.tasks.plan_spec import read_spec

    plan = plan_cross_dc_from(read_spec(spec), trace=trace)
    tell(plan, json=json, output=output, html=html, page=lambda: page_of(plan), text=lambda: _text(plan))


def _text(plan: CrossDcPlan) -> list[RenderableType]:
    from placement.report.plan_cross_dc import headline, levels_table, paragraph, policies_table

    parts: list[RenderableType] = [headline(plan), _table(levels_table(plan))]
    if plan.routed is not None:
        parts.append(_table(policies_table(plan.routed)))
    return [*parts, paragraph(plan)]


def _table(table: PlanTable) -> RenderableType:
    return text_table(table.columns, table.rows, title=table.title, marked=table.marked)
