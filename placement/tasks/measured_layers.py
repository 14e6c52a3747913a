"""Reads measured layers: a CSV with one row for each, who sent how much to whom and how long it took.

Columns, R and S being ranks from 0: ``hidden, expert_hidden, experts, top_k, tokens_per_rank``;
``pairs_RS`` (or ``pairs_R_S``) and, where rows are de-duplicated (``dedup`` 1), ``tokens_RS``;
``total_ms_rankR``. Optional: ``transport, shape, layer, window, placement``, ``active_experts_R``,
``PHASE_ms_rankR``. Other columns are ignored.

Shape letters: R ranks.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from placement._fields import brief
from placement.cost.layer_time import PHASES, LayerCounts
from placement.errors import InputError
from placement.model_shape import ModelShape

__all__ = ["MeasuredLayer", "read_measured_layers"]

FloatArray = npt.NDArray[np.float64]

MAX_FILE_BYTES = 256 * 2**20
"""Largest file that is read."""

_SIZES = ("hidden", "expert_hidden", "experts", "top_k")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredLayer:
    """One layer, run once.

    Parameters
    ----------
    transport, label
        What the exchange went over and what the model is called; empty where not told.
    shape
        Sizes.
    counts
        Who sent how much to whom.
    dedup
        Whether a token was sent once to each rank, not once for each pair.
    total_ms_R
        Time of the whole layer on each rank.
    phase_ms_R
        Time of each phase that was measured, on each rank.
    """

    transport: str
    label: str
    shape: ModelShape
    counts: LayerCounts
    dedup: bool
    total_ms_R: FloatArray
    phase_ms_R: Mapping[str, FloatArray]


def read_measured_layers(path: str | Path) -> list[MeasuredLayer]:
    """Read a CSV of measured layers.

    Raises
    ------
    InputError
        If the file is missing, is no such CSV, or a value is wrong; with its line and column.
    """
    try:
        if Path(path).stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"measured layers {path}: larger than {MAX_FILE_BYTES // 2**20} MiB")
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            columns = _columns(next(reader, []), str(path))
            layers = [
                columns.layer(row, reader.line_num) for row in reader if any(entry.strip() for entry in row)
            ]
    except OSError as exc:
        raise InputError(f"measured layers {path} cannot be read: {exc.strerror}") from exc
    except (csv.Error, UnicodeDecodeError) as exc:
        raise InputError(f"measured layers {path} is no CSV of UTF-8 text: {exc}") from exc
    if not layers:
        raise InputError(f"measured layers {path} has no row below its header")
    return layers


def _columns(header: Sequence[str], source: str) -> _Columns:
    names = [name.strip() for name in header]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise InputError(f"measured layers {source}: column {twice[0]!r} is there twice; keep one")
    ranks = 0
    while f"total_ms_rank{ranks}" in names:
        ranks += 1
    if ranks < 2:
        raise InputError(
            f"measured layers {source}: column total_ms_rank{ranks} is missing; every rank's time is needed, "
            "of 2 ranks or more"
        )
    columns = _Columns(source=source, index={name: i for i, name in enumerate(names)}, num_ranks=ranks)
    columns.check()
    return columns


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """The header of a file: where each column is."""

    source: str
    index: Mapping[str, int]
    num_ranks: int

    def check(self) -> None:
        needed = [*_SIZES, "tokens_per_rank", "dedup", *self._square("pairs")]
        missing = [name for name in needed if name not in self.index]
        if missing:
            raise InputError(f"measured layers {self.source}: column {missing[0]} is missing")

    def layer(self, row: Sequence[str], line: int) -> MeasuredLayer:
        """Return what a row tells."""
        if len(row) != len(self.index):
            raise self._wrong(line, f"{len(row)} values under {len(self.index)} columns")
        read = _Row(columns=self, row=row, line=line)
        sizes = {name: read.whole(name) for name in _SIZES}
        dedup = read.number("dedup")
        if dedup not in (0.0, 1.0):
            raise self._wrong(line, f"dedup is {dedup:g}; it must be 0 or 1")
        label = read.text("shape")
        try:
            shape = ModelShape(
                name=label or "measured layers",
                num_layers=1,
                num_experts=sizes["experts"],
                top_k=sizes["top_k"],
                hidden_size=sizes["hidden"],
                expert_hidden_size=sizes["expert_hidden"],
            )
        except InputError as exc:
            raise self._wrong(line, str(exc)) from exc
        totals_R = self._ranks("total_ms_rank{}", read.positive)
        return MeasuredLayer(
            transport=read.text("transport"),
            label=label,
            shape=shape,
            counts=self._counts(read, shape, dedup=bool(dedup)),
            dedup=bool(dedup),
            total_ms_R=totals_R,
            phase_ms_R={
                phase: self._ranks(f"{phase}_ms_rank{{}}", read.number)
                for phase in PHASES
                if all(f"{phase}_ms_rank{rank}" in self.index for rank in range(self.num_ranks))
            },
        )

    def _counts(self, read: _Row, shape: ModelShape, *, dedup: bool) -> LayerCounts:
        ranks = self.num_ranks
        local = shape.num_experts / ranks
        given = all(f"active_experts_{rank}" in self.index for rank in range(ranks))
        return LayerCounts(
            pairs_RR=self._matrix("pairs", read),
            tokens_RR=self._matrix("tokens", read) if dedup else None,
            tokens_R=np.full(ranks, read.number("tokens_per_rank")),
            active_R=self._ranks("active_experts_{}", read.number) if given else np.full(ranks, local),
            local_R=np.full(ranks, local),
        )

    def _matrix(self, what: str, read: _Row) -> FloatArray:
        values = [read.number(name) for name in self._square(what)]
        return np.array(values).reshape(self.num_ranks, self.num_ranks)

    def _square(self, what: str) -> list[str]:
        """Columns of all pairs of ranks; with two-digit ranks only the separated form is clear."""
        ranks = list(itertools.product(range(self.num_ranks), repeat=2))
        plain = [f"{what}_{a}{b}" for a, b in ranks]
        if self.num_ranks <= 10 and plain[0] in self.index:
            return plain
        return [f"{what}_{a}_{b}" for a, b in ranks]

    def _ranks(self, pattern: str, read: Callable[[str], float]) -> FloatArray:
        return np.array([read(pattern.format(rank)) for rank in range(self.num_ranks)])

    def _wrong(self, line: int, what: str) -> InputError:
        return InputError(f"measured layers {self.source}, line {line}: {what}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One row of a file, read by column."""

    columns: _Columns
    row: Sequence[str]
    line: int

    def text(self, name: str) -> str:
        """Return a text, empty where the column is not there."""
        index = self.columns.index.get(name)
        return "" if index is None else self.row[index].strip()

    def number(self, name: str) -> float:
        """Return a finite number of 0 or more."""
        if name not in self.columns.index:
            raise self._wrong(f"column {name} is missing")
        text = self.text(name)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1e15:
            raise self._wrong(f"{name} is {brief(text)}; it must be a number, 0 or more")
        return value

    def positive(self, name: str) -> float:
        """Return a number above 0."""
        value = self.number(name)
        if value <= 0:
            raise self._wrong(f"{name} is {value:g}; it must be above 0")
        return value

    def whole(self, name: str) -> int:
        """Return a whole number above 0."""
        value = self.positive(name)
        if value != int(value):
            raise self._wrong(f"{name} is {value:g}; it must be a whole number")
        return int(value)

    def _wrong(self, what: str) -> InputError:
        return InputError(f"measured layers {self.columns.source}, line {self.line}: {what}")
