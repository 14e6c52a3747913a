"""Placement files: read, checked, and written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from placement.errors import InputError
from placement.plan import Placement

__all__ = [
    "FORMAT",
    "dump_json",
    "placement_from_dict",
    "placement_to_dict",
    "read_placement",
    "write_json",
    "write_text",
]

FORMAT = "moe-placement/1"

_OWN_KEYS = frozenset(
    {
        "format",
        "model",
        "num_layers",
        "num_experts",
        "num_devices",
        "physical_to_logical_map",
        "device_of_slot",
    }
)

_OWN_MODEL_KEYS = frozenset({"name", "moe_layer_ids"})

MAX_FILE_BYTES = 1 << 30


def placement_to_dict(placement: Placement, **entries: Any) -> dict[str, Any]:
    """Return the JSON form of a placement.

    Parameters
    ----------
    entries
        Further top-level keys (objective, breakdown, held_out, provenance); they replace keys of the same
        name that the placement was read with. All other unknown keys are kept.
    """
    layer_ids = placement.moe_layer_ids
    own = {
        "format": FORMAT,
        "model": {
            **placement.extra.get("model", {}),
            "name": placement.model_name,
            "moe_layer_ids": list(range(placement.num_layers)) if layer_ids is None else list(layer_ids),
        },
        "num_layers": placement.num_layers,
        "num_experts": placement.num_experts,
        "num_devices": placement.num_devices,
        "physical_to_logical_map": placement.physical_to_logical_map_LS.tolist(),
        "device_of_slot": placement.device_of_slot_S.tolist(),
    }
    return {**own, **{key: value for key, value in placement.extra.items() if key not in own}, **entries}


def placement_from_dict(values: object, *, source: str = "placement") -> Placement:
    """Build a placement from its JSON form.

    `num_experts` and `num_devices` may be missing; they then follow from the maps.

    Raises
    ------
    InputError
        If keys are missing or wrong, starting with `source`.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{source}: holds a {type(values).__name__}, not an object")
    if values.get("format", FORMAT) != FORMAT:
        raise InputError(f"{source}: format is {values['format']!r}, not {FORMAT!r}")
    missing = [key for key in ("physical_to_logical_map", "device_of_slot") if key not in values]
    if missing:
        raise InputError(f"{source}: is no placement, it lacks {' and '.join(missing)}")
    model = values.get("model") or {}
    try:
        map_LS = _integers(values["physical_to_logical_map"], "physical_to_logical_map")
        slots = _integers(values["device_of_slot"], "device_of_slot")
        if not isinstance(model, Mapping):
            raise InputError(f"model is a {type(model).__name__}, not an object")
        if not isinstance(model.get("name"), str | None):
            raise InputError(f"model.name is {model['name']!r}, not a text")
        extra = {key: value for key, value in values.items() if key not in _OWN_KEYS}
        if more := {key: value for key, value in model.items() if key not in _OWN_MODEL_KEYS}:
            extra["model"] = more
        placement = Placement(
            physical_to_logical_map_LS=map_LS,
            device_of_slot_S=slots,
            num_experts=_count(values, "num_experts", int(map_LS.max(initial=0)) + 1),
            num_devices=_count(values, "num_devices", int(slots.max(initial=0)) + 1),
            model_name=model.get("name"),
            moe_layer_ids=_layer_ids(model.get("moe_layer_ids")),
            extra=extra,
        )
        layers = _count(values, "num_layers", placement.num_layers)
        if layers != placement.num_layers:
            raise InputError(f"num_layers is {layers}, the map has {placement.num_layers}")
    except InputError as exc:
        raise InputError(f"{source}: {exc}") from exc
    return placement


def _integers(values: object, name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    try:
        array = np.asarray(values)
    except ValueError as exc:
        raise InputError(f"{name} is ragged: every layer needs the same number of slots") from exc
    # A true among numbers would turn into 1, and what 64 signed bits do not hold into something else.
    truths = isinstance(values, list) and any(type(v) is bool for row in values for v in _entries(row))
    if array.dtype.kind != "i" or array.size == 0 or truths:
        raise InputError(f"{name} must hold integers")
    return array.astype(np.int64)


def _entries(row: object) -> list[object]:
    return row if isinstance(row, list) else [row]


def _layer_ids(values: object) -> tuple[int, ...] | None:
    if values is None:
        return None
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise InputError("moe_layer_ids is not a list of integers")
    return tuple(values)


def _count(values: Mapping[str, Any], key: str, default: int) -> int:
    value = values.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{key} is {value!r}; it must be a positive integer")
    return value


def read_placement(path: str | os.PathLike[str]) -> Placement:
    """Read a placement file.

    Raises
    ------
    InputError
        If the file is missing, too large, truncated, not JSON, or not a placement.
    """
    file = Path(path)
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{file}: is {file.stat().st_size} bytes; no placement is that large")
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise InputError(f"{file}: cannot be read: {exc.strerror}") from exc
    except InputError:
        raise
    except ValueError as exc:
        raise InputError(f"{file}: is not JSON (truncated?): {exc}") from exc
    except RecursionError as exc:
        raise InputError(f"{file}: is nested too deeply to be a placement") from exc
    return placement_from_dict(values, source=str(file))


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value


def dump_json(values: object) -> str:
    """Return strict JSON; figures that do not exist become null."""
    return json.dumps(_finite(values), allow_nan=False)


def write_json(path: str | os.PathLike[str], values: object) -> None:
    """Write strict JSON, whole or not at all.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    write_text(path, dump_json(values) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, whole or not at all.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    file = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=file.parent, prefix=f".{file.name}.", suffix=".partial", delete=False, encoding="utf-8"
        ) as stream:
            temporary = Path(stream.name)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(file)
    except OSError as exc:
        raise InputError(f"{file}: cannot be written: {exc.strerror}") from exc
    finally:
        # Gone by now unless something failed.
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
