"""Our own placement file, which says all there is: see `placement.io`."""

from __future__ import annotations

from pathlib import Path

from placement.formats.protocol import FormatOptions, Usage
from placement.io import dump_json, placement_from_dict, placement_to_dict
from placement.plan import Placement

__all__ = ["SUFFIXES", "check", "decode", "encode", "recognise", "usage"]

SUFFIXES: tuple[str, ...] = ()

KEY = "physical_to_logical_map"


def check(placement: Placement, options: FormatOptions) -> None:
    """Accept every placement."""


def encode(placement: Placement, options: FormatOptions) -> str:
    """Return the JSON text."""
    return dump_json(placement_to_dict(placement)) + "\n"


def recognise(document: object) -> bool:
    """Tell by the format's name, or by the two maps."""
    if not isinstance(document, dict):
        return False
    name = document.get("format")
    ours = isinstance(name, str) and name.startswith("moe-placement/")
    return ours or (KEY in document and "device_of_slot" in document)


def decode(document: object, options: FormatOptions) -> Placement:
    """Read the placement; its own numbers count, whatever `options` say."""
    return placement_from_dict(document, source="placement")


def usage(placement: Placement, options: FormatOptions, path: Path) -> Usage:
    """Say nothing: it is for our own commands."""
    return Usage()
