"""The page of a fabric plan: how fast the circuits are, what they look like, when they change, their cost.

Shape letters: L layers, S servers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from placement.planning.fabric import FabricKind, FabricPlan
from placement.report.document import Chart
from placement.report.figures.look import BLUE, GREEN, GREY, ORANGE, axis_title, empty_figure, legend_above
from placement.report.numbers import Scale, number, percent, plural
from placement.report.plan_page import PlanPage, PlanTable

__all__ = ["fabric_rows", "headline", "method_rows", "page_of", "paragraph"]

Rows = tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]
"""Heads of columns, and rows."""

METHODS = {
    "published": "MixNet, Algorithm 1",
    "published code": "MixNet, its code",
    "published, split": "Algorithm 1, best split",
    "balanced": "greedy that counts packet ports",
    "search": "local search",
    "exact": "exact program",
}

WORDS = {
    "Circuit": "A link from one server to another through the optical switch, in both directions.",
    "Split": "Bytes of a pair that go through packet switches because its circuits are full.",
    "Lower bound": "No circuits of this region take less; from counting and from the exact program.",
    "Held-out": "Windows of the trace that no placement and no circuits were made for.",
    "Exposed": "Time of a change of circuits that no compute hides.",
}


def headline(plan: FabricPlan) -> str:
    """Return the answer in a sentence."""
    faster = 1 - plan.time_s / plan.published_s if plan.published_s > 0 else 0.0
    gain = f"{percent(faster)} less than MixNet's own" if faster > 0 else "as MixNet's own"
    changes = plan.schedule.num_changes
    advice = "set them once" if changes == 0 else f"change them {changes} times a step"
    return f"Optical circuits bring one all-to-all of every layer to {_time(plan.time_s)}, {gain}; {advice}."


def paragraph(plan: FabricPlan) -> str:
    """Return what stands behind the headline."""
    tree, mine = plan.fabric(FabricKind.FAT_TREE), plan.fabric(FabricKind.MIXNET)
    dearer = tree.dollars / mine.dollars
    texts = [
        f"At most {percent(plan.gap)} of that could be saved by better circuits.",
        f"All-to-alls and exposed changes of a step take {_time(plan.schedule.time_s)}: "
        f"{_time(plan.always_keep_s)} where circuits never change, {_time(plan.always_change_s)} where they "
        "change at every layer once its gate has run.",
        f"A fat-tree that never blocks takes {_time(tree.all_to_all_s)} and costs {number(dearer, digits=3)} "
        "times as much.",
    ]
    if plan.placement is not None:
        placed, best = plan.placement, plan.placement.best_separate
        change = 1 - placed.held_out_s / placed.separate_held_out_s[best]
        texts.append(
            f"Placing experts together with the circuits takes {_time(placed.held_out_s)} a step on held-out "
            f"windows, {percent(abs(change))} {'less' if change >= 0 else 'more'} than the best placement "
            "with circuits allocated afterwards."
        )
    if plan.prediction is not None:
        errors = ", ".join(f"{name} {percent(error)}" for name, error in plan.prediction.error.items())
        texts.append(
            f"Predicting a layer's load ahead puts on the wrong expert: {errors}; best is "
            f"{plan.prediction.best}."
        )
    return " ".join(texts)


def method_rows(plan: FabricPlan) -> Rows:
    """Return the time of every method's circuits, summed over layers."""
    columns = ("method", "one all-to-all of every layer", "to the lower bound")
    totals = {
        name: sum(allocation.time_of_method_s.get(name, allocation.time_s) for allocation in plan.allocations)
        for name in METHODS
        if any(name in allocation.time_of_method_s for allocation in plan.allocations)
    }
    rows = [
        (METHODS[name], _time(total), _ratio(total, plan.lower_bound_s)) for name, total in totals.items()
    ]
    rows.append(("the plan: best of all", _time(plan.time_s), _ratio(plan.time_s, plan.lower_bound_s)))
    rows.append(("lower bound", _time(plan.lower_bound_s), _ratio(plan.lower_bound_s, plan.lower_bound_s)))
    return columns, tuple(rows)


def fabric_rows(plan: FabricPlan) -> Rows:
    """Return every fabric's time and price."""
    columns = ("fabric", "all-to-alls of a step", "step", "network, $", "steps per $, fat-tree = 1")
    base = plan.fabric(FabricKind.FAT_TREE).steps_per_dollar
    return columns, tuple(
        (
            str(answer.kind),
            _time(answer.all_to_all_s),
            _time(answer.step_s),
            f"{answer.dollars:,.0f}",
            _ratio(answer.steps_per_dollar, base),
        )
        for answer in plan.fabrics
    )


def page_of(plan: FabricPlan, *, title: str = "Fabric plan", traffic: str = "demand as given") -> PlanPage:
    """Return the page of a plan.

    Parameters
    ----------
    title
        Head of the page.
    traffic
        What the demand comes from, in words.
    """
    region = plan.region
    return PlanPage(
        title=title,
        headline=headline(plan),
        paragraph=paragraph(plan),
        facts={
            "Servers": str(region.num_servers),
            "Ports per server": f"{region.ocs_ports} optical, {region.eps_ports} packet, "
            f"{region.link_gbits:g} Gb/s each",
            "Optical switch": f"{region.switch.name}, {region.switch.ports} ports, "
            f"{_time(region.switch.reconfiguration_s)} to reconfigure",
            "Layers": str(plan.num_layers),
        },
        warnings=plan.notes,
        sections=_sections(plan),
        words=WORDS,
        provenance={
            "Traffic": traffic,
            "Prices": f"{plan.generation} Gb/s, MixNet (arXiv 2501.03905); packet ports of MixNet billed",
        },
    )


def _sections(plan: FabricPlan) -> tuple[Chart | PlanTable, ...]:
    method_columns, methods = method_rows(plan)
    fabric_columns, fabrics = fabric_rows(plan)
    charts: list[Chart | PlanTable] = [
        Chart(
            name="layers",
            title="All-to-all of each layer",
            caption="Time on the plan's circuits, on MixNet's own, and the lower bound.",
            figure=_layers_figure(plan),
        ),
        Chart(
            name="circuits",
            title="Circuits of the layer with the longest all-to-all",
            caption="Number of circuits between each pair of servers; an empty pair uses packet switches.",
            figure=_circuits_figure(plan),
        ),
        *_schedule_chart(plan),
        PlanTable(
            title="Circuits by method",
            caption=f"Summed over {plural(plan.num_layers, 'layer')}; the first two split no pair's bytes.",
            columns=method_columns,
            rows=methods,
            marked=len(methods) - 2,
        ),
        PlanTable(
            title="Fabrics of the same ports per server",
            caption="A step is its compute windows, all-to-alls and exposed changes of circuits.",
            columns=fabric_columns,
            rows=fabrics,
            marked=0,
        ),
    ]
    if plan.placement is not None:
        charts.append(_placement_table(plan))
    return tuple(charts)


def _schedule_chart(plan: FabricPlan) -> list[Chart]:
    """Return the picture of changes; none where circuits are set once, which needs no picture."""
    if not plan.schedule.num_changes:
        return []
    chart = Chart(
        name="schedule",
        title="Which circuits are up",
        caption="At each all-to-all of a step: circuits made for which layer; set once where none.",
        figure=_schedule_figure(plan),
    )
    return [chart]


def _placement_table(plan: FabricPlan) -> PlanTable:
    placed = plan.placement
    assert placed is not None
    rows = [("placement and circuits together", _time(placed.time_s), _time(placed.held_out_s))]
    rows += [
        (f"{name}, circuits afterwards", _time(time_s), _time(placed.separate_held_out_s[name]))
        for name, time_s in placed.separate_s.items()
    ]
    return PlanTable(
        title="Placement",
        caption="All-to-alls and fullest devices of one step, summed over layers.",
        columns=("placement", "fitted windows", "held-out windows"),
        rows=tuple(rows),
        marked=0,
    )


def _layers_figure(plan: FabricPlan) -> go.Figure:
    allocations = plan.allocations
    series = {
        "MixNet's own circuits": ([a.published_s for a in allocations], GREY),
        "the plan": ([a.time_s for a in allocations], BLUE),
        "lower bound": ([a.lower_bound_s for a in allocations], GREEN),
    }
    largest = max((t for times, _ in series.values() for t in times if np.isfinite(t)), default=0.0)
    scale = Scale.of(largest, "s")
    bars = [
        go.Bar(
            name=name,
            x=np.arange(plan.num_layers),
            y=[t / scale.factor if np.isfinite(t) else None for t in times],
            marker={"color": colour},
            hovertemplate=f"layer %{{x}}: {name} %{{y:,.4~g}} {scale.unit}<extra></extra>",
        )
        for name, (times, colour) in series.items()
    ]
    figure = empty_figure(*bars, height=340, barmode="group", legend=legend_above(), margin=_margin())
    figure.update_xaxes(title=axis_title("MoE layer"), showgrid=False, dtick=_tick(plan.num_layers))
    figure.update_yaxes(title=axis_title(f"one all-to-all ({scale.unit})"), rangemode="tozero")
    return figure


def _circuits_figure(plan: FabricPlan) -> go.Figure:
    longest = max(plan.allocations, key=lambda allocation: allocation.time_s)
    heat = go.Heatmap(
        z=longest.circuits_SS,
        colorscale=[[0.0, "rgba(0,0,0,0)"], [1.0, BLUE]],
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": "circuits"}, "dtick": 1},
        hovertemplate="servers %{y} and %{x}: %{z} circuits<extra></extra>",
    )
    figure = empty_figure(heat, height=420)
    figure.update_xaxes(title=axis_title("server"), showgrid=False, dtick=_tick(plan.region.num_servers))
    figure.update_yaxes(
        title=axis_title("server"), showgrid=False, autorange="reversed", dtick=_tick(plan.region.num_servers)
    )
    return figure


def _schedule_figure(plan: FabricPlan) -> go.Figure:
    layer_A = plan.schedule.up_A - 1
    line = go.Scatter(
        x=np.arange(layer_A.size),
        y=layer_A,
        mode="lines+markers",
        line={"shape": "hv", "color": ORANGE},
        hovertemplate="all-to-all %{x}: circuits of layer %{y}<extra></extra>",
    )
    figure = empty_figure(line, height=300)
    figure.update_xaxes(title=axis_title("all-to-all of the step"))
    figure.update_yaxes(
        title=axis_title("circuits of layer (-1: set once)"), dtick=_tick(plan.num_layers), range=[-1.5, None]
    )
    return figure


def _margin() -> dict[str, Any]:
    return {"l": 8, "r": 16, "t": 40, "b": 8}


def _tick(count: int) -> int:
    return max(1, -(-count // 24))


def _time(time_s: float) -> str:
    if not np.isfinite(time_s):
        return "for ever"
    scale = Scale.of(time_s, "s")
    return f"{scale.text(time_s)} {scale.unit}"


def _ratio(value: float, base: float) -> str:
    return number(value / base if base > 0 else None, digits=4)
