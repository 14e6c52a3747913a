"""Recorded data sets: a folder of Parquet fragments that is valid after every write.

One row per token, one fixed-size binary column per layer (a token's k expert ids, little-endian), which
compresses to about one byte per id. Every rank writes its own fragments and its own manifest
``manifest.rankNNNNN.json``, so parallel ranks share a folder without a lock; readers merge the manifests.
Shape letters: T tokens, L MoE layers, K top-k.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from placement.errors import InputError
from traces.files import check_size, reading, writing, writing_whole
from traces.source import TraceHeader
from traces.trace import UNKNOWN_DOMAIN, Trace

__all__ = [
    "FORMAT",
    "FRAGMENT_TOKENS",
    "DatasetWriter",
    "clear_dataset",
    "read_dataset",
    "write_dataset",
    "write_npz",
]

FORMAT = "moe-trace/1"
"""Version of the data set format, in every manifest."""

FRAGMENT_TOKENS = 1 << 17
"""Tokens that a fragment holds unless told otherwise: some 10 to 100 MB."""

_MANIFEST = re.compile(r"manifest\.rank(\d{5})\.json")
_FRAGMENT = re.compile(r"rank(\d{5})-\d{5,}\.parquet")
_MAX_RANK = 99_999
_TOKEN_COLUMNS: dict[str, Any] = {
    "sequence": pa.int64(),
    "position": pa.int64(),
    "rank": pa.int64(),
    "domain": pa.int32(),
}
# Ids compress best plain, ascending numbers as differences, constants through a dictionary.
_PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": ["rank", "domain"],
    "column_encoding": {"sequence": "DELTA_BINARY_PACKED", "position": "DELTA_BINARY_PACKED"},
    "write_statistics": False,
}
_ALL_OR_NONE = ("sequence", "position", "rank")


def _schema(header: TraceHeader) -> pa.Schema:
    ids = pa.binary(header.top_k * header.dtype.itemsize)
    fields = [pa.field(name, kind) for name, kind in _TOKEN_COLUMNS.items()]
    fields += [pa.field(f"layer_{layer:03}", ids, nullable=False) for layer in range(header.num_layers)]
    return pa.schema(fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fragment:
    """One Parquet file of a data set, as its manifest describes it."""

    file: str
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Manifest:
    """What one rank recorded."""

    header: TraceHeader
    rank: int
    fragments: tuple[_Fragment, ...]

    @property
    def num_tokens(self) -> int:
        return sum(fragment.tokens for fragment in self.fragments)

    def to_json(self) -> dict[str, Any]:
        header = dataclasses.asdict(self.header)
        model = {"name": header.pop("model_name"), "moe_layer_ids": header.pop("moe_layer_ids")}
        fragments = [dataclasses.asdict(fragment) for fragment in self.fragments]
        return {"format": FORMAT, "model": model, **header, "rank": self.rank, "fragments": fragments}

    @classmethod
    def from_json(cls, content: Any) -> _Manifest:
        """Read a manifest; a missing or misshapen entry is a `KeyError`, `TypeError` or `ValueError`."""
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise InputError(f"is of format {found!r}, not {FORMAT!r}")
        layer_ids = content["model"]["moe_layer_ids"]
        header = TraceHeader(
            num_layers=_count(content["num_layers"]),
            num_experts=_count(content["num_experts"]),
            top_k=_count(content["top_k"]),
            model_name=_text(content["model"]["name"]),
            moe_layer_ids=None if layer_ids is None else tuple(int(layer) for layer in layer_ids),
            domain_names=tuple(str(name) for name in content["domain_names"]),
        )
        rank = int(content["rank"])
        fragments = tuple(_fragment(entry, rank) for entry in content["fragments"])
        return cls(header=header, rank=rank, fragments=fragments)


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise InputError(f"gives {value!r} where a positive number belongs")
    return value


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InputError(f"gives {value!r} where a name belongs")
    return value


def _fragment(entry: Any, rank: int) -> _Fragment:
    # A fragment lies in the folder itself: a manifest from elsewhere must not make us open other files.
    match = _FRAGMENT.fullmatch(str(entry["file"]))
    if match is None or int(match[1]) != rank:
        raise InputError(f"names {entry['file']!r}, which is no fragment of rank {rank}")
    return _Fragment(
        file=entry["file"],
        tokens=_count(entry["tokens"]),
        bytes=_count(entry["bytes"]),
        sha256=str(entry["sha256"]),
    )


class DatasetWriter:
    """Appends tokens to a recorded data set; what was flushed is always a valid data set.

    Several processes may write into one folder at the same time, each as its own `rank`.

    Parameters
    ----------
    path
        Folder of the data set; created if it is not there.
    num_layers, num_experts, top_k
        Shape of the routing.
    model_name, moe_layer_ids, domain_names
        As in `Trace`.
    rank
        Process rank that records.
    fragment_tokens
        Tokens after which a fragment is written; fewer are lost by a crash.
    overwrite
        Remove a data set that is there. Not for several ranks, which could not tell an old data set from
        each other's new one: `clear_dataset` in one of them, before any other opens the folder.

    Raises
    ------
    InputError
        If the folder cannot be written, holds other files, or holds a data set already.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        num_layers: int,
        num_experts: int,
        top_k: int,
        model_name: str | None = None,
        moe_layer_ids: Sequence[int] | None = None,
        domain_names: Sequence[str] = (),
        rank: int = 0,
        fragment_tokens: int = FRAGMENT_TOKENS,
        overwrite: bool = False,
    ) -> None:
        if fragment_tokens < 1:
            raise InputError(f"a fragment of {fragment_tokens} tokens is impossible; use at least 1")
        self._header = TraceHeader(
            num_layers=num_layers,
            num_experts=num_experts,
            top_k=top_k,
            model_name=model_name,
            moe_layer_ids=None if moe_layer_ids is None else tuple(int(layer) for layer in moe_layer_ids),
            domain_names=tuple(domain_names),
        )
        self._path = Path(path)
        self._rank = rank
        self._fragment_tokens = fragment_tokens
        self._fragments: list[_Fragment] = []
        self._buffer: list[Trace] = []
        self._buffered_tokens = 0
        self._recorded: tuple[str, ...] | None = None
        self._closed = False
        _prepare(self._path, self._header, rank=rank, overwrite=overwrite)
        self._write_manifest()

    def append(
        self,
        experts_TLK: npt.ArrayLike,
        *,
        sequence_T: npt.ArrayLike | None = None,
        position_T: npt.ArrayLike | None = None,
        domain_T: npt.ArrayLike | None = None,
    ) -> None:
        """Add tokens that this rank routed, in recorded order; the arrays are copied.

        Parameters
        ----------
        experts_TLK
            Expert ids, ``[tokens, layers, k]``.
        sequence_T, position_T, domain_T
            As in `Trace`; sequences are numbered per rank.

        Raises
        ------
        InputError
            If the tokens are no valid trace or do not fit the data set.
        """
        experts = np.array(experts_TLK)
        self.append_trace(
            Trace(
                experts_TLK=experts,
                num_experts=self._header.num_experts,
                sequence_T=_given(sequence_T),
                position_T=_given(position_T),
                rank_T=np.full(experts.shape[:1], self._rank),
                domain_T=_given(domain_T),
                domain_names=self._header.domain_names,
                model_name=self._header.model_name,
                moe_layer_ids=self._header.moe_layer_ids,
            )
        )

    def append_trace(self, trace: Trace) -> None:
        """Add a trace whose tokens keep the ranks they have, or have none.

        Raises
        ------
        InputError
            If shapes, model or domains differ from the data set's, or the writer is closed.
        """
        if self._closed:
            raise InputError(f"{self._path}: is closed; nothing can be appended")
        difference = TraceHeader.of(trace).difference(self._header)
        if difference:
            raise InputError(f"{self._path}: the data set and the tokens appended to it differ: {difference}")
        self._check_recorded(trace)
        if self._buffered_tokens == self._fragment_tokens:
            self.flush()  # the flush that was due failed; try again before more is taken
        for piece in _pieces(trace, self._fragment_tokens - self._buffered_tokens, self._fragment_tokens):
            self._buffer.append(piece)
            self._buffered_tokens += piece.num_tokens
            if self._buffered_tokens == self._fragment_tokens:
                self.flush()

    def _check_recorded(self, trace: Trace) -> None:
        """Refuse now what could not be read back: a column that only some tokens have."""
        recorded = tuple(name for name in _ALL_OR_NONE if getattr(trace, f"{name}_T") is not None)
        if self._recorded is None:
            self._recorded = recorded
        if recorded != self._recorded:
            raise InputError(
                f"{self._path}: tokens appended before came with {', '.join(self._recorded) or 'nothing'}, "
                f"these with {', '.join(recorded) or 'nothing'}; give the same for all"
            )

    def flush(self) -> None:
        """Write what was appended since the last fragment, and the manifest."""
        if not self._buffer:
            return
        name = _fragment_name(self._rank, len(self._fragments))
        self._fragments.append(_write_fragment(self._path / name, self._header, self._buffer))
        self._buffer, self._buffered_tokens = [], 0
        self._write_manifest()

    def close(self) -> None:
        """Flush; nothing can be appended afterwards. Closing twice does nothing."""
        self._closed = True
        self.flush()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; what was appended before a failure is kept."""
        self.close()

    def _write_manifest(self) -> None:
        manifest = _Manifest(header=self._header, rank=self._rank, fragments=tuple(self._fragments))
        _write_manifest(self._path, manifest)


def _given(values: npt.ArrayLike | None) -> npt.NDArray[Any] | None:
    return None if values is None else np.array(values)


def _pieces(trace: Trace, first_tokens: int, tokens: int) -> Iterator[Trace]:
    """Cut a trace into consecutive pieces: the first of `first_tokens`, the others of `tokens`."""
    start, stop = 0, first_tokens
    while start < trace.num_tokens:
        yield trace if (start, stop) == (0, trace.num_tokens) else trace.select_tokens(slice(start, stop))
        start, stop = stop, stop + tokens


def _fragment_name(rank: int, number: int) -> str:
    return f"rank{rank:05}-{number:05}.parquet"


def _dataset_files(path: Path) -> list[Path]:
    """List the files of a folder, manifests first; a folder that holds other files is refused."""
    files = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    foreign = [f.name for f in files if not _MANIFEST.fullmatch(f.name) and not _FRAGMENT.fullmatch(f.name)]
    if foreign:
        raise InputError(
            f"{path}: holds other files ({', '.join(sorted(foreign)[:3])}); choose an empty folder"
        )
    return sorted(files)


def clear_dataset(path: str | Path) -> None:
    """Remove the files of a recorded data set, all ranks; the folder stays.

    A folder that does not exist is left so.

    Raises
    ------
    InputError
        If the folder holds other files too, or cannot be changed.
    """
    path = Path(path)
    with writing(path):
        if path.exists():
            # Manifests sort before fragments: a reader never meets one that names removed fragments.
            for file in _dataset_files(path):
                file.unlink()


def _prepare(path: Path, header: TraceHeader, *, rank: int, overwrite: bool) -> None:
    """Make the folder ready for this rank to write, or say why it must not."""
    if not 0 <= rank <= _MAX_RANK:
        raise InputError(f"{path}: rank {rank} is outside 0..{_MAX_RANK}")
    if overwrite and rank:
        raise InputError(f"{path}: rank {rank} cannot overwrite what other ranks write; clear it beforehand")
    if overwrite:
        clear_dataset(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        files = _dataset_files(path)
    for manifest in (_read_manifest(file) for file in files if _MANIFEST.fullmatch(file.name)):
        _check_same_recording(path, manifest, header, rank)
    with writing(path):
        # Fragments of this rank that no manifest names are left from a crash.
        for orphan in path.glob(f"rank{rank:05}-*.parquet"):
            orphan.unlink()


def _check_same_recording(path: Path, manifest: _Manifest, header: TraceHeader, rank: int) -> None:
    if manifest.rank == rank:
        raise InputError(
            f"{path}: holds a data set of rank {rank} already; choose another output or overwrite it"
        )
    difference = header.difference(manifest.header)
    if difference:
        raise InputError(
            f"{path}: holds another recording ({difference}); choose another output or overwrite it"
        )


def _write_manifest(path: Path, manifest: _Manifest) -> None:
    text = json.dumps(manifest.to_json(), indent=1) + "\n"
    with writing_whole(path / f"manifest.rank{manifest.rank:05}.json") as file:
        file.write(text.encode())


def _write_fragment(path: Path, header: TraceHeader, traces: Sequence[Trace]) -> _Fragment:
    tables = [_to_table(header, trace) for trace in traces]
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.concat_tables(tables).combine_chunks(),
        sink,
        **_PARQUET,
    )
    content = memoryview(sink.getvalue())
    with writing_whole(path) as file:
        file.write(content)
    return _Fragment(
        file=path.name,
        tokens=sum(table.num_rows for table in tables),
        bytes=content.nbytes,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _to_table(header: TraceHeader, trace: Trace) -> pa.Table:
    columns: list[Any] = []
    for name, kind in _TOKEN_COLUMNS.items():
        values_T = getattr(trace, f"{name}_T")
        if values_T is None:
            columns.append(pa.nulls(trace.num_tokens, kind))
        else:
            unknown = values_T == UNKNOWN_DOMAIN if name == "domain" else None
            columns.append(pa.array(values_T, type=kind, mask=unknown))
    ids = pa.binary(header.top_k * header.dtype.itemsize)
    for layer in range(trace.num_layers):
        content = np.ascontiguousarray(trace.experts_TLK[:, layer], dtype=header.dtype).data
        columns.append(
            pa.FixedSizeBinaryArray.from_buffers(ids, trace.num_tokens, [None, pa.py_buffer(content)])
        )
    return pa.Table.from_arrays(columns, schema=_schema(header))


def read_dataset(path: str | Path) -> Trace:
    """Read a recorded data set, ranks in ascending order, each rank's tokens in recorded order.

    Parameters
    ----------
    path
        Folder of the data set; ranks may still be writing into it.

    Raises
    ------
    InputError
        If it is no data set, its manifests disagree, or a fragment is missing, truncated or altered; the
        message names the file.
    """
    path = Path(path)
    with reading(path):
        if not path.is_dir():
            raise InputError("is not a folder" if path.exists() else "does not exist")
        names = sorted(entry.name for entry in path.iterdir() if _MANIFEST.fullmatch(entry.name))
        if not names:
            raise InputError("is a folder without a manifest.rankNNNNN.json, so no recorded data set")
    manifests = [_read_manifest(path / name) for name in names]
    with reading(path):
        header = _common_header(manifests)
        fragments = [fragment for manifest in manifests for fragment in manifest.fragments]
        if not fragments:
            raise InputError("holds no tokens; nothing was flushed while it was recorded")
        columns = _allocate(header, fragments)
    start = 0
    for fragment in fragments:
        with reading(path / fragment.file, pa.ArrowException):
            _read_fragment(path / fragment.file, fragment, header, columns, start)
        start += fragment.tokens
    with reading(path):
        return _to_trace(header, columns)


def _read_manifest(path: Path) -> _Manifest:
    with reading(path, UnicodeDecodeError):
        text = path.read_text(encoding="utf-8")
        try:
            manifest = _Manifest.from_json(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as exc:
            raise InputError(f"is no JSON ({exc}); restore it from a copy") from exc
        except KeyError as exc:
            raise InputError(f"lacks the entry {exc}") from exc
        except InputError:
            raise
        except (TypeError, ValueError) as exc:
            raise InputError(f"has an entry of the wrong type ({exc})") from exc
        if path.name != f"manifest.rank{manifest.rank:05}.json":
            raise InputError(f"is the manifest of rank {manifest.rank}, as its content says")
        return manifest


def _common_header(manifests: Sequence[_Manifest]) -> TraceHeader:
    first = manifests[0]
    for other in manifests[1:]:
        difference = first.header.difference(other.header)
        if difference:
            raise InputError(
                f"ranks {first.rank} and {other.rank} are of different recordings ({difference}); "
                "keep the files of one"
            )
    return first.header


def _allocate(header: TraceHeader, fragments: Sequence[_Fragment]) -> dict[str, npt.NDArray[Any]]:
    """Room for all tokens, so that no fragment is held twice in memory."""
    num_tokens = sum(fragment.tokens for fragment in fragments)
    ids_per_token = header.num_layers * header.top_k
    check_size(
        num_tokens * (ids_per_token * header.dtype.itemsize + 8 * len(_TOKEN_COLUMNS)),
        sum(fragment.bytes for fragment in fragments),
    )
    columns: dict[str, npt.NDArray[Any]] = {
        name: np.full(num_tokens, -1, dtype=np.int64) for name in _TOKEN_COLUMNS
    }
    columns["experts"] = np.empty((num_tokens, header.num_layers, header.top_k), dtype=header.dtype)
    return columns


def _read_fragment(
    path: Path, fragment: _Fragment, header: TraceHeader, columns: dict[str, npt.NDArray[Any]], start: int
) -> None:
    if not path.exists():
        raise InputError("is named by the manifest and not there; restore it from a copy")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != fragment.sha256:
        raise InputError(
            f"is truncated or altered: its {len(content)} bytes are not the {fragment.bytes} whose checksum "
            "the manifest holds; restore it from a copy or record again"
        )
    file = pq.ParquetFile(pa.BufferReader(content))
    if not file.schema_arrow.equals(_schema(header)) or file.metadata.num_rows != fragment.tokens:
        raise InputError(
            f"holds {file.metadata.num_rows} tokens of {file.schema_arrow.names}, which is not what the "
            f"manifest says: {fragment.tokens} tokens of {header.num_layers} layers, top-{header.top_k}"
        )
    table: Any = file.read().combine_chunks()
    rows = slice(start, start + fragment.tokens)
    for name in _TOKEN_COLUMNS:
        columns[name][rows] = table[name].fill_null(-1).to_numpy()
    for layer in range(header.num_layers):
        columns["experts"][rows, layer] = _ids_TK(table[f"layer_{layer:03}"], header)


def _ids_TK(column: Any, header: TraceHeader) -> npt.NDArray[Any]:
    """Expert ids of one Arrow column, without a copy."""
    chunk = column.chunk(0)
    ids = np.frombuffer(chunk.buffers()[1], dtype=header.dtype)
    first = chunk.offset * header.top_k
    return ids[first : first + len(chunk) * header.top_k].reshape(-1, header.top_k)


def _to_trace(header: TraceHeader, columns: dict[str, npt.NDArray[Any]]) -> Trace:
    fields: dict[str, npt.NDArray[Any] | None] = {}
    for name in _TOKEN_COLUMNS:
        values_T = columns[name]
        known = values_T >= 0
        if name != "domain" and known.any() and not known.all():
            raise InputError(
                f"token {int((~known).argmax())} has no {name}, others have one; "
                "every rank records it or none does"
            )
        fields[f"{name}_T"] = values_T if known.any() else None
    return Trace(
        experts_TLK=columns["experts"],
        num_experts=header.num_experts,
        domain_names=header.domain_names,
        model_name=header.model_name,
        moe_layer_ids=header.moe_layer_ids,
        **fields,
    )


def write_dataset(
    trace: Trace, path: str | Path, *, overwrite: bool = False, fragment_tokens: int = FRAGMENT_TOKENS
) -> None:
    """Write a trace as a recorded data set; the folder becomes one with its last file.

    Parameters
    ----------
    trace
        The trace; read back, it has the same digest.
    path
        Folder of the data set; created if it is not there.
    overwrite
        Replace a data set that is there.
    fragment_tokens
        Tokens per fragment.

    Raises
    ------
    InputError
        If the folder cannot be written, holds other files, or holds a data set already.
    """
    if fragment_tokens < 1:
        raise InputError(f"a fragment of {fragment_tokens} tokens is impossible; use at least 1")
    path, header = Path(path), TraceHeader.of(trace)
    _prepare(path, header, rank=0, overwrite=overwrite)
    fragments = tuple(
        _write_fragment(path / _fragment_name(0, number), header, [piece])
        for number, piece in enumerate(_pieces(trace, fragment_tokens, fragment_tokens))
    )
    _write_manifest(path, _Manifest(header=header, rank=0, fragments=fragments))


def write_npz(trace: Trace, path: str | Path) -> None:
    """Write a trace as a NumPy archive, whole or not at all.

    Keys: ``topk`` [tokens, layers, k], ``num_experts``, ``domain_names``, and where the trace has them
    ``sequence``, ``position``, ``rank``, ``domain`` [tokens], ``model_name``, ``moe_layer_ids``. Read back,
    the trace has the same digest.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    arrays: dict[str, npt.NDArray[Any]] = {
        "topk": trace.experts_TLK,
        "num_experts": np.array(trace.num_experts),
        "domain_names": np.array(trace.domain_names, dtype=np.str_),
    }
    optional = {
        "sequence": trace.sequence_T,
        "position": trace.position_T,
        "rank": trace.rank_T,
        "domain": trace.domain_T,
        "model_name": trace.model_name,
        "moe_layer_ids": trace.moe_layer_ids,
    }
    arrays |= {name: np.asarray(value) for name, value in optional.items() if value is not None}
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file")
    with writing_whole(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
