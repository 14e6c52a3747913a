"""What all figures share: colours that anybody can tell apart, an empty theme, escaped texts.

Fonts, grid and the colours of text come from the page's style sheet, so that they follow the reader's
light or dark theme.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

import plotly.graph_objects as go

from placement.comparison import PolicyResult

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "axis_title",
    "diverging",
    "empty_figure",
    "faint",
    "hover_name",
    "legend_above",
    "names_of",
    "number_ticks",
]

# After Okabe and Ito: told apart with any colour vision; the blue is lighter, to stand on dark ground too.
BLUE, ORANGE, GREEN, GREY = "#1f83c4", "#e69f00", "#009e73", "#8a8f98"

BELOW, EVEN, ABOVE = ("#2166ac", "#67a9cf"), "#f7f7f7", ("#ef8a62", "#b2182b")


def empty_figure(*traces: Any, height: int, **layout: Any) -> go.Figure:
    """Return a figure of some traces without plotly's own theme, which would add kilobytes to each."""
    margin = {"l": 8, "r": 16, "t": 8, "b": 8}
    base = {"template": {}, "height": height, "margin": margin}
    return go.Figure(data=list(traces), layout=go.Layout({**base, **layout}))


def diverging(middle: float) -> list[tuple[float, str]]:
    """Return a colour scale that is blue below, white in the middle (a share of the scale) and red above."""
    return [
        (0.0, BELOW[0]),
        (middle / 2, BELOW[1]),
        (middle, EVEN),
        (middle + (1 - middle) / 2, ABOVE[0]),
        (1.0, ABOVE[1]),
    ]


def legend_above() -> dict[str, Any]:
    """Return the layout of a legend in a line above the plot."""
    place = {"x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    return {"orientation": "h", "traceorder": "normal", **place}


def faint(colour: str) -> str:
    """Return a colour that steps back behind its full self, on light and on dark ground."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.45)"


def names_of(results: Iterable[PolicyResult]) -> list[str]:
    """Return the policies' names for a figure: plotly reads a subset of HTML in its texts."""
    return [escape(result.name) for result in results]


def hover_name(name: str) -> str:
    """Escape a name for a hover template, where ``%{`` also begins a placeholder."""
    return escape(name).replace("%", "&#37;")


def axis_title(text: str) -> dict[str, str]:
    """Return the title of an axis."""
    return {"text": escape(text, quote=False)}


def number_ticks(count: int) -> dict[str, Any]:
    """Return the ticks of an axis of numbers from 0 on, 31 at most, at round distances."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 10**6) if count / s <= 31)
    return {"tick0": 0, "dtick": step}
