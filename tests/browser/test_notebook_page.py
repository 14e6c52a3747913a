"""The page of a notebook, opened from a file: drawn without a network, read by everyone."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect

from notebooks.run import execute, render
from tests.browser.accessibility import violations
from tests.browser.visits import PHONE, Visits, assert_fits_the_width

CODE = """import plotly.graph_objects as go  # a comment, 12 and "a text"

from placement.report.figures.look import empty_figure
from placement.report.notebook import show

print(sum(range(12)))
show(empty_figure(go.Bar(x=[1, 2], y=[3, 4]), height=200), caption="Bars & more")
"""


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A notebook of a text, code, what it prints and a figure, run and rendered."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell(
                "# Does it draw?\n\nA text with `code` and a [link](#Does-it-draw?)."
            ),
            nbformat.v4.new_code_cell(CODE),
        ]
    )
    source, made = folder / "one.ipynb", folder / "one.html"
    nbformat.write(notebook, source)
    made.write_text(render(execute(source), title="Does it draw?"), encoding="utf-8")
    return made


def test_page_of_a_notebook(visits: Visits, page_file: Path) -> None:
    """Its figure is drawn, nothing is asked for, axe-core finds nothing, a phone shows all of it."""
    page = visits.open(page_file.as_uri(), offline=True)
    expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible()
    visits.shot(page, "light", whole=True)
    assert violations(page) == []
    page.set_viewport_size({"width": PHONE, "height": 844})
    page.wait_for_function(f"() => document.documentElement.scrollWidth <= {PHONE}")
    assert_fits_the_width(page)
    assert [url for url in visits.requests if not url.startswith(("data:", "blob:"))] == [page_file.as_uri()]
