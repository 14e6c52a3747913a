"""Reads mappings from outside: known keys only, right types, every error with its place.

The YAML file formats of this project (topology, model) share these readers, so that a wrong entry is
named the same way everywhere: ``rack.yaml: nodes[0].devices must be an integer from 1 to 1e+09, not 'two'``.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Any

from placement._suggest import nearest
from placement.errors import InputError

__all__ = ["LARGEST", "MAX_FILE_BYTES", "Fields", "as_number", "brief", "load_yaml", "read_text"]

MAX_FILE_BYTES = 4 * 2**20
"""Largest configuration file that is read, bytes; a topology or a model description is far smaller."""

LARGEST = 10**9
"""Largest number that a file may give; the units of the formats are chosen so that none comes near.

Above it, bytes would leave 64-bit integers.
"""

_repr = reprlib.Repr()
_repr.maxlevel = 2
_repr.maxlist = _repr.maxdict = 3
_repr.maxstring = _repr.maxother = 60


def brief(value: object) -> str:
    """Return a value as it may stand in a one-line message, however large or self-repeating it is."""
    return _repr.repr(value)


class Fields:
    """One mapping of a file, read key by key.

    Parameters
    ----------
    values
        The mapping, as parsed.
    source, place
        What was read (a file name) and where in it (``nodes[0]``; empty at the top): the start of every
        message.
    known, required
        Keys that may and must be there.

    Raises
    ------
    InputError
        If `values` is no mapping, has a key that is not known, or lacks a required one.
    """

    def __init__(
        self,
        values: object,
        *,
        source: str,
        place: str = "",
        known: Collection[str],
        required: Collection[str] = (),
    ) -> None:
        self.source = source
        self.place = place
        if not isinstance(values, Mapping):
            raise InputError(f"{source}: {place or 'the top level'} must be a mapping, not {brief(values)}")
        self._values = values
        self._check_keys(known, required)

    def _check_keys(self, known: Collection[str], required: Collection[str]) -> None:
        for key in self._values:
            if key not in known:
                guess = nearest(str(key), known)
                hint = f"did you mean {guess!r}?" if guess else f"known keys: {', '.join(known)}"
                where = self.place or "the top level"
                raise InputError(f"{self.source}: {where} has the unknown key {brief(key)}; {hint}")
        for key in required:
            if self._values.get(key) is None:
                raise InputError(f"{self.source}: {self.at(key)} is missing")

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def at(self, key: object) -> str:
        """Return the path of a key in the file."""
        return f"{self.place}.{key}" if self.place else str(key)

    def wrong(self, key: str, expected: str) -> InputError:
        """Return the error for a value that is not what the key asks for."""
        return InputError(
            f"{self.source}: {self.at(key)} must be {expected}, not {brief(self._values.get(key))}"
        )

    def raw(self, key: str) -> Any:
        """Return the value as parsed, None where the key is absent."""
        return self._values.get(key)

    def number(self, key: str, *, zero: bool = False) -> float | None:
        """Return a positive finite number (or 0 where `zero` allows it), None where absent."""
        value = self._values.get(key)
        if value is None:
            return None
        number = as_number(value)
        if number is None or not (0 <= number <= LARGEST) or (number == 0 and not zero):
            raise self.wrong(key, f"{'a number from 0' if zero else 'a positive number'} up to {LARGEST:.0e}")
        return number

    def integer(self, key: str, *, minimum: int = 1) -> int | None:
        """Return an integer of at least `minimum`, None where absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= LARGEST:
            raise self.wrong(key, f"an integer from {minimum} to {LARGEST:.0e}")
        return value

    def text(self, key: str) -> str | None:
        """Return a text that is not empty, None where absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(key, "a text")
        return value.strip()

    def mapping(self, key: str) -> Mapping[str, Any]:
        """Return a mapping with text keys, empty where absent."""
        value = self._values.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise self.wrong(key, "a mapping with text keys")
        return value

    def items(self, key: str) -> list[Any]:
        """Return a list that is not empty; empty only where absent."""
        value = self._values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not value:
            raise self.wrong(key, "a list that is not empty")
        return value

    def integers(self, key: str) -> list[int]:
        """Return a list of integers of 0 or more; empty only where absent."""
        items = self.items(key)
        for index, value in enumerate(items):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(
                    f"{self.source}: {self.at(key)}[{index}] must be an integer of 0 or more, "
                    f"not {brief(value)}"
                )
        return items


def as_number(value: object) -> float | None:
    """Return a finite number, None for anything else.

    PyYAML reads ``1e9`` (no dot) as text; it is taken for the number that it is.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def read_text(path: str | os.PathLike[str], *, what: str) -> str:
    """Read a small UTF-8 file.

    Raises
    ------
    InputError
        If it does not exist, is a directory, is larger than `MAX_FILE_BYTES` or is not UTF-8 text.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise InputError(f"{what} {os.fspath(path)!r} cannot be read: {reason}") from exc
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{what} {os.fspath(path)!r} is larger than {MAX_FILE_BYTES // 2**20} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise InputError(f"{what} {os.fspath(path)!r} is not UTF-8 text (byte {exc.start})") from exc


def load_yaml(text: str, *, source: str) -> Any:
    """Parse YAML with the safe loader only; a key given twice is an error instead of the last one winning.

    Raises
    ------
    InputError
        If the text is not YAML, with line and column.
    """
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                    )
                if isinstance(key, yaml.ScalarNode):
                    seen.add(key.value)
            return super().construct_mapping(node, deep=deep)

    try:
        return yaml.load(text, Loader=UniqueKeyLoader)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        where = f"line {mark.line + 1} column {mark.column + 1}: " if mark else ""
        raise InputError(f"{source} is not valid YAML: {where}{exc.problem or exc.context}") from exc
    except (yaml.YAMLError, ValueError) as exc:
        raise InputError(f"{source} is not valid YAML: {' '.join(str(exc).split())}") from exc
    except RecursionError as exc:
        raise InputError(f"{source} is not valid YAML: nested too deeply") from exc
