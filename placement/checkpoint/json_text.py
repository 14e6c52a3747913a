"""JSON as text: where the members of an object stand, so that one can change and the rest stays as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from placement._fields import brief
from placement.errors import InputError

__all__ = ["Member", "members", "no_repeats", "read_json", "read_text", "reading_json", "spliced"]

_OPEN = re.compile(r"[ \t\n\r]*\{[ \t\n\r]*(?P<more>\}?)")
_KEY = re.compile(r'[ \t\n\r]*(?P<key>"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*")[ \t\n\r]*:[ \t\n\r]*')
_CLOSE = re.compile(r"[ \t\n\r]*(?P<more>[,}])")


MAX_JSON_BYTES = 256 * 2**20
"""Largest JSON file that is read: the index of 140,000 tensors takes 15 MB."""


class Member(NamedTuple):
    """One member of an object: key and value, and where each stands in the text (quotes included)."""

    key: str
    value: Any
    key_begin: int
    key_end: int
    value_begin: int
    value_end: int


def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; for the `object_pairs_hook` of `json`.

    Raises
    ------
    InputError
        If a key comes twice.
    """
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            _check_new(key, seen)
    return values


def members(text: str, begin: int = 0, *, until: str | None = None) -> Iterator[Member]:
    """Yield the members of the object that starts at `begin`.

    Parameters
    ----------
    until
        Key of the last member to yield, without its value: where a large one begins.

    Raises
    ------
    InputError
        If a key comes twice.
    ValueError
        If there is no JSON object.
    """
    value_at = json.JSONDecoder(object_pairs_hook=no_repeats).raw_decode
    opened = _matched(_OPEN, text, begin)
    at = opened.end()
    seen: set[str] = set()
    more = opened["more"] != "}"
    while more:
        found = _matched(_KEY, text, at)
        key_begin, key_end = found.span("key")
        key = text[key_begin + 1 : key_end - 1]
        if "\\" in key:
            key = json.loads(text[key_begin:key_end])
        _check_new(key, seen)
        value_begin = found.end()
        if key == until:
            yield Member(key, None, key_begin, key_end, value_begin, value_begin)
            return
        value, value_end = value_at(text, value_begin)
        yield Member(key, value, key_begin, key_end, value_begin, value_end)
        closed = _matched(_CLOSE, text, value_end)
        at, more = closed.end(), closed["more"] == ","


def _matched(pattern: re.Pattern[str], text: str, at: int) -> re.Match[str]:
    found = pattern.match(text, at)
    if found is None:
        raise ValueError(f"unexpected text at {at}")
    return found


def _check_new(key: str, seen: set[str]) -> None:
    if key in seen:
        raise InputError(f"{brief(key)} is given twice; get the file again")
    seen.add(key)


def spliced(text: str, changes: Iterable[tuple[int, int, object]]) -> Iterator[str]:
    """Yield the text in pieces, with other values at some places.

    Parameters
    ----------
    changes
        Begin, end and the new value of each place, in the order of the text.
    """
    at = 0
    for begin, end, value in changes:
        yield text[at:begin]
        yield json.dumps(value, ensure_ascii=False)
        at = end
    yield text[at:]


@contextmanager
def reading_json(path: Path) -> Iterator[None]:
    """Name `path` in every input error raised inside, and turn failures to read or parse it into one.

    Raises
    ------
    InputError
        Instead of what was raised inside.
    """
    try:
        yield
    except InputError as exc:
        raise InputError(f"{path}: {exc}") from exc
    except OSError as exc:
        raise InputError(
            f"{path}: cannot be read ({exc.strerror}); check the path and its permissions"
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{path}: is not JSON; get the file again") from exc


def read_text(path: Path) -> str:
    """Return the text of a JSON file of a bounded size.

    Raises
    ------
    InputError
        If it is too large.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(f"is {path.stat().st_size} bytes, more than {MAX_JSON_BYTES}")
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    InputError
        If it cannot be read, is too large, or is no JSON.
    """
    with reading_json(path):
        return json.loads(read_text(path), object_pairs_hook=no_repeats)
