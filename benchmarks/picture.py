"""Draws the README's picture from the newest rows of ``benchmarks/results/quality.jsonl``.

Run ``python -m benchmarks.picture`` after ``python -m benchmarks.quality``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from typing import Any

from benchmarks.environment import RESULTS

__all__ = ["main"]

WIDTH, LEFT, BAR, GAP, GROUP = 860, 190, 20, 5, 26
SHADES = {"contiguous": "#9aa5b1", "baseline": "#56789a", "ours": "#d1603d"}


def newest(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the last step-time row of each instance without spare slots, fitted on even windows."""
    chosen = {}
    for row in rows:
        if (
            row["objective"] == "step-time"
            and "ratio" in row
            and row["fit"] == "even"
            and row["spare_slots"] == 0
        ):
            chosen[f"{row['instance']}, {str(row['topology']).rpartition('x')[2]} GPUs"] = row
    return chosen


def picture(rows: dict[str, dict[str, Any]]) -> str:
    """Return an SVG of bars: held-out step cost relative to contiguous, for greedy / EPLB and ours."""
    parts, y = [], 46
    scale = WIDTH - LEFT - 90
    for name, row in rows.items():
        base = float(row["contiguous_ratio"])
        values = {"contiguous": 1.0, "baseline": 1 / base, "ours": float(row["ratio"]) / base}
        middle = y + 1.5 * (BAR + GAP)
        parts.append(f'<text x="{LEFT - 14}" y="{middle + 2}" text-anchor="end">{escape(name)}</text>')
        for key, value in values.items():
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{value * scale:.1f}" height="{BAR}" rx="2" '
                f'fill="{SHADES[key]}"/>'
                f'<text x="{LEFT + value * scale + 8:.1f}" y="{y + 15}">{value - 1:+.1%}</text>'
            )
            y += BAR + GAP
        y += GROUP - GAP
    labels = {"contiguous": "contiguous", "baseline": "greedy / EPLB", "ours": "moe-placement"}
    legend = "".join(
        f'<rect x="{LEFT + index * 170}" y="14" width="13" height="13" rx="2" fill="{SHADES[key]}"/>'
        f'<text x="{LEFT + 20 + index * 170}" y="25">{text}</text>'
        for index, (key, text) in enumerate(labels.items())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
        'font-family="system-ui, sans-serif" font-size="14" fill="#333" role="img" '
        'aria-label="Held-out step cost relative to contiguous placement">'
        f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>{legend}{"".join(parts)}</svg>\n'
    )


def main() -> None:
    """Write ``quality.svg``."""
    with (RESULTS / "quality.jsonl").open(encoding="utf-8") as stream:
        rows = newest(json.loads(line) for line in stream)
    (RESULTS / "quality.svg").write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
