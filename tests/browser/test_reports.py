"""Reports as they are opened: from a file, without a network, on paper, on a phone, by ear, in the dark."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from placement.cli.app import run
from tests.browser.accessibility import violations
from tests.browser.visits import PHONE, SHOTS, Visits, assert_fits_the_width
from tests.service.server import ROOT, tiny_trace

PLANS = ROOT / "examples" / "plans"
COSTS = ["--calibration", str(ROOT / "placement" / "samples" / "linear.json"), "--window", "256"]
COMMANDS: dict[str, list[str]] = {
    "compare": ["compare", "TRACE", "-t", "h100:1x4", *COSTS],
    "evaluate": ["evaluate", "PLACEMENT", "TRACE", "-t", "h100:1x4", *COSTS],
    "parallelism": ["plan", "parallelism", str(PLANS / "parallelism.yaml")],
    "cross-dc": ["plan", "cross-dc", str(PLANS / "cross-dc.yaml")],
    "hetero": ["plan", "hetero", str(PLANS / "hetero.yaml")],
    "fabric": ["plan", "fabric", str(PLANS / "fabric.yaml")],
}
PAPER = 704
"""Width of what is printed on A4 with margins of 12 mm, in CSS pixels."""
MOST_BYTES = 2_000_000

DRAWN = """() => [...document.querySelectorAll(".chart")].map((chart) => {
    const pictures = [...chart.querySelectorAll(".main-svg")];
    return {
        name: chart.id,
        wide: Math.max(...pictures.map((picture) => picture.getBoundingClientRect().right)),
        shapes: chart.querySelectorAll(".main-svg path, .main-svg image, .main-svg rect").length,
    };
})"""
"""What is in every chart, and where its right edge is."""
CUT = """(most) => [...document.querySelectorAll("main .scroll, main table")].filter((element) => {
    const clips = getComputedStyle(element).overflowX !== "visible";
    const isWide = element.scrollWidth > element.clientWidth;
    return (clips && isWide) || element.getBoundingClientRect().right > most + 1;
}).map((element) => element.outerHTML.slice(0, 100))"""
PICTURE = "(id) => JSON.stringify(document.getElementById(id).data.map(({ visible, z }) => [visible, z]))"


@pytest.fixture(scope="module", params=list(COMMANDS))
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One report of each command, of the examples and a small trace."""
    folder = tmp_path_factory.mktemp("report")
    trace = tiny_trace(folder / "trace.npz", tokens=4096, layers=3, experts=16)
    files = {"TRACE": str(trace), "PLACEMENT": str(folder / "placement.json")}
    path = folder / f"{request.param}.html"
    command = [files.get(part, part) for part in COMMANDS[request.param]]
    if request.param == "evaluate":
        solve = ["solve", str(trace), "-t", "h100:1x4", *COSTS, "--solver", "greedy"]
        assert run([*solve, "-o", files["PLACEMENT"]]) == 0
    assert run([*command, "--html", str(path)]) == 0
    assert path.stat().st_size < MOST_BYTES
    return path


def test_report(visits: Visits, report: Path) -> None:
    """From a file without a network: complete on a screen, in the dark, on paper and on a phone."""
    page = visits.open(report.as_uri(), offline=True)
    expect(page.locator(".chart .main-svg").first).to_be_visible()
    assert_drawn(page)
    visits.shot(page, "light", whole=True)
    found = violations(page)
    page.emulate_media(color_scheme="dark")
    found += [f"dark: {line}" for line in violations(page, colours_alone=True)]
    visits.shot(page, "dark", whole=True)
    assert found == []
    use_selectors(page)
    print_it(visits, page, report.stem)
    use_phone(visits, page)
    # Nothing but the file itself was asked for.
    assert [url for url in visits.requests if not url.startswith(("data:", "blob:"))] == [report.as_uri()]


def use_selectors(page: Page) -> None:
    """Another choice of a selector changes its chart."""
    for selector in page.locator("select[data-chart]").all():
        chart = selector.get_attribute("data-chart")
        options = selector.locator("option").evaluate_all("(options) => options.map(({ value }) => value)")
        before = page.evaluate(PICTURE, chart)
        selector.select_option(next(value for value in options if value != selector.input_value()))
        assert page.evaluate(PICTURE, chart) != before


def print_it(visits: Visits, page: Page, name: str) -> None:
    """On paper every chart and every column is within the margins, ink on white though the screen is dark."""
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": PAPER, "height": 1000})
    page.evaluate("() => window.dispatchEvent(new Event('beforeprint'))")
    wait_for_width(page, PAPER)
    assert_drawn(page)
    assert page.evaluate(CUT, PAPER) == []
    assert brightness(page.evaluate("() => getComputedStyle(document.documentElement).backgroundColor")) > 240
    visits.shot(page, "paper", whole=True)
    page.evaluate("() => window.dispatchEvent(new Event('afterprint'))")
    printed = page.pdf(path=SHOTS / f"report-{name}.pdf", format="A4", prefer_css_page_size=True)
    assert printed.startswith(b"%PDF")
    page.emulate_media(media="screen", color_scheme="light")


def use_phone(visits: Visits, page: Page) -> None:
    """On a phone charts take its width, and what is wider scrolls by itself."""
    page.set_viewport_size({"width": PHONE, "height": 844})
    wait_for_width(page, PHONE)
    assert_fits_the_width(page)
    visits.shot(page, "phone", whole=True)


def wait_for_width(page: Page, most: int) -> None:
    """Wait until no chart is wider: they take a new width a moment after the window has it."""
    page.wait_for_function(f"() => ({DRAWN})().every((one) => one.wide <= {most} + 1)")


def assert_drawn(page: Page) -> None:
    """Every chart has a picture."""
    drawn: list[dict[str, Any]] = page.evaluate(DRAWN)
    assert drawn
    assert [one["name"] for one in drawn if one["shapes"] < 4] == []


def brightness(colour: str) -> float:
    """Return how bright a colour of the style sheet is, 0 to 255; none at all is paper."""
    red, green, blue, *alpha = map(float, re.findall(r"[\d.]+", colour))
    return 255.0 if alpha == [0.0] else 0.2126 * red + 0.7152 * green + 0.0722 * blue
