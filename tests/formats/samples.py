"""Random placements that engines can load, and a model with dense layers to place them in."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from placement.formats.layers import ModelLayers
from placement.formats.protocol import FormatOptions
from placement.model import ModelShape
from placement.plan import Placement

HYBRID = ModelShape(
    name="hybrid",
    num_layers=2,
    num_experts=4,
    top_k=2,
    hidden_size=8,
    expert_hidden_size=16,
    num_decoder_layers=4,
    moe_layer_ids=(1, 2),
    num_mtp_layers=1,
)
"""Four decoder layers, dense at both ends, and one for multi-token prediction."""


def model_of(placement: Placement, *, first_dense: int = 1) -> ModelShape:
    """Return a model with a placement's MoE layers after some dense ones, and one more behind."""
    last = first_dense + placement.num_layers
    return ModelShape(
        name="random-moe",
        num_layers=placement.num_layers,
        num_experts=placement.num_experts,
        top_k=1,
        hidden_size=8,
        expert_hidden_size=8,
        num_decoder_layers=last + 1,
        moe_layer_ids=tuple(range(first_dense, last)),
        num_mtp_layers=1,
    )


def options_of(placement: Placement, *, first_dense: int = 1) -> FormatOptions:
    """Return what a reader of a placement's file is told."""
    model = model_of(placement, first_dense=first_dense)
    return FormatOptions(layers=ModelLayers.of(model), num_devices=placement.num_devices)


def place(rows: list[list[int]], *, devices: int = 2, experts: int = 4, **more: object) -> Placement:
    """Return a placement of equal slots, device by device."""
    return Placement(
        physical_to_logical_map_LS=np.array(rows),
        device_of_slot_S=np.repeat(np.arange(devices), len(rows[0]) // devices),
        num_experts=experts,
        num_devices=devices,
        **more,  # type: ignore[arg-type]
    )


@st.composite
def placements(draw: st.DrawFn, *, replicas: bool = True, one_map: bool = False) -> Placement:
    """Draw a placement with equal, filled slots in any order; `one_map` is the same in every layer."""
    num_devices = draw(st.integers(1, 4))
    slots = draw(st.integers(1, 4))
    num_slots = num_devices * slots
    num_experts = draw(st.integers(slots, num_slots)) if replicas else num_slots
    num_layers = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = [_row(rng, num_devices, slots, num_experts) for _ in range(num_layers)]
    device_S = np.repeat(np.arange(num_devices), slots)
    order_S = rng.permutation(num_slots)
    return Placement(
        physical_to_logical_map_LS=np.stack([rows[0] if one_map else row for row in rows])[:, order_S],
        device_of_slot_S=device_S[order_S],
        num_experts=num_experts,
        num_devices=num_devices,
    )


def _row(rng: np.random.Generator, num_devices: int, slots: int, num_experts: int) -> np.ndarray:
    """Return a layer's experts device by device: every expert there, none twice on a device."""
    # Runs of consecutive ids never repeat within a device that has at most as many slots as there are
    # experts.
    row_DS = (np.arange(num_devices * slots) % num_experts).reshape(num_devices, slots)
    for _ in range(num_devices * slots):
        (a, b), (i, j) = rng.integers(num_devices, size=2), rng.integers(slots, size=2)
        x, y = row_DS[a, i], row_DS[b, j]
        if a != b and x not in row_DS[b] and y not in row_DS[a]:
            row_DS[a, i], row_DS[b, j] = y, x
    return rng.permutation(num_experts)[row_DS].ravel()
