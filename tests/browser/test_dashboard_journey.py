"""From an empty service to a placement that runs, and back: all of it through the dashboard."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from placement.io import placement_from_dict
from placement.plan import diff
from tests.browser.dashboard import (
    DEVICES,
    LAYERS,
    SPEC,
    at,
    go,
    placement_file,
    promote,
    store_placement,
)
from tests.browser.visits import Visits
from tests.service.server import Server, tiny_trace

MARKED = """() => {
    const canvas = document.querySelector("#grid canvas.marks");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return data.some((value) => value > 0);
}"""
"""Whether anything is drawn over the cells."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service that knows nothing yet."""
    with Server(tmp_path_factory.mktemp("journey") / "data") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    """Somebody else, who speaks with the service directly."""
    with server.client() as opened:
        yield opened


def test_from_nothing_to_a_placement_and_back(
    visits: Visits, server: Server, client: httpx.Client, tmp_path: Path
) -> None:
    """Empty states, a solve watched to its end, the explorer, a comparison, a promotion, a roll-back."""
    page = visits.open(f"{server.base_url}/")
    look_at_empty_states(visits, page)
    submit(page, tiny_trace(tmp_path / "tiny.npz"))
    solve_id = watch(visits, page)

    before = store_placement(client, placement_file())
    assert client.put("/v1/deployments/small", json=SPEC).status_code == 201
    promote(client, before)
    page.get_by_role("link", name="Explore the placement").click()
    after = client.get(f"/v1/solves/{solve_id}").json()["placement_id"]
    explore(visits, page, client.get(f"/v1/placements/{after}").json())
    compare(visits, page, client, before, after)
    promote_here(visits, page, client, after)
    roll_back(visits, page, client, before)


def look_at_empty_states(visits: Visits, page: Page) -> None:
    """Every list says what to do first."""
    for view, route in (("overview", "#/"), ("traces", "#/traces"), ("placements", "#/placements")):
        go(page, route)
        expect(at(page, view).locator(".empty").first).to_be_visible()
        visits.shot(page, f"empty-{view}")
    expect(page.locator("#state")).to_have_text("ready")


def submit(page: Page, trace: Path) -> None:
    """Upload a trace, make a mistake, correct it, check, and start the solve."""
    page.get_by_role("link", name="New solve").click()
    at(page, "submit")
    page.locator("#file").set_input_files(trace)
    expect(page.locator("#trace_id")).to_have_value(re.compile("^sha256:"))
    page.get_by_role("button", name="Solve", exact=True).click()
    expect(page.locator("#topology")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#topology")).to_be_focused()
    page.get_by_label("Topology").fill(f"h100:1x{DEVICES}")
    page.get_by_label("Objective").select_option("balance")
    page.get_by_label("Spare slots").fill("4")
    page.get_by_label("Time limit").fill("2")
    page.get_by_role("button", name="Check").click()
    expect(page.locator("#submit-note")).to_contain_text("This can be solved")
    page.get_by_role("button", name="Solve", exact=True).click()


def watch(visits: Visits, page: Page) -> str:
    """Stay on the page until the solve has ended; it is never loaded again."""
    at(page, "solve")
    solve_id = page.url.rpartition("/")[2]
    visits.shot(page, "solve-begun")
    expect(page.locator("#status")).to_have_text("succeeded", timeout=60_000)
    expect(page.locator("#live")).to_have_text("ended")
    assert any(url.endswith(f"/v1/solves/{solve_id}/events") for url in visits.requests)
    expect(page.locator("#objective")).to_contain_text(re.compile(r"\d"))
    expect(page.locator("#bound")).to_contain_text(re.compile(r"\d"))
    expect(page.locator("#curve .main-svg").first).to_be_visible()
    expect(page.locator("#incumbents tbody tr").first).to_be_attached()
    visits.shot(page, "solve-ended", whole=True)
    return solve_id


def explore(visits: Visits, page: Page, document: dict[str, Any]) -> None:
    """What pointer and keys tell of a cell is what the placement holds; an expert is found everywhere."""
    at(page, "placement")
    slots = document["device_of_slot"]
    rows = document["physical_to_logical_map"]

    def held(layer: int, device: int) -> list[int]:
        return sorted({rows[layer][slot] for slot, where in enumerate(slots) if where == device})

    box = page.locator("#grid canvas.marks").last.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 1.5 / DEVICES, box["y"] + box["height"] * 0.4)
    said = page.locator("#cell")
    expect(said).to_contain_text(re.compile(r"^layer 0, device 1, load [\d.]+ times the mean"))
    assert experts_in(said.inner_text()) == held(0, 1)
    visits.shot(page, "explorer-hover")
    page.mouse.move(1, 1)

    page.locator("#grid").focus()
    page.keyboard.press("Control+Home")
    texts = []
    for layer in range(LAYERS):
        for device in range(DEVICES):
            expect(said).to_contain_text(f"layer {layer}, device {device},")
            texts.append(said.inner_text())
            assert experts_in(texts[-1]) == held(layer, device)
            page.keyboard.press("ArrowRight")
        page.keyboard.press("Home")
        page.keyboard.press("ArrowDown")
    assert any("2 replicas" in text for text in texts)

    page.get_by_label("Find expert").fill("3")
    copies = sum(row.count(3) for row in rows)
    expect(page.locator("#found")).to_have_text(f"expert 3: {copies} replicas in {LAYERS} layers")
    assert page.evaluate(MARKED)
    page.get_by_label("Find expert").fill("")


def experts_in(sentence: str) -> list[int]:
    """Return the experts that a sentence on a cell names."""
    names = re.sub(r"\([^)]*\)", "", sentence.partition("experts: ")[2].partition(";")[0])
    return [int(name) for name in names.split(",")]


def compare(visits: Visits, page: Page, client: httpx.Client, before: str, after: str) -> None:
    """The number of moves is that of the placements' own difference, and cells that differ stand out."""
    assert not page.evaluate(MARKED)
    page.locator("#from").select_option(before)
    one, two = (placement_from_dict(client.get(f"/v1/placements/{id}").json()) for id in (before, after))
    moves = diff(one, two)
    expect(page.locator("#num-moves")).to_have_text(f"{len(moves)} moves")
    expect(page.locator("#moves tbody tr")).to_have_count(len(moves))
    assert page.evaluate(MARKED)
    page.get_by_role("button", name=re.compile("^Show the move")).first.click()
    expect(page.locator("#cell")).to_contain_text("gains")
    assert f"from={before}" in page.url
    visits.shot(page, "compared", whole=True)


def promote_here(visits: Visits, page: Page, client: httpx.Client, placement_id: str) -> None:
    """Nothing changes without a confirmation; with it the deployment's page says what runs."""
    page.locator("#promote").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("#change-to")).to_contain_text("version 2")
    expect(dialog.locator("#change-moves")).to_contain_text(re.compile(r"\d"))
    visits.shot(page, "promote")
    dialog.get_by_role("button", name="Cancel").click()
    assert client.get("/v1/deployments/small").json()["version"] == 1
    page.locator("#promote").click()
    dialog.get_by_label("Reason").fill("the solve found better")
    dialog.get_by_role("button", name="Promote", exact=True).click()
    at(page, "deployment")
    expect(page.locator("#version")).to_contain_text("2")
    current = client.get("/v1/deployments/small/versions").json()["items"][0]
    assert (current["version"], current["placement_id"]) == (2, placement_id)
    assert current["why"] == "the solve found better"
    visits.shot(page, "promoted", whole=True)


def roll_back(visits: Visits, page: Page, client: httpx.Client, before: str) -> None:
    """The earlier placement runs again, as a new version of the history."""
    page.get_by_role("button", name="Roll back to version 1").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Reason").fill("throughput fell")
    expect(dialog.locator("#change-to")).to_contain_text("version 3")
    visits.shot(page, "roll-back")
    dialog.get_by_role("button", name="Roll back", exact=True).click()
    expect(page.locator("#versions tr[data-version]")).to_have_count(3)
    expect(page.locator("#version")).to_contain_text("3")
    current = client.get("/v1/deployments/small/versions").json()["items"][0]
    assert (current["cause"], current["placement_id"]) == ("rollback", before)


def test_who_was_slower_is_told(visits: Visits, server: Server, client: httpx.Client) -> None:
    """A change in between is not overwritten: the dialog says so, shows it, and asks again."""
    visits.allow("status of 412")
    spec = client.put("/v1/deployments/shared", json=SPEC)
    assert spec.status_code == 201
    one, two = (store_placement(client, placement_file(shift=shift)) for shift in (1, 2))
    promote(client, one, name="shared")
    page = visits.open(f"{server.base_url}/#/deployments/shared")
    at(page, "deployment")
    page.locator("#promote").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Placement", exact=True).select_option(two)
    dialog.get_by_label("Reason").fill("mine")
    expect(dialog.locator("#change-to")).to_contain_text("version 2")
    promote(client, store_placement(client, placement_file(shift=5)), name="shared")
    dialog.get_by_role("button", name="Promote", exact=True).click()
    expect(dialog.locator("#change-error")).to_contain_text("meanwhile")
    expect(dialog.locator("#change-to")).to_contain_text("version 3")
    visits.shot(page, "somebody-was-faster")
    assert client.get("/v1/deployments/shared").json()["version"] == 2
    dialog.get_by_role("button", name="Promote", exact=True).click()
    expect(page.locator("#version")).to_contain_text("3")
