"""Reads Megatron-LM's router traces: a folder of ``router_trace_rankR.jsonl``, or one such file.

A line is what one layer routed in one forward pass on one rank: ``{"step", "stage", "block", "layer", "rank",
"num_tokens", "topk", "top_indices"}``. In training a step has several passes (micro-batches): the n-th line
of a layer belongs to the n-th pass. Files are indexed once, by line; a pass is read when it is wanted.

Three things the files do not say. How many experts there are: the model says, else the largest id. To which
stage of a pipeline a rank belongs: each stage numbers its layers from 0, so that only the model tells. And
that activations were recomputed, which routes every token twice: such passes repeat to the letter and are
read once, as are ranks that routed the same tokens.
Shape letters: P passes, R ranks, T tokens, L MoE layers, K top-k.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.files import one_line, reading
from traces.importers.passes import few, model_layers, naming, pass_source, stages
from traces.importers.shapes import tell
from traces.source import TraceHeader, TraceSource

if TYPE_CHECKING:
    from placement.model_shape import ModelShape
    from traces.readers import ReadOptions

__all__ = ["LINE_LIMIT_BYTES", "open", "sniff"]

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]
Pass = tuple[int, int]

LINE_LIMIT_BYTES = 1 << 28
"""Longest line that is read: over four million ids."""

_COMPILED_BYTES = 1 << 14
"""Lines from this length on are worth a compiled parser."""

_FILE = re.compile(r"router_trace_rank(\d+)\.jsonl")
_HEAD = re.compile(rb'\s*\{.*"top_indices"\s*:', re.DOTALL)
_HEAD_BYTES = 1 << 12
_MANY = 1 << 31
_COPIES_TOKENS = 16
"""Tokens that passes or ranks must agree on before they are taken to be the same ones."""
_FOREIGN = (ValueError, RecursionError, OverflowError, TypeError, KeyError)


def sniff(path: Path) -> bool:
    """Tell whether `path` is a router trace or a folder with one, complete or not."""
    if path.is_dir():
        return any(_FILE.fullmatch(entry.name) for entry in path.iterdir())
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    keys = (b'"step"', b'"layer"', b'"num_tokens"', b'"top_indices"')
    return _HEAD.match(head) is not None and all(key in head for key in keys)


def open(path: Path, options: ReadOptions) -> TraceSource:
    """Index the trace.

    A run that was stopped ends within a step, on some ranks a step later than on others: that step is left
    out, with a warning. Anything else that is missing is an error.

    Raises
    ------
    InputError
        If a rank, a step or a layer is missing, a line is damaged or too long, or pipeline stages cannot be
        joined.
    """
    with reading(path):
        ranks = [_index(path, file, number, options.model) for number, file in _files(path).items()]
        _end_together(path, ranks)
        _check_passes(ranks)
        top_k, num_experts = _shape(path, ranks, options.model)
        columns, layers = _pipelines(path, ranks, options.model)
        columns = _without_copies(path, columns)
        header = TraceHeader(
            num_layers=len(layers),
            num_experts=num_experts,
            top_k=top_k,
            model_name=None if options.model is None else options.model.name,
            moe_layer_ids=layers,
            domain_names=() if options.domain is None else (options.domain,),
        )
        passes = sorted(set[Pass]().union(*(column.tokens_of_pass for column in columns)))
        tokens_PR = np.array(
            [[column.tokens_of_pass.get(each, 0) for column in columns] for each in passes], dtype=np.int64
        ).reshape(len(passes), len(columns))
        numbers = [column.rank for column in columns]
        return pass_source(
            path,
            header,
            tokens_PR,
            numbers,
            lambda index, column: columns[column].load(passes[index], top_k),
        )


def _files(path: Path) -> dict[int | None, Path]:
    """Return files by the rank in their names; a file given alone may have any name."""
    if not path.is_dir():
        return {None: path}
    found: dict[int | None, Path] = {}
    ranks: set[int] = set()
    for entry in sorted(path.iterdir()):
        match = _FILE.fullmatch(entry.name)
        if match:
            if int(match[1]) in ranks:
                raise InputError(f"has two files of rank {int(match[1])}")
            ranks.add(int(match[1]))
            found[int(match[1])] = entry
    missing = sorted(set(range(max(ranks, default=0) + 1)) - ranks)
    if missing:
        raise InputError(
            f"lacks router_trace_rank{missing[0]}.jsonl (missing: rank {few(missing)}); copy it from the "
            "machine that wrote it, or give one file alone"
        )
    return found


# ------------------------------------------------------------------------------------------------------ lines


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """Where a layer's ids of one pass are, and how many."""

    line: int
    offset: int
    num_bytes: int
    tokens: int
    fingerprint: bytes


@dataclass(slots=True, kw_only=True)
class _Rank:
    """One rank's file: its lines by step, layer and pass."""

    number: int | None
    path: Path
    top_k: int = 0
    most: int = -1
    ends_within: int | None = None
    layers: set[int] = field(default_factory=set)
    lines: dict[int, dict[int, list[_Line]]] = field(default_factory=dict)

    def passes(self, step: int) -> int:
        return max(len(lines) for lines in self.lines[step].values())

    def is_whole(self, step: int) -> bool:
        """Tell whether a step has all layers, equally often."""
        lengths = {len(self.lines[step].get(layer, ())) for layer in self.layers}
        return len(lengths) == 1


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, offset and text of every line that is not blank, its end included."""
    offset = 0
    for number in range(1, _MANY):
        line = file.readline(LINE_LIMIT_BYTES + 1)
        if not line:
            return
        if len(line) > LINE_LIMIT_BYTES:
            raise InputError(
                f"line {number} is longer than {LINE_LIMIT_BYTES} bytes; no router trace has such"
            )
        if line.strip():
            yield number, offset, line
        offset += len(line)


def _index(folder: Path, path: Path, number: int | None, model: ModelShape | None) -> _Rank:
    """Read a file once; without a model also for its largest id."""
    rank = _Rank(number=number, path=path)
    with naming(folder, path), path.open("rb") as file:
        damage: InputError | None = None
        for line_number, offset, line in _lines(file):
            if damage is not None:
                raise damage
            try:
                _add(rank, line_number, offset, line, need_ids=model is None)
            except InputError:
                raise
            except _FOREIGN as exc:
                damage = InputError(
                    f"line {line_number} is damaged ({one_line(exc)}); restore it from a copy"
                )
                if line.endswith(b"\n"):
                    raise damage from exc
                # A line without an end can only be the last: the writer was stopped in it.
                rank.ends_within = line_number
        if not rank.lines:
            raise damage or InputError("holds no line of the decoder's layers")
    return rank


def _add(rank: _Rank, number: int, offset: int, line: bytes, *, need_ids: bool) -> None:
    """Index one line; what is no such line raises one of `_FOREIGN`."""
    head, found, tail = line.partition(b'"top_indices"')
    record: dict[str, Any]
    if not found or need_ids or b'"' in tail:
        # Further keys follow, or ids are needed now.
        record = json.loads(line)
        if not isinstance(record, dict):
            raise TypeError("it is no object")
        ids_TK = _ids(record)
    else:
        record = json.loads(head.rstrip().rstrip(b",") + b"}")
        if not tail.rstrip().endswith((b"]]}", b"[]}")):
            raise ValueError("the ids are cut off")
        ids_TK = None
    if record["block"] != "decoder":
        return
    tokens, top_k = _number(record, "num_tokens", 0), _number(record, "topk", 1)
    if rank.top_k and top_k != rank.top_k:
        raise InputError(f"line {number} has top-{top_k}, lines before it top-{rank.top_k}")
    if rank.number is None:
        rank.number = _number(record, "rank", 0)
    if _number(record, "rank", 0) != rank.number:
        raise InputError(
            f"line {number} is of rank {record['rank']}, not {rank.number}; the file is misnamed, or two "
            "were joined"
        )
    rank.top_k = top_k
    if ids_TK is not None:
        if len(ids_TK) != tokens and "semantic_token_ids" not in record:
            raise ValueError(f"{tokens} tokens are announced, {len(ids_TK)} are there")
        tokens = len(ids_TK)
        rank.most = max(rank.most, int(ids_TK.max(initial=-1)))
    step, layer = _number(record, "step", 0), _number(record, "layer", 0)
    entry = _Line(
        line=number,
        offset=offset,
        num_bytes=len(line),
        tokens=tokens,
        fingerprint=hashlib.blake2b(tail.strip(), digest_size=8).digest(),
    )
    if rank.lines and step < next(reversed(rank.lines)):
        raise InputError(f"line {number} is of step {step}, after step {next(reversed(rank.lines))}")
    rank.layers.add(layer)
    rank.lines.setdefault(step, {}).setdefault(layer, []).append(entry)


def _parsed(line: bytes, tokens: int, top_k: int) -> Array:
    """Return a line's ids, of long lines by a compiled parser; what it does not take is left to JSON."""
    if len(line) >= _COMPILED_BYTES:
        from traces.importers.kernels import parse_ids

        _, _, tail = line.partition(b'"top_indices"')
        text = tail[tail.find(b"[") :] if tail.lstrip()[:1] == b":" else b""
        ids_TK = np.empty((tokens, top_k), dtype=np.int64)
        end = parse_ids(np.frombuffer(text, dtype=np.uint8), ids_TK)
        if end >= 0 and text[end:].strip() == b"}":
            return ids_TK
    return _ids(json.loads(line))


def _number(record: dict[str, Any], key: str, least: int) -> int:
    value = record[key]
    if type(value) is not int or not least <= value < _MANY:
        raise ValueError(f"{key} is {str(value)[:40]!r}")
    return value


def _ids(record: dict[str, Any]) -> Array:
    """Return a line's ids, ``[tokens, k]``, without the tokens marked as padding."""
    top_k = _number(record, "topk", 1)
    ids = np.array(record["top_indices"] or np.empty((0, top_k), dtype=np.int64))
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.shape[1] != top_k:
        raise ValueError(f"the ids are {ids.dtype} {list(ids.shape)}, not integers [tokens, {top_k}]")
    labels = record.get("semantic_token_ids")
    if labels is None:
        return ids
    if not isinstance(labels, list) or len(labels) != len(ids):
        raise ValueError("semantic_token_ids does not name every token")
    return ids[[label is not None for label in labels]]


# ----------------------------------------------------------------------------------------------- whole passes


def _end_together(path: Path, ranks: Sequence[_Rank]) -> None:
    """Leave out the step in which the run was stopped."""
    last = max(next(reversed(rank.lines)) for rank in ranks)
    whole = min(_last_whole(rank) for rank in ranks)
    late = next((rank for rank in ranks if _last_whole(rank) < last - 1), None)
    if late is not None:
        raise InputError(
            f"rank {late.number} ends with step {_last_whole(late)}, others with step {last}: "
            f"{late.path.name} is incomplete; restore it, or record again"
        )
    within = [rank for rank in ranks if rank.ends_within is not None]
    if whole == last and not within:
        return
    for rank in ranks:
        for step in [step for step in rank.lines if step > whole]:
            del rank.lines[step]
    where = f"; line {within[0].ends_within} of {within[0].path.name} is cut off" if within else ""
    tell(f"{path}: was stopped within step {whole + 1}{where}; the steps up to {whole} are read")


def _last_whole(rank: _Rank) -> int:
    steps = list(rank.lines)
    if rank.is_whole(steps[-1]) and rank.ends_within is None:
        return steps[-1]
    if rank.is_whole(steps[-1]) and _alone(rank, steps):
        return steps[-1]
    if len(steps) < 2:
        raise InputError(f"{rank.path.name} holds no step that is complete; record again")
    return steps[-2]


def _alone(rank: _Rank, steps: Sequence[int]) -> bool:
    """Tell whether the line that is cut off began a new step: the last one has as many passes as before."""
    return len(steps) > 1 and rank.passes(steps[-1]) == rank.passes(steps[-2])


def _check_passes(ranks: Sequence[_Rank]) -> None:
    """Refuse steps that are missing or lack layers, and passes whose layers have different lengths."""
    steps = sorted(set[int]().union(*(rank.lines for rank in ranks)))
    for rank in ranks:
        missing = sorted(set(steps) - set(rank.lines))
        if missing:
            raise InputError(f"{rank.path.name} lacks step {few(missing)}, which other ranks have")
        for step, by_layer in rank.lines.items():
            if not rank.is_whole(step):
                lengths = {layer: len(by_layer.get(layer, ())) for layer in sorted(rank.layers)}
                short = min(lengths, key=lambda layer: lengths[layer])
                raise InputError(
                    f"{rank.path.name} has layer {short} {lengths[short]} times in step {step}, others "
                    f"{max(lengths.values())} times; lines are missing"
                )
            for at, lines in enumerate(zip(*by_layer.values(), strict=True)):
                if len({line.tokens for line in lines}) > 1:
                    raise InputError(
                        f"{rank.path.name} routes {lines[0].tokens} tokens in one layer and other numbers in "
                        f"others, in pass {at} of step {step} (line {lines[0].line})"
                    )


def _shape(path: Path, ranks: Sequence[_Rank], model: ModelShape | None) -> tuple[int, int]:
    top_ks = sorted({rank.top_k for rank in ranks})
    if len(top_ks) > 1:
        raise InputError(f"has ranks with top-{top_ks[0]} and with top-{top_ks[1]}; they are of two models")
    if model is None:
        num_experts = max(rank.most for rank in ranks) + 1
        tell(
            f"{path}: does not say how many experts there are; {num_experts} are taken, up to the largest id "
            "(--model says otherwise)"
        )
        return top_ks[0], num_experts
    if model.top_k != top_ks[0]:
        raise InputError(f"has top-{top_ks[0]}, {model.name} has top-{model.top_k}; name the right --model")
    return top_ks[0], model.num_experts


# ----------------------------------------------------------------------------------------- stages and columns


class _Column:
    """The tokens of one rank, or of the ranks of a pipeline that passed them on."""

    def __init__(self, folder: Path, parts: Sequence[_Rank], layers_of_part: Sequence[Sequence[int]]) -> None:
        self.rank = parts[0].number or 0
        self._folder = folder
        self._lines: dict[Pass, list[tuple[Path, _Line]]] = {}
        self.tokens_of_pass: dict[Pass, int] = {}
        for step in parts[0].lines:
            for at in range(parts[0].passes(step)):
                here = [
                    (part.path, part.lines[step][layer][at])
                    for part, layers in zip(parts, layers_of_part, strict=True)
                    for layer in layers
                ]
                self._lines[step, at] = here
                self.tokens_of_pass[step, at] = here[0][1].tokens

    def fingerprint(self, each: Pass) -> bytes:
        """Return what tells the ids of a pass from those of others."""
        return b"".join(line.fingerprint for _, line in self._lines[each])

    def keep(self, passes: Sequence[Pass]) -> None:
        self._lines = {each: self._lines[each] for each in passes}
        self.tokens_of_pass = {each: self.tokens_of_pass[each] for each in passes}

    def load(self, each: Pass, top_k: int) -> Array:
        """Read the expert ids of one pass, ``[tokens, layers, k]``."""
        layers_TK = []
        for path, entry in self._lines[each]:
            with naming(self._folder, path):
                with path.open("rb") as file:
                    file.seek(entry.offset)
                    line = file.read(entry.num_bytes)
                try:
                    ids_TK = _parsed(line, entry.tokens, top_k)
                    if ids_TK.shape != (entry.tokens, top_k):
                        raise ValueError(f"{entry.tokens} tokens are announced, {len(ids_TK)} are there")
                except _FOREIGN as exc:
                    raise InputError(
                        f"line {entry.line} is damaged ({one_line(exc)}); restore it from a copy"
                    ) from exc
                layers_TK.append(ids_TK)
        return np.stack(layers_TK, axis=1)


def _pipelines(
    path: Path, ranks: Sequence[_Rank], model: ModelShape | None
) -> tuple[list[_Column], tuple[int, ...]]:
    """Join the stages of a pipeline, and name the decoder layers."""
    groups = stages([rank.layers for rank in ranks])
    layers_of_stage = [sorted(ranks[members[0]].layers) for members in groups]
    layers: tuple[int, ...]
    if model is not None and len(groups) == 1 and len(layers_of_stage[0]) < model.num_layers:
        groups = _local_stages(path, len(ranks), len(layers_of_stage[0]), model)
        layers_of_stage *= len(groups)
        layers = model.moe_layer_ids
    else:
        layers = model_layers(set[int]().union(*layers_of_stage), model)
        layers_of_stage = [[layer for layer in stage if layer in layers] for stage in layers_of_stage]
    if len({len(members) for members in groups}) > 1:
        sizes = ", ".join(str(len(members)) for members in groups)
        raise InputError(f"has pipeline stages of {sizes} ranks, whose tokens cannot be joined")
    columns = []
    for members in zip(*groups, strict=True):
        parts = [ranks[at] for at in members]
        _check_joined(parts)
        columns.append(_Column(path, parts, layers_of_stage))
    return columns, layers


def _local_stages(path: Path, num_ranks: int, num_layers: int, model: ModelShape) -> list[list[int]]:
    """Cut the ranks into stages that each number their layers from 0, in Megatron's order of ranks."""
    count, rest = divmod(model.num_layers, num_layers)
    if rest or num_ranks % count or model.num_layers != model.num_decoder_layers:
        raise InputError(
            f"has {num_layers} layers on each rank, {model.name} has {model.num_layers}: stages of a "
            "pipeline number their layers from 0, and these cannot be told apart; record without pipeline "
            "parallelism, or name the right model with --model"
        )
    each = num_ranks // count
    tell(
        f"{path}: every rank has {num_layers} of the {model.num_layers} layers of {model.name}; read as "
        f"{count} pipeline stages of {each} ranks"
    )
    return [list(range(stage * each, (stage + 1) * each)) for stage in range(count)]


def _check_joined(parts: Sequence[_Rank]) -> None:
    """Refuse to join ranks of two stages that did not route the same passes."""
    first = parts[0]
    for other in parts[1:]:
        for step in first.lines:
            mine, theirs = (
                [line.tokens for line in next(iter(rank.lines[step].values()))] for rank in (first, other)
            )
            if mine != theirs:
                raise InputError(
                    f"ranks {first.number} and {other.number} are two stages of a pipeline, yet their passes "
                    f"of step {step} have {mine[:3]} and {theirs[:3]} tokens; they cannot be joined"
                )


def _without_copies(path: Path, columns: list[_Column]) -> list[_Column]:
    """Read once what was recorded twice: recomputed passes, and ranks that routed the same tokens."""
    if all(_repeats(column) for column in columns):
        for column in columns:
            seen: dict[tuple[int, bytes], Pass] = {}
            for each in column.tokens_of_pass:
                seen.setdefault((each[0], column.fingerprint(each)), each)
            column.keep(list(seen.values()))
        tell(f"{path}: every pass is there twice (activations were recomputed); it is read once")
    kept: dict[tuple[bytes, ...], _Column] = {}
    for column in columns:
        tokens = sum(column.tokens_of_pass.values())
        own = (str(column.rank).encode(),) if tokens < _COPIES_TOKENS else ()
        key = (*own, *(column.fingerprint(each) for each in column.tokens_of_pass))
        kept.setdefault(key, column)
    if len(kept) < len(columns):
        tell(f"{path}: {len(columns)} ranks routed the tokens of {len(kept)}; each token is read once")
    return list(kept.values())


def _repeats(column: _Column) -> bool:
    """Tell whether every pass of every step is there twice, to the letter."""
    if sum(column.tokens_of_pass.values()) < 2 * _COPIES_TOKENS:
        return False
    count = Counter((each[0], column.fingerprint(each)) for each in column.tokens_of_pass)
    return all(times == 2 for times in count.values())
