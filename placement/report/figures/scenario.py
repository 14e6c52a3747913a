"""The figures of other clusters: steps of policies on each, savings, and what a fabric takes and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import plotly.graph_objects as go

from placement.errors import InputError
from placement.planning.fabric import FabricPlan
from placement.report.figures.look import (
    BLUE,
    GREY,
    ORANGE,
    axis_title,
    empty_figure,
    legend_above,
)
from placement.report.numbers import Scale, percent
from placement.scenario import ScenarioScore

__all__ = ["fabrics_figure", "scenarios_figure", "times_figure"]

LOOKS = {
    "contiguous": ("experts in order", GREY),
    "eplb": ("EPLB", ORANGE),
    "auto": ("moe-placement", BLUE),
}


def scenarios_figure(scores: Sequence[ScenarioScore], *, question: str) -> go.Figure:
    """Draw the mean held-out step (seconds) of each policy in each scenario, with ours' saving against EPLB.

    Parameters
    ----------
    question
        What the scenarios differ in: the title of their axis.
    """
    if not scores:
        raise InputError("no scenario was scored")
    policies = [p for p in LOOKS if any(p in _policies(score) for score in scores)]
    scale = Scale.of(max(score.step(p) for score in scores for p in _policies(score)), scores[0].step_unit)
    names = [escape(score.name) for score in scores]
    figure = empty_figure(
        *(_bars(policy, scores, scale) for policy in policies),
        height=420,
        barmode="group",
        bargap=0.3,
        bargroupgap=0.08,
        legend=legend_above(),
        margin={"l": 8, "r": 16, "t": 44, "b": 8},
    )
    # Ours is the last bar of each group, and nothing stands above it: its saving does.
    for name, score in zip(names, scores, strict=True):
        figure.add_annotation(
            x=name,
            y=max(score.step(policy) for policy in _policies(score)) / scale.factor,
            text=f"<b>{percent(-score.saving(), signed=True)}</b>",
            showarrow=False,
            yanchor="bottom",
            yshift=4,
            hovertext="ours against EPLB",
        )
    figure.update_xaxes(type="category", title=axis_title(question), showgrid=False)
    figure.update_yaxes(
        title=axis_title(f"step, mean of held-out windows ({scale.unit})"), rangemode="tozero"
    )
    return figure


def _policies(score: ScenarioScore) -> list[str]:
    return [result.name for result in score.comparison.policies]


def _bars(policy: str, scores: Sequence[ScenarioScore], scale: Scale) -> go.Bar:
    label, colour = LOOKS[policy]
    its = [score for score in scores if policy in _policies(score)]
    return go.Bar(
        name=label,
        x=[escape(score.name) for score in its],
        y=[score.step(policy) / scale.factor for score in its],
        marker={"color": colour},
        hovertemplate=f"%{{x}}, {label}: %{{y:,.4~g}} {scale.unit}<extra></extra>",
    )


def times_figure(seconds: Mapping[str, float], *, title: str, marked: str) -> go.Figure:
    """Draw the time (seconds) of each of several ways as a bar, one of them marked.

    Parameters
    ----------
    title
        What is timed, without its unit.
    marked
        The way that is proposed.
    """
    if marked not in seconds:
        raise InputError(f"{marked!r} is not among {list(seconds)}")
    scale = Scale.of(max(seconds.values()), "s")
    figure = empty_figure(
        go.Bar(
            orientation="h",
            y=[escape(name) for name in seconds],
            x=[value / scale.factor for value in seconds.values()],
            text=[f"{scale.text(value)} {scale.unit}" for value in seconds.values()],
            textposition="outside",
            cliponaxis=False,
            marker={"color": [BLUE if name == marked else GREY for name in seconds]},
            hovertemplate=f"%{{y}}: %{{x:,.4~g}} {scale.unit}<extra></extra>",
        ),
        height=90 + 40 * len(seconds),
        bargap=0.35,
        margin={"l": 8, "r": 84, "t": 8, "b": 8},
    )
    figure.update_xaxes(title=axis_title(f"{title} ({scale.unit})"), rangemode="tozero")
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure


def fabrics_figure(plan: FabricPlan) -> go.Figure:
    """Draw the exchanges (seconds) of a plan's fabrics, and what each network costs (thousand dollars)."""
    priced = {
        f"{answer.kind}, {answer.dollars / 1e3:,.0f} k$": answer.all_to_all_s
        for answer in plan.fabrics
        if np.isfinite(answer.all_to_all_s)
    }
    return times_figure(priced, title="exchanges of a step", marked=next(iter(priced)))
