"""Figures on their way to a page: a title and a caption in plain text, the figure as plotly writes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["figure_entry", "json_of"]


def figure_entry(title: str, caption: str, figure: go.Figure | None, **more: Any) -> dict[str, Any]:
    """Return what a page needs to show a figure; without one the caption says what to do.

    Parameters
    ----------
    title, caption
        Plain text.
    more
        Further entries.
    """
    drawn = None if figure is None else orjson.Fragment(_json(figure))
    return {**more, "title": title, "caption": caption, "figure": drawn}


def _json(figure: go.Figure) -> bytes:
    import plotly.io

    found: str = plotly.io.to_json(figure, validate=False)
    return found.encode()


def json_of(document: Any) -> bytes:
    """Return a document with figures and arrays as JSON; what is no number leaves as null."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
