"""DeepSpeed: a permutation of the checkpoint, because ranks hold contiguous shards of the experts.

Rank `r` of an expert parallel group of `N` has experts `r * E/N` and up, in every layer.
"""

from __future__ import annotations

from pathlib import Path

from placement.formats import permutation_file
from placement.formats.permutation_file import recognise
from placement.formats.protocol import FormatOptions, Usage
from placement.plan import Placement

__all__ = ["SUFFIXES", "check", "decode", "encode", "recognise", "usage"]

SUFFIXES: tuple[str, ...] = ()

TARGET = "DeepSpeed"

decode = permutation_file.decode


def check(placement: Placement, options: FormatOptions) -> None:
    """Verify that every expert has one replica and shards are equal; see `PlacementFormat.check`."""
    permutation_file.permutation_of(placement, options, target=TARGET)


def encode(placement: Placement, options: FormatOptions) -> str:
    """Return the JSON text."""
    return permutation_file.encode(placement, options, target=TARGET)


def usage(placement: Placement, options: FormatOptions, path: Path) -> Usage:
    """Say that the checkpoint is to be rearranged."""
    return Usage(
        settings=(("deepspeed.moe.layer.MoE(ep_size=)", str(placement.num_devices)),),
        notes=(
            "rearrange the checkpoint before loading it, experts and router rows of each layer: "
            "moe-placement export PLACEMENT --to deepspeed --checkpoint FOLDER -o FOLDER does",
        ),
    )
