"""vLLM: a table of slots per MoE layer, ``eplb_config.initial_expert_map_path``.

Released vLLM loads no placement file: our policy plugin (`placement.runtime.vllm_policy`) reads this one, and
so does the initial-map proposal (vllm#49572), which also takes one row for all layers.
"""

from __future__ import annotations

import json
from pathlib import Path

from placement.errors import InputError
from placement.formats.protocol import FormatOptions, Usage
from placement.formats.rules import by_device, from_rows, integer_rows
from placement.io import dump_json
from placement.plan import Placement

__all__ = ["SUFFIXES", "check", "decode", "encode", "recognise", "usage"]

SUFFIXES: tuple[str, ...] = (".json",)

TARGET = "vLLM"

MOST_REDUNDANT = 1023
"""vLLM keeps a table of at most 1024 slots per expert."""


def check(placement: Placement, options: FormatOptions) -> None:
    """Verify that vLLM can load the placement; see `PlacementFormat.check`."""
    redundant = by_device(placement, target=TARGET).shape[1] - placement.num_experts
    if redundant > MOST_REDUNDANT:
        raise InputError(
            f"the placement has {redundant} redundant slots per layer; vLLM takes at most {MOST_REDUNDANT}"
        )


def encode(placement: Placement, options: FormatOptions) -> str:
    """Return the JSON text: a row for every MoE layer."""
    check(placement, options)
    return dump_json(by_device(placement, target=TARGET).tolist()) + "\n"


def recognise(document: object) -> bool:
    """Tell by there being no names at all: a bare list."""
    return isinstance(document, list)


def decode(document: object, options: FormatOptions) -> Placement:
    """Read a row per MoE layer, or one row for all."""
    known = options.layers
    shared = isinstance(document, list) and bool(document) and not isinstance(document[0], list)
    rows = integer_rows([document] if shared else document, name="the map")
    if shared:
        if known is None:
            raise InputError(
                "is one row for all MoE layers, and nothing says how many there are; name the model with "
                "--model"
            )
        rows = rows.repeat(known.num_layers, axis=0)
    if known is not None and known.num_layers != len(rows):
        raise InputError(
            f"lists {len(rows)} MoE layers, {known.model_name or 'the model'} has {known.describe()}; name "
            "the right model with --model"
        )
    return from_rows(
        rows,
        num_devices=options.num_devices,
        num_experts=None if known is None else known.num_experts,
        moe_layer_ids=None if known is None else known.moe_layer_ids,
        model_name=None if known is None else known.model_name,
    )


def usage(placement: Placement, options: FormatOptions, path: Path) -> Usage:
    """Return how to load the table through the plugin, and through the proposal."""
    redundant = by_device(placement, target=TARGET).shape[1] - placement.num_experts
    config = {"num_redundant_experts": redundant}
    proposed = {**config, "initial_expert_map_path": str(path)}
    return Usage(
        arguments=("--enable-expert-parallel", "--enable-eplb", "--eplb-config", json.dumps(config)),
        settings=(("environment MOE_PLACEMENT_VLLM_PLACEMENT", str(path)),),
        notes=(
            "the policy plugin that comes with moe-placement puts it in place at the first rebalance; where "
            f"vLLM has the initial-map proposal (vllm#49572), pass --eplb-config '{json.dumps(proposed)}' "
            "instead",
        ),
    )
