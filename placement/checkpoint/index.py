"""The index of a checkpoint in several files: which file holds which tensor.

It is read and rewritten member by member: of large models it is the largest thing to keep in memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from placement._fields import brief
from placement.checkpoint.header import quoted
from placement.checkpoint.json_text import Member, members, no_repeats, read_text, reading_json, spliced
from placement.errors import InputError

__all__ = ["read_index", "with_other_files"]

_KEY = "weight_map"


def read_index(path: Path) -> dict[str, str]:
    """Return the file of each tensor.

    Raises
    ------
    InputError
        If the index cannot be read, is none, names a tensor twice, or a file that is no safetensors file of
        the same folder.
    """
    with reading_json(path):
        text = read_text(path)
        files: dict[str, str] = {}
        known: set[str] = set()
        end = 0
        for entry in _entries(text):
            name = entry.value
            if not isinstance(name, str) or (name not in known and not _is_file_name(name)):
                raise InputError(
                    f"puts {quoted(entry.key)} in {brief(name)}, no safetensors file of the folder"
                )
            # Of 140,000 tensors in 200 files: one copy of every name.
            files[sys.intern(entry.key)] = sys.intern(name)
            known.add(name)
            end = entry.value_end
        if not files:
            raise InputError(f"has no {_KEY}; get the checkpoint again")
        # What follows the last entry must still close the objects, and may hold other members.
        json.loads(f'{{"{_KEY}":{{"":0{text[end:]}', object_pairs_hook=no_repeats)
        return files


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and name.endswith(".safetensors")


def _entries(text: str) -> Iterator[Member]:
    *_, last = (None, *members(text, until=_KEY))
    return iter(()) if last is None or last.key != _KEY else members(text, last.value_begin)


def with_other_files(text: str, file_of: Mapping[str, str]) -> Iterator[str]:
    """Yield the text of an index in pieces, with other files for some tensors and nothing else changed."""
    return spliced(
        text,
        (
            (entry.value_begin, entry.value_end, file_of[entry.key])
            for entry in _entries(text)
            if entry.key in file_of
        ),
    )
