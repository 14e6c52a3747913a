"""Showing a figure in a notebook: a light look, a caption beneath, and nothing fetched.

The part of plotly.js that reports embed is embedded here too: once a kernel, with the first figure. So the
same cell shows the same picture in Jupyter, in VS Code and in the HTML that nbconvert writes, offline.
"""

from __future__ import annotations

import json
from html import escape
from uuid import uuid4

import plotly.graph_objects as go
import plotly.io
from IPython.core.getipython import get_ipython
from IPython.display import publish_display_data

from placement.errors import InputError
from placement.report.document import PLOTLY, resource

__all__ = ["TEMPLATE", "Shown", "show"]

TEXT, MUTED, LINE, GRID = "#1b2026", "#5b6570", "#d9dee4", "#e6eaee"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Liberation Sans', Arial, sans-serif"

_AXIS = {
    "automargin": True,
    "ticklabelstandoff": 6,
    "exponentformat": "none",
    "separatethousands": True,
    "gridcolor": GRID,
    "linecolor": LINE,
    "zerolinecolor": LINE,
    "tickcolor": LINE,
    "title": {"standoff": 10, "font": {"size": 13}},
}

TEMPLATE = {
    "layout": {
        "font": {"family": FONT, "size": 13, "color": TEXT},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "hoverlabel": {"bgcolor": "#f5f7f9", "bordercolor": LINE, "font": {"color": TEXT}},
        "separators": ".,",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
}
"""The light look of `charts.js`, written out: a notebook has no style sheet of ours."""

_CONFIG = {"responsive": True, "displaylogo": False, "modeBarButtons": [["toImage"]]}

_WAITING = "This figure needs that of the cell which came first: restart the kernel and run all cells."

# Front ends may insert outputs out of order, so a figure waits for the library.
_SCRIPT = """(function draw() {
  const element = document.getElementById("ID");
  if (!element) return;
  if (!window.Plotly) { setTimeout(draw, 100); return; }
  element.textContent = "";
  const figure = FIGURE;
  window.Plotly.newPlot(element, figure.data, figure.layout, CONFIG);
})();"""


class _Library:
    """Whether this kernel has sent plotly.js already."""

    sent = False


class Shown:
    """A figure that is on display and may be drawn anew in its place, as a solve goes on."""

    def __init__(self) -> None:
        self._display_id = uuid4().hex

    def update(self, figure: go.Figure, *, caption: str | None = None) -> Shown:
        """Draw another figure where this one was; return what is shown."""
        self._publish(figure, caption, update=True)
        return self

    def _ipython_display_(self) -> None:
        """Show nothing more where a cell ends with this."""

    def _publish(self, figure: go.Figure, caption: str | None, *, update: bool) -> None:
        _publish(_html(figure, caption), caption or "figure", display_id=self._display_id, update=update)


def show(figure: go.Figure, *, caption: str | None = None) -> Shown:
    """Display a figure in the notebook, with a sentence (plain text) beneath; the figure stays as it is.

    Raises
    ------
    InputError
        Outside a notebook.
    """
    if get_ipython() is None:
        raise InputError("show() displays in a notebook; elsewhere, figure.write_html(path) makes a page")
    if not _Library.sent:
        _publish(f"<script>{resource(PLOTLY)}</script>", "plotly.js, which draws the figures")
        _Library.sent = True
    shown = Shown()
    shown._publish(figure, caption, update=False)
    return shown


def _publish(html: str, text: str, *, display_id: str | None = None, update: bool = False) -> None:
    transient = {} if display_id is None else {"display_id": display_id}
    bundle = {"text/html": html, "text/plain": text}
    publish_display_data(bundle, transient=transient, update=update)  # type: ignore[no-untyped-call]


def _html(figure: go.Figure, caption: str | None) -> str:
    dressed = go.Figure(figure).update_layout(template=TEMPLATE)
    height = int(dressed.layout.height or 450)
    name = f"figure-{uuid4().hex}"
    # "<" cannot end the script element early.
    data = plotly.io.to_json(dressed, validate=False).replace("<", "\\u003c")
    script = _SCRIPT.replace("ID", name).replace("CONFIG", json.dumps(_CONFIG)).replace("FIGURE", data)
    label = escape(caption or "figure")
    beneath = f'<figcaption style="color:{MUTED};padding:4px 8px 8px">{escape(caption or "")}</figcaption>'
    words = beneath if caption else ""
    return (
        f'<figure style="margin:8px 0 16px;background:#ffffff;color:{TEXT};font:14px/1.5 {FONT}">'
        f'<div id="{name}" style="height:{height}px" role="group" aria-label="{label}">{_WAITING}</div>'
        f"{words}</figure>\n<script>{script}</script>"
    )
