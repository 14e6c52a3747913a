"""Requests are checked before they are queued; messages are in the caller's terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from placement.errors import InputError
from service.jobs.problem import check_request, for_callers, inputs_of
from service.schemas import EvaluationRequest, SolveRequest
from service.settings import Settings

TRACE = "sha256:" + "0" * 64


def solve(**changes: Any) -> SolveRequest:
    """Return a body that is fine but for the changes."""
    return SolveRequest.model_validate({"trace_id": TRACE, "topology": "h100:1x8", **changes})


def test_good_requests_pass() -> None:
    """Objects and names are both taken; the JSON of a request is as good as the request."""
    nodes = {"name": "two", "nodes": [{"kind": "h100", "devices": 4, "count": 2}]}
    sizes = {"num_layers": 2, "num_experts": 8, "top_k": 2, "hidden_size": 64, "expert_hidden_size": 32}
    for request in (
        solve(),
        solve(topology=nodes, model=sizes, options={"solver": "greedy", "threads": 4}),
        solve(model="deepseek-v3", start_placement_id="s-1", options={"max_moves": 3}),
    ):
        check_request(request, Settings())
        check_request(request.model_dump(mode="json"))
    check_request(EvaluationRequest(placement_id="s-1", trace_id=TRACE, topology="h100:1x8"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "h100"}, "is not KIND:NODESxDEVICES"),
        ({"topology": "h1000:1x8"}, "h100"),
        ({"topology": {"nodes": []}}, "topology"),
        ({"model": "deepsek-v3"}, "deepseek-v3"),
        ({"model": {"num_layers": 2}}, "model"),
        ({"options": {"solver": "serach"}}, "search"),
        ({"options": {"max_moves": 3}}, "start_placement_id"),
        ({"options": {"spare_slots": 2, "fill_memory": True}}, "spare_slots"),
        ({"options": {"calibration": {"kind": "cubic"}}}, "calibration"),
        ({"options": {"threads": 1000}}, "at most 64"),
    ],
)
def test_bad_requests_are_refused(changes: dict[str, Any], message: str) -> None:
    """One line says what is wrong."""
    with pytest.raises(InputError, match=message):
        check_request(solve(**changes), Settings())


def test_a_model_of_another_shape_is_refused() -> None:
    """Where the trace's summary is known."""
    with pytest.raises(InputError, match="256 experts per layer, the trace 16"):
        check_request(solve(model="deepseek-v3"), trace={"num_experts": 16})


@pytest.mark.parametrize("name", ["topology", "model"])
def test_a_path_is_never_opened(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller's text that names a file of the server is no file."""
    monkeypatch.chdir(tmp_path)
    for text in ("h100:1x8.yaml", "config.json", str(tmp_path / "sizes.yaml")):
        (tmp_path / text).write_text("nodes: [{kind: h100, devices: 2}]", encoding="utf-8")
        with pytest.raises(InputError):
            inputs_of({"topology": "h100:1x8", name: text}, trace="")


def test_messages_lose_paths_and_dashes() -> None:
    """What a caller reads names neither local files nor options of a command line."""
    text = "/data/artifacts/ab: bad;\n name it with --source-format, --from or --model"
    told = for_callers(text, {Path("/data/artifacts/ab"): "the trace"})
    assert told == "the trace: bad; name it with source_format, source_format or model"
