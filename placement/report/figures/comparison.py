"""The figures of costs: what a step is made of, how the solve went, how windows differ.

Shape letters: W windows, L layers, P policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from placement.cost import CostBreakdown
from placement.report.figures.look import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    axis_title,
    empty_figure,
    faint,
    hover_name,
    legend_above,
    names_of,
    number_ticks,
)
from placement.report.figures.solve import incumbents_figure
from placement.report.numbers import Scale
from placement.report.story import Story

__all__ = ["gap_figure", "layers_figure", "phases_figure", "windows_figure"]

FloatArray = npt.NDArray[np.float64]

PHASES = {"experts": BLUE, "dispatch": ORANGE, "combine": GREEN}

MAX_POINTS = 250
"""Values per policy in the figure of windows; more are thinned to as many quantiles."""


def _phase_means_L(breakdown: CostBreakdown) -> dict[str, FloatArray]:
    return {phase: getattr(breakdown, f"{phase}_WL").mean(axis=0) for phase in PHASES}


def _phases_present(parts: Sequence[dict[str, FloatArray]]) -> list[str]:
    """Return the phases that cost anything; a linear calibration, for one, has no combine."""
    return [phase for phase in PHASES if any(part[phase].any() for part in parts)]


def phases_figure(story: Story) -> go.Figure:
    """Draw the parts of a mean held-out step, one bar per policy, with its total at the end."""
    policies, scale = story.comparison.policies, story.step_scale
    parts = [_phase_means_L(result.held_out) for result in policies]
    traces = [
        go.Bar(
            name=phase,
            orientation="h",
            y=names_of(policies),
            x=np.array([float(part[phase].sum()) for part in parts]) / scale.factor,
            marker={"color": PHASES[phase]},
            hovertemplate=f"%{{y}}: {phase} %{{x:,.4~g}} {scale.unit}<extra></extra>",
        )
        for phase in _phases_present(parts)
    ]
    figure = empty_figure(
        *traces,
        height=110 + 42 * len(policies),
        barmode="stack",
        bargap=0.35,
        showlegend=True,
        legend=legend_above(),
        margin={"l": 8, "r": 72, "t": 40, "b": 8},
    )
    figure.update_xaxes(title=axis_title(f"{story.step_label}, mean of {story.windows} ({scale.unit})"))
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    for result, name in zip(policies, names_of(policies), strict=True):
        figure.add_annotation(
            x=result.held_out.step / scale.factor,
            y=name,
            text=f"<b>{scale.text(result.held_out.step)}</b>",
            showarrow=False,
            xanchor="left",
            xshift=6,
        )
    return figure


def layers_figure(story: Story) -> go.Figure:
    """Draw the parts of each layer's time: replaced policy left and faint, proposed right."""
    policies = story.contrast
    means = [_phase_means_L(result.held_out) for result in policies]
    total_PL = np.array([np.sum(list(parts.values()), axis=0) for parts in means])
    scale = Scale.of(float(total_PL.max()), story.proposed.held_out.step_unit)
    width = 0.8 / len(policies)
    figure = empty_figure(
        height=380,
        barmode="stack",
        legend=legend_above(),
        margin={"l": 8, "r": 16, "t": 40, "b": 8},
    )
    for place, (result, parts) in enumerate(zip(policies, means, strict=True)):
        shift = (place - (len(policies) - 1) / 2) * width
        for phase in _phases_present(means):
            colour = PHASES[phase] if result is story.proposed else faint(PHASES[phase])
            figure.add_trace(
                go.Bar(
                    name=f"{phase}, {escape(result.name)}",
                    x=np.arange(parts[phase].size) + shift,
                    y=parts[phase] / scale.factor,
                    customdata=np.arange(parts[phase].size),
                    width=0.92 * width,
                    marker={"color": colour},
                    hovertemplate=(
                        f"layer %{{customdata}}, {hover_name(result.name)}: {phase} "
                        f"%{{y:,.4~g}} {scale.unit}<extra></extra>"
                    ),
                )
            )
    figure.update_xaxes(title=axis_title("MoE layer"), showgrid=False, **_layer_ticks(total_PL.shape[1]))
    figure.update_yaxes(title=axis_title(f"mean of {story.windows} ({scale.unit})"), rangemode="tozero")
    return figure


def _layer_ticks(num_layers: int) -> dict[str, Any]:
    return {**number_ticks(num_layers), "range": [-0.6, num_layers - 0.4]}


def gap_figure(story: Story) -> go.Figure:
    """Draw the proposed policy's best objective and lower bound against the solve's seconds."""
    solution = story.proposed.solution
    incumbents = solution.incumbents
    # The proof may end after the last improvement.
    bounds = [*(incumbent.lower_bound for incumbent in incumbents[:-1]), solution.lower_bound]
    return incumbents_figure(
        elapsed_s=[incumbent.elapsed_s for incumbent in incumbents],
        objective=[incumbent.objective for incumbent in incumbents],
        lower_bound=bounds,
        solver=[incumbent.solver for incumbent in incumbents],
        label=f"{story.objective_label}, fitted",
        scale=story.objective_scale,
    )


def windows_figure(story: Story) -> go.Figure:
    """Draw how held-out windows differ: a box and the windows themselves for every policy."""
    policies = story.comparison.policies
    values = [story.window_values_W(result.held_out) for result in policies]
    largest = max(float(value_W.mean()) for value_W in values)
    scale = Scale.of(largest, story.proposed.held_out.step_unit if story.measures_step else "max / mean")
    traces = [
        go.Box(
            name=name,
            x=_thinned(value_W) / scale.factor,
            orientation="h",
            boxpoints="all" if value_W.size <= 200 else False,
            jitter=0.5,
            pointpos=0,
            whiskerwidth=0.4,
            marker={"size": 4, "opacity": 0.55},
            line={"width": 1.5, "color": BLUE if result is story.proposed else GREY},
            hovertemplate=f"%{{y}}: %{{x:,.4~g}} {scale.unit}<extra></extra>",
            showlegend=False,
        )
        for result, name, value_W in zip(policies, names_of(policies), values, strict=True)
    ]
    figure = empty_figure(*traces, height=100 + 52 * len(policies))
    label = (
        f"{story.step_label} of a {story.window}" if story.measures_step else f"balance of a {story.window}"
    )
    figure.update_xaxes(title=axis_title(f"{label} ({scale.unit})"))
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure


def _thinned(value_W: FloatArray) -> FloatArray:
    if value_W.size <= MAX_POINTS:
        return value_W
    return np.asarray(np.quantile(value_W, np.linspace(0.0, 1.0, MAX_POINTS)))
