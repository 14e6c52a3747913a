"""Reads what SGLang's ``per_token`` and ``per_pass`` recorders dump, one ``.pt`` per rank.

Token by token: physical slots are mapped back to logical experts by the table in the dump (as it was at the
end of the recording) or by ``options.physical_map``; ranks are merged pass by pass, each pass's ranks evenly
interleaved, since they ran it at the same time; a token's home is the rank that recorded it. Padding is left
out. Requests are told apart as far as the passes show them (`sglang_sequences`).
Pass by pass: expert counts (`sglang_pass_counts`).
Shape letters: L layers, R physical slots, T tokens, K top-k, N passes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.counts import ExpertCounts
from traces.files import reading
from traces.importers.physical_map import EMPTY_SLOT, read_physical_map, spread_map
from traces.importers.records import PieceReader, PieceSource, TokenFields, interleaved, joined_fields
from traces.importers.sglang_pass_counts import PassCounts
from traces.importers.sglang_passes import (
    RankFile,
    SglangRecord,
    check_ranks,
    load_rank_file,
    rank_files,
    sniff_passes,
)
from traces.importers.sglang_sequences import SequenceFollower
from traces.importers.shapes import LayerChoice, choose_layers, tell
from traces.source import TraceHeader, TraceSource

if TYPE_CHECKING:
    from placement.model_shape import ModelShape
    from traces.readers import ReadOptions

__all__ = ["open", "sniff"]

IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def sniff(path: Path) -> bool:
    """Tell whether `path` is a dump of forward passes, or a folder with one."""
    if path.is_dir():
        return any(sniff_passes(file) for file in sorted(path.glob("*.pt")))
    return sniff_passes(path)


def open(path: Path, options: ReadOptions) -> TraceSource | ExpertCounts:
    """Open one rank's file, or a folder of the files of all ranks; every pass is looked at once.

    Raises
    ------
    InputError
        If a file is damaged or a rank's is missing, files differ in shape, slots are outside of the table of
        slots, or there is no such table.
    """
    given_LR = None if options.physical_map is None else read_physical_map(options.physical_map)
    with reading(path):
        files = rank_files(path)
    survey, counts = _Survey(options.model, given_LR), PassCounts(options.model, given_LR)
    for name in files:
        file = load_rank_file(name)
        with reading(name):
            if file.records:
                (survey if file.records[0].has_tokens else counts).add(file)
    with reading(path):
        ranks = {*survey.ranks, *counts.ranks}
        if not ranks:
            raise InputError(
                "holds no record; start the recording before the requests and dump it after them"
            )
        if survey.ranks and counts.ranks:
            raise InputError("mixes dumps of the per_token and the per_pass recorder")
        if path.is_dir():
            check_ranks(ranks)
        return counts.total(path) if counts.ranks else survey.source(path, options.domain)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What all files have in common."""

    num_layers: int
    top_k: int
    num_experts: int
    choice: LayerChoice
    model_name: str | None

    @classmethod
    def of(cls, topk_LTK: npt.NDArray[Any], map_LR: IntArray, model: ModelShape | None) -> _Shape:
        """Learn the shape from a record that holds a token."""
        used_LT = (topk_LTK >= 0).sum(axis=2)
        busy = tuple(np.nonzero(used_LT.any(axis=1))[0].tolist())
        top_k, num_experts = int(used_LT.max()), int(map_LR.max()) + 1
        if model is not None and (model.top_k, model.num_experts) != (top_k, num_experts):
            raise InputError(
                f"routes to top-{top_k} of {num_experts} experts, {model.name} to top-{model.top_k} of "
                f"{model.num_experts}; name the right model with --model"
            )
        return cls(
            num_layers=len(topk_LTK),
            top_k=top_k,
            num_experts=num_experts,
            choice=choose_layers(len(topk_LTK), model=model, busy=busy),
            model_name=None if model is None else model.name,
        )

    def experts_LR(self, map_LR: IntArray) -> npt.NDArray[Any]:
        """Return the logical expert of each slot of the MoE layers, in few bytes."""
        table = spread_map(map_LR, num_layers=self.num_layers, rows=self.choice.rows)
        if int(table.max()) + 1 != self.num_experts:
            raise InputError(
                f"its table of physical slots names experts 0 to {table.max()}, others 0 to "
                f"{self.num_experts - 1}; keep models apart"
            )
        for row_R in table:
            homeless_E = np.bincount(row_R[row_R != EMPTY_SLOT], minlength=self.num_experts) == 0
            if homeless_E.any():
                raise InputError(
                    f"its table of physical slots has no slot for expert {int(homeless_E.argmax())}; name "
                    "the right table with --physical-map"
                )
        # An empty slot becomes an id beyond the last expert, which is refused wherever a token names it.
        smallest = np.min_scalar_type(self.num_experts)
        return np.where(table == EMPTY_SLOT, self.num_experts, table).astype(smallest)

    def valid(self, topk_LTK: npt.NDArray[Any], record: SglangRecord) -> Mask:
        """Tell which rows are tokens: those with all their ids in all MoE layers."""
        if len(topk_LTK) != self.num_layers or topk_LTK.shape[2] < self.top_k:
            raise InputError(
                f"record {record.number} has {len(topk_LTK)} layers of {topk_LTK.shape[2]} ids, others "
                f"{self.num_layers} of {self.top_k}; keep recordings of different models apart"
            )
        rows = self.choice.rows
        contiguous = rows[-1] - rows[0] + 1 == len(rows)
        moe_LTK = topk_LTK[rows[0] : rows[-1] + 1] if contiguous else topk_LTK[list(rows)]
        lowest_T: npt.NDArray[Any] = moe_LTK[:, :, : self.top_k].min(axis=(0, 2), initial=0)
        if int(lowest_T.min(initial=0)) < -1:
            raise InputError(f"record {record.number} names physical slot {lowest_T.min()}")
        if int(moe_LTK[:, :, self.top_k :].max(initial=-1)) >= 0:
            raise InputError(
                f"record {record.number} routes to more than the top-{self.top_k} of other records"
            )
        valid_T: Mask = lowest_T >= 0
        return valid_T


@dataclass(slots=True, kw_only=True)
class _Scan:
    """What is kept of a file after it was looked at once."""

    path: Path
    rank: int
    pass_N: IntArray
    tokens_N: IntArray
    ragged: set[int] = field(default_factory=set)
    follower: SequenceFollower
    content: str = ""
    batch: str = ""
    num_rows: int = 0

    @property
    def first(self) -> int:
        return int(self.pass_N.min())

    @property
    def last(self) -> int:
        return int(self.pass_N.max())


class _Survey:
    """Goes through the files once: checks them, counts tokens, follows requests."""

    def __init__(self, model: ModelShape | None, given_LR: IntArray | None) -> None:
        self._model = model
        self._given_LR = given_LR
        self._shape: _Shape | None = None
        self._scans: list[_Scan] = []
        self._followers: dict[int, SequenceFollower] = {}
        self._knows_positions = True

    @property
    def ranks(self) -> set[int]:
        """Ranks whose files were taken in."""
        return {scan.rank for scan in self._scans}

    def add(self, file: RankFile) -> None:
        """Take in one file."""
        rank = file.records[0].rank
        map_LR = file.slots(self._given_LR)
        follower = self._followers.setdefault(rank, SequenceFollower())
        scan = _Scan(
            path=file.path,
            rank=rank,
            pass_N=np.array([record.pass_id for record in file.records], dtype=np.int64),
            tokens_N=np.zeros(len(file.records), dtype=np.int64),
            follower=follower.copy(),
        )
        digest, batch = hashlib.blake2b(), hashlib.blake2b()
        for index, record in enumerate(file.records):
            topk_LTK = record.topk_LTK
            scan.num_rows += topk_LTK.shape[1]
            for key in ("input_ids", "positions"):
                listed = record.integers(key)
                batch.update(b"" if listed is None else listed.tobytes())
            if self._shape is None and (topk_LTK >= 0).any():
                self._shape = _Shape.of(topk_LTK, map_LR, self._model)
            if self._shape is not None:
                valid_T = self._shape.valid(topk_LTK, record)
                # Tokens that agree in a whole layer are the same tokens; hashing every layer would cost more
                # than reading it.
                digest.update(np.ascontiguousarray(topk_LTK[self._shape.choice.rows[-1]]).data)
                num_tokens = scan.tokens_N[index] = int(valid_T.sum())
                if not valid_T[:num_tokens].all():
                    scan.ragged.add(record.number)
                self._follow(record, follower, valid_T)
        if self._shape is not None:
            self._shape.experts_LR(map_LR)
        scan.content, scan.batch = digest.hexdigest(), batch.hexdigest()
        self._scans.append(scan)

    def _follow(self, record: SglangRecord, follower: SequenceFollower, valid_T: Mask) -> None:
        position_T = record.integers("positions")
        if position_T is None or len(position_T) != len(valid_T):
            self._knows_positions = False
        else:
            lengths = record.integers("extend_seq_lens")
            follower.follow(position_T, mode=record.mode, lengths=lengths, valid_T=valid_T)

    def source(self, path: Path, domain: str | None) -> TraceSource:
        """Return the trace of the files looked at."""
        shape, scans = self._shape, [scan for scan in self._scans if scan.tokens_N.any()]
        if shape is None or not scans:
            raise InputError("holds no token: nothing was routed while it was recorded")
        in_order = _check_overlaps(scans)
        distinct = _without_copies(scans)
        if len(distinct) < len(scans):
            tell(f"{path}: several ranks recorded the same tokens; each is read once, its home is not known")
        if _are_scattered(distinct):
            self._knows_positions = False
            tell(f"{path}: ranks split the tokens of one batch; which positions each took is not known")
        num_rows = sum(scan.num_rows for scan in self._scans)
        num_tokens = sum(int(scan.tokens_N.sum()) for scan in scans)
        if num_tokens < num_rows:
            tell(f"{path}: {num_rows - num_tokens:,} of {num_rows:,} rows are padding and left out")
        followed = in_order and all(follower.known for follower in self._followers.values())
        passes = _Passes(
            scans=distinct,
            shape=shape,
            given_LR=self._given_LR,
            knows_sequences=self._knows_positions and followed,
            knows_positions=self._knows_positions,
            knows_homes=len(distinct) == len(scans),
        )
        header = TraceHeader(
            num_layers=len(shape.choice.rows),
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            model_name=shape.model_name,
            moe_layer_ids=shape.choice.moe_layer_ids,
            domain_names=() if domain is None else (domain,),
        )
        return PieceSource(
            path=path,
            header=header,
            tokens_N=passes.tokens_N,
            open_pieces=passes.reader,
            name_piece=lambda piece: f"forward pass {passes.pass_N[piece]}",
            advice=(
                "the dump's table of physical slots is the last one: record without rebalancing, or name the "
                "right table with --physical-map"
            ),
        )


@dataclass(slots=True, kw_only=True)
class _Passes:
    """The passes of all ranks in order, and how one is read."""

    scans: Sequence[_Scan]
    shape: _Shape
    given_LR: IntArray | None
    knows_sequences: bool
    knows_positions: bool
    knows_homes: bool
    pass_N: IntArray = field(init=False)
    tokens_N: IntArray = field(init=False)

    def __post_init__(self) -> None:
        passes = np.concatenate([scan.pass_N for scan in self.scans])
        tokens = np.concatenate([scan.tokens_N for scan in self.scans])
        self.pass_N, place = np.unique(passes, return_inverse=True)
        self.tokens_N = np.zeros(len(self.pass_N), dtype=np.int64)
        np.add.at(self.tokens_N, place, tokens)

    def reader(self) -> PieceReader:
        """Return a reader of passes that holds one file per rank open."""
        ranks: dict[int, list[_Scan]] = {}
        for scan in self.scans:
            ranks.setdefault(scan.rank, []).append(scan)
        open_ranks = [_OpenRank(self, scans) for _, scans in sorted(ranks.items())]

        def read(piece: int) -> TokenFields:
            found = [rank.read(int(self.pass_N[piece])) for rank in open_ranks]
            return interleaved([fields for fields in found if fields is not None])

        return read


class _OpenRank:
    """One rank's files, of which one at a time is open."""

    def __init__(self, passes: _Passes, scans: Sequence[_Scan]) -> None:
        self._passes = passes
        self._scans = scans
        self._scan: _Scan | None = None
        self._records: dict[int, list[tuple[SglangRecord, Mask, IntArray | None]]] = {}
        self._experts_LR: npt.NDArray[Any] = np.zeros((0, 0), dtype=np.uint8)

    def read(self, pass_id: int) -> TokenFields | None:
        """Return this rank's tokens of a pass, if it has any."""
        scan = next((scan for scan in self._scans if scan.first <= pass_id <= scan.last), None)
        if scan is None:
            return None
        with reading(scan.path):
            if scan is not self._scan:
                self._load(scan)
            parts = [self._tokens(*entry) for entry in self._records.get(pass_id, []) if entry[1].any()]
        return joined_fields(parts) if parts else None

    def _load(self, scan: _Scan) -> None:
        # The last file goes before the next one comes.
        self._records = {}
        file = load_rank_file(scan.path)
        if len(file.records) != len(scan.pass_N):
            raise InputError("has changed since it was opened; open it again")
        shape, follower = self._passes.shape, scan.follower.copy()
        self._experts_LR = shape.experts_LR(file.slots(self._passes.given_LR))
        self._scan = scan
        for record, num_tokens in zip(file.records, scan.tokens_N.tolist(), strict=True):
            if record.number in scan.ragged:
                valid_T = shape.valid(record.topk_LTK, record)
            else:
                # Padding comes last, as a rule: the count says which rows are tokens.
                valid_T = np.arange(record.topk_LTK.shape[1]) < num_tokens
            numbers_T, position_T = None, record.integers("positions")
            if self._passes.knows_sequences and position_T is not None:
                lengths = record.integers("extend_seq_lens")
                numbers_T = follower.follow(position_T, mode=record.mode, lengths=lengths, valid_T=valid_T)
            self._records.setdefault(record.pass_id, []).append((record, valid_T, numbers_T))

    def _tokens(self, record: SglangRecord, valid_T: Mask, numbers_T: IntArray | None) -> TokenFields:
        """Return the tokens of one record as logical experts, padding left out."""
        shape, topk_LTK = self._passes.shape, record.topk_LTK
        num_tokens, num_slots = int(valid_T.sum()), self._experts_LR.shape[1]
        kept: slice | Mask = slice(num_tokens) if valid_T[:num_tokens].all() else valid_T
        experts_TLK = np.empty(
            (num_tokens, len(shape.choice.rows), shape.top_k), dtype=self._experts_LR.dtype
        )
        for place, layer in enumerate(shape.choice.rows):
            slots_TK = topk_LTK[layer, kept, : shape.top_k]
            if int(slots_TK.max()) >= num_slots or int(slots_TK.min()) < 0:
                outside = slots_TK.max() if int(slots_TK.max()) >= num_slots else slots_TK.min()
                raise InputError(
                    f"record {record.number} layer {layer} names physical slot {outside} of {num_slots}; "
                    "name the right table of slots with --physical-map"
                )
            experts_TLK[:, place] = self._experts_LR[place][slots_TK]
        position_T = record.integers("positions") if self._passes.knows_positions else None
        rank_T = np.full(num_tokens, record.rank, dtype=np.int64) if self._passes.knows_homes else None
        return TokenFields(
            experts_TLK=experts_TLK,
            sequence_T=None if numbers_T is None else numbers_T[valid_T],
            position_T=None if position_T is None else position_T[valid_T],
            rank_T=rank_T,
        )


def _check_overlaps(scans: Sequence[_Scan]) -> bool:
    """Refuse two files of one rank that hold the same passes; tell whether files came in order of passes."""
    in_order = True
    last: dict[int, _Scan] = {}
    for scan in scans:
        in_order &= scan.rank not in last or last[scan.rank].last < scan.first
        last[scan.rank] = scan
    ordered = sorted(scans, key=lambda scan: (scan.rank, scan.first))
    for before, after in itertools.pairwise(ordered):
        if before.rank == after.rank and after.first <= before.last:
            raise InputError(
                f"holds forward pass {after.first} of rank {after.rank} in {before.path.name} and in "
                f"{after.path.name}; keep each recording in a folder of its own"
            )
    return in_order


def _are_scattered(scans: Sequence[_Scan]) -> bool:
    """Tell whether ranks list the same batch but each routed a part of it (attention in tensor parallel).

    Each lists the ids and positions of all tokens, and routes the first rows alone, which are other tokens on
    every rank.
    """
    ranks_of: dict[tuple[int, str], set[int]] = {}
    for scan in scans:
        if int(scan.tokens_N.sum()) < scan.num_rows:
            ranks_of.setdefault((scan.first, scan.batch), set()).add(scan.rank)
    return any(len(ranks) > 1 for ranks in ranks_of.values())


def _without_copies(scans: Sequence[_Scan]) -> list[_Scan]:
    """Leave out ranks that recorded what an earlier rank did, as ranks of one tensor-parallel group do.

    They read the same text, too: short recordings of few experts may agree in routing by chance.
    """
    contents: dict[int, list[tuple[int, str, str]]] = {}
    for scan in scans:
        contents.setdefault(scan.rank, []).append((scan.first, scan.content, scan.batch))
    first_of: dict[tuple[tuple[int, str, str], ...], int] = {}
    for rank in sorted(contents):
        first_of.setdefault(tuple(sorted(contents[rank])), rank)
    return [scan for scan in scans if scan.rank in first_of.values()]
