"""The page: one file, nothing fetched, nothing injected, every case told."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs_version

from placement import LinearCalibration, compare, make_problem, parse_topology, report
from placement.comparison import Comparison
from placement.cost import CostBreakdown
from placement.errors import InputError
from placement.profile import RoutingProfile
from placement.report import render_report, write_report
from placement.report.document import PLOTLY
from placement.report.numbers import number
from placement.report.story import Story
from placement.report.tables import policy_table
from traces.statistics import build_profile
from traces.synthesize import synthesize

MakeComparison = Callable[..., Comparison]
TakeApart = Callable[[str], Any]

ATTACK = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\'"&%{x}'

FETCHING = {"src", "href", "srcset", "action", "formaction", "data", "poster", "background", "ping"}


def test_sections_come_in_reading_order(make_comparison: MakeComparison, take_apart: TakeApart) -> None:
    """The answer first, then pictures, the table, the words and where it came from."""
    html = render_report(make_comparison(), title="A title", provenance={"trace": "sha256:abc"})
    text = take_apart(html).text
    headings = (
        "A title", "Worth moving", "Where the load sits", "What a step is made of", "Layer by layer",
        "How the solve went", "How windows differ", "All policies", "How to read this", "Provenance",
        "sha256:abc",
    )  # fmt: skip
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)


def test_nothing_is_fetched(make_comparison: MakeComparison, take_apart: TakeApart) -> None:
    """No element loads anything, no style imports anything, and the policy forbids every request."""
    html = render_report(make_comparison())
    page = take_apart(html)
    assert not [(tag, attributes) for tag, attributes in page.elements if FETCHING & set(attributes)]
    assert not [
        tag for tag, _ in page.elements if tag in ("link", "iframe", "img", "object", "embed", "base")
    ]
    style = html.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in _policy(page)


def test_only_the_pages_own_scripts_may_run(make_comparison: MakeComparison, take_apart: TakeApart) -> None:
    """Plotly is embedded once, and the policy names the digests of exactly the scripts in the page."""
    page = take_apart(render_report(make_comparison()))
    digests = {
        f"sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}" for script in page.scripts
    }
    assert len(page.scripts) == 3
    assert sum("plotly.js (cartesian" in script for script in page.scripts) == 1
    assert set(re.findall(r"sha256-[A-Za-z0-9+/=]+", _policy(page))) == digests


def test_the_plotly_in_pages_is_that_of_the_package() -> None:
    """The part that pages embed draws what the Python package describes: both are of one version."""
    head = files("placement.report").joinpath(PLOTLY).read_text(encoding="utf-8")[:200]
    assert f" v{get_plotlyjs_version()}\n" in head


def test_data_cannot_be_sent_to_a_chart_service() -> None:
    """Plotly's sharing button, on by default, is off, and it has no server to share with."""
    script = files("placement.report").joinpath("charts.js").read_text(encoding="utf-8")
    assert "showSendToCloud: false" in script
    assert 'plotlyServerURL: ""' in script
    assert "displayModeBar: false" in script


def test_strings_from_outside_stay_text(make_comparison: MakeComparison, take_apart: TakeApart) -> None:
    """Markup in titles, provenance, names and reasons is shown, not obeyed."""
    comparison = make_comparison(names=("contiguous", ATTACK), skipped={ATTACK: ATTACK})
    html = render_report(comparison, title=ATTACK, provenance={ATTACK: ATTACK})
    page = take_apart(html)
    assert len(page.scripts) == 3
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert html.count(ATTACK) == 0
    assert page.text.count("alert(1)") >= 5


def test_names_are_escaped_in_figures(make_comparison: MakeComparison, take_apart: TakeApart) -> None:
    """Plotly reads tags and placeholders in its texts, so names reach it escaped."""
    comparison = make_comparison(names=("contiguous", "<a href='x'>%{x}</a>"))
    for figure in take_apart(render_report(comparison)).figures.values():
        for trace in figure["data"]:
            texts = [trace.get("name", ""), trace.get("hovertemplate", "")]
            assert not any("<a" in text for text in texts)
            assert "%{x}</a" not in trace.get("hovertemplate", "")


def test_table_shows_held_out_and_fitted_figures(
    make_comparison: MakeComparison, take_apart: TakeApart
) -> None:
    """One row per policy, held-out first; the proposed one is marked; reasons of skipped ones follow."""
    comparison = make_comparison(skipped={"traffic-only": "no placement keeps the balance"})
    page = take_apart(render_report(comparison))
    heads, rows = page.rows[0], page.rows[1:]
    assert [row[0].split()[0] for row in rows] == [result.name for result in comparison.policies]
    figures: dict[str, Callable[[CostBreakdown], float | None]] = {
        "Predicted step cost": lambda b: b.objective,
        "Balance": lambda b: b.metrics.balance,
        "p95 balance": lambda b: b.metrics.balance_p95,
        "Fanout": lambda b: b.metrics.fanout,
        "Mean-traffic imbalance": lambda b: b.metrics.mean_traffic_balance,
    }
    for label, value in figures.items():
        column = next(i for i, head in enumerate(heads) if head.startswith(label))
        for row, result in zip(rows, comparison.policies, strict=True):
            assert row[column] == f"{number(value(result.held_out))} {number(value(result.fitted))}"
    assert not any(head.startswith("Node fanout") for head in heads)
    assert ("tr", {"class": "proposed"}) in page.elements
    assert "traffic-only no placement keeps the balance" in page.text


def test_unknown_step_costs_leave_their_charts_out(
    make_comparison: MakeComparison, take_apart: TakeApart
) -> None:
    """Without a model there are no step costs: the charts are missing and the page says why."""
    comparison = make_comparison(objective="balance", steps_known=False, lower_bound=1.0)
    html = render_report(comparison)
    page = take_apart(html)
    assert set(page.figures) == {"load-map", "gap", "windows"}
    assert "Left out: no model was named" in page.text
    assert "nan" not in page.text.lower().split()


def test_counts_only_are_told_apart_from_no_model(
    make_comparison: MakeComparison, take_apart: TakeApart
) -> None:
    """With costs but without tokens the exchange is unknown; the reason differs."""
    comparison = make_comparison(objective="balance", with_fanout=False, lower_bound=1.0)
    for result in comparison.policies:
        result.held_out.dispatch_WL[:] = float("nan")
    page = take_apart(render_report(comparison))
    assert "the trace has expert counts only" in page.text
    assert "Fanout" not in page.section("All policies", "How to read this")


def test_no_incumbents(make_comparison: MakeComparison, take_apart: TakeApart) -> None:
    """A solve without incumbents has no course to draw."""
    page = take_apart(render_report(make_comparison(incumbents=())))
    assert "gap" not in page.figures
    assert "the solve recorded no incumbents" in page.text


def test_a_single_policy(make_comparison: MakeComparison, take_apart: TakeApart) -> None:
    """One policy alone makes a page with one map and no relative columns."""
    page = take_apart(render_report(make_comparison(names=("auto",))))
    assert len(page.figures["load-map"]["data"]) == 1
    assert not any(head.startswith(("Against", "Windows won")) for head in page.rows[0])


def test_few_windows_are_warned_of(make_comparison: MakeComparison, take_apart: TakeApart) -> None:
    """The warning stands in the answer, before any table."""
    text = take_apart(render_report(make_comparison(num_windows=3))).text
    assert text.index("Only 3 held-out windows") < text.index("Where the load sits")


@pytest.mark.parametrize(("num_layers", "selects"), [(1, 0), (2, 1)])
def test_layers_are_selected_only_where_there_are_several(
    make_comparison: MakeComparison, take_apart: TakeApart, num_layers: int, selects: int
) -> None:
    """A selector of one choice would be noise."""
    page = take_apart(render_report(make_comparison(num_layers=num_layers)))
    assert sum(tag == "select" for tag, _ in page.elements) == selects
    options = [attributes for tag, attributes in page.elements if tag == "option"]
    assert len(options) == num_layers * selects
    shown = [trace["meta"]["layer"] for trace in page.figures["load-map"]["data"]]
    assert [int(o["value"]) for o in options if "selected" in o] == shown[:selects]


def test_a_large_cluster_makes_a_small_page(make_comparison: MakeComparison, take_apart: TakeApart) -> None:
    """61 layers on 512 devices stay below 2 MB, and the page says what a cell stands for."""
    comparison = make_comparison(names=("contiguous", "auto"), num_layers=61, num_devices=512, num_windows=60)
    html = render_report(comparison)
    assert len(html.encode()) < 2_000_000
    page = take_apart(html)
    assert page.figures["load-map"]["choices"]["shape"][:2] == [2, 61]
    assert "neighbouring devices" in page.text


def test_many_layers_make_a_small_page(make_comparison: MakeComparison, take_apart: TakeApart) -> None:
    """94 layers of 64 devices under six policies, 300 windows: below 2 MB, and what was thinned is said."""
    names = ("contiguous", "greedy", "eplb", "balance-only", "traffic-only", "auto")
    comparison = make_comparison(names=names, num_layers=94, num_devices=64, num_windows=300)
    html = render_report(comparison)
    assert len(html.encode()) < 2_000_000
    assert "of 300 windows are shown, evenly spaced" in take_apart(html).text


def test_the_same_comparison_gives_the_same_page(make_comparison: MakeComparison) -> None:
    """No clock and no random identifiers: reports can be compared and cached."""
    assert render_report(make_comparison()) == render_report(make_comparison())


def test_provenance_adds_to_what_is_known(make_comparison: MakeComparison, take_apart: TakeApart) -> None:
    """The caller's entries follow, and replace those of the same name."""
    html = render_report(make_comparison(), provenance={"model": "mine", "trace": "sha256:abc"})
    closing = take_apart(html).section("Provenance", "\0")
    assert "model mine" in closing
    assert "trace sha256:abc" in closing
    assert "topology h100:1x4 (h100)" in closing
    assert "calibration linear, pair cost 1, token cost 2" in closing
    assert "version moe-placement" in closing


def test_a_report_is_written_whole(make_comparison: MakeComparison, tmp_path: Path) -> None:
    """The file holds the rendered page and nothing is left beside it."""
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(make_comparison(), path, title="Mine")
    assert path.read_text(encoding="utf-8") == render_report(make_comparison(), title="Mine")
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_report_leaves_the_old_file(make_comparison: MakeComparison, tmp_path: Path) -> None:
    """Nothing is written when there is nothing to report, or nowhere to write."""
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(InputError, match="no policy"):
        write_report(make_comparison(names=()), path)
    assert path.read_text() == "old"
    with pytest.raises(InputError, match="cannot be written"):
        write_report(make_comparison(), tmp_path / "missing" / "report.html")


def test_the_package_loads_plotly_only_for_a_report() -> None:
    """Importing the package is cheap, its public names are there, and others are refused."""
    code = "import sys, placement.report; print('plotly' in sys.modules, placement.report.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False ['render_report', 'write_report']"
    assert dir(report) == ["render_report", "write_report"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        report.nothing  # noqa: B018


def test_a_real_comparison(take_apart: TakeApart) -> None:
    """From a trace to a page, through the cost model and the solvers."""
    trace = synthesize(num_tokens=3072, num_layers=2, num_experts=8, top_k=2, seed=0)
    profile: RoutingProfile = build_profile(trace, window_tokens=128)
    calibration = LinearCalibration(pair_cost=1, token_cost=4)
    problem = make_problem(profile, parse_topology("h100:2x2"), calibration=calibration)
    comparison = compare(problem, work_s=0.1, only=("contiguous", "greedy", "auto"))
    page = take_apart(render_report(comparison))
    assert set(page.figures) == {"load-map", "phases", "layers", "gap", "windows"}
    assert "Node fanout" in policy_table(Story(comparison=comparison))
    assert number(comparison.policy("auto").held_out.objective) in page.text


def _policy(page: Any) -> str:
    return next(
        str(attributes["content"])
        for tag, attributes in page.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
