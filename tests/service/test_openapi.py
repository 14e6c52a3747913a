"""The OpenAPI document against a real server: every operation as described, and nothing in the 500s."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from service.state.database import open_database
from service.state.tokens import Scope, TokenStore
from tests.service.server import Server, tiny_trace, upload

Operation = schemathesis.APIOperation[Any, Any, Any, Any]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
FEW = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)


class Described:
    """A server, its document, and ids of what it holds.

    Its token has all scopes.
    """

    def __init__(
        self,
        server: Server,
        client: httpx.Client,
        session: requests.Session,
        folder: Path,
        *,
        num_examples: int,
    ) -> None:
        self.client = client
        self.known = known_ids(client, folder)
        self.num_examples = num_examples
        self._session = session
        self.headers = {"Authorization": f"Bearer {server.token}"}
        self.schema = schemathesis.openapi.from_url(f"{server.base_url}/openapi.json", headers=self.headers)

    def send(self, case: schemathesis.Case[Any]) -> None:
        """Send a request, one half of them for what exists, and check the answer."""
        if len(repr((case.path_parameters, case.body))) % 2:
            self._make_real(case)
        if "wait" in (case.query or {}):
            case.query["wait"] = 0
        answer = case.call(session=self._session, headers=self.headers, timeout=20)
        case.validate_response(answer, checks=CHECKS)

    def _make_real(self, case: schemathesis.Case[Any]) -> None:
        for holder in (case.path_parameters, case.query, case.body):
            if isinstance(holder, dict):
                holder.update({name: self.known[name] for name in self.known.keys() & holder.keys()})


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def described(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Described]:
    """A server without a worker on each kind of database."""
    folder = tmp_path_factory.mktemp("openapi")
    url = f"sqlite:///{folder / 'state.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("cluster").create(f"openapi_{uuid4().hex}")
    database = open_database(url)
    token = TokenStore(database).create(name="tester", scopes=[Scope.ADMIN], by="test").text
    database.close()
    running = Server(folder / "data", role="api", database_url=url, token=token)
    with running as server, server.client() as client, requests.Session() as session:
        yield Described(server, client, session, folder, num_examples=8 if request.param == "sqlite" else 4)


def known_ids(client: httpx.Client, folder: Path) -> dict[str, str]:
    """Make one thing of each kind; return their ids by the name of the parameter."""
    trace = upload(client, tiny_trace(folder / "tiny.npz"))
    body = {"trace_id": trace, "topology": "h100:1x2"}
    solve = client.post("/v1/solves", json=body).json()["id"]
    assert client.delete(f"/v1/solves/{solve}").json()["status"] == "stopped"
    in_order = {
        "format": "moe-placement/1",
        "num_layers": 2,
        "num_experts": 8,
        "num_devices": 2,
        "physical_to_logical_map": [list(range(8))] * 2,
        "device_of_slot": [0] * 4 + [1] * 4,
    }
    stored = client.post("/v1/placements", json=in_order).json()["id"]
    return {"trace_id": trace, "solve_id": solve, "placement_id": stored, "from": stored}


def explore(
    described: Described, operation: schemathesis.APIOperation[Any, Any, Any, Any], mode: GenerationMode
) -> None:
    """Send some requests of an operation."""

    @settings(FEW, max_examples=described.num_examples)
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case[Any]) -> None:
        described.send(case)

    with suppress(Unsatisfiable):  # without parameters there is nothing to get wrong
        check()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_whatever_comes_is_answered_as_described(
    described: Described, mode: GenerationMode, subtests: pytest.Subtests
) -> None:
    """Valid or not, random or for what exists: an answer of the document, never a failure inside."""
    for found in described.schema.get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()
        with subtests.test(operation.label):
            explore(described, operation, mode)


@pytest.mark.parametrize("path", ["/v1/solves", "/v1/evaluations"])
def test_the_examples_are_taken_for_what_they_are(described: Described, path: str) -> None:
    """Every example of a body is valid: what is missing is only what it names."""
    body = described.schema.raw_schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    assert body["examples"]
    for example in body["examples"].values():
        answer = described.client.post(path, json=example["value"])
        assert (answer.status_code, answer.json()["code"]) == (404, "not-found")


def test_every_operation_is_told_of(described: Described) -> None:
    """Each has an id of its own, a summary, a tag; each error has the form of a problem."""
    operations = [one for path in described.schema.raw_schema["paths"].values() for one in path.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(set(ids)) == len(ids)
    for operation in operations:
        assert operation["summary"]
        assert operation["tags"]
        for status, answer in operation["responses"].items():
            if int(status) >= 400 and operation["tags"] != ["health"]:
                assert list(answer["content"]) == ["application/problem+json"], operation["operationId"]
