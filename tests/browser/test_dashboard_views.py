"""Every view of the dashboard: for people who do not see, who see the dark, who have a phone, or no mouse."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.accessibility import violations
from tests.browser.dashboard import SPEC, Site, at, small_site
from tests.browser.visits import PHONE, Visits, assert_fits_the_width
from tests.service.server import Server, eventually

VIEWS = ("overview", "submit", "solve", "deployment", "traces", "trace", "placements", "placement", "missing")
MOST_STEPS = 60
"""Presses of the tabulator within which everything on a page is reached."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A service with some of everything."""
    folder = tmp_path_factory.mktemp("views")
    with Server(folder / "data") as server, server.client() as client:
        yield small_site(server, client, folder)


@pytest.fixture(scope="module")
def solve(site: Site) -> str:
    """A solve that has ended."""
    body = {
        "trace_id": site.trace,
        "topology": SPEC["topology"],
        "options": {"objective": "balance", "spare_slots": 4, "time_limit": 1},
    }
    answer = site.client.post("/v1/solves", json=body)
    assert answer.status_code == 202, answer.text
    found: str = answer.json()["id"]
    eventually(lambda: site.client.get(f"/v1/solves/{found}").json()["status"] == "succeeded", 60.0)
    return found


def show(visits: Visits, site: Site, view: str, solve: str = "") -> Page:
    """Open a view; return its page once all is drawn."""
    route = f"#/solves/{solve}" if view == "solve" else site.path_of(view)
    page = visits.open(f"{site.server.base_url}/{route}")
    at(page, view)
    expect(page.locator("#state")).to_have_text("ready")
    if view in ("solve", "trace", "deployment"):
        expect(page.locator("#main .main-svg").first).to_be_visible()
    if view == "placement":
        expect(page.locator("#num-moves")).to_be_visible()
    return page


@pytest.mark.parametrize("view", VIEWS)
def test_view_is_for_everyone(visits: Visits, site: Site, solve: str, view: str) -> None:
    """axe-core finds nothing in either scheme, and on a phone nothing scrolls sideways but what may."""
    page = show(visits, site, view, solve)
    visits.shot(page, "light", whole=True)
    found = violations(page)
    page.emulate_media(color_scheme="dark")
    visits.shot(page, "dark", whole=True)
    found += [f"dark: {line}" for line in violations(page, colours_alone=True)]
    page.set_viewport_size({"width": PHONE, "height": 844})
    # Charts take their new width a moment later.
    page.wait_for_function(f"() => document.documentElement.scrollWidth <= {PHONE}")
    visits.shot(page, "phone", whole=True)
    assert_fits_the_width(page)
    found += [f"phone: {line}" for line in violations(page)]
    assert found == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_dialog_is_for_everyone(visits: Visits, site: Site, dark: bool) -> None:
    """The question before a change, too, and it fits a phone."""
    page = show(visits, site, "placement")
    page.emulate_media(color_scheme="dark" if dark else "light")
    page.locator("#promote").click()
    expect(page.locator("#change-yes")).to_be_enabled()
    assert violations(page, colours_alone=dark) == []
    page.set_viewport_size({"width": PHONE, "height": 844})
    assert_fits_the_width(page)
    visits.shot(page, "phone")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.locator("#promote")).to_be_focused()


def tab_to(page: Page, target: Locator) -> None:
    """Press the tabulator until an element has the focus."""
    for _ in range(MOST_STEPS):
        if target.evaluate("(element) => element === document.activeElement"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{target} is not reached by the keyboard")


def test_a_keyboard_is_enough(visits: Visits, site: Site) -> None:
    """From the first link to a deployment, a chosen placement and its promotion, without a mouse."""
    page = show(visits, site, "overview")
    page.keyboard.press("Tab")
    expect(page.locator("#skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    tab_to(page, page.get_by_role("link", name="small", exact=True))
    visits.shot(page, "focus")
    page.keyboard.press("Enter")
    at(page, "deployment")
    expect(page.get_by_role("heading", level=1)).to_be_focused()
    tab_to(page, page.locator("#promote"))
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    choice = dialog.get_by_label("Placement", exact=True)
    tab_to(page, choice)
    wanted = site.client.get("/v1/deployments/small/versions").json()["items"][0]["placement_id"]
    for _ in range(choice.locator("option").count()):
        if choice.input_value() != wanted:
            break
        page.keyboard.press("ArrowDown")
    chosen = choice.input_value()
    assert chosen != wanted
    tab_to(page, dialog.get_by_label("Reason"))
    page.keyboard.type("by hand")
    expect(page.locator("#change-yes")).to_be_enabled()
    page.keyboard.press("Enter")
    expect(dialog).to_have_count(0)
    expect(page.locator("#version")).to_contain_text("2")
    current = site.client.get("/v1/deployments/small/versions").json()["items"][0]
    assert (current["placement_id"], current["why"]) == (chosen, "by hand")
