"""Expert counts of SGLang's ``per_pass`` recorder: pairs per physical slot, rank by rank and pass by pass.

Each rank counts the pairs that it knows of (those of its own tokens, or those that its own experts took); the
sum over ranks is what was routed. A pass is a window; a long recording sums neighbouring passes.
Shape letters: L layers, R physical slots, E experts, N windows.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.counts import ExpertCounts
from traces.importers.physical_map import EMPTY_SLOT, spread_map
from traces.importers.sglang_counts import LIMIT_COUNTS, expert_counts
from traces.importers.sglang_passes import RankFile, SglangRecord
from traces.importers.shapes import choose_layers, tell

if TYPE_CHECKING:
    from placement.model_shape import ModelShape

__all__ = ["PassCounts"]

IntArray = npt.NDArray[np.int64]


class PassCounts:
    """Adds up the files of all ranks."""

    def __init__(self, model: ModelShape | None, given_LR: IntArray | None) -> None:
        self._model = model
        self._given_LR = given_LR
        self._contents: dict[int, hashlib.blake2b] = {}
        self._first_rank = -1
        self._of_first = _Windows()
        self._of_all = _Windows()

    @property
    def ranks(self) -> set[int]:
        """Ranks whose files were taken in."""
        return set(self._contents)

    def add(self, file: RankFile) -> None:
        """Take in one file."""
        rank = file.records[0].rank
        map_LR = file.slots(self._given_LR)
        if not self._contents:
            self._first_rank = rank
        content = self._contents.setdefault(rank, hashlib.blake2b())
        for record in file.records:
            if record.has_tokens:
                raise InputError(
                    f"mixes records with and without ids of tokens, record {record.number} has some"
                )
            count_LR = record.count_LR
            content.update(f"{record.pass_id} {count_LR.shape} ".encode())
            content.update(np.ascontiguousarray(count_LR).data)
            logical_LE = self._logical(record, count_LR, map_LR)
            self._of_all.add(record, logical_LE)
            if rank == self._first_rank:
                self._of_first.add(record, logical_LE)

    def total(self, path: Path) -> ExpertCounts:
        """Return the counts of all ranks."""
        contents = {content.hexdigest() for content in self._contents.values()}
        if len(self._contents) > 1 and len(contents) == 1:
            tell(f"{path}: all ranks counted the same pairs; they are counted once")
            return expert_counts(self._of_first.stacked(), self._model)
        return expert_counts(self._of_all.stacked(), self._model)

    def _logical(self, record: SglangRecord, count_LR: npt.NDArray[np.int64], map_LR: IntArray) -> IntArray:
        """Return counts of logical experts."""
        if int(count_LR.min()) < 0:
            raise InputError(f"record {record.number} counts {count_LR.min()} pairs; counts are not negative")
        if count_LR.shape[1] != map_LR.shape[1]:
            raise InputError(
                f"record {record.number} counts {count_LR.shape[1]} physical slots, the table of slots has "
                f"{map_LR.shape[1]}; name the right table with --physical-map"
            )
        num_layers = len(count_LR)
        rows = tuple(range(num_layers))
        if 1 < len(map_LR) < num_layers and self._model is not None:
            rows = choose_layers(num_layers, model=self._model).rows
        table = spread_map(map_LR, num_layers=num_layers, rows=rows)
        logical_LE = np.zeros((num_layers, int(map_LR.max()) + 1), dtype=np.int64)
        row, slot = np.nonzero(table != EMPTY_SLOT)
        layer = np.asarray(rows)[row]
        np.add.at(logical_LE, (layer, table[row, slot]), count_LR[layer, slot].astype(np.int64))
        return logical_LE


class _Windows:
    """Counts by pass; neighbouring passes are summed once there are too many."""

    def __init__(self) -> None:
        self._passes_per_window = 1
        self._load_LE: dict[int, IntArray] = {}

    def add(self, record: SglangRecord, count_LE: IntArray) -> None:
        other = next(iter(self._load_LE.values()), count_LE)
        if other.shape != count_LE.shape:
            raise InputError(
                f"record {record.number} counts {list(count_LE.shape)} [layers, experts], others "
                f"{list(other.shape)}; keep recordings of different models apart"
            )
        self._put(record.pass_id // self._passes_per_window, count_LE)
        while len(self._load_LE) * count_LE.size > LIMIT_COUNTS and len(self._load_LE) > 1:
            self._passes_per_window *= 2
            earlier, self._load_LE = self._load_LE, {}
            for window, load_LE in earlier.items():
                self._put(window // 2, load_LE)

    def _put(self, window: int, count_LE: IntArray) -> None:
        if window in self._load_LE:
            self._load_LE[window] += count_LE
        else:
            self._load_LE[window] = count_LE.copy()

    def stacked(self) -> IntArray:
        return np.stack([self._load_LE[window] for window in sorted(self._load_LE)])
