"""Reads JSON and JSON Lines from strangers, one record at a time: sizes are bounded, NaN is no number.

A file is one value, an array of values, or values one after another (JSON Lines); they are all read as a
sequence of records with their place in the file, so that a record can be read again without those before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from placement.errors import InputError
from traces.files import one_line

__all__ = ["LIMIT_RECORD_BYTES", "JsonRecord", "json_head", "json_records", "load_json", "read_record"]

LIMIT_RECORD_BYTES = 256 * 2**20
"""A record over this size is no record but a file without line ends."""

_CHUNK_BYTES = 1 << 20
_SPACE = b" \t\r\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonRecord:
    """One value of a file, with its place.

    Parameters
    ----------
    number
        Its number in the file, from 1.
    start, num_bytes
        Where it lies.
    value
        What it says.
    """

    number: int
    start: int
    num_bytes: int
    value: Any


def json_head(path: Path, num_bytes: int) -> bytes:
    """Return the first bytes of a file that may be JSON, without a byte order mark; else nothing."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        head = file.read(num_bytes).removeprefix(_BYTE_ORDER_MARK).lstrip(_SPACE)
    return head if head[:1] in (b"{", b"[") else b""


def load_json(path: Path) -> Any:
    """Return a file's single value.

    Raises
    ------
    InputError
        If it is too large or not valid JSON.
    """
    size = path.stat().st_size
    if size > LIMIT_RECORD_BYTES:
        raise InputError(f"has {size} bytes of JSON, more than {LIMIT_RECORD_BYTES}; cut it in parts")
    content = path.read_bytes().removeprefix(_BYTE_ORDER_MARK)
    try:
        # The decoder's own limit on nesting is the interpreter's.
        return _DECODER.decode(content.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise InputError(f"is not text in UTF-8 ({one_line(exc)})") from exc
    except RecursionError as exc:
        raise InputError("is not valid JSON: nested too deeply") from exc
    except ValueError as exc:
        raise InputError(f"is not valid JSON: {one_line(exc)}") from exc


def json_records(path: Path) -> Iterator[JsonRecord]:
    """Yield a file's records in order, holding one at a time in memory.

    Raises
    ------
    InputError
        If a record is too long or not valid JSON; the message names its number.
    """
    with path.open("rb") as file:
        yield from _Scanner(file).records()


def read_record(path: Path, record_start: int, num_bytes: int) -> Any:
    """Return a record whose place is known.

    Raises
    ------
    InputError
        If the file has changed since.
    """
    with path.open("rb") as file:
        file.seek(record_start)
        text = file.read(num_bytes).decode("latin-1")
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as exc:
        raise InputError("has changed since it was opened; open it again") from exc


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


class _Scanner:
    """Cuts a file into records, reading on while a record is not complete."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._text = ""
        self._place = 0
        self._offset = 0
        self._ended = False
        self._in_array = False

    def records(self) -> Iterator[JsonRecord]:
        number = 0
        self._skip("\xef\xbb\xbf" if self._peek() == "\xef" else "")
        if self._skip() == "[":
            # An array of records; its brackets and commas are skipped like white space.
            self._place += 1
            self._in_array = True
        while (first := self._skip("," if self._in_array and number else "")) != "":
            if self._in_array and first == "]":
                self._place += 1
                if self._skip() != "":
                    raise InputError("is not valid JSON: something follows the array")
                return
            number += 1
            start = self._offset + self._place
            value, end = self._value(number)
            yield JsonRecord(number=number, start=start, num_bytes=end - self._place, value=value)
            self._place = end
        if self._in_array:
            raise InputError(f"is not valid JSON: the array ends after record {number}, without a bracket")

    def _peek(self) -> str:
        while self._place >= len(self._text) and not self._ended:
            self._read(_CHUNK_BYTES)
        return self._text[self._place : self._place + 1]

    def _skip(self, extra: str = "") -> str:
        """Pass over white space, and `extra` characters; return what comes next, nothing at the end."""
        while (character := self._peek()) and character in " \t\r\n" + extra:
            self._place += 1
        return character

    def _read(self, num_bytes: int) -> None:
        """Read on, letting go of what lies behind."""
        # As latin-1 every byte is one character, so places in the text are places in the file; JSON's own
        # characters are the same in UTF-8, and the texts of others are not looked at.
        more = self._file.read(num_bytes)
        self._ended = not more
        self._text = self._text[self._place :] + more.decode("latin-1")
        self._offset += self._place
        self._place = 0

    def _value(self, number: int) -> tuple[Any, int]:
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except RecursionError as exc:
                raise InputError(f"record {number} is not valid JSON: nested too deeply") from exc
            except ValueError as exc:
                # Only the words are kept: the failure holds the whole text, and would until the next
                # collection of cycles.
                reason = one_line(exc)
            else:
                # A bare number at the end of what is read may go on.
                if end < len(self._text) or self._ended or isinstance(value, (dict, list, str)):
                    return value, end
                reason = "it does not end"
            if self._ended:
                raise InputError(f"record {number} is not valid JSON: {reason}")
            length = len(self._text) - self._place
            if length > LIMIT_RECORD_BYTES:
                raise InputError(
                    f"record {number} is longer than {LIMIT_RECORD_BYTES} bytes or never ends; write one "
                    "response per line"
                )
            # Twice as much each time: a long record is looked at a few times, not once per chunk.
            self._read(max(_CHUNK_BYTES, length))
