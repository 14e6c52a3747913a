"""What the figures of the service are measured on: a real server, a trace, a placement that is deployed."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from placement import Placement
from placement.io import placement_to_dict, write_json
from tests.service.server import Server, eventually, tiny_trace, upload

__all__ = [
    "DEPLOYMENT",
    "Figure",
    "Stage",
    "deploy",
    "median",
    "memory_mb",
    "request_text",
    "staged",
    "wait_for_end",
]

LAYERS, EXPERTS, SLOTS, DEVICES = 58, 256, 288, 32
DEPLOYMENT = "prod"
TOPOLOGY = "h100:4x8"
SEED = 0
FINAL = ("succeeded", "stopped", "failed", "timed_out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table.

    Parameters
    ----------
    met
        Whether the target is met; None where there is none.
    """

    what: str
    database: str
    target: str
    measured: str
    met: bool | None
    values: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A server that runs, and what is on it."""

    server: Server
    client: httpx.Client
    database: str
    trace_id: str

    @property
    def port(self) -> int:
        """Port of the server."""
        return self.server.port


def large_placement(path: Path) -> Path:
    """Write a placement of the size of DeepSeek-V3's with 32 spare slots."""
    rng = np.random.default_rng(SEED)
    map_LS = np.empty((LAYERS, SLOTS), dtype=np.int64)
    devices = np.repeat(np.arange(DEVICES), SLOTS // DEVICES)
    for layer in range(LAYERS):
        order_E = rng.permutation(EXPERTS)
        # One more slot on each device; its second copy sits on another one.
        grid_DS = np.empty((DEVICES, SLOTS // DEVICES), dtype=np.int64)
        grid_DS[:, :-1] = order_E.reshape(DEVICES, -1)
        grid_DS[:, -1] = np.roll(grid_DS[:, 0], 1)
        map_LS[layer] = grid_DS.reshape(-1)
    placement = Placement(
        physical_to_logical_map_LS=map_LS, device_of_slot_S=devices, num_experts=EXPERTS, num_devices=DEVICES
    )
    write_json(path, placement_to_dict(placement))
    return path


@contextmanager
def staged(
    folder: Path, *, database: str, url: str | None, role: str = "all", env: dict[str, str] | None = None
) -> Iterator[Stage]:
    """Start a server with a tiny trace on it."""
    server = Server(folder / "data", role=role, database_url=url, env=env)  # type: ignore[arg-type]
    with server, server.client(timeout_s=120) as client:
        trace_id = upload(client, tiny_trace(folder / "tiny.npz", tokens=512))
        yield Stage(server=server, client=client, database=database, trace_id=trace_id)


def deploy(client: httpx.Client, folder: Path) -> tuple[str, str]:
    """Deploy a 58 x 288 placement; return its id and the ETag with which it is served."""
    content = large_placement(folder / "large.json").read_bytes()
    placement_id: str = client.post("/v1/placements", content=content).raise_for_status().json()["id"]
    spec = {"topology": TOPOLOGY, "model": "deepseek-v3", "options": {"spare_slots": SLOTS - EXPERTS}}
    client.put(f"/v1/deployments/{DEPLOYMENT}", json=spec).raise_for_status()
    promotion = {"placement_id": placement_id, "why": "benchmark"}
    client.put(f"/v1/deployments/{DEPLOYMENT}/placement", json=promotion).raise_for_status()
    served = client.get(f"/v1/deployments/{DEPLOYMENT}/placement").raise_for_status()
    return placement_id, served.headers["ETag"]


def request_text(
    stage: Stage, method: str, path: str, *, headers: dict[str, str] | None = None, body: str = ""
) -> str:
    """Return a request as it goes over the wire."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{stage.port}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body.encode())}"]
    return "\r\n".join([*lines, "", body])


def wait_for_end(client: httpx.Client, job_id: str, within_s: float = 120.0) -> dict[str, Any]:
    """Wait until a solve has ended; return it."""

    def ended() -> dict[str, Any] | None:
        found: dict[str, Any] = client.get(f"/v1/solves/{job_id}").raise_for_status().json()
        return found if found["status"] in FINAL else None

    found = eventually(ended, within_s, every_s=0.005)
    assert found is not None
    return found


def memory_mb(server: Server) -> tuple[float, float, int]:
    """Return proportional and resident memory of all processes of a server, and their number."""
    pss_kb = rss_kb = 0
    processes = server.processes()
    for process in processes:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
        pss_kb += int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]
        rss_kb += int(re.search(r"^Rss:\s+(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]
    return pss_kb / 1024, rss_kb / 1024, len(processes)


def median(values: list[float]) -> float:
    """Return the median; NaN of nothing."""
    return statistics.median(values) if values else float("nan")
