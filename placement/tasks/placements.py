"""Placements that are given and that are found: read from any file, made ready to be written, compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placement.errors import InputError

if TYPE_CHECKING:
    from placement.formats.protocol import FormatOptions
    from placement.model import ModelShape
    from placement.plan import Placement
    from placement.problem import PlacementProblem
    from placement.topology import Topology

__all__ = ["load_placement", "moves_entry", "note_fillers"]

_MAPS = ("physical_to_logical_map", "last_physical_to_logical_map")


def load_placement(
    path: Path,
    *,
    model: ModelShape | str | None = None,
    topology: Topology | str | None = None,
    num_devices: int | None = None,
) -> Placement:
    """Read a placement from our own file or an engine's, or from the dump of a running one.

    Parameters
    ----------
    model
        The model, for files that count other layers than its MoE layers.
    topology, num_devices
        The cluster, or how many devices it has, for files that list slots alone. Texts may name files, as
        for `ProblemInputs`.

    Raises
    ------
    InputError
        If the file is of no known format or damaged, or needs what was not given.
    """
    from placement.formats.files import placement_from_document, read_placement_file
    from placement.formats.layers import ModelLayers
    from placement.formats.protocol import FormatOptions
    from placement.model import resolve_model
    from placement.topology import parse_topology

    if num_devices is not None and num_devices < 1:
        raise InputError(f"--devices is {num_devices}; it must be 1 or more")

    def told() -> FormatOptions:
        shape = resolve_model(model) if isinstance(model, str) else model
        devices = num_devices
        if devices is None and topology is not None:
            shared = parse_topology(topology) if isinstance(topology, str) else topology
            devices = shared.num_devices
        return FormatOptions(layers=None if shape is None else ModelLayers.of(shape), num_devices=devices)

    running = _of_dump(path)
    if running is not None:
        found = placement_from_document(running, told, source=str(path))
    else:
        found = read_placement_file(path, told)
    if num_devices is not None and found.num_devices != num_devices:
        raise InputError(f"{path}: is for {found.num_devices} devices, --devices says {num_devices}")
    return found


def _of_dump(path: Path) -> dict[str, Any] | None:
    """Return the map of slots in a PyTorch file: a dump of SGLang's recorder says how experts lay last."""
    from traces.importers.torch_file import as_array, is_torch_file, load_torch

    if not is_torch_file(path):
        return None
    content = load_torch(path)
    keys = [key for key in _MAPS if isinstance(content, dict) and content.get(key) is not None]
    if not keys:
        raise InputError(f"{path}: has no {' or '.join(_MAPS)}; it holds no placement")
    return {_MAPS[0]: as_array(content[keys[0]], keys[0]).tolist()}


def note_fillers(placement: Placement, problem: PlacementProblem, *, start: Placement | None) -> Placement:
    """Return a placement that notes what its empty slots may be filled with for an engine."""
    import numpy as np

    from placement.formats.fill import KEY, find_fillers

    extra = {key: value for key, value in placement.extra.items() if key != KEY}
    slots_D = np.bincount(placement.device_of_slot_S, minlength=placement.num_devices)
    if (slots_D == slots_D[0]).all() and (
        fillers := find_fillers(placement, problem.profile.load_WLE, start=start)
    ):
        extra[KEY] = [list(filler) for filler in fillers]
    return replace(placement, extra=extra)


def moves_entry(first: Placement, placement: Placement, problem: PlacementProblem) -> dict[str, Any]:
    """Count and price what leads from a start to a result."""
    from placement.moves import summarise_moves

    summary = summarise_moves(first, placement, topology=problem.topology, model=problem.model)
    return {
        "count": summary.num_moves,
        "by_tier": summary.moves_by_tier,
        "bytes": summary.total_bytes,
        "seconds": summary.seconds,
    }
