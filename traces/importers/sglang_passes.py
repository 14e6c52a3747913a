"""Forward passes as SGLang's ``per_token`` and ``per_pass`` recorders dump them, one file per rank.

A file holds ``{"records": [...], "last_physical_to_logical_map": [L, R]}``, a record one pass of one rank:
``forward_pass_id``, ``rank``, ``global_physical_count`` [L, R], and from ``per_token`` also ``positions``,
``extend_seq_lens``, ``forward_mode`` and ``topk_ids_of_layer`` [L, T, width] of physical slots, -1 where
there is no token or no expert. All decoder layers are listed, dense ones without ids. Shape letters: L
layers, R physical slots, T tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.files import reading
from traces.importers.physical_map import check_map
from traces.importers.torch_file import as_array, is_torch_file, leading_strings, load_torch

__all__ = ["RankFile", "SglangRecord", "check_ranks", "load_rank_file", "rank_files", "sniff_passes"]

IntArray = npt.NDArray[np.int64]

_TOPK = "topk_ids_of_layer"
_COUNT = "global_physical_count"
_MAP = "last_physical_to_logical_map"
_FIRST_KEY = "records"


@dataclass(frozen=True, slots=True)
class SglangRecord:
    """One forward pass of one rank; its fields are read when asked for."""

    fields: Mapping[str, Any]
    number: int

    @property
    def pass_id(self) -> int:
        """Number of the pass, the same on all ranks."""
        return self._integer("forward_pass_id")

    @property
    def rank(self) -> int:
        """Process rank that recorded it."""
        return self._integer("rank")

    @property
    def mode(self) -> int:
        """SGLang's ``ForwardMode`` of the pass; 0 where it is not said."""
        mode = self.fields.get("forward_mode", 0)
        return mode if isinstance(mode, int) else 0

    @property
    def has_tokens(self) -> bool:
        """Whether token by token was recorded."""
        return _TOPK in self.fields

    @property
    def topk_LTK(self) -> npt.NDArray[Any]:
        """Physical slots of each token, -1 for none."""
        if _TOPK not in self.fields:
            raise InputError(f"mixes records with and without {_TOPK}, record {self.number} has none")
        topk = as_array(self.fields[_TOPK], f"{_TOPK} of record {self.number}")
        if topk.ndim != 3 or topk.dtype.kind != "i" or 0 in (topk.shape[0], topk.shape[2]):
            raise InputError(
                f"{_TOPK} of record {self.number} is {topk.dtype} {list(topk.shape)}, not integers [layers, "
                "tokens, k]"
            )
        return topk

    @property
    def count_LR(self) -> npt.NDArray[Any]:
        """Pairs that each physical slot took in the pass, as far as this rank knows."""
        if _COUNT not in self.fields:
            raise InputError(f"record {self.number} has neither {_TOPK} nor {_COUNT}")
        count = as_array(self.fields[_COUNT], f"{_COUNT} of record {self.number}")
        if count.ndim != 2 or count.dtype.kind not in "iu" or 0 in count.shape:
            raise InputError(
                f"{_COUNT} of record {self.number} is {count.dtype} {list(count.shape)}, not integers "
                "[layers, physical slots]"
            )
        return count

    def integers(self, key: str) -> IntArray | None:
        """Return a list of whole numbers, or `None` where the record has none."""
        value = self.fields.get(key)
        if value is None:
            return None
        if isinstance(value, (list, tuple)):
            array = np.asarray(value) if value else np.zeros(0, dtype=np.int64)
        else:
            array = as_array(value, f"{key} of record {self.number}")
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise InputError(f"{key} of record {self.number} is no list of whole numbers")
        return array.astype(np.int64, copy=False)

    def _integer(self, key: str) -> int:
        value = self.fields.get(key)
        if type(value) is not int or value < 0:
            raise InputError(f"{key} of record {self.number} is {value!r}, not a number from 0")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFile:
    """A loaded file: its passes in recorded order, and the table of slots as it was when dumped."""

    path: Path
    records: Sequence[SglangRecord]
    map_LR: IntArray | None

    def slots(self, given_LR: IntArray | None) -> IntArray:
        """Return the table of slots that was named, or else the file's own.

        Raises
        ------
        InputError
            If there is neither.
        """
        table = self.map_LR if given_LR is None else given_LR
        if table is None:
            raise InputError(
                "does not say which expert each physical slot held; name a placement or a table of slots "
                "with --physical-map"
            )
        return table


def sniff_passes(path: Path) -> bool:
    """Tell whether a file's first key is that of SGLang's passes."""
    return is_torch_file(path) and leading_strings(path)[:1] == (_FIRST_KEY,)


def rank_files(path: Path) -> list[Path]:
    """Return the dumps of a folder by name, or the one file itself.

    Raises
    ------
    InputError
        If a ``.pt`` file of the folder is none, or of another kind.
    """
    if not path.is_dir():
        return [path]
    found = []
    for file in sorted(path.iterdir()):
        if sniff_passes(file):
            found.append(file)
        elif file.suffix == ".pt":
            what = (
                "another kind of PyTorch file" if is_torch_file(file) else "no PyTorch file, or an empty one"
            )
            raise InputError(f"holds {file.name}, which is {what}; keep recordings apart")
    if not found:
        raise InputError("holds no dump of forward passes")
    return found


def load_rank_file(path: Path) -> RankFile:
    """Load one rank's dump; tensors stay on the disk until they are looked at.

    Raises
    ------
    InputError
        If it is damaged or no such dump.
    """
    content = load_torch(path)
    with reading(path):
        if not isinstance(content, Mapping) or not isinstance(content.get(_FIRST_KEY), list):
            raise InputError("holds no list of records; it is no dump of SGLang's recorder")
        records = [SglangRecord(fields, number) for number, fields in _numbered(content[_FIRST_KEY])]
        table = content.get(_MAP)
        map_LR = None if table is None else check_map(as_array(table, _MAP))
        ranks = {record.rank for record in records}
        if len(ranks) > 1:
            raise InputError(f"mixes records of ranks {sorted(ranks)[0]} and {sorted(ranks)[1]}")
    return RankFile(path=path, records=records, map_LR=map_LR)


def _numbered(records: list[Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, fields in enumerate(records):
        if not isinstance(fields, Mapping):
            raise InputError(f"record {number} is {type(fields).__name__}, not a dictionary")
        yield number, fields


def check_ranks(ranks: Collection[int]) -> None:
    """Refuse a recording that lacks a rank between others.

    Raises
    ------
    InputError
        With the rank that is missing.
    """
    present = sorted(set(ranks))
    missing = sorted(set(range(present[-1] + 1)) - set(present))
    if missing:
        raise InputError(
            f"holds dumps of rank{'s' if len(present) > 1 else ''} {', '.join(map(str, present))}, but none "
            f"of rank {missing[0]}; copy the dumps of all ranks into the folder"
        )
