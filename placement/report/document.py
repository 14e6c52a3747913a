"""One self-contained HTML file: nothing is fetched, only these very scripts run.

Plotly's JavaScript (the part for two axes) is embedded once and every figure's data as JSON. A content
security policy lets only these very scripts run and forbids every request, so a name in the data can do no
harm even if an escape were missed.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import plotly.io

from placement.report.chart_numbers import ChartNumbers, numbers_of

__all__ = ["PLOTLY", "Chart", "document", "omitted", "resource"]

PLOTLY = "vendor/plotly-cartesian.min.js"
"""The part of plotly.js that draws on two axes, as npm's plotly.js-cartesian-dist-min brings it: a third of
the whole. Its version is that of the whole one in the Python package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A figure and its words.

    Parameters
    ----------
    name
        Identifier in the page.
    title, caption
        Its heading, and what it shows.
    figure
        A plotly figure.
    controls
        HTML above the figure.
    numbers
        The numbers behind it; by default those of the figure, where a table can hold them.
    choices
        JSON of what the controls put into the figure; read by `page.js`.
    """

    name: str
    title: str
    caption: str
    figure: Any
    controls: str = ""
    numbers: ChartNumbers | None = None
    choices: str = ""

    def html(self) -> str:
        """Return the section: heading, figure, caption, and the figure's data."""
        # "<" cannot end the script element early; plotly escapes it too, but that is not its contract.
        data = plotly.io.to_json(self.figure, validate=False)
        if self.choices:
            data = f'{data[:-1]},"choices":{self.choices}}}'
        data = data.replace("<", "\\u003c")
        said = escape(f"{self.title}: {self.caption}")
        height = int(self.figure.layout.height)
        return (
            f"<section><h2>{escape(self.title)}</h2>{self.controls}\n"
            f'<figure><div class="chart" id="{self.name}" style="height:{height}px" role="img" '
            f'aria-label="{said}"></div>'
            f"<figcaption>{escape(self.caption)}</figcaption></figure>\n"
            f'<div class="tools">{self._numbers()}'
            f'<button type="button" data-save="{self.name}" hidden>Save picture'
            f'<span class="aside"> of {escape(self.title)}</span></button></div>\n'
            f'<script type="application/json" id="{self.name}-data">{data}</script></section>'
        )

    def _numbers(self) -> str:
        numbers = numbers_of(self.figure) if self.numbers is None else self.numbers
        if numbers is None:
            return ""
        label = f"Numbers of {self.title}"
        return (
            f'<details><summary>Numbers<span class="aside"> of {escape(self.title)}</span></summary>'
            f"{numbers.html(label)}</details>"
        )


def omitted(title: str, reason: str) -> str:
    """Return the section of a figure that cannot be drawn, with the reason."""
    return f'<section><h2>{escape(title)}</h2><p class="omitted">Left out: {escape(reason)}.</p></section>'


def document(title: str, body: str) -> str:
    """Return the whole page: HTML of a body under a title (plain text), with style, scripts and policy."""
    scripts = [resource(name) for name in (PLOTLY, "charts.js", "page.js")]
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_digest, scripts))}; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{resource("style.css")}</style>
<script>{scripts[0]}</script>
</head>
<body>
<main>
<noscript><p class="warning">The charts need JavaScript; the answer and the table do not.</p></noscript>
{body}
</main>
<script>{scripts[1]}</script>
<script>{scripts[2]}</script>
</body>
</html>
"""


def resource(name: str) -> str:
    """Return a file that pages are made of: style sheet, scripts, plotly (`PLOTLY`)."""
    return files("placement.report").joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """Return the source expression that lets exactly this script run (CSP level 2)."""
    return f"'sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
