"""vLLM: one rank for every expert, ``--expert-placement-file`` of the proposal vllm#34811.

The same for all MoE layers, each expert once, equally many on each rank; a rank keeps its experts in
ascending order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from placement.errors import InputError
from placement.formats.document import keys_of
from placement.formats.protocol import FormatOptions, Usage
from placement.formats.rules import by_device, from_rows, integer
from placement.io import dump_json
from placement.plan import Placement

__all__ = ["SUFFIXES", "check", "decode", "encode", "recognise", "usage"]

SUFFIXES: tuple[str, ...] = (".json",)

KEY = "expert_to_ep_rank"
TARGET = "vLLM's expert placement file"


def check(placement: Placement, options: FormatOptions) -> None:
    """Verify that every layer is the same and no expert has a second replica."""
    by_device(placement, target=TARGET)
    replicas_LE = placement.replicas_LE
    if (replicas_LE > 1).any():
        layer, expert = (int(i[0]) for i in np.nonzero(replicas_LE > 1))
        raise InputError(
            f"expert {expert} of layer {layer} has {replicas_LE[layer, expert]} replicas; {TARGET} has one "
            "rank for each: solve with --spare-slots 0, or export to vllm"
        )
    home_LE = placement.first_device_LE
    other_L = (home_LE != home_LE[0]).any(axis=1)
    if other_L.any():
        layer = int(other_L.argmax())
        expert = int((home_LE[layer] != home_LE[0]).argmax())
        raise InputError(
            f"expert {expert} is on device {home_LE[0, expert]} in layer 0 and {home_LE[layer, expert]} in "
            f"layer {layer}; {TARGET} has one map for all layers: export to vllm"
        )


def encode(placement: Placement, options: FormatOptions) -> str:
    """Return the JSON text."""
    check(placement, options)
    return dump_json({KEY: placement.first_device_LE[0].tolist()}) + "\n"


def recognise(document: object) -> bool:
    """Tell by the key."""
    return isinstance(document, dict) and KEY in document


def decode(document: object, options: FormatOptions) -> Placement:
    """Read the ranks of one layer, for all layers of the model."""
    values = keys_of(document, required=(KEY,))[KEY]
    if not isinstance(values, list) or not values:
        raise InputError(f"{KEY} must be a list of ranks")
    rank_E = np.array([integer(rank, name=f"{KEY}[{expert}]") for expert, rank in enumerate(values)])
    num_ranks = int(rank_E.max()) + 1 if options.num_devices is None else options.num_devices
    if rank_E.max() >= num_ranks:
        raise InputError(f"{KEY} names rank {rank_E.max()} of {num_ranks} devices")
    known = options.layers
    if known is None:
        raise InputError(
            "is one map for all MoE layers, and nothing says how many; name the model with --model"
        )
    if known.num_experts is not None and known.num_experts != len(values):
        raise InputError(
            f"places {len(values)} experts, {known.model_name or 'the model'} has {known.num_experts}"
        )
    held_D = np.bincount(rank_E, minlength=num_ranks)
    if (held_D != held_D[0]).any():
        rank = int((held_D != held_D[0]).argmax())
        raise InputError(
            f"puts {held_D[0]} experts on rank 0 and {held_D[rank]} on rank {rank}; equally many is a rule"
        )
    row_R = np.argsort(rank_E, kind="stable").astype(np.int64)
    return from_rows(
        np.tile(row_R, (known.num_layers, 1)),
        num_devices=num_ranks,
        num_experts=len(values),
        moe_layer_ids=known.moe_layer_ids,
        model_name=known.model_name,
    )


def usage(placement: Placement, options: FormatOptions, path: Path) -> Usage:
    """Return the options of the proposal."""
    return Usage(
        arguments=("--enable-expert-parallel", "--expert-placement-file", str(path)),
        notes=("needs a vLLM with the expert placement file (vllm#34811); not together with --enable-eplb",),
    )
