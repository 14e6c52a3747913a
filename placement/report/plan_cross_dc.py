"""The page of a plan between data centres: what travels, what it takes, and how that changes with size.

Shape letters: L MoE layers, C data centres, G devices.
"""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from placement.planning.cross_dc import CrossDcPlan, EvenTimes, RoutedPlan, relation_GG
from placement.planning.cross_dc.level import num_devices
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

__all__ = ["headline", "levels_table", "page_of", "paragraph", "policies_table"]

MOST_PAIRS = 64
"""Members up to which the page shows every pair; inner levels are left out where there are more."""

NOTHING = 1e-9
"""Relative gain that counts as none."""


def headline(plan: CrossDcPlan) -> str:
    """Return the answer in a sentence."""
    routed = plan.routed
    if routed is None:
        sizes = ", ".join(
            f"{size} of {level.size} at level {level.name}"
            for level, size in zip(plan.load.levels, plan.best.sizes, strict=True)
        )
        if plan.even_speed_up <= 1 + NOTHING:
            return "Under even routing let tokens travel: no domains that fit beat plain expert parallelism."
        return (
            f"Under even routing gather experts in domains of {sizes}: "
            f"{number(plan.even_speed_up, digits=3)} times as fast as plain expert parallelism."
        )
    plain, uniform, chosen = routed.policies[0], routed.policies[1], routed.chosen
    copies = int(chosen.decision.copy_LCE.sum())
    saved = 1 - chosen.fitted_s / uniform.fitted_s if uniform.fitted_s else 0.0
    gain = plain.fitted_s / chosen.fitted_s if chosen.fitted_s else 1.0
    return (
        f"Prefetch {plural(copies, 'expert copy') if copies == 1 else f'{copies:,} expert copies'} per step: "
        f"{number(gain, digits=3)} times as fast as plain expert parallelism, and {percent(saved)} less time "
        f"than the best uniform domains."
    )


def paragraph(plan: CrossDcPlan) -> str:
    """Return what stands behind the answer."""
    even = (
        f"An expert is cheaper to fetch than to visit from {number(plan.break_even_tokens)} tokens on; a "
        "prefetch that the computation before the experts hides pays earlier."
    )
    if plan.routed is None:
        return f"{even} Domain sizes are exact: every combination of divisors was compared.{_memory(plan)}"
    solution, chosen = plan.routed.solution, plan.routed.chosen
    judged = "" if chosen.held_out_s is None else _judged(plan.routed)
    return (
        f"{even} Between data centres a step takes {number(1e3 * solution.step_s)} ms; no decision with "
        f"these homes takes less than {number(1e3 * solution.lower_bound_s)} ms "
        f"(gap {percent(solution.gap)}).{judged}"
    )


def _memory(plan: CrossDcPlan) -> str:
    if plan.unlimited.step_s >= plan.best.step_s:
        return ""
    sizes = " x ".join(map(str, plan.unlimited.sizes))
    return (
        f" Memory is short: with {number(plan.unlimited_bytes / 2**30)} GiB on each device for gathered "
        f"experts, domains of {sizes} would take {number(1e3 * plan.unlimited.step_s)} instead of "
        f"{number(1e3 * plan.best.step_s)} ms."
    )


def _judged(routed: RoutedPlan) -> str:
    plain, uniform, chosen = (routed.policies[index].held_out_s for index in (0, 1, -1))
    if plain is None or uniform is None or not chosen:
        return ""
    return (
        f" On {plural(routed.windows, 'window')} that no policy has seen it is "
        f"{number(plain / chosen, digits=3)} times as fast as plain expert parallelism and "
        f"{number(uniform / chosen, digits=3)} times as fast as the best uniform domains."
    )


def levels_table(plan: CrossDcPlan) -> PlanTable:
    """Return the table of levels under even routing."""
    best = plan.best
    rows = tuple(
        (
            level.name,
            str(level.size),
            number(level.bandwidth * 8 / 1e9),
            str(size),
            number(1e3 * gather_s),
            number(1e3 * exchange_s),
            f"{count.gather:,}",
            f"{count.exchange:,}",
        )
        for level, size, gather_s, exchange_s, count in zip(
            plan.load.levels, best.sizes, best.gather_s, best.exchange_s, plan.messages, strict=True
        )
    )
    return PlanTable(
        title="Domains under even routing",
        caption=(
            f"One layer takes {number(1e3 * best.step_s)} ms, with plain expert parallelism "
            f"{number(1e3 * plan.plain.step_s)} ms. Inside a domain experts are gathered, between domains "
            "tokens travel. Messages are those of one gather and of one exchange."
        ),
        columns=(
            "level", "members", "Gb/s per GPU", "domain", "gather, ms", "exchange, ms", "gather messages",
            "exchange messages",
        ),
        rows=rows,
    )  # fmt: skip


def policies_table(routed: RoutedPlan) -> PlanTable:
    """Return the table of policies under real routing."""

    def cell(value: float | None) -> str:
        return NO_VALUE if value is None else number(1e3 * value)

    plain = routed.policies[0]
    rows = tuple(
        (
            policy.name,
            cell(policy.fitted_s),
            cell(policy.held_out_s),
            NO_VALUE
            if not policy.held_out_s or plain.held_out_s is None
            else f"{number(plain.held_out_s / policy.held_out_s, digits=3)} times",
            cell(policy.distinct_s),
            f"{int(policy.decision.copy_LCE.sum()):,}",
        )
        for policy in routed.policies
    )
    return PlanTable(
        title="Real routing between data centres",
        caption=(
            "Time of all layers between data centres; traffic inside them is left out. The held-out column "
            "is the mean of windows that no policy has seen. The next to last column counts a token once per "
            "data centre that it visits, on a sample of the trace; nothing was chosen for it."
        ),
        columns=("policy", "fitted, ms", "held out, ms", "held-out gain", "tokens once, ms", "copies"),
        rows=rows,
        marked=len(rows) - 1,
    )


def page_of(plan: CrossDcPlan) -> PlanPage:
    """Return the page of a plan."""
    load = plan.load
    names = ", ".join(f"{level.size} of {level.name}" for level in load.levels)
    sections: list[Chart | PlanTable] = []
    if plan.routed is not None:
        sections += [policies_table(plan.routed), _copies_chart(plan, plan.routed)]
    sections += [levels_table(plan), *_curve_charts(plan)]
    if load.levels[0].size <= MOST_PAIRS:
        sections.append(_pairs_chart(plan))
    sections.append(_scale_chart(plan))
    return PlanPage(
        title="Experts or tokens between data centres",
        headline=headline(plan),
        paragraph=paragraph(plan),
        good=plan.even_speed_up > 1 + NOTHING or plan.routed is not None,
        facts={
            "Network": names,
            "Slowest link": f"{number(load.levels[0].bandwidth * 8 / 1e9)} Gb/s per GPU",
            "Compression of experts": "none" if load.compression == 1 else f"{load.compression:g}-fold",
            "Pass": "forward and backward" if load.training else "forward",
        },
        sections=tuple(sections),
        words={
            "Gather": "Devices of one domain fetch each other's experts ahead of time.",
            "Exchange": "Tokens travel to their experts and back, once in each direction.",
            "Uniform domains": "Every data centre gathers with equally many neighbours in every layer.",
            "Program": "Each data centre decides for each expert of each layer whether to prefetch it.",
            "Lower bound": "No decision with these homes takes less time.",
        },
        provenance={
            "Model of uniform domains": "HybridEP, arXiv 2510.19470",
            "Counting": "token-expert pairs; each link full duplex, its slower side counts",
        },
    )


def _curve_charts(plan: CrossDcPlan) -> list[Chart]:
    return [
        Chart(
            name=f"sizes-{index}",
            title=f"Domain size at level {level.name}",
            caption=(
                "What one layer takes against the domain's size at this level, other levels at their best, "
                "memory aside. The least is marked."
            ),
            figure=_curve_figure(plan, curve, index),
        )
        for index, (level, curve) in enumerate(zip(plan.load.levels, plan.curves, strict=True))
        if level.size > 1
    ]


def _curve_figure(plan: CrossDcPlan, curve: tuple[EvenTimes, ...], level: int) -> go.Figure:
    scale = Scale.of(max(times.step_s for times in curve), "s")
    sizes = [str(times.sizes[level]) for times in curve]
    exchange = [times.step_s - times.exposed_gather_s - _pre_s(plan) for times in curve]
    parts: dict[str, tuple[str, list[float]]] = {
        "before the experts": (GREY, [_pre_s(plan)] * len(curve)),
        "gather that shows": (ORANGE, [times.exposed_gather_s for times in curve]),
        "tokens": (BLUE, exchange),
    }
    bars = [
        go.Bar(
            name=name,
            x=sizes,
            y=np.array(values) / scale.factor,
            marker={"color": colour},
            hovertemplate=f"domains of %{{x}}: {name} %{{y:,.4~g}} {scale.unit}<extra></extra>",
        )
        for name, (colour, values) in parts.items()
    ]
    figure = empty_figure(
        *bars, height=340, barmode="stack", legend=legend_above(), margin={"l": 8, "r": 16, "t": 40, "b": 8}
    )
    best = min(range(len(curve)), key=lambda index: curve[index].step_s)
    # Bars are placed by their index; a size would be read as one.
    figure.add_annotation(
        x=best, y=curve[best].step_s / scale.factor, text="<b>least</b>", showarrow=False, yshift=10
    )
    members = escape(plan.load.levels[level].name)
    figure.update_xaxes(title=axis_title(f"members of a domain ({members})"), type="category", showgrid=False)
    figure.update_yaxes(title=axis_title(f"one layer ({scale.unit})"), rangemode="tozero")
    return figure


def _pre_s(plan: CrossDcPlan) -> float:
    from placement.planning.cross_dc.even import pass_weights

    return plan.load.pre_expert_s * sum(pass_weights(plan.load.training))


def _heat(values: Any, **entries: Any) -> go.Heatmap:
    return go.Heatmap(z=values, xgap=1, ygap=1, **entries)


def _pairs_chart(plan: CrossDcPlan) -> Chart:
    levels = plan.load.levels
    shown = max(depth for depth in range(1, len(levels) + 1) if num_devices(levels[:depth]) <= MOST_PAIRS)
    relation = relation_GG(levels[:shown], plan.best.sizes[:shown])
    devices, member = relation.shape[0], levels[shown - 1].name
    words = np.array(["nothing", "gather experts", "exchange tokens"])
    # Three equal steps of one scale: nothing, gather, exchange.
    third = 1 / 3
    colours = ("rgba(138,143,152,0.15)", ORANGE, BLUE)
    steps = [[(index + end) * third, colour] for index, colour in enumerate(colours) for end in (0, 1)]
    heat = _heat(
        relation,
        customdata=words[relation],
        colorscale=steps,
        zmin=-0.5,
        zmax=2.5,
        colorbar={"tickvals": [0, 1, 2], "ticktext": ["nothing", "gather", "exchange"]},
        hovertemplate=f"{hover_name(member)} %{{y}} with %{{x}}: %{{customdata}}<extra></extra>",
    )
    figure = empty_figure(heat, height=min(620, 220 + 8 * devices))
    figure.update_xaxes(title=axis_title(member), showgrid=False)
    figure.update_yaxes(title=axis_title(member), autorange="reversed", showgrid=False)
    return Chart(
        name="pairs",
        title="Who gathers with whom",
        caption=(
            f"Every pair of level {member} under the best domains. A pair with nothing to do "
            "reaches each other level by level."
        ),
        figure=figure,
    )


def _copies_chart(plan: CrossDcPlan, routed: RoutedPlan) -> Chart:
    share_LC = routed.copied_share_LC
    names = [escape(name) for name in plan.centre_names]
    heat = _heat(
        100 * share_LC.T,
        x=[str(layer) for layer in range(share_LC.shape[0])],
        y=names,
        colorscale=[[0, "rgba(31,131,196,0.06)"], [1, BLUE]],
        zmin=0,
        zmax=100,
        colorbar={"title": {"text": "%"}},
        hovertemplate="%{y}, layer %{x}: %{z:.1f} % of remote experts<extra></extra>",
    )
    figure = empty_figure(heat, height=min(900, 160 + 26 * len(names)))
    figure.update_xaxes(title=axis_title("MoE layer"), type="category", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return Chart(
        name="copies",
        title="Share of remote experts that are prefetched",
        caption="By data centre and layer; all other remote experts are visited by tokens.",
        figure=figure,
    )


def _scale_chart(plan: CrossDcPlan) -> Chart:
    size = plan.best.sizes[0]
    centres = [point.centres for point in plan.scale]
    fixed = [point for point in plan.scale if point.fixed_size is not None]
    lines = (
        ("best size within memory", BLUE, "solid", centres, [point.best for point in plan.scale]),
        (f"domains of {size}", ORANGE, "dash", [p.centres for p in fixed], [p.fixed_size for p in fixed]),
        ("share of tokens kept, forward", GREEN, "dot", centres, [point.fixed_share for point in plan.scale]),
    )
    traces = [
        go.Scatter(
            name=name,
            x=x,
            y=y,
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2},
            hovertemplate=f"{hover_name(name)}: %{{y:.3~g}} times with %{{x}} data centres<extra></extra>",
        )
        for name, colour, dash, x, y in lines
    ]
    figure = empty_figure(
        *traces, height=360, legend=legend_above(), margin={"l": 8, "r": 16, "t": 56, "b": 8}
    )
    figure.update_xaxes(title=axis_title("data centres"), type="log", dtick=1)
    figure.update_yaxes(title=axis_title("times as fast as plain expert parallelism"), rangemode="tozero")
    return Chart(
        name="scale",
        title="Gain as data centres are added",
        caption=(
            "Outermost level alone, even routing; bytes per device stay as they are while data "
            "centres are added."
        ),
        figure=figure,
    )
