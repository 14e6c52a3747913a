"""Examples of the OpenAPI document: one small solve, told from its request to its end."""

from __future__ import annotations

from typing import Any

__all__ = [
    "ACCEPTED",
    "CHECKED",
    "EVALUATED",
    "EVALUATION_REQUEST",
    "EVENTS",
    "PLACEMENT",
    "PLACEMENT_ID",
    "SOLVE",
    "SOLVE_ID",
    "SOLVE_REQUEST",
    "TRACE_ID",
]

SOLVE_ID = "s-01kapn3v5c9w8j2m6r0xq4t7yz"
EVALUATION_ID = "e-01kapn3v5c9w8j2m6r0xq4t800"
CHECK_ID = "c-01kapn3v5c9w8j2m6r0xq4t801"
TRACE_ID = "sha256:" + "3b" * 32
PLACEMENT_ID = "sha256:" + "c4" * 32

SOLVE_REQUEST: dict[str, Any] = {
    "trace_id": TRACE_ID,
    "topology": "h100:1x8",
    "options": {"objective": "balance", "spare_slots": 8, "window": 512, "time_limit": 30.0},
}
EVALUATION_REQUEST: dict[str, Any] = {
    "placement_id": SOLVE_ID,
    "trace_id": TRACE_ID,
    "topology": "h100:1x8",
    "options": {"objective": "balance", "window": 512},
}

_LINKS = {
    "self": f"/v1/solves/{SOLVE_ID}",
    "events": f"/v1/solves/{SOLVE_ID}/events",
    "placement": f"/v1/solves/{SOLVE_ID}/placement",
    "trace": f"/v1/traces/{TRACE_ID}",
}
_FIGURES = {"lower_bound": 0.000412, "gap": 0.0072}

ACCEPTED: dict[str, Any] = {"id": SOLVE_ID, "status": "queued", "links": _LINKS}

CHECKED: dict[str, Any] = {
    "id": CHECK_ID,
    "status": "succeeded",
    "valid": True,
    "result": {
        "layers": 6,
        "experts": 16,
        "devices": 8,
        "slots": 24,
        "windows": 1170,
        "notes": ["assuming the sizes of byte16; name another with --model"],
    },
}

SOLVE: dict[str, Any] = {
    "id": SOLVE_ID,
    "kind": "solve",
    "status": "running",
    "priority": 0,
    "created_at": 1763822400.0,
    "started_at": 1763822400.2,
    "ended_at": None,
    "elapsed_s": 4.1,
    "elapsed": 4.1,
    "attempt": 1,
    "stop_requested": False,
    "incumbent": {"objective": 0.000415, **_FIGURES, "solver": "search", "elapsed_s": 2.5},
    "objective": 0.000415,
    "bound": 0.000412,
    **_FIGURES,
    "result": None,
    "error": None,
    "placement_id": None,
    "trace_id": TRACE_ID,
    "deployment": None,
    "caller": "local",
    "last_event": 7,
    "request": SOLVE_REQUEST,
    "links": _LINKS,
}

EVALUATED: dict[str, Any] = {
    "id": EVALUATION_ID,
    "status": "succeeded",
    "created_at": 1763822400.0,
    "started_at": 1763822400.2,
    "ended_at": 1763822401.0,
    "elapsed_s": 0.8,
    "result": {
        "objective": {"name": "step-time", "value": 0.000415, "unit": "s"},
        "balance": 1.031,
        "windows": 1170,
        "devices": 8,
        "trace": TRACE_ID,
    },
    "error": None,
    "placement_id": PLACEMENT_ID,
    "trace_id": TRACE_ID,
    "request": EVALUATION_REQUEST,
    "links": {"self": f"/v1/evaluations/{EVALUATION_ID}"},
}

EVENTS = """retry: 1000

id: 1
event: progress
data: {"phase":"started","attempt":1}

id: 2
event: incumbent
data: {"objective":0.000415,"lower_bound":0.000412,"gap":0.0072,"solver":"search","elapsed_s":2.5}

: keep-alive

id: 3
event: done
data: {"status":"succeeded","result":{"objective":{"value":0.000415}},"error":null}

"""

PLACEMENT: dict[str, Any] = {
    "format": "moe-placement/1",
    "model": {"name": None, "moe_layer_ids": [0]},
    "num_layers": 1,
    "num_experts": 4,
    "num_devices": 2,
    "physical_to_logical_map": [[0, 3, 1, 2]],
    "device_of_slot": [0, 0, 1, 1],
}
