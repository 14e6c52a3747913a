"""Reads the routed experts that vLLM returns: ``CompletionOutput.routed_experts``, or responses over HTTP.

An array is ``[tokens - 1, all decoder layers, k]`` of logical ids (one or two bytes each), the last token not
being routed; rows of dense layers say nothing. Arrays come as ``.npy`` (one, or a folder of them), as an
``.npz`` of many, or in JSON or JSON Lines as base64 of an ``.npy`` (``choices[].routed_experts``, where
prompts come apart also ``prompt_routed_experts``). One array is one sequence, in the order of names or of the
file. Shape letters: T tokens, L layers, K top-k.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.files import check_size, reading
from traces.importers.npz import ARCHIVE_FAILURES, is_archive_of_arrays
from traces.importers.records import PieceReader, PieceSource, TokenFields, naming
from traces.importers.responses import AnswerTable, read_answers, walk_answers
from traces.importers.routed_values import decoded_ids, ids_shape, npy_shape
from traces.importers.sglang_response import routed_value
from traces.importers.shapes import choose_layers, likely_model, named_model, tell
from traces.source import TraceHeader, TraceSource

if TYPE_CHECKING:
    from placement.model_shape import ModelShape
    from traces.readers import ReadOptions

__all__ = ["open", "sniff"]

IntArray = npt.NDArray[np.int64]
Shape = tuple[int, int, int]

_NPY = b"\x93NUMPY"
_ZIP = b"PK\x03\x04"


def sniff(path: Path) -> bool:
    """Tell whether `path` holds arrays of expert ids, ``[tokens, layers, k]``, or responses with such."""
    if path.is_dir():
        return any(_is_array(file) for file in sorted(path.glob("*.npy")))
    return _is_array(path) or is_archive_of_arrays(path) or routed_value(path) in ("npy", "lists")


def _is_array(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if file.read(len(_NPY)) != _NPY:
            return False
        file.seek(0)
        try:
            npy_shape(file, path.stat().st_size)
        except InputError:
            return False
    return True


def open(path: Path, options: ReadOptions) -> TraceSource:
    """Open arrays or responses; without a model, every array is looked at once to learn how many experts are.

    Raises
    ------
    InputError
        If an array is damaged or no array of expert ids, or arrays differ in layers or k.
    """
    with naming(path):
        arrays = _arrays(path)
        shapes = {shape[1:] for shape in arrays.shapes}
        if not shapes:
            raise InputError("holds no routed experts; start vLLM with --enable-return-routed-experts")
        if len(shapes) > 1:
            layers, k = zip(*sorted(shapes)[:2], strict=True)
            raise InputError(
                f"holds arrays of {layers[0]} layers x top-{k[0]} and of {layers[1]} x top-{k[1]}; keep "
                "those of different models apart"
            )
        num_layers, top_k = shapes.pop()
        model = options.model or named_model(arrays.model)
        choice = _Choice.of(arrays, model, num_layers=num_layers, top_k=top_k)
        return PieceSource(
            path=path,
            header=TraceHeader(
                num_layers=len(choice.rows),
                num_experts=choice.num_experts,
                top_k=top_k,
                model_name=None if model is None else model.name,
                moe_layer_ids=choice.moe_layer_ids,
                domain_names=() if options.domain is None else (options.domain,),
            ),
            tokens_N=[shape[0] for shape in arrays.shapes],
            open_pieces=_pieces(arrays, choice.rows),
            name_piece=arrays.name,
            advice="are the layers those of the model that is named?",
        )


class _Arrays(Protocol):
    """Arrays of ids in a file or folder, each read alone."""

    @property
    def shapes(self) -> Sequence[Shape]: ...

    @property
    def model(self) -> str | None: ...

    def read(self, number: int) -> npt.NDArray[Any]: ...

    def name(self, number: int) -> str: ...

    def sequences(self) -> tuple[IntArray, IntArray]:
        """Sequence of each array, and the position of its first token."""
        ...


def _arrays(path: Path) -> _Arrays:
    if path.is_dir():
        return _Files(sorted(file for file in path.glob("*.npy")))
    with path.open("rb") as file:
        head = file.read(len(_NPY))
    if head.startswith(_ZIP):
        return _Archive(path)
    return _Files([path]) if head == _NPY else _Responses(path)


def _pieces(arrays: _Arrays, rows: Sequence[int]) -> Callable[[], PieceReader]:
    sequences, starts = arrays.sequences()
    num_layers = arrays.shapes[0][1]
    taken = slice(None) if list(rows) == list(range(num_layers)) else list(rows)

    def read(number: int) -> TokenFields:
        experts_TLK = arrays.read(number)[:, taken]
        num_tokens = len(experts_TLK)
        return TokenFields(
            experts_TLK=experts_TLK,
            sequence_T=np.full(num_tokens, sequences[number], dtype=np.int64),
            position_T=starts[number] + np.arange(num_tokens),
        )

    return lambda: read


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """Layers that are kept, and how many experts they have."""

    rows: tuple[int, ...]
    moe_layer_ids: tuple[int, ...] | None
    num_experts: int

    @classmethod
    def of(cls, arrays: _Arrays, model: ModelShape | None, *, num_layers: int, top_k: int) -> _Choice:
        if model is not None:
            if model.top_k != top_k:
                raise InputError(
                    f"routes to top-{top_k}, {model.name} to top-{model.top_k}; name the right model"
                )
            layers = choose_layers(num_layers, model=model)
            return cls(rows=layers.rows, moe_layer_ids=layers.moe_layer_ids, num_experts=model.num_experts)
        busy_L, num_experts = _looked_through(arrays, num_layers)
        busy = tuple(np.nonzero(busy_L)[0].tolist())
        if not busy:
            raise InputError("routes nothing: all ids of every token are the same")
        known = likely_model(num_layers=num_layers, top_k=top_k, least_experts=num_experts)
        if known is not None:
            layers = choose_layers(num_layers, model=known)
            if layers.rows == busy:
                tell(f"assuming {known.num_experts} experts per layer, as {known.name} has")
                return cls(rows=busy, moe_layer_ids=layers.moe_layer_ids, num_experts=known.num_experts)
        tell(f"assuming {num_experts} experts per layer, the largest id + 1; name the model with --model")
        layers = choose_layers(num_layers, model=None, busy=busy)
        return cls(rows=busy, moe_layer_ids=layers.moe_layer_ids, num_experts=num_experts)


def _looked_through(arrays: _Arrays, num_layers: int) -> tuple[npt.NDArray[np.bool_], int]:
    """Return which layers route, and one more than the largest id."""
    busy_L = np.zeros(num_layers, dtype=bool)
    largest = 0
    for number, shape in enumerate(arrays.shapes):
        if not shape[0]:
            continue
        ids_TLK = arrays.read(number)
        largest = max(largest, int(ids_TLK.max()))
        # A token's experts are distinct, so a layer whose ids are all alike was never filled in: a dense one.
        busy_L |= (ids_TLK != ids_TLK[:, :, :1]).any(axis=(0, 2)) | (shape[2] == 1)
    return busy_L, largest + 1


class _Files:
    """``.npy`` files, mapped into memory one at a time."""

    model = None

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.shapes = [self._shape(path) for path in paths]

    @staticmethod
    def _shape(path: Path) -> Shape:
        with reading(path), path.open("rb") as file:
            return npy_shape(file, path.stat().st_size)[0]

    def read(self, number: int) -> npt.NDArray[Any]:
        with reading(self._paths[number], ValueError, EOFError):
            array: npt.NDArray[Any] = np.load(self._paths[number], mmap_mode="r", allow_pickle=False)
        return array

    def name(self, number: int) -> str:
        return self._paths[number].name

    def sequences(self) -> tuple[IntArray, IntArray]:
        return np.arange(len(self._paths)), np.zeros(len(self._paths), dtype=np.int64)


class _Archive:
    """An ``.npz`` of arrays, unpacked one at a time."""

    model = None

    def __init__(self, path: Path) -> None:
        self._path = path
        with reading(path, *ARCHIVE_FAILURES), zipfile.ZipFile(path) as archive:
            self._entries = archive.infolist()
            check_size(sum(entry.file_size for entry in self._entries), path.stat().st_size)
            self.shapes = [self._shape(archive, entry) for entry in self._entries]

    @staticmethod
    def _shape(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Shape:
        try:
            with archive.open(entry) as file:
                return npy_shape(file, entry.file_size)[0]
        except InputError as exc:
            raise InputError(f"array {entry.filename} {exc}") from exc

    def read(self, number: int) -> npt.NDArray[Any]:
        with (
            reading(self._path, *ARCHIVE_FAILURES),
            zipfile.ZipFile(self._path) as archive,
            archive.open(self._entries[number]) as file,
        ):
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))

    def name(self, number: int) -> str:
        return f"array {self._entries[number].filename}"

    def sequences(self) -> tuple[IntArray, IntArray]:
        return np.arange(len(self._entries)), np.zeros(len(self._entries), dtype=np.int64)


class _Responses:
    """Arrays in the responses of a JSON file, read one response at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._table = AnswerTable()
        self.shapes: list[Shape] = []
        self.model: str | None = None
        known: dict[Shape, Shape] = {}
        for place, answer in walk_answers(path):
            try:
                shape = ids_shape(answer.value)
            except InputError as exc:
                raise InputError(f"record {place.record}: {exc}") from exc
            if shape[0]:
                self.model = self.model or answer.model
                # Equal shapes are kept once.
                self.shapes.append(known.setdefault(shape, shape))
                self._table.add(place, answer)

    def read(self, number: int) -> npt.NDArray[Any]:
        place = self._table.place(number)
        try:
            return decoded_ids(read_answers(self._path, place)[place.place].value)
        except InputError as exc:
            raise InputError(f"record {place.record}: {exc}") from exc

    def name(self, number: int) -> str:
        return f"record {self._table.place(number).record}"

    def sequences(self) -> tuple[IntArray, IntArray]:
        sequence_N = self._table.sequences()
        # Where the prompt came apart, every choice begins after it.
        starts = np.zeros(len(sequence_N), dtype=np.int64)
        prompt_tokens, record = 0, 0
        for number, shape in enumerate(self.shapes):
            if self._table.place(number).record != record:
                prompt_tokens, record = 0, self._table.place(number).record
            if self._table.is_prompt(number):
                prompt_tokens = shape[0]
            else:
                starts[number] = prompt_tokens
        return sequence_N, starts
