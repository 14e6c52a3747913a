"""The numbers behind a picture, as a table: for who cannot see it, and for who wants them exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape, unescape
from typing import Any

import numpy as np

from placement.report.numbers import NO_VALUE, number

__all__ = ["ChartNumbers", "numbers_of"]

MOST_ROWS, MOST_CELLS = 200, 1200
"""Larger tables would double the page, and nobody reads them aloud."""

QUANTILES = {"least": 0.0, "quarter": 0.25, "median": 0.5, "three quarters": 0.75, "most": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartNumbers:
    """A table of plain texts.

    Parameters
    ----------
    columns
        Heads; the first column names the rows.
    rows
        Texts, ``[rows][columns]``.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def html(self, label: str) -> str:
        """Return the table, in a region that scrolls and can be reached by keyboard."""
        heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in self.columns)
        rows = "\n".join(
            f'<tr><th scope="row">{escape(row[0])}</th>'
            f"{''.join(f'<td>{escape(text)}</td>' for text in row[1:])}</tr>"
            for row in self.rows
        )
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>\n'
            f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
        )


def numbers_of(figure: Any) -> ChartNumbers | None:
    """Return the numbers of a figure of bars, lines, boxes or one map; None where they are too many."""
    traces = list(figure.data)
    if not traces or any(trace.type != traces[0].type for trace in traces):
        return None
    if traces[0].type == "heatmap":
        numbers = _of_map(figure) if len(traces) == 1 else None
    elif traces[0].type == "box":
        numbers = _of_boxes(figure)
    else:
        numbers = _of_series(figure)
    if numbers is None or not numbers.rows or len(numbers.rows) > MOST_ROWS:
        return None
    return numbers if len(numbers.rows) * len(numbers.columns) <= MOST_CELLS else None


def _of_series(figure: Any) -> ChartNumbers | None:
    """Bars and lines: a row for each place, a column for each series."""
    # Bars with a base of their own are spans; their lengths alone would tell nothing.
    if any(trace.type == "bar" and trace.base is not None for trace in figure.data):
        return None
    lying = figure.data[0].orientation == "h"
    table: dict[Any, dict[int, Any]] = {}
    for series, trace in enumerate(figure.data):
        places, values = (trace.y, trace.x) if lying else (trace.x, trace.y)
        for place, value in zip(_listed(places), _listed(values), strict=False):
            table.setdefault(place, {})[series] = value
    places = list(table)
    if all(isinstance(place, (int, float)) for place in places):
        places.sort()
    place_axis, value_axis = ("yaxis", "xaxis") if lying else ("xaxis", "yaxis")
    names = [_plain(trace.name or _title(figure, value_axis)) for trace in figure.data]
    return ChartNumbers(
        columns=(_title(figure, place_axis), *names),
        rows=tuple(
            (_text(place), *(_text(table[place].get(series)) for series in range(len(names))))
            for place in places
        ),
    )


def _of_boxes(figure: Any) -> ChartNumbers:
    rows = [
        (
            _plain(trace.name),
            *(number(float(np.quantile(np.asarray(trace.x), q))) for q in QUANTILES.values()),
        )
        for trace in figure.data
    ]
    return ChartNumbers(columns=(_title(figure, "xaxis"), *QUANTILES), rows=tuple(rows))


def _of_map(figure: Any) -> ChartNumbers:
    trace = figure.data[0]
    values = np.asarray(trace.z)
    rows, columns = (
        _listed(names) if names is not None else list(range(count))
        for names, count in zip((trace.y, trace.x), values.shape, strict=True)
    )
    head = " / ".join(title for title in (_title(figure, "yaxis"), _title(figure, "xaxis")) if title)
    return ChartNumbers(
        columns=(head, *(_text(column) for column in columns)),
        rows=tuple(
            (_text(name), *(_text(value) for value in row))
            for name, row in zip(rows, values.tolist(), strict=True)
        ),
    )


def _title(figure: Any, axis: str) -> str:
    return _plain(figure.layout[axis].title.text or "")


def _listed(values: Sequence[Any] | None) -> list[Any]:
    return [] if values is None else [_item(value) for value in values]


def _item(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _text(value: Any) -> str:
    if value is None:
        return NO_VALUE
    if isinstance(value, str):
        return _plain(value)
    return f"{value:,.0f}" if float(value).is_integer() else number(float(value))


def _plain(text: str) -> str:
    return unescape(text)
