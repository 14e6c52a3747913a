"""The report of a plan for a mixed cluster: the schedule, how busy either side is, what it was compared with.

Shape letters: L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from placement.report.document import Chart
from placement.report.figures.look import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    axis_title,
    empty_figure,
    hover_name,
    legend_above,
)
from placement.report.numbers import NO_VALUE, Scale, number, percent, plural
from placement.report.plan_page import PlanPage, PlanTable

if TYPE_CHECKING:
    from placement.planning.hetero import Event, HeteroPlan

__all__ = ["contender_rows", "headline", "page_of", "paragraph"]

# Told apart with any colour vision, after Okabe and Ito; further micro-batches begin again.
MICRO_BATCHES = (BLUE, ORANGE, GREEN, "#cc79a7", "#56b4e9", "#d55e00", GREY)

LANES = {
    "attention": "attention devices",
    "dispatch": "dispatch",
    "experts": "expert devices",
    "combine": "combine",
}

MOST_BARS = 600
"""Tasks in the picture of the schedule; of a longer one the first and the last halves are shown."""


def headline(plan: HeteroPlan) -> str:
    """Return the answer in a sentence."""
    ideal, apart = plan.speed_up("EP(Ideal)"), plan.speed_up("EP")
    return (
        f"{plan.group.text()}, {plural(plan.answer.times.num_micro_batches, 'micro-batch')}: "
        f"{number(apart, digits=3)} times as fast as EP, {number(ideal, digits=3)} times EP(Ideal)."
    )


def paragraph(plan: HeteroPlan) -> str:
    """Return what stands behind the answer."""
    scale = Scale.of(plan.answer.makespan_s, "s")
    answer = plan.answer
    published = plan.speed_up("Algorithm 1")
    against = (
        f"HeterMoE's Algorithm 1 is undefined or out of memory here ({plan.asymmetric.reason or 'all roles'})"
        if published is None
        else f"{number(published)} times as fast as HeterMoE's Algorithm 1 on its best roles"
    )
    held_out = "" if plan.held_out_s is None else (
        f" Under loads that the plan has not seen a step takes {scale.text(plan.held_out_s)} {scale.unit}."
    )  # fmt: skip
    return (
        f"A step takes {scale.text(answer.makespan_s)} {scale.unit} ({number(plan.tokens_per_s)} tokens/s), "
        f"{percent(answer.makespan_s / answer.lower_bound_s - 1)} above what no assignment on these roles "
        f"beats ({scale.text(answer.lower_bound_s)} {scale.unit}); {against}. Attention devices work "
        f"{percent(plan.schedule.utilisation('attention'))} of the step, expert devices "
        f"{percent(plan.schedule.utilisation('experts'))}. {plan.num_candidates} combinations of roles and "
        f"micro-batches were considered, {plan.num_searched} of them searched.{held_out}"
    )


def contender_rows(plan: HeteroPlan) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return columns and rows of the comparison."""
    scale = Scale.of(plan.answer.makespan_s, "s")
    columns = (
        "policy", f"step ({scale.unit})", "plan's speed-up", "attention side", "expert side", "how",
    )  # fmt: skip
    rows = tuple(
        (
            its.name,
            scale.text(its.step_s),
            NO_VALUE if its.step_s is None else f"{its.step_s / plan.answer.makespan_s:.3f}",
            percent(its.attention_use),
            percent(its.expert_use),
            its.note,
        )
        for its in plan.contenders
    )
    return columns, rows


def page_of(plan: HeteroPlan) -> PlanPage:
    """Return the page of a plan."""
    columns, rows = contender_rows(plan)
    classes = ", ".join(f"{its.count} {its.name}" for its in plan.classes)
    return PlanPage(
        title="Plan for a mixed cluster",
        headline=headline(plan),
        paragraph=paragraph(plan),
        facts={
            "devices": classes,
            "model": f"{plan.job.num_layers} MoE layers of {plan.job.num_experts} experts",
            "tokens per step": number(plan.job.tokens_per_step, digits=6),
            "pass": "forward and backward" if plan.job.backward else "forward",
        },
        warnings=plan.warnings,
        sections=(
            _gantt(plan),
            _utilisation(plan),
            _makespans(plan),
            _offloads(plan),
            PlanTable(
                title="Ways to use the cluster",
                caption="Steps of the same tokens on all devices; utilisation is of compute alone.",
                columns=columns,
                rows=rows,
                marked=0,
            ),
            _classes(plan),
        ),
        words=_WORDS,
        provenance={
            "method": "HeterMoE (arXiv 2504.03871): zebra schedule, Asym-EA; assignment by search and MILP",
            "lower bound": f"{plan.answer.lower_bound_s:.6g} s of {plan.answer.makespan_s:.6g} s",
            "found by": plan.answer.source,
        },
    )


_WORDS = {
    "micro-batch": "A part of a group's tokens; while one is at its experts another is in attention.",
    "dispatch, combine": "Exchanges that carry tokens to their experts and back.",
    "own experts": "Experts that attention devices hold, so that neither side waits for the other.",
    "EP": "Every device computes attention and experts, in equal shares; the slowest decides.",
    "EP(Ideal)": "The same with perfect shares by speed in each phase, which no system reaches.",
    "DistEP": "Attention and experts on devices of their own, one after the other.",
    "Algorithm 1": "HeterMoE's assignment in whole chunks; the number of one side must divide the other's.",
}


def _shown(plan: HeteroPlan) -> tuple[Sequence[Event], int]:
    events = sorted(plan.schedule.events, key=lambda event: (event.start_s, event.stream))
    left_out = max(0, len(events) - MOST_BARS)
    if left_out:
        events = [*events[: MOST_BARS // 2], *events[-(MOST_BARS // 2) :]]
    return events, left_out


def _gantt(plan: HeteroPlan) -> Chart:
    events, left_out = _shown(plan)
    scale = Scale.of(plan.answer.makespan_s, "s")
    figure = empty_figure(
        height=330, barmode="overlay", bargap=0.25, legend=legend_above(),
        margin={"l": 8, "r": 16, "t": 48, "b": 8},
    )  # fmt: skip
    for place in range(min(plan.schedule.num_micro_batches, len(MICRO_BATCHES))):
        mine = [event for event in events if event.micro_batch % len(MICRO_BATCHES) == place]
        figure.add_trace(
            go.Bar(
                name=f"micro-batch {place}",
                orientation="h",
                y=[LANES[event.stream] for event in mine],
                base=[event.start_s / scale.factor for event in mine],
                x=[(event.end_s - event.start_s) / scale.factor for event in mine],
                text=[_bar_text(event) for event in mine],
                textposition="inside",
                insidetextanchor="middle",
                customdata=[_hover(event) for event in mine],
                # A pattern would make a printed page of megabytes.
                width=[0.4 if event.task == "own experts" else 0.75 for event in mine],
                marker={"color": MICRO_BATCHES[place], "line": {"width": 0.5, "color": "#ffffff"}},
                hovertemplate=f"%{{customdata}}: %{{base:,.4~g}} {scale.unit} on<extra></extra>",
            )
        )
    figure.update_yaxes(categoryorder="array", categoryarray=list(LANES.values())[::-1], showgrid=False)
    figure.update_xaxes(title=axis_title(f"time of the step ({scale.unit})"))
    again = plan.schedule.num_micro_batches > len(MICRO_BATCHES)
    caption = (
        "One lane for each stream of one group; the number is the layer (one past the last: the head), "
        "half as high are experts on attention devices."
        + (" Colours begin again after seven micro-batches." if again else "")
    )
    if left_out:
        caption += f" The first and the last {MOST_BARS // 2} tasks; {left_out:,} between them are left out."
    return Chart(name="gantt", title="A step, task by task", caption=caption, figure=figure)


def _bar_text(event: Event) -> str:
    return f"{event.layer}" if event.stream in ("attention", "experts") else ""


def _hover(event: Event) -> str:
    return f"{event.task}, layer {event.layer} {event.direction}, micro-batch {event.micro_batch}"


def _utilisation(plan: HeteroPlan) -> Chart:
    known = [its for its in plan.contenders if its.attention_use is not None]
    parts = {"attention devices": "attention_use", "expert devices": "expert_use"}
    figure = empty_figure(
        *(
            go.Bar(
                name=name,
                orientation="h",
                y=[escape(its.name) for its in known],
                x=[100 * getattr(its, key) for its in known],
                marker={"color": colour},
                hovertemplate=f"%{{y}}: {name} %{{x:.1f}} %<extra></extra>",
            )
            for (name, key), colour in zip(parts.items(), (BLUE, ORANGE), strict=True)
        ),
        height=120 + 56 * len(known),
        barmode="group",
        legend=legend_above(),
        margin={"l": 8, "r": 16, "t": 40, "b": 8},
    )
    figure.update_xaxes(title=axis_title("share of the step in which devices compute (%)"), range=[0, 100])
    figure.update_yaxes(autorange="reversed", showgrid=False)
    caption = "Compute of the sides of a group; what is left is waiting."
    return Chart(name="utilisation", title="How busy either side is", caption=caption, figure=figure)


def _makespans(plan: HeteroPlan) -> Chart:
    known = [its for its in plan.contenders if its.step_s is not None]
    scale = Scale.of(max(its.step_s or 0.0 for its in known), "s")
    seconds = [(its.step_s or 0.0) / scale.factor for its in known]
    figure = empty_figure(
        go.Bar(
            orientation="h",
            y=[escape(its.name) for its in known],
            x=seconds,
            text=[number(value) for value in seconds],
            textposition="outside",
            cliponaxis=False,
            marker={"color": [BLUE, *[GREY] * (len(known) - 1)]},
            hovertemplate=f"%{{y}}: %{{x:,.4~g}} {scale.unit}<extra></extra>",
        ),
        height=110 + 40 * len(known),
        showlegend=False,
        margin={"l": 8, "r": 72, "t": 16, "b": 8},
    )
    bound = plan.answer.lower_bound_s / scale.factor
    figure.add_vline(x=bound, line={"color": ORANGE, "dash": "dash", "width": 2})
    figure.update_xaxes(title=axis_title(f"time of a step ({scale.unit})"), rangemode="tozero")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    caption = "The dashed line is what no assignment of experts on the plan's roles beats."
    return Chart(name="makespan", title="A step under every policy", caption=caption, figure=figure)


def _offloads(plan: HeteroPlan) -> Chart:
    layers = list(range(plan.job.num_layers))
    traces = [
        go.Bar(
            name="plan",
            x=layers,
            y=list(plan.answer.own_count_L),
            marker={"color": BLUE},
            hovertemplate="layer %{x}: %{y} experts<extra></extra>",
        )
    ]
    offload_L, caption = plan.asymmetric.offload_L, "Experts on attention devices in each layer of one group."
    if offload_L is None:
        caption += f" Algorithm 1 is undefined on these roles: {plan.asymmetric.reason}."
    else:
        traces.append(
            go.Bar(
                name="Algorithm 1 on the same roles",
                x=layers,
                y=[count * plan.group.num_expert_devices for count in offload_L],
                marker={"color": ORANGE},
                hovertemplate=f"layer %{{x}}: {hover_name('Algorithm 1')} %{{y}} experts<extra></extra>",
            )
        )
    figure = empty_figure(
        *traces, height=320, barmode="group", showlegend=True, legend=legend_above(),
        margin={"l": 8, "r": 16, "t": 40, "b": 8},
    )  # fmt: skip
    figure.update_xaxes(title=axis_title("MoE layer"), showgrid=False)
    figure.update_yaxes(title=axis_title("experts on attention devices"), rangemode="tozero")
    return Chart(name="offload", title="Experts that attention devices take", caption=caption, figure=figure)


def _classes(plan: HeteroPlan) -> PlanTable:
    rows = tuple(
        (
            its.name,
            f"{its.count}",
            f"{its.memory_bytes / 2**30:.1f}",
            number(its.attention_s * 1e6),
            number(its.expert_s * 1e6),
            f"{a * plan.group.num_groups}",
            f"{e * plan.group.num_groups}",
        )
        for its, a, e in zip(plan.classes, plan.group.attention, plan.group.experts, strict=True)
    )
    return PlanTable(
        title="Devices",
        caption="Times are one device's, forward, for one token and one layer.",
        columns=(
            "class", "devices", "memory (GiB)", "attention (µs/token)", "experts (µs/token)",
            "attend", "hold experts only",
        ),
        rows=rows,
    )  # fmt: skip
