"""Placement files over HTTP: any engine's in, any engine's out, kept in our own form."""

from __future__ import annotations

import json

import httpx
import pytest

from service.artifacts import digest_of
from tests.service.api.guarded import assert_problem

OURS = {
    "format": "moe-placement/1",
    "physical_to_logical_map": [[0, 1, 2, 3]],
    "device_of_slot": [0, 0, 1, 1],
}


def test_placements_of_every_form_are_kept_in_ours(client: httpx.Client) -> None:
    """Ours is stored byte for byte; an engine's is read by its rules and stored as ours."""
    content = json.dumps(OURS).encode()
    first = client.post("/v1/placements", content=content, headers={"Content-Type": "application/json"})
    assert first.status_code == 201, first.text
    assert first.json()["id"] == digest_of(content)
    assert client.post("/v1/placements", content=content).status_code == 200
    assert client.get(first.headers["location"]).content == content


@pytest.mark.parametrize("name", ["tensorrt-llm", "vllm", "vllm-ascend", "megatron", "deepspeed"])
def test_engines_files_come_and_go(client: httpx.Client, name: str) -> None:
    """What an engine gets can be given back, and is the same placement."""
    model = {"name": "m", "moe_layer_ids": [0], "num_decoder_layers": 1}
    ours = client.post("/v1/placements", json={**OURS, "model": model}).json()
    engine = client.get(ours["links"]["self"], params={"format": name})
    assert engine.status_code == 200, engine.text

    back = client.post("/v1/placements", content=engine.content, params={"devices": 2})

    assert back.status_code in (200, 201), back.text
    found = client.get(back.json()["links"]["self"]).json()
    assert {key: found[key] for key in OURS} == OURS
    again = client.get(ours["links"]["self"], params={"format": name})
    assert (again.content, again.headers["etag"]) == (engine.content, engine.headers["etag"])
    known = client.get(
        ours["links"]["self"], params={"format": name}, headers={"If-None-Match": engine.headers["etag"]}
    )
    assert (known.status_code, known.content) == (304, b"")


def test_a_model_says_what_a_file_does_not(client: httpx.Client) -> None:
    """SGLang's rows need the model's layers, on the way in and on the way out; presets alone name it."""
    rows = {"physical_to_logical_map": [list(range(8))] * 32}
    problem = assert_problem(client.post("/v1/placements?devices=2", json=rows), 422, "invalid")
    assert "?model=" in problem["detail"]
    made = client.post("/v1/placements?devices=2&model=mixtral-8x7b", json=rows)
    assert made.status_code == 201, made.text
    out = client.get(made.headers["location"], params={"format": "sglang", "model": "mixtral-8x7b"})
    assert out.json() == rows
    for wrong in ("/etc/passwd", "../x", "mixtral-8x22b"):
        assert_problem(
            client.get(made.headers["location"], params={"format": "sglang", "model": wrong}), 422, "invalid"
        )
        assert_problem(client.post(f"/v1/placements?devices=2&model={wrong}", json=rows), 422, "invalid")
    assert_problem(client.get(made.headers["location"], params={"format": "nope"}), 422, "invalid")


def test_placements_are_validated(client: httpx.Client) -> None:
    """As on the command line: what is wrong is said in one line."""
    for document, said in [
        ({**OURS, "physical_to_logical_map": [[0, 0, 1, 2]]}, "device"),
        ({**OURS, "device_of_slot": [0, 0]}, "slot"),
        ({"hello": 1}, "no placement of a known format"),
    ]:
        problem = assert_problem(client.post("/v1/placements", json=document), 422, "invalid")
        assert said in problem["detail"]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe{",
        b"[" * 100_000,
        b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"\n".join(
            b"%c: &%c [%s]" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
        ),
    ],
    ids=["no UTF-8", "deep", "YAML bomb"],
)
def test_hostile_documents_do_no_harm(client: httpx.Client, content: bytes) -> None:
    """Bad text, endless nesting and aliases that multiply are refused, and the server goes on."""
    assert_problem(client.post("/v1/placements", content=content), 422, "invalid")
