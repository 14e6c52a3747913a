"""Placements on the command line: our own files and those of engines, found out by content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placement.errors import InputError
from placement.tasks.placements import load_placement, note_fillers

if TYPE_CHECKING:
    from placement.formats.protocol import FormatOptions
    from placement.model import ModelShape
    from placement.plan import Placement
    from placement.problem import PlacementProblem
    from placement.tasks.problem import TraceOrigin

__all__ = [
    "DevicesOption",
    "ExportFile",
    "ExportOption",
    "check_exports",
    "encode_exports",
    "export_options",
    "load_placement",
    "note_fillers",
    "parse_exports",
    "warn_of_moves",
    "write_exports",
]

DevicesOption = Annotated[
    int | None,
    typer.Option(
        "--devices",
        help="Devices that share the slots, for an engine's file that does not say.",
        show_default=False,
    ),
]
ExportOption = Annotated[
    list[str] | None,
    typer.Option(
        "--export",
        metavar="FORMAT=FILE",
        help="Also write the result for an engine; repeatable. Formats: those of export.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportFile:
    """A file to write for an engine."""

    format: str
    path: Path


def parse_exports(texts: Sequence[str] | None) -> tuple[ExportFile, ...]:
    """Return the files that ``--export FORMAT=FILE`` names.

    Raises
    ------
    InputError
        If one is malformed, of an unknown format, or has a name that its engine does not load.
    """
    from placement.formats.files import check_name

    files = []
    for text in texts or ():
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise InputError(f"--export {text!r} must be FORMAT=FILE, such as sglang=location.json")
        check_name(path, name)
        files.append(ExportFile(format=name, path=Path(path)))
    paths = [file.path for file in files]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise InputError(f"--export names {twice[0]} twice")
    return tuple(files)


def encode_exports(
    placement: Placement, files: Sequence[ExportFile], model: ModelShape | None
) -> tuple[str, ...]:
    """Return the text of every file; nothing is written yet.

    Raises
    ------
    InputError
        If one of the engines cannot load the placement.
    """
    from placement.formats.files import encode_as

    texts = []
    for file in files:
        options = export_options(placement, model)
        try:
            texts.append(encode_as(placement, file.format, options))
        except InputError as exc:
            raise InputError(f"--export {file.format}={file.path}: {exc}") from exc
    return tuple(texts)


def export_options(
    placement: Placement, model: ModelShape | None, *, num_mtp_layers: int | None = None
) -> FormatOptions:
    """Return what formats need to know of the model that a placement is for.

    Raises
    ------
    InputError
        If placement and model contradict each other.
    """
    from placement.formats.layers import layers_of
    from placement.formats.protocol import FormatOptions

    layers = layers_of(placement, model, num_mtp_layers=num_mtp_layers)
    return FormatOptions(layers=layers, num_devices=placement.num_devices)


def write_exports(
    placement: Placement, files: Sequence[ExportFile], problem: PlacementProblem, *, written: Path
) -> float | None:
    """Write the files of a solve: all of them, or none.

    Parameters
    ----------
    written
        Where the placement itself is already, for the message.

    Returns
    -------
    objective
        With the slots filled that engines do not leave empty; None where nothing had to be filled.

    Raises
    ------
    InputError
        If one of the engines cannot load the placement, or a file cannot be written.
    """
    from placement.cost import CostModel
    from placement.formats.fill import full
    from placement.io import write_text

    if not files:
        return None
    try:
        texts = encode_exports(placement, files, problem.model)
    except InputError as exc:
        raise InputError(f"{exc}; the placement is in {written}") from exc
    for file, text in zip(files, texts, strict=True):
        write_text(file.path, text)
    filled = full(placement)
    return None if filled is placement else CostModel(problem).evaluate(filled).objective


def warn_of_moves(start: Placement, placement: Placement, max_moves: int) -> None:
    """Tell where filling slots for an engine moves more than the user allowed."""
    from placement.cli.inputs import warn
    from placement.formats.fill import full
    from placement.plan import diff

    count = len(diff(start, full(placement)))
    if count > max_moves:
        warn(
            f"engines have no empty slots: with those filled, {count} copies move, more than --max-moves "
            f"{max_moves}"
        )


def check_exports(problem: PlacementProblem, trace: TraceOrigin, files: Sequence[ExportFile]) -> None:
    """Refuse, before a solve, what no solution of it could be exported to.

    Raises
    ------
    InputError
        As for `encode_exports`.
    """
    import numpy as np

    from placement.formats.rules import trivial_row
    from placement.plan import Placement
    from placement.tasks.problem import labelled

    slots_S = problem.device_of_slot_S
    row_S = np.empty(slots_S.size, dtype=np.int64)
    row_S[np.argsort(slots_S, kind="stable")] = trivial_row(slots_S.size, problem.num_experts)
    trial = Placement(
        physical_to_logical_map_LS=np.tile(row_S, (problem.num_layers, 1)),
        device_of_slot_S=slots_S,
        num_experts=problem.num_experts,
        num_devices=problem.num_devices,
    )
    encode_exports(labelled(trial, problem, trace), files, problem.model)
