"""Reads TensorRT-LLM's expert statistics: a folder with ``meta_info.json`` and one file or two per rank.

``rankR.safetensors`` counts the pairs of each expert under ``"{iteration}_{layer}"``;
``rankR_raw.safetensors`` holds the expert ids of each token there, ``[tokens, k]``. Layers are decoder
layers. Where a load balancer ran, the engine records slots in place of experts; its configuration maps them
back. Shape letters: I iterations, R ranks, T tokens, L MoE layers, E experts, S slots, K top-k.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.counts import ExpertCounts
from traces.files import check_size, reading
from traces.importers.passes import few, model_layers, naming, pass_source, stages
from traces.importers.shapes import tell
from traces.source import TraceHeader, TraceSource
from traces.trace import MAX_EXPERTS

if TYPE_CHECKING:
    from placement.model_shape import ModelShape
    from traces.readers import ReadOptions

__all__ = ["open", "sniff"]

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]

_META = "meta_info.json"
_COUNTS = re.compile(r"rank(\d+)\.safetensors")
_RAW = re.compile(r"(?:rank(\d+)_raw|token_selected_experts_rank(\d+))\.safetensors")
_KEY = re.compile(r"(\d+)_(\d+)")
_LIMIT_JSON_BYTES = 1 << 24
_COPIES_PAIRS = 64
"""Pairs that ranks must agree on before they are taken to have routed the same ones."""


def sniff(path: Path) -> bool:
    """Tell whether `path` is a folder of expert statistics, complete or not."""
    if not path.is_dir():
        return False
    if any(_COUNTS.fullmatch(entry.name) or _RAW.fullmatch(entry.name) for entry in path.iterdir()):
        return True
    meta = path / _META
    return meta.is_file() and b'"num_experts_per_token"' in meta.read_bytes()[:_LIMIT_JSON_BYTES]


def open(path: Path, options: ReadOptions) -> TraceSource | ExpertCounts:
    """Open the folder: token by token where every rank kept raw ids, else its counts, a window per iteration.

    Raises
    ------
    InputError
        If a rank's file is missing or damaged, iterations or layers are incomplete, or slots were recorded
        and no ``options.physical_map`` says what they held.
    """
    with reading(path):
        if not path.is_dir():
            raise InputError(f"is a file; TensorRT-LLM's statistics are a folder with {_META}")
        counts = _rank_files(path, _COUNTS)
        raw = _rank_files(path, _RAW)
        if not counts and not raw:
            raise InputError("has no rankR.safetensors; copy what the ranks wrote beside it")
        for files in (counts, raw):
            _check_ranks(files)
        if counts and raw and len(counts) != len(raw):
            raise InputError(
                f"has counts of {len(counts)} ranks, raw ids of {len(raw)}; copy the files that are missing"
            )
        ids = _Ids.read(path, options, len(raw or counts))
        if raw:
            return _open_raw(path, raw, counts, ids, options)
        return _open_counts(path, counts, ids, options)


def _rank_files(path: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Return a folder's files of one kind by rank."""
    found: dict[int, Path] = {}
    for entry in sorted(path.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match:
            rank = int(next(number for number in match.groups() if number is not None))
            if rank in found:
                raise InputError(f"has two files of rank {rank}: {found[rank].name} and {entry.name}")
            found[rank] = entry
    return dict(sorted(found.items()))


def _check_ranks(files: Mapping[int, Path]) -> None:
    if files:
        missing = sorted(set(range(max(files) + 1)) - set(files))
        if missing:
            raise InputError(
                f"lacks the files of rank {few(missing)} (it has those of rank {few(files)}); copy them from "
                "the machines that wrote them"
            )


# ------------------------------------------------------------------------------------------ experts and slots


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ids:
    """What recorded ids mean: experts, or slots that a load balancer filled."""

    num_recorded: int
    num_experts: int
    top_k: int
    slots_of_layer: Mapping[int, IntArray] | None

    @classmethod
    def read(cls, path: Path, options: ReadOptions, num_ranks: int) -> _Ids:
        meta = path / _META
        with naming(path, meta, ValueError, RecursionError):
            content = json.loads(_small_text(meta))
            if not isinstance(content, dict):
                raise InputError("holds no JSON object")
            recorded = _count(content, "num_experts")
            # Some versions say how many ranks there were.
            if num_ranks < (_count(content, "ep_size") if "ep_size" in content else 0):
                raise InputError(
                    f"says that {content['ep_size']} ranks ran; files of {num_ranks} are there; copy the rest"
                )
            top_k = _count(content, "num_experts_per_token")
            model = options.model
            if model is not None and model.top_k != top_k:
                raise InputError(f"is of a model with top-{top_k}; {model.name} has top-{model.top_k}")
            if options.physical_map is None and model is not None and model.num_experts != recorded:
                raise InputError(
                    f"counts {recorded} ids per layer, {model.name} has {model.num_experts} experts: a load "
                    "balancer ran and its slots were recorded; give its YAML file with --physical-map"
                )
        if options.physical_map is None:
            return cls(num_recorded=recorded, num_experts=recorded, top_k=top_k, slots_of_layer=None)
        slots = _read_slots(options.physical_map, recorded, model)
        experts = 1 + max(int(slot_S.max()) for slot_S in slots.values())
        return cls(
            num_recorded=recorded,
            num_experts=experts if model is None else model.num_experts,
            top_k=top_k,
            slots_of_layer=slots,
        )

    def check_layers(self, layers: Sequence[int]) -> None:
        missing = [] if self.slots_of_layer is None else sorted(set(layers) - set(self.slots_of_layer))
        if missing:
            raise InputError(f"routes in layer {few(missing)}, of which the physical map says nothing")

    def logical_counts(self, count_IS: IntArray, layer: int) -> IntArray:
        """Return pairs per expert from pairs per recorded id."""
        if self.slots_of_layer is None:
            return count_IS
        count_IE = np.zeros((len(count_IS), self.num_experts), dtype=np.int64)
        np.add.at(count_IE.T, self.slots_of_layer[layer], count_IS.T)
        return count_IE

    def logical_ids(self, id_TK: Array, layer: int) -> Array:
        """Return expert ids from recorded ids, which are checked here."""
        if int(id_TK.min(initial=0)) < 0 or int(id_TK.max(initial=0)) >= self.num_recorded:
            worst = int(id_TK.min()) if int(id_TK.min()) < 0 else int(id_TK.max())
            raise InputError(f"names id {worst} in layer {layer}, outside 0..{self.num_recorded - 1}")
        return id_TK if self.slots_of_layer is None else self.slots_of_layer[layer][id_TK]

    def padding_T(self, id_TK: Array) -> npt.NDArray[np.bool_]:
        """Tell which tokens are padding: each of their ids is -1 or one past the last."""
        mask: npt.NDArray[np.bool_] = ((id_TK == -1) | (id_TK == self.num_recorded)).all(axis=1)
        return mask


def _small_text(path: Path) -> str:
    if path.stat().st_size > _LIMIT_JSON_BYTES:
        raise InputError(f"is larger than {_LIMIT_JSON_BYTES} bytes; it is not what TensorRT-LLM writes")
    return path.read_text(encoding="utf-8")


def _count(content: Mapping[str, Any], key: str) -> int:
    value = content.get(key)
    if type(value) is not int or not 1 <= value <= MAX_EXPERTS:
        raise InputError(f"gives {key} as {value!r}, not a number from 1 to {MAX_EXPERTS}")
    return value


def _read_slots(path: Path, num_slots: int, model: ModelShape | None) -> dict[int, IntArray]:
    """Read which expert each slot held from a load balancer's configuration."""
    import yaml

    with reading(path, ValueError, RecursionError, yaml.YAMLError):
        content = yaml.safe_load(_small_text(path))
        if isinstance(content, dict):
            content = content.get("moe_config", content)
        if isinstance(content, dict):
            content = content.get("load_balancer", content)
        assignments = content.get("initial_global_assignments") if isinstance(content, dict) else None
        if not isinstance(assignments, dict) or not assignments:
            raise InputError("has no initial_global_assignments: it does not say what the slots held")
        if content.get("layer_updates_per_iter", 0) != 0:
            raise InputError(
                "has layer_updates_per_iter above 0: the engine moved experts while it recorded, so nobody "
                "knows what a slot held; record with layer_updates_per_iter: 0"
            )
        return {_layer(key): _slots(key, held, num_slots, model) for key, held in assignments.items()}


def _layer(key: Any) -> int:
    if type(key) is not int or key < 0:
        raise InputError(f"names {key!r} where a layer belongs")
    return key


def _slots(layer: int, held: Any, num_slots: int, model: ModelShape | None) -> IntArray:
    if not isinstance(held, list) or any(type(expert) is not int for expert in held):
        raise InputError(f"does not list the experts of layer {layer}'s slots")
    if len(held) != num_slots:
        raise InputError(f"lists {len(held)} slots in layer {layer}; {num_slots} were recorded")
    most = MAX_EXPERTS if model is None else model.num_experts
    if min(held) < 0 or max(held) >= most:
        raise InputError(
            f"puts expert {min(held) if min(held) < 0 else max(held)} in layer {layer}, of {most}"
        )
    return np.array(held, dtype=np.int64)


# ------------------------------------------------------------------------------------------------------ files


class _Tensors:
    """One rank's file: its tensors by iteration and layer, mapped from the disk."""

    def __init__(self, folder: Path, file: Path, *, dims: int) -> None:
        from safetensors import SafetensorError

        self._folder, self._path = folder, file
        self.num_bytes = file.stat().st_size
        self._foreign = (SafetensorError, ValueError, TypeError)
        with self.naming():
            self._file = _opened(file)
            self.shapes: dict[tuple[int, int], tuple[int, ...]] = {}
            names: list[str] = self._file.keys()
            for key in names:
                self.shapes[_parsed(key)] = self._checked_shape(key, dims)
            if not self.shapes:
                raise InputError("holds no iteration")

    def _checked_shape(self, key: str, dims: int) -> tuple[int, ...]:
        stored = self._file.get_slice(key)
        shape = tuple(stored.get_shape())
        if len(shape) != dims or stored.get_dtype() not in ("I64", "I32", "I16", "I8", "U8", "U16", "U32"):
            raise InputError(
                f"holds {stored.get_dtype()} {list(shape)} under {key}, not integers of {dims} dimensions"
            )
        return shape

    @property
    def layers(self) -> frozenset[int]:
        return frozenset(layer for _, layer in self.shapes)

    @property
    def iterations(self) -> frozenset[int]:
        return frozenset(iteration for iteration, _ in self.shapes)

    def naming(self) -> contextlib.AbstractContextManager[None]:
        """Name the file in errors raised inside."""
        return naming(self._folder, self._path, *self._foreign)

    def read(self, iteration: int, layer: int) -> Array:
        with self.naming():
            return np.asarray(self._file.get_tensor(f"{iteration}_{layer}"))


def _opened(file: Path) -> Any:
    from safetensors import safe_open  # its methods carry no types

    return safe_open(file, framework="np")


def _parsed(key: str) -> tuple[int, int]:
    match = _KEY.fullmatch(key)
    if match is None or len(key) > 32 or key != f"{int(match[1])}_{int(match[2])}":
        raise InputError(f"holds {key[:40]!r} where an iteration and a layer belong, such as '50_3'")
    return int(match[1]), int(match[2])


# ----------------------------------------------------------------------------------------------------- counts


def _open_counts(path: Path, files: Mapping[int, Path], ids: _Ids, options: ReadOptions) -> ExpertCounts:
    ranks = [_Tensors(path, file, dims=1) for file in files.values()]
    iterations = sorted(set[int]().union(*(rank.iterations for rank in ranks)))
    layers = model_layers(set[int]().union(*(rank.layers for rank in ranks)), options.model)
    ids.check_layers(layers)
    groups = stages([rank.layers for rank in ranks])
    stage_of_layer = {
        layer: [ranks[at] for at in members] for members in groups for layer in ranks[members[0]].layers
    }
    check_size(8 * len(iterations) * len(layers) * ids.num_experts, sum(rank.num_bytes for rank in ranks))
    load_ILE = np.empty((len(iterations), len(layers), ids.num_experts), dtype=np.int64)
    seen_IL = np.zeros((len(iterations), len(layers)), dtype=bool)
    same_L = np.zeros(len(layers), dtype=bool)
    first = []
    for at, layer in enumerate(layers):
        count_RIS = np.stack(
            [_counts_IS(rank, iterations, layer, ids, seen_IL[:, at]) for rank in stage_of_layer[layer]]
        )
        same_L[at] = (count_RIS == count_RIS[0]).all() and count_RIS[0].sum() >= _COPIES_PAIRS
        first.append(count_RIS[0])
        load_ILE[:, at] = ids.logical_counts(count_RIS.sum(axis=0), layer)
    if not seen_IL.all():
        row, column = (int(i) for i in np.argwhere(~seen_IL)[0])
        raise InputError(f"lacks layer {layers[column]} in iteration {iterations[row]}; record again")
    if same_L.all() and len(ranks) > len(groups):
        tell(f"{path}: all ranks of a stage counted the same tokens; they are counted once")
        for at, layer in enumerate(layers):
            load_ILE[:, at] = ids.logical_counts(first[at], layer)
    _tell_partial(path, ranks, groups)
    return ExpertCounts(
        load_WLE=load_ILE,
        top_k=ids.top_k,
        model_name=None if options.model is None else options.model.name,
        moe_layer_ids=layers,
    )


def _tell_partial(path: Path, ranks: Sequence[_Tensors], groups: Sequence[Sequence[int]]) -> None:
    """Say which iterations are not on all ranks of a stage: the engine sums over those that have them."""
    partial: set[int] = set()
    for members in groups:
        sets = [ranks[at].iterations for at in members]
        partial |= set[int]().union(*sets) - frozenset[int].intersection(*sets)
    if partial:
        tell(f"{path}: iteration {few(partial)} is not on all ranks; summed over those that have it")


def _counts_IS(
    rank: _Tensors, iterations: Sequence[int], layer: int, ids: _Ids, seen_I: npt.NDArray[np.bool_]
) -> IntArray:
    """Read one rank's counts of a layer, zero where it has no such iteration."""
    count_IS = np.zeros((len(iterations), ids.num_recorded), dtype=np.int64)
    for at, iteration in enumerate(iterations):
        shape = rank.shapes.get((iteration, layer))
        if shape is None:
            continue
        with rank.naming():
            if shape != (ids.num_recorded,):
                raise InputError(
                    f"counts {shape[0]} experts in layer {layer} of iteration {iteration}; {_META} says "
                    f"{ids.num_recorded}"
                )
            count_IS[at] = rank.read(iteration, layer)
            if int(count_IS[at].min()) < 0:
                raise InputError(
                    f"counts {count_IS[at].min()} pairs in layer {layer} of iteration {iteration}"
                )
        seen_I[at] = True
    return count_IS


# -------------------------------------------------------------------------------------------------------- raw


def _open_raw(
    path: Path, raw: Mapping[int, Path], counts: Mapping[int, Path], ids: _Ids, options: ReadOptions
) -> TraceSource:
    ranks = [_Tensors(path, file, dims=2) for file in raw.values()]
    for rank, number in zip(ranks, raw, strict=True):
        _check_complete(rank, ids)
        if number in counts:
            _check_against_counts(rank, _Tensors(path, counts[number], dims=1))
    layers = model_layers(set[int]().union(*(rank.layers for rank in ranks)), options.model)
    ids.check_layers(layers)
    groups = stages([rank.layers for rank in ranks])
    if len({len(members) for members in groups}) > 1:
        raise InputError(
            f"has pipeline stages of {', '.join(str(len(members)) for members in groups)} ranks, whose "
            "tokens cannot be joined; remove the raw files to use the counts"
        )
    iterations = sorted(set[int]().union(*(rank.iterations for rank in ranks)))
    pipelines = [[ranks[at] for at in members] for members in zip(*groups, strict=True)]
    columns = [_Column(files, iterations, ids, layers) for files in pipelines]
    numbers = [list(raw)[at] for at in groups[0]]
    kept = _without_copies(path, columns)
    header = TraceHeader(
        num_layers=len(layers),
        num_experts=ids.num_experts,
        top_k=ids.top_k,
        model_name=None if options.model is None else options.model.name,
        moe_layer_ids=layers,
        domain_names=() if options.domain is None else (options.domain,),
    )
    tokens_IR = np.stack([columns[at].tokens_I for at in kept], axis=1)
    return pass_source(
        path,
        header,
        tokens_IR,
        [numbers[at] for at in kept],
        lambda index, column: columns[kept[column]].load(index),
    )


def _check_complete(rank: _Tensors, ids: _Ids) -> None:
    """Refuse a rank whose iterations have not all its layers, or layers of different lengths."""
    with rank.naming():
        for (iteration, layer), shape in rank.shapes.items():
            if shape[1] != ids.top_k:
                raise InputError(
                    f"names {shape[1]} experts per token in layer {layer}; {_META} says {ids.top_k}"
                )
            tokens = rank.shapes.get((iteration, min(rank.layers)), (None,))[0]
            if shape[0] != tokens:
                raise InputError(
                    f"holds {shape[0]} tokens in layer {layer} of iteration {iteration}, {tokens or 'none'} "
                    f"in layer {min(rank.layers)}; remove the raw files to use the counts"
                )
        missing = len(rank.iterations) * len(rank.layers) - len(rank.shapes)
        if missing:
            raise InputError(f"lacks {missing} layers in some iterations; record again")


def _check_against_counts(rank: _Tensors, counted: _Tensors) -> None:
    """Refuse raw ids that are fewer than the counts beside them.

    Where the engine runs a layer in chunks it adds the counts up, yet keeps the ids of the last chunk alone.
    """
    with rank.naming():
        for (iteration, layer), shape in rank.shapes.items():
            if (iteration, layer) not in counted.shapes:
                continue
            pairs = int(counted.read(iteration, layer).sum())
            if pairs != shape[0] * shape[1] and pairs:
                raise InputError(
                    f"holds {shape[0] * shape[1]} ids in layer {layer} of iteration {iteration}, of {pairs} "
                    "counted: the engine keeps the last chunk of each layer alone; remove the raw files to "
                    "use the counts"
                )


class _Column:
    """The tokens of one rank, or of the ranks of a pipeline that passed them on."""

    def __init__(
        self, files: Sequence[_Tensors], iterations: Sequence[int], ids: _Ids, layers: Sequence[int]
    ) -> None:
        self._iterations, self._ids = iterations, ids
        self.top_k = ids.top_k
        self._file_of_layer = [
            (layer, next(file for file in files if layer in file.layers)) for layer in layers
        ]
        first, file = self._file_of_layer[0]
        self.tokens_I = np.zeros(len(iterations), dtype=np.int64)
        self.first_layer: list[bytes] = []
        for at, iteration in enumerate(iterations):
            lengths = {part.shapes.get((iteration, min(part.layers)), (0,))[0] for part in files}
            if len(lengths) > 1:
                raise InputError(
                    f"iteration {iteration} has {' and '.join(map(str, sorted(lengths)))} tokens in "
                    "different pipeline stages, which cannot be joined; remove the raw files to use counts"
                )
            ids_TK = (
                file.read(iteration, first) if (iteration, first) in file.shapes else np.empty((0, ids.top_k))
            )
            self.tokens_I[at] = int((~ids.padding_T(ids_TK)).sum())
            self.first_layer.append(hashlib.blake2b(ids_TK.tobytes(), digest_size=16).digest())

    def load(self, index: int) -> Array:
        """Return the expert ids of one iteration, ``[tokens, layers, k]``, without padding."""
        iteration = self._iterations[index]
        parts = []
        for layer, file in self._file_of_layer:
            ids_TK = file.read(iteration, layer)
            kept_TK = ids_TK[~self._ids.padding_T(ids_TK)]
            with file.naming():
                if len(kept_TK) != self.tokens_I[index]:
                    raise InputError(
                        f"pads other tokens in layer {layer} of iteration {iteration} than before"
                    )
                parts.append(self._ids.logical_ids(kept_TK, layer))
        return np.stack(parts, axis=1)


def _without_copies(path: Path, columns: Sequence[_Column]) -> list[int]:
    """Return the columns to keep: one, where tensor-parallel ranks all routed the same tokens."""
    first = columns[0]
    same = len(columns) > 1 and all(column.first_layer == first.first_layer for column in columns[1:])
    for column in columns:
        column.first_layer = []
    if same and int(first.tokens_I.sum()) * first.top_k >= _COPIES_PAIRS:
        tell(f"{path}: all {len(columns)} ranks routed the same tokens; they are read once")
        return [0]
    return list(range(len(columns)))
