"""One self-contained HTML file: nothing is fetched, only these very scripts run.

Plotly's JavaScript is embedded once and every figure's data as JSON. A content security policy lets only
these very scripts run and forbids every request, so a name in the data can do no harm even if an escape
were missed.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import plotly.io
from plotly.offline import get_plotlyjs

__all__ = ["Chart", "document", "omitted"]


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
    """

    name: str
    title: str
    caption: str
    figure: Any
    controls: str = ""

    def html(self) -> str:
        """Return the section: heading, figure, caption, and the figure's data."""
        # "<" cannot end the script element early; plotly escapes it too, but that is not its contract.
        data = plotly.io.to_json(self.figure, validate=False).replace("<", "\\u003c")
        height = int(self.figure.layout.height)
        return (
            f"<section><h2>{escape(self.title)}</h2>{self.controls}\n"
            f'<figure><div class="chart" id="{self.name}" style="height:{height}px" role="img" '
            f'aria-label="{escape(self.title)}"></div>'
            f"<figcaption>{escape(self.caption)}</figcaption></figure>\n"
            f'<script type="application/json" id="{self.name}-data">{data}</script></section>'
        )


def omitted(title: str, reason: str) -> str:
    """Return the section of a figure that cannot be drawn, with the reason."""
    return f'<section><h2>{escape(title)}</h2><p class="omitted">Left out: {escape(reason)}.</p></section>'


def document(title: str, body: str) -> str:
    """Return the whole page: HTML of a body under a title (plain text), with style, scripts and policy."""
    style, script, library = _resource("style.css"), _resource("page.js"), get_plotlyjs()
    policy = (
        f"default-src 'none'; script-src {_digest(library)} {_digest(script)}; "
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
<style>{style}</style>
<script>{library}</script>
</head>
<body>
<main>
<noscript><p class="warning">The charts need JavaScript; the answer and the table do not.</p></noscript>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def _resource(name: str) -> str:
    return files("placement.report").joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """Return the source expression that lets exactly this script run (CSP level 2)."""
    return f"'sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
