"""Placements to and from the files of engines: found by content, checked by reading back, written whole.

A format is a module with the functions of `PlacementFormat`, listed in `FORMATS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from placement._suggest import did_you_mean
from placement.errors import InputError
from placement.formats import (
    deepspeed,
    megatron,
    native,
    sglang,
    tensorrt_llm,
    vllm,
    vllm_ascend,
    vllm_ranks,
)
from placement.formats.document import parse_document, read_document
from placement.formats.fill import full
from placement.formats.protocol import FormatOptions, PlacementFormat
from placement.formats.rules import same_placement
from placement.io import placement_from_dict, write_text
from placement.plan import Placement

__all__ = [
    "FORMATS",
    "check_name",
    "encode_as",
    "find_format",
    "placement_from_document",
    "read_placement_file",
    "write_as",
]

FORMATS: Mapping[str, PlacementFormat] = MappingProxyType(
    {
        "sglang": sglang,
        "tensorrt-llm": tensorrt_llm,
        "vllm": vllm,
        "vllm-ranks": vllm_ranks,
        "vllm-ascend": vllm_ascend,
        "megatron": megatron,
        "deepspeed": deepspeed,
        "native": native,
    }
)
"""Placement formats by the name that ``--to`` takes."""


def _format(name: str) -> PlacementFormat:
    if name not in FORMATS:
        raise InputError(f"unknown placement format {name!r}; {did_you_mean(name, FORMATS)}")
    return FORMATS[name]


def check_name(path: str | os.PathLike[str], to: str) -> None:
    """Refuse a file name that the engine would not load.

    Raises
    ------
    InputError
        If there is no such format, or the engine insists on another ending.
    """
    suffixes = _format(to).SUFFIXES
    if suffixes and not os.fspath(path).endswith(suffixes):
        raise InputError(f"{os.fspath(path)}: {to} only loads files that end in {' or '.join(suffixes)}")


def encode_as(placement: Placement, to: str, options: FormatOptions) -> str:
    """Return a placement as the text of an engine's file, proved by reading it back.

    Parameters
    ----------
    to
        A key of `FORMATS`.
    options
        The model's layers, for engines that count others than the MoE layers.

    Raises
    ------
    InputError
        If the engine cannot load the placement, or needs to know more of the model.
    """
    target = _format(to)
    if to != "native":
        placement = full(placement)
    target.check(placement, options)
    text = target.encode(placement, options)
    back = target.decode(parse_document(text), replace(options, num_devices=placement.num_devices))
    difference = same_placement(placement, back)
    if difference is not None:
        raise InputError(f"the placement does not survive {to}: read back it has {difference}")
    return text


def write_as(placement: Placement, path: str | os.PathLike[str], to: str, options: FormatOptions) -> None:
    """Write a placement as an engine's file, whole or not at all.

    Raises
    ------
    InputError
        As for `encode_as`, or if the file has a wrong ending or cannot be written.
    """
    check_name(path, to)
    write_text(path, encode_as(placement, to, options))


def find_format(document: object) -> str:
    """Return the format of a document, by its content.

    Raises
    ------
    InputError
        If it is of none.
    """
    for name in ("native", *FORMATS):
        if FORMATS[name].recognise(document):
            return name
    seen = f"an object with {', '.join(map(repr, list(document)[:4]))}" if isinstance(document, dict) else ""
    raise InputError(
        f"is no placement of a known format ({', '.join(FORMATS)}): it holds "
        f"{seen or f'a {type(document).__name__}'}"
    )


def read_placement_file(
    path: str | os.PathLike[str], options: FormatOptions | Callable[[], FormatOptions] | None = None
) -> Placement:
    """Read a placement from our own file or from that of an engine, found out by content.

    Parameters
    ----------
    options
        What engines' files may not say: the model's layers, and how many devices there are. As a function it
        is called for such files alone.

    Raises
    ------
    InputError
        If the file is of no known format, breaks its rules, or lacks what `options` does not tell either.
    """
    try:
        document = read_document(Path(path))
    except InputError as exc:
        raise InputError(f"{os.fspath(path)}: {exc}") from exc
    return placement_from_document(document, options, source=os.fspath(path))


def placement_from_document(
    document: object,
    options: FormatOptions | Callable[[], FormatOptions] | None = None,
    *,
    source: str = "placement",
) -> Placement:
    """Build a placement from what a file of any format parses to.

    Parameters
    ----------
    options
        As for `read_placement_file`.
    source
        Start of every message.

    Raises
    ------
    InputError
        As for `read_placement_file`.
    """
    try:
        name = find_format(document)
    except InputError as exc:
        raise InputError(f"{source}: {exc}") from exc
    if name == "native":
        return placement_from_dict(document, source=source)
    told = options() if callable(options) else options or FormatOptions()
    try:
        return FORMATS[name].decode(document, told)
    except InputError as exc:
        raise InputError(f"{source}: is read as a placement of {name}: {exc}") from exc
