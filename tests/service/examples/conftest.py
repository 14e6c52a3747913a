"""A running service with a deployment of the bundled model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from placement.io import dump_json, placement_to_dict
from placement.plan import Placement
from service.client import Client
from tests.service.server import Server

__all__ = ["Service", "placement_file"]

LAYERS, EXPERTS, DEVICES = 6, 16, 4


def placement_file(shift: int) -> bytes:
    """Return the file of a placement of byte16 on four devices, another one for every shift."""
    placement = Placement(
        physical_to_logical_map_LS=np.tile(np.roll(np.arange(EXPERTS), shift), (LAYERS, 1)),
        device_of_slot_S=np.repeat(np.arange(DEVICES), EXPERTS // DEVICES),
        num_experts=EXPERTS,
        num_devices=DEVICES,
        model_name="byte16",
    )
    return dump_json(placement_to_dict(placement)).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The service, and the deployment's name."""

    url: str
    client: Client
    deployment: str

    def promote(self, shift: int) -> bytes:
        """Promote another placement; return its file."""
        content = placement_file(shift)
        self.client.promote(self.deployment, placement=self.client.upload_placement(content))
        return content


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a running server."""
    with Server(tmp_path_factory.mktemp("service") / "data") as running:
        yield running


@pytest.fixture
def service(server: Server, request: pytest.FixtureRequest) -> Iterator[Service]:
    """Return a deployment of its own with one placement."""
    name = request.node.name.partition("[")[0].replace("_", "-")[:60]
    with Client(server.base_url) as client:
        client.put_deployment(
            name,
            {
                "topology": "h100:1x4",
                "model": {"layers": LAYERS, "experts": EXPERTS, "top_k": 2},
                "num_ranks": 2,
            },
        )
        found = Service(url=server.base_url, client=client, deployment=name)
        found.promote(1)
        yield found
