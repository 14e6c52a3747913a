"""What the tests of notebooks share: a notebook run from scratch, and what must hold for its page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from nbformat import NotebookNode

from notebooks.run import FOLDER, execute, render

__all__ = ["FILES", "check_notebook", "figures_of", "other_trace", "page_of", "path_of", "texts_of"]

FILES = ("1-routing", "2-placement", "3-moving", "4-what-if", "5-launch")
"""The notebooks, in reading order."""

MAX_BYTES = 5_000_000
"""Of a page: 1.5 MB of it are plotly."""

FETCHING = {"src", "href", "srcset", "action", "formaction", "poster", "background", "ping"}


def path_of(name: str) -> Path:
    """Return the file of a notebook."""
    return FOLDER / f"{name}.ipynb"


def figures_of(notebook: NotebookNode) -> list[str]:
    """Return the HTML of every figure."""
    return [html for html in _outputs(notebook, "text/html") if "Plotly.newPlot" in html]


def texts_of(notebook: NotebookNode) -> str:
    """Return what cells printed."""
    return "".join(o.text for cell in notebook.cells for o in cell.get("outputs", ()) if o.get("name"))


def _outputs(notebook: NotebookNode, kind: str) -> list[str]:
    return [
        output.data[kind]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if kind in output.get("data", {})
    ]


def other_trace(folder: Path) -> Path:
    """Write a small trace of another shape than the sample's: 4 layers, top-2 of 12, four domains in turn."""
    rng = np.random.default_rng(0)
    tokens, layers, experts = 6144, 4, 12
    domain_T = np.arange(tokens) * 4 // tokens
    favour_DLE = rng.normal(size=(4, layers, experts))
    key_TLE = rng.gumbel(size=(tokens, layers, experts)) + 1.5 * favour_DLE[domain_T]
    ids_TLK = np.argsort(-key_TLE, axis=2)[:, :, :2].astype(np.uint16)
    path = folder / "other.npz"
    np.savez(path, topk=ids_TLK, num_experts=np.int64(experts))
    return path


def check_notebook(name: str, *, least_figures: int, **parameters: Any) -> NotebookNode:
    """Run a notebook from scratch, check its page, and return it.

    Parameters
    ----------
    least_figures
        Figures that it shows, at least.
    parameters
        Values that replace those of its cell of parameters.
    """
    executed = execute(path_of(name), parameters=parameters)
    assert len(figures_of(executed)) >= least_figures
    assert "NaN" not in texts_of(executed)
    assert _answer(executed).strip()
    html = render(executed, title=name)
    assert len(html) < MAX_BYTES
    page = page_of(html)
    assert page.fetching == []
    assert html.count("plotly.js (cartesian") == 1
    assert html.count("Plotly.newPlot(element") == len(figures_of(executed))
    return executed


def _answer(notebook: NotebookNode) -> str:
    """Return what is printed under the last heading."""
    headings = [i for i, cell in enumerate(notebook.cells) if cell.source.startswith("## ")]
    return texts_of(NotebookNode({"cells": notebook.cells[headings[-1] :]}))


class _Page(HTMLParser):
    """Finds what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetching: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what loads something; links within the page do not."""
        for key, value in attrs:
            if key in FETCHING and value and not re.match("#|data:", value):
                self.fetching.append(f"{tag} {key}={value}")


def page_of(html: str) -> _Page:
    """Return a page taken apart."""
    page = _Page()
    page.feed(html)
    return page
