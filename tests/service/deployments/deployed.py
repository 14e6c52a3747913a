"""Traffic and placements of a small model, and what tests of deployments do again and again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from tests.service.server import Server, eventually

LAYERS, EXPERTS, TOP_K, DEVICES = 2, 16, 2, 4
TOKENS = 4000
SPEC: dict[str, Any] = {
    "topology": "h100:1x4",
    "model": {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K},
}
SIZED = {
    "name": "small",
    "num_layers": LAYERS,
    "num_experts": EXPERTS,
    "top_k": TOP_K,
    "hidden_size": 1024,
    "expert_hidden_size": 2048,
}
QUICK = {"solver": "auto", "time_limit": 3.0}

Loads = npt.NDArray[np.int64]


class Traffic:
    """Windows of a router whose favourite experts can be changed.

    Parameters
    ----------
    hot
        Experts that take `share` of all pairs, in every layer.
    """

    def __init__(self, *, hot: tuple[int, ...] = (), share: float = 0.6, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self.window = 1000
        self.turn(hot, share=share)

    def turn(self, hot: tuple[int, ...], *, share: float = 0.6) -> None:
        """Change the favourites."""
        share_E = np.full(EXPERTS, 1.0)
        if hot:
            cold = np.setdiff1d(np.arange(EXPERTS), hot)
            share_E[list(hot)] = share / len(hot)
            share_E[cold] = (1 - share) / cold.size
        self.share_E = share_E / share_E.sum()

    def load_LE(self, tokens: int = TOKENS) -> Loads:
        """Draw one window."""
        return self._rng.multinomial(tokens * TOP_K, self.share_E, size=LAYERS).astype(np.int64)

    def post(
        self, client: httpx.Client, name: str, count: int, *, rank: int = 0, tokens: int = TOKENS
    ) -> dict[str, Any]:
        """Post fresh windows in one request; return the answer."""
        windows = []
        for _ in range(count):
            windows.append({"window": self.window, "load": self.load_LE(tokens).tolist()})
            self.window += 1
        response = client.post(f"/v1/deployments/{name}/windows", json={"rank": rank, "windows": windows})
        assert response.status_code == 202, response.text
        found: dict[str, Any] = response.json()
        return found


def placement_of(
    rows: list[list[int]] | None = None, *, devices: int = DEVICES, experts: int = EXPERTS
) -> bytes:
    """Return a placement file; by default experts lie in order, the same in every layer."""
    row = list(range(experts))
    document = {
        "format": "moe-placement/1",
        "num_layers": len(rows or [row] * LAYERS),
        "num_experts": experts,
        "num_devices": devices,
        "physical_to_logical_map": rows or [row] * LAYERS,
        "device_of_slot": [slot * devices // experts for slot in range(experts)],
    }
    return json.dumps(document).encode()


def spread(order: list[int]) -> bytes:
    """Return the placement with experts in another order."""
    return placement_of([order] * LAYERS)


def upload_placement(client: httpx.Client, content: bytes) -> str:
    """Upload a placement; return its id."""
    response = client.post("/v1/placements", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 201), response.text
    found: str = response.json()["id"]
    return found


def put(client: httpx.Client, name: str, **changes: Any) -> dict[str, Any]:
    """Create or change a deployment of the small model."""
    response = client.put(f"/v1/deployments/{name}", json={**SPEC, **changes})
    assert response.status_code in (200, 201), response.text
    found: dict[str, Any] = response.json()
    return found


def promote(client: httpx.Client, name: str, content: bytes, **headers: str) -> dict[str, Any]:
    """Upload a placement and promote it."""
    body = {"placement_id": upload_placement(client, content), "why": "test"}
    response = client.put(f"/v1/deployments/{name}/placement", json=body, headers=headers)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def get(client: httpx.Client, path: str) -> dict[str, Any]:
    """Return a document."""
    response = client.get(path)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def versions(client: httpx.Client, name: str) -> list[dict[str, Any]]:
    """Return the history, newest first."""
    found: list[dict[str, Any]] = get(client, f"/v1/deployments/{name}/versions")["items"]
    return found


def until(
    client: httpx.Client, name: str, condition: Callable[[dict[str, Any]], Any], within_s: float = 60.0
) -> dict[str, Any]:
    """Return the deployment once it meets a condition."""
    last: dict[str, Any] = {}

    def look() -> bool:
        last.clear()
        last.update(get(client, f"/v1/deployments/{name}"))
        return bool(condition(last))

    try:
        eventually(look, within_s, every_s=0.1)
    except AssertionError as exc:
        raise AssertionError(f"{exc}\ndrift {last.get('drift')}\nrefresh {last.get('refresh')}") from exc
    return last


@contextmanager
def serving(
    tmp_path: Path, database_url: str, *, role: str = "all", name: str = "data", **env: str
) -> Iterator[tuple[Server, httpx.Client]]:
    """Run a server with short intervals; give it and a client."""
    given = {f"MOE_PLACEMENT_{key.upper()}": value for key, value in env.items()}
    server = Server(
        tmp_path / name,
        role=role,  # type: ignore[arg-type]
        database_url=database_url,
        env={"MOE_PLACEMENT_LEASE_SECONDS": "2", "MOE_PLACEMENT_LOG_LEVEL": "warning", **given},
    )
    with server, server.client() as client:
        yield server, client
