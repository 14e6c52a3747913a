"""A small model on a running service, and the dashboard's pages by their routes.

``from tests.browser.dashboard import at, small_site``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from playwright.sync_api import Locator, Page, expect

from tests.service.server import Server, tiny_trace, upload

__all__ = [
    "DEVICES",
    "EXPERTS",
    "LAYERS",
    "SPEC",
    "Site",
    "at",
    "go",
    "placement_file",
    "promote",
    "small_site",
    "store_placement",
]

LAYERS, EXPERTS, DEVICES, SPARE = 2, 8, 4, 4
SPEC: dict[str, Any] = {
    "topology": f"h100:1x{DEVICES}",
    "options": {"spare_slots": SPARE},
    "model": {"layers": LAYERS, "experts": EXPERTS, "top_k": 2},
}


@dataclass(frozen=True)
class Site:
    """What a service was given: ids of a trace and of two placements, the older one first."""

    server: Server
    client: httpx.Client
    trace: str
    first: str
    second: str

    def path_of(self, view: str) -> str:
        """Return the route of a view of this site's own things."""
        return {
            "overview": "#/",
            "submit": "#/solves/new",
            "deployment": "#/deployments/small",
            "traces": "#/traces",
            "trace": f"#/traces/{self.trace}",
            "placements": "#/placements",
            "placement": f"#/placements/{self.second}?trace={self.trace}&from={self.first}",
            "missing": "#/nowhere",
        }[view]


def placement_file(*, shift: int = 0) -> bytes:
    """Return a placement of the small model: experts in order, turned by `shift`; the first ones twice."""
    row = [(slot + shift) % EXPERTS for slot in range(EXPERTS + SPARE)]
    document = {
        "format": "moe-placement/1",
        "physical_to_logical_map": [row] * LAYERS,
        "device_of_slot": (np.arange(EXPERTS + SPARE) * DEVICES // (EXPERTS + SPARE)).tolist(),
        "num_experts": EXPERTS,
        "num_devices": DEVICES,
    }
    return json.dumps(document).encode()


def store_placement(client: httpx.Client, content: bytes) -> str:
    """Upload a placement; return its id."""
    response = client.post("/v1/placements", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 201), response.text
    found: str = response.json()["id"]
    return found


def promote(client: httpx.Client, placement_id: str, *, name: str = "small") -> None:
    """Promote a placement."""
    body = {"placement_id": placement_id, "why": "from elsewhere"}
    response = client.put(f"/v1/deployments/{name}/placement", json=body)
    assert response.status_code == 200, response.text


def small_site(server: Server, client: httpx.Client, folder: Path) -> Site:
    """Give a service a trace, two placements, and the deployment "small", which runs the first."""
    site = Site(
        server=server,
        client=client,
        trace=upload(client, tiny_trace(folder / "small.npz")),
        first=store_placement(client, placement_file()),
        second=store_placement(client, placement_file(shift=3)),
    )
    response = client.put("/v1/deployments/small", json=SPEC)
    assert response.status_code == 201, response.text
    promote(client, site.first)
    post_windows(client, 6)
    return site


def post_windows(client: httpx.Client, count: int) -> None:
    """Post what the model's only rank counted."""
    rng = np.random.default_rng(5)
    windows = [
        {"window": index, "load": rng.integers(100, 200, size=(LAYERS, EXPERTS)).tolist()}
        for index in range(count)
    ]
    response = client.post("/v1/deployments/small/windows", json={"rank": 0, "windows": windows})
    assert response.status_code == 202, response.text


def go(page: Page, route: str) -> None:
    """Follow a route as a link within the page does."""
    page.evaluate("(route) => { location.hash = route; }", route)


def at(page: Page, view: str) -> Locator:
    """Wait until a view shows what there is; return it."""
    main = page.locator(f"#main[data-view='{view}'][data-ready='true']")
    expect(main).to_be_visible()
    return main
