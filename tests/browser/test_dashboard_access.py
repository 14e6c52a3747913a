"""Tokens and a service that goes away: the dashboard says what is the matter, and goes on when it is over."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.dashboard import Site, at, small_site
from tests.browser.visits import Visits
from tests.service.api.guarded import Keys, make_keys
from tests.service.server import BYTE16, LINEAR, Server, eventually, upload

WRONG = "mp_nobody_secret"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Keys, Path]:
    """A token of each scope, and the data directory that knows them."""
    folder = tmp_path_factory.mktemp("access") / "data"
    return make_keys(folder), folder


@pytest.fixture(scope="module")
def site(keys: tuple[Keys, Path]) -> Iterator[Site]:
    """A service that asks for tokens."""
    made, folder = keys
    with Server(folder) as server, server.client(token=made.submit) as client:
        yield small_site(server, client, folder.parent)


def give(page: Page, token: str) -> None:
    """Write a token into the form."""
    page.locator("#token").fill(token)
    page.get_by_role("button", name="Use token").click()


def test_tokens_are_asked_for_until_one_is_right(visits: Visits, site: Site, keys: tuple[Keys, Path]) -> None:
    """No token, a wrong one, the right one, and none again."""
    visits.allow("status of 401")
    page = visits.open(f"{site.server.base_url}/")
    form = page.locator("#token-form")
    expect(form).to_be_visible()
    expect(page.locator("#state")).to_have_text("token needed")
    give(page, WRONG)
    expect(page.locator("#token-error")).to_contain_text("refused")
    expect(form).to_be_visible()
    visits.shot(page, "wrong-token")
    give(page, keys[0].read)
    at(page, "overview")
    expect(form).to_be_hidden()
    expect(page.get_by_role("link", name="small")).to_be_visible()
    kept = page.evaluate("() => [Object.values(sessionStorage), localStorage.length, document.cookie]")
    assert kept == [[keys[0].read], 0, ""]
    assert not any(keys[0].read in url for url in visits.requests)
    page.get_by_role("button", name="Forget the token").click()
    page.reload()
    expect(form).to_be_visible()


def test_a_token_that_may_only_read_gets_no_buttons_for_more(
    visits: Visits, site: Site, keys: tuple[Keys, Path]
) -> None:
    """It sees everything; what it may not do is disabled, and says which scope is missing."""
    visits.allow("status of 401")
    page = visits.open(f"{site.server.base_url}/#/deployments/small")
    give(page, keys[0].read)
    at(page, "deployment")
    promote = page.locator("#promote")
    expect(promote).to_be_disabled()
    expect(promote).to_have_attribute("title", re.compile("scope submit"))
    page.reload()
    at(page, "deployment")
    expect(promote).to_be_disabled()


def test_a_token_that_lost_its_scope_is_told_so(visits: Visits, site: Site, keys: tuple[Keys, Path]) -> None:
    """A promotion that is refused says which scope is missing, and nothing has changed."""
    visits.allow("status of 401", "status of 403")
    everything = ["admin", "read", "submit"]

    def had_it(route: Route) -> None:
        answer = route.fetch()
        if answer.ok:
            route.fulfill(response=answer, json={**answer.json(), "scopes": everything})
        else:
            route.fulfill(response=answer)

    page = visits.open(f"{site.server.base_url}/#/deployments/small")
    page.route("**/v1/status", had_it)
    give(page, keys[0].read)
    at(page, "deployment")
    page.locator("#promote").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Placement", exact=True).select_option(site.second)
    dialog.get_by_label("Reason").fill("not mine to decide")
    dialog.get_by_role("button", name="Promote", exact=True).click()
    expect(dialog.locator("#change-error")).to_contain_text("scope submit")
    visits.shot(page, "scope-missing")
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.locator("#promote")).to_be_disabled()
    expect(page.locator("#promote")).to_have_attribute("title", re.compile("scope submit"))
    assert site.client.get("/v1/deployments/small").json()["version"] == 1


def test_a_restart_loses_nothing(visits: Visits, site: Site, keys: tuple[Keys, Path]) -> None:
    """While a solve is watched the service ends and starts again: the page says so, and goes on by itself."""
    # What a browser writes about requests that nobody answers.
    visits.allow("ERR_CONNECTION_REFUSED", "ERR_EMPTY_RESPONSE", "ERR_CONNECTION_RESET", "INCOMPLETE_CHUNKED")
    visits.allow("status of 401", "status of 503")
    server, client = site.server, site.client
    body = {
        "trace_id": upload(client, BYTE16),
        "topology": "h100:1x4",
        "options": {"calibration": LINEAR, "window": 512, "time_limit": 120, "solver": "lns"},
    }
    answer = client.post("/v1/solves", json=body)
    assert answer.status_code == 202, answer.text
    solve = answer.json()["id"]
    page = visits.open(f"{server.base_url}/#/solves/{solve}")
    give(page, keys[0].submit)
    at(page, "solve")
    expect(page.locator("#status")).to_have_text("running")
    expect(page.locator("#objective")).to_contain_text(re.compile(r"\d"), timeout=60_000)
    page.evaluate("() => { window.sameDocument = true; }")

    server.stop()
    expect(page.locator("#state")).to_have_text("no answer")
    expect(page.locator("#trouble")).to_contain_text("does not answer")
    expect(page.locator("#live")).to_contain_text("reconnecting")
    visits.shot(page, "away")

    server.start()
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#trouble")).to_be_hidden()
    expect(page.locator("#live")).to_have_text("live")
    expect(page.locator("#status")).to_have_text("running", timeout=60_000)
    visits.shot(page, "back")
    page.get_by_role("button", name="Stop early").click()
    expect(page.locator("#status")).to_have_text("stopped")
    expect(page.locator("#live")).to_have_text("ended")
    assert page.evaluate("() => window.sameDocument")
    found = eventually(lambda: client.get(f"/v1/solves/{solve}").json())
    assert found["status"] == "stopped"
    assert client.get("/v1/deployments/small").json()["version"] == 1
