"""Which logical expert each physical slot held: turns an engine's slot numbers into expert ids.

Shape letters: L layers, R physical slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.files import reading
from traces.importers.json_file import load_json
from traces.trace import MAX_EXPERTS

__all__ = ["EMPTY_SLOT", "check_map", "read_physical_map", "spread_map"]

EMPTY_SLOT = -1
"""What the table says of a slot that holds no expert."""

IntArray = npt.NDArray[np.int64]

_KEYS = ("physical_to_logical_map", "initial_expert_map", "last_physical_to_logical_map")


def read_physical_map(path: Path) -> IntArray:
    """Read a table of slots from JSON.

    Accepts a ``placement.json`` of ours, an engine's ``{"physical_to_logical_map": [[...]]}``, or plain rows:
    ``[layers][slots]``, or ``[slots]`` where all layers are alike.

    Returns
    -------
    array
        Logical expert of each slot, ``[layers, slots]``; `EMPTY_SLOT` where there is none.

    Raises
    ------
    InputError
        If the file cannot be read or holds no such table.
    """
    with reading(path):
        value = load_json(path)
        if isinstance(value, Mapping):
            key = next((key for key in _KEYS if key in value), None)
            if key is None:
                raise InputError(f"has no {_KEYS[0]}; it is no placement or table of physical slots")
            value = value[key]
        return check_map(_rows(value))


def _rows(value: Any) -> npt.NDArray[Any]:
    if not isinstance(value, list) or not value:
        raise InputError("holds no list of slots")
    rows = value if isinstance(value[0], list) else [value]
    if any(not isinstance(row, list) or len(row) != len(rows[0]) for row in rows):
        raise InputError("gives layers of different numbers of slots")
    if any(type(expert) is not int for row in rows for expert in row):
        raise InputError("gives slots that are no whole numbers")
    try:
        return np.array(rows, dtype=np.int64)
    except OverflowError as exc:
        raise InputError("gives expert numbers that are beyond any model") from exc


def check_map(map_LR: npt.NDArray[Any]) -> IntArray:
    """Return a checked table of slots.

    Raises
    ------
    InputError
        If it is no table of expert ids, or an expert below the largest has no slot.
    """
    if map_LR.ndim != 2 or 0 in map_LR.shape or map_LR.dtype.kind not in "iu":
        raise InputError(
            f"the table of physical slots is {map_LR.dtype} {list(map_LR.shape)}, not integers [layers, "
            "slots]"
        )
    if int(map_LR.min()) < EMPTY_SLOT or int(map_LR.max()) >= MAX_EXPERTS or int(map_LR.max()) < 0:
        raise InputError(
            f"the table of physical slots names experts {map_LR.min()} to {map_LR.max()}, outside 0 to "
            f"{MAX_EXPERTS - 1}"
        )
    return np.ascontiguousarray(map_LR, dtype=np.int64)


def spread_map(map_LR: IntArray, *, num_layers: int, rows: tuple[int, ...]) -> IntArray:
    """Return a table's rows for the MoE layers of a dump.

    Parameters
    ----------
    map_LR
        The table: one row for all layers, one per layer of the dump, or one per MoE layer.
    num_layers
        Layers of the dump.
    rows
        The dump's MoE layers.

    Raises
    ------
    InputError
        If the table has another number of layers.
    """
    if len(map_LR) == num_layers:
        return map_LR[list(rows)]
    if len(map_LR) == len(rows):
        return map_LR
    if len(map_LR) == 1:
        return np.repeat(map_LR, len(rows), axis=0)
    raise InputError(
        f"the table of physical slots has {len(map_LR)} layers; {num_layers} or its {len(rows)} MoE layers "
        "are dumped: name the right table with --physical-map"
    )
