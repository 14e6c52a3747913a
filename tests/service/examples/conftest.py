"""A running service with a deployment of the bundled model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placement.io import dump_json, placement_to_dict
from placement.plan import Placement
from service.client import Client
from tests.service.server import Server

__all__ = ["Service", "placement_file"]

ROOT = Path(__file__).parents[3]
LAYERS, EXPERTS, DEVICES = 6, 16, 4
SPEC = {
    "topology": "h100:1x4",
    "model": {"layers": LAYERS, "experts": EXPERTS, "top_k": 2},
    "num_ranks": 2,
}


def placement_file(shift: int, *, devices: int = DEVICES, swapped: bool = False) -> bytes:
    """Return the file of a placement of byte16, another one for every shift, or with two experts swapped."""
    map_LS = np.tile(np.roll(np.arange(EXPERTS), shift), (LAYERS, 1))
    if swapped:
        map_LS[0, [0, -1]] = map_LS[0, [-1, 0]]
    placement = Placement(
        physical_to_logical_map_LS=map_LS,
        device_of_slot_S=np.repeat(np.arange(devices), EXPERTS // devices),
        num_experts=EXPERTS,
        num_devices=devices,
        model_name="byte16",
    )
    return dump_json(placement_to_dict(placement)).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The service, and the deployment's name."""

    url: str
    client: Client
    deployment: str

    def promote(self, shift: int, **options: Any) -> bytes:
        """Promote another placement; return its file."""
        content = placement_file(shift, **options)
        self.client.promote(self.deployment, placement=self.client.upload_placement(content))
        return content


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a running server."""
    with Server(tmp_path_factory.mktemp("service") / "data") as running:
        yield running


@pytest.fixture
def token(tmp_path: Path) -> str:
    """Return an administrator's token of a data directory ``guarded``, whose server asks for one."""
    options = ["admin", "--scope", "admin", "--data-dir", str(tmp_path / "guarded"), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "placement.cli", "token", "create", *options],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    found: str = json.loads(done.stdout)["token"]
    return found


@pytest.fixture
def guarded(token: str, tmp_path: Path) -> Iterator[Service]:
    """Return a deployment of a service that asks for a token."""
    with (
        Server(tmp_path / "guarded", token=token) as running,
        Client(running.base_url, token=token) as client,
    ):
        client.put_deployment("chat", SPEC)
        found = Service(url=running.base_url, client=client, deployment="chat")
        found.promote(1)
        yield found


@pytest.fixture
def training(server: Server, request: pytest.FixtureRequest) -> Iterator[Service]:
    """Return a deployment of its own for two ranks that share the experts, with one placement."""
    name = re.sub(r"[^a-z]+", "-", request.node.name).strip("-")
    with Client(server.base_url) as client:
        client.put_deployment(name, {**SPEC, "topology": "h100:1x2"})
        found = Service(url=server.base_url, client=client, deployment=name)
        found.promote(1, devices=2)
        yield found


@pytest.fixture
def service(server: Server, request: pytest.FixtureRequest) -> Iterator[Service]:
    """Return a deployment of its own with one placement."""
    name = request.node.name.partition("[")[0].replace("_", "-")[:60]
    with Client(server.base_url) as client:
        client.put_deployment(name, SPEC)
        found = Service(url=server.base_url, client=client, deployment=name)
        found.promote(1)
        yield found
