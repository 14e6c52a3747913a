"""Reads the JSON or YAML of a foreign placement file: strictly, and bounded in size."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from placement._fields import brief
from placement.errors import InputError

__all__ = ["MAX_FILE_BYTES", "keys_of", "parse_document", "read_document"]

MAX_FILE_BYTES = 1 << 28
"""Largest file that is read, bytes; 10 000 layers of 1 000 slots take a sixth of it."""

MAX_YAML_BYTES = 1 << 25
"""Largest YAML file that is read, bytes: YAML takes a hundred times its size in memory."""


def read_document(path: Path) -> Any:
    """Return what a JSON or YAML file holds.

    Raises
    ------
    InputError
        If it cannot be read, is too large, or is neither.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise InputError(f"cannot be read: {exc.strerror}") from exc
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"is larger than {MAX_FILE_BYTES >> 20} MiB; no placement is that large")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise InputError(
            f"is no placement of a known format: it is not text (byte {exc.start}); the engines' .pt files "
            "are traces"
        ) from exc
    return parse_document(text)


def parse_document(text: str) -> Any:
    """Return what a JSON or YAML text holds.

    A key given twice, NaN and infinities are errors.

    Raises
    ------
    InputError
        If it is neither, or empty.
    """
    if not text.strip():
        raise InputError("is empty")
    if text.lstrip()[0] in "{[":
        return _json(text)
    if len(text) > MAX_YAML_BYTES:
        raise InputError(f"is larger than {MAX_YAML_BYTES >> 20} MiB of YAML; no placement is that large")
    return _yaml(text)


def _json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_no_twins, parse_constant=_no_constant)
    except InputError:
        raise
    except ValueError as exc:
        raise InputError(f"is not JSON (truncated?): {exc}") from exc
    except RecursionError as exc:
        raise InputError("is nested too deeply to be a placement") from exc


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"gives {brief(twin)} twice")
    return found


def _no_constant(name: str) -> Any:
    raise InputError(f"holds {name}, which is no JSON and no expert")


def _yaml(text: str) -> Any:
    import yaml

    # libyaml where it is there: pure Python takes seconds for the slots of a large model.
    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            found: dict[Hashable, Any] = super().construct_mapping(node, deep=True)
            if len(found) < len(node.value):
                raise yaml.MarkedYAMLError(problem="a key is given twice", problem_mark=node.start_mark)
            return found

    try:
        # Aliases make a small file unfold to any size.
        if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=base)):
            raise InputError("uses YAML aliases, which are not accepted")
        return yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        where = f"line {mark.line + 1} column {mark.column + 1}: " if mark else ""
        raise InputError(f"is neither JSON nor YAML: {where}{exc.problem or exc.context}") from exc
    except (yaml.YAMLError, ValueError) as exc:
        raise InputError(f"is neither JSON nor YAML: {' '.join(str(exc).split())}") from exc
    except RecursionError as exc:
        raise InputError("is nested too deeply to be a placement") from exc


def keys_of(
    values: object, *, required: tuple[str, ...], known: tuple[str, ...] = (), place: str = ""
) -> dict[str, Any]:
    """Return a mapping that has all required keys and no unknown one.

    Raises
    ------
    InputError
        If a key is missing or unknown, naming it.
    """
    where = f"{place}: " if place else ""
    if not isinstance(values, dict):
        raise InputError(f"{where}must be an object, not {brief(values)}")
    missing = [key for key in required if key not in values]
    if missing:
        raise InputError(f"{where}lacks {' and '.join(missing)}")
    strange = [key for key in values if key not in (*required, *known)]
    if strange:
        raise InputError(
            f"{where}has the key {brief(strange[0])}, which the engine does not take; it knows "
            f"{', '.join((*required, *known))}"
        )
    return values
