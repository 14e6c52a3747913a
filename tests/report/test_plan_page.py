"""The page of a plan: complete, escaped, in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from placement.errors import InputError
from placement.report.document import Chart
from placement.report.figures.look import empty_figure
from placement.report.plan_page import PlanPage, PlanTable, render_plan, write_plan

NASTY = "</script><img src=x onerror=alert(1)>"

PAGE = PlanPage(
    title=NASTY,
    headline="Use <b>4</b> stages",
    paragraph="Because.",
    facts={"Devices": "8 & more"},
    warnings=("Curves are missing",),
    sections=(
        Chart(
            name="times",
            title="Times",
            caption="What takes how long",
            figure=empty_figure(go.Bar(x=[1], y=[NASTY]), height=200),
        ),
        PlanTable(
            title="Plans",
            caption="Best first",
            columns=("Plan", "Time"),
            rows=(("a", "1 ms"), (NASTY, "2 ms")),
            marked=0,
        ),
    ),
    words={"stage": "some layers"},
    provenance={"spec": "plan.yaml"},
)


def test_everything_is_there_in_reading_order(take_apart: Callable[[str], Any]) -> None:
    """Title, facts, answer, warnings, pictures, tables, words, provenance."""
    text = take_apart(render_plan(PAGE)).text
    texts = (
        "8 & more", "Use <b>4</b> stages", "Because.", "Curves are missing", "Times", "Best first",
        "some layers", "plan.yaml",
    )  # fmt: skip
    places = [text.index(part) for part in texts]
    assert places == sorted(places)


def test_texts_are_texts(take_apart: Callable[[str], Any]) -> None:
    """Names from files make no element, neither in tables nor in the figures' data."""
    page = take_apart(render_plan(PAGE))
    assert {"img", "b"} & {tag for tag, _ in page.elements} == set()
    assert [NASTY, "2 ms"] in page.rows
    assert page.figures["times"]["data"][0]["y"] == [NASTY]


def test_the_recommended_row_is_marked(take_apart: Callable[[str], Any]) -> None:
    """The first of the two plans, and no other row."""
    rows = [attributes for tag, attributes in take_apart(render_plan(PAGE)).elements if tag == "tr"]
    assert rows[-3:] == [{}, {"class": "proposed"}, {}]
    assert all(row == {} for row in rows[:-3])


def test_a_row_has_a_text_for_each_column() -> None:
    """A table that is not rectangular is refused."""
    with pytest.raises(InputError, match="'Plans': 1 texts for 2 columns"):
        PlanTable(title="Plans", caption="", columns=("a", "b"), rows=(("1",),))


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    """The file is the page; the same plan gives the same one."""
    write_plan(PAGE, tmp_path / "plan.html")
    assert (tmp_path / "plan.html").read_text(encoding="utf-8") == render_plan(PAGE)
