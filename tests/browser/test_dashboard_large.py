"""Fifty thousand slots in the explorer: whatever is done, the next picture is there within 100 ms."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
import numpy as np
import pytest
from playwright.sync_api import Page, expect

from tests.browser.dashboard import at, store_placement
from tests.browser.visits import PHONE, Visits, assert_fits_the_width
from tests.service.server import Server, tiny_trace, upload

LAYERS, EXPERTS, DEVICES, SLOTS = 58, 256, 288, 864
"""50,112 slots."""
MOST_MS = 100.0
REPEATS = 7
ROUNDS = 3
"""Something else that the machine does can only make a round slow: one round in time is enough."""

WATCH = """(type) => {
    window.taken = new Promise((resolve) => addEventListener(type, (event) => {
        // From the input itself to the second frame after it: the first one is on the screen then.
        const began = event.timeStamp;
        requestAnimationFrame(() => requestAnimationFrame(() => resolve(performance.now() - began)));
    }, { once: true, capture: true }));
}"""


@dataclass(frozen=True)
class Large:
    """A service with two large placements and traffic for them."""

    server: Server
    trace: str
    first: str
    second: str


def large_placement(seed: int) -> bytes:
    """Return a placement of 256 experts in 864 slots on 288 devices, no expert twice on one device."""
    rng = np.random.default_rng(seed)
    # Neighbours in a permutation that begins again and again differ.
    rows = [rng.permutation(EXPERTS)[np.arange(SLOTS) % EXPERTS].tolist() for _ in range(LAYERS)]
    document = {
        "format": "moe-placement/1",
        "physical_to_logical_map": rows,
        "device_of_slot": (np.arange(SLOTS) * DEVICES // SLOTS).tolist(),
        "num_experts": EXPERTS,
        "num_devices": DEVICES,
    }
    return json.dumps(document).encode()


def some_moved(content: bytes) -> bytes:
    """Return a placement with two experts of each layer exchanged."""
    document = json.loads(content)
    for row in document["physical_to_logical_map"]:
        row[0], row[-1] = row[-1], row[0]
    return json.dumps(document).encode()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Large]:
    """A service that holds them."""
    folder: Path = tmp_path_factory.mktemp("large")
    with Server(folder / "data", role="api") as server, server.client() as client:
        yield _filled(server, client, folder)


def _filled(server: Server, client: httpx.Client, folder: Path) -> Large:
    content = large_placement(0)
    trace = tiny_trace(folder / "large.npz", tokens=128, layers=LAYERS, experts=EXPERTS, top_k=8)
    return Large(
        server=server,
        trace=upload(client, trace),
        first=store_placement(client, content),
        second=store_placement(client, some_moved(content)),
    )


def quickest_median_ms(page: Page, event: str, act: Callable[[int], None]) -> float:
    """Return how long an interaction takes until its picture is there; the median of the quickest round.

    Parameters
    ----------
    event
        Type of the event from whose time on it counts.
    act
        Does it, by real input; called with a count.
    """
    medians: list[float] = []
    for begun in range(ROUNDS):
        taken = []
        for index in range(REPEATS):
            page.evaluate(WATCH, event)
            act(begun * REPEATS + index)
            taken.append(float(page.evaluate("() => window.taken")))
        medians.append(median(taken))
        if medians[-1] < MOST_MS:
            break
    return min(medians)


def test_interactions_stay_below_a_tenth_of_a_second(visits: Visits, large: Large) -> None:
    """Pointing, keys, another layer, finding an expert, and comparing, with loads of a trace shown."""
    page = visits.open(f"{large.server.base_url}/#/placements/{large.second}?trace={large.trace}")
    at(page, "placement")
    expect(page.locator(f"#from option[value='{large.first}']")).to_be_attached()
    visits.shot(page, "loads")
    taken_ms = {}
    box = page.locator("#grid").bounding_box()
    assert box is not None

    def point(count: int) -> None:
        page.mouse.move(box["x"] + 80 + 20 * (count % 20), box["y"] + 60 + 13 * (count % 17))

    taken_ms["hover"] = quickest_median_ms(page, "pointermove", point)
    expect(page.locator("#cell")).to_contain_text("replicas")
    page.locator("#grid").focus()
    taken_ms["key"] = quickest_median_ms(page, "keydown", lambda _: page.keyboard.press("ArrowRight"))
    taken_ms["layer"] = quickest_median_ms(page, "keydown", lambda _: page.keyboard.press("ArrowDown"))
    page.get_by_label("Find expert").focus()
    # Both presses of a number count: the one that is waited for is the first.
    taken_ms["find"] = quickest_median_ms(page, "input", lambda count: page.keyboard.press(str(count % 2)))
    page.get_by_label("Find expert").fill("")

    page.locator("#from").select_option(large.first)
    expect(page.locator("#num-moves")).to_have_text(f"{2 * LAYERS} moves")
    visits.shot(page, "compared")
    compared = page.evaluate("() => performance.getEntriesByName('grid:compare').map((one) => one.duration)")
    taken_ms["compare"] = median(compared)
    page.locator("#grid").focus()
    taken_ms["key, compared"] = quickest_median_ms(
        page, "keydown", lambda _: page.keyboard.press("ArrowLeft")
    )
    print({name: round(ms, 1) for name, ms in taken_ms.items()})
    assert max(taken_ms.values()) < MOST_MS, taken_ms


def test_it_fits_a_phone(visits: Visits, large: Large) -> None:
    """The grid scrolls by itself; the page does not."""
    page = visits.open(f"{large.server.base_url}/#/placements/{large.second}", width=PHONE, height=844)
    at(page, "placement")
    assert_fits_the_width(page)
    page.locator("#grid").focus()
    page.keyboard.press("Control+End")
    expect(page.locator("#cell")).to_contain_text(f"layer {LAYERS - 1}, device {DEVICES - 1}")
