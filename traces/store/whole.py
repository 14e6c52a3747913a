"""Whole traces: into a data set, out of one, and into a NumPy archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.files import check_size, reading, writing_whole
from traces.source import TraceHeader
from traces.store.columns import turn_to_tokens
from traces.store.folder import open_folder
from traces.store.manifest import Manifest, fragment_name
from traces.store.prepare import (
    check_fragment_tokens,
    made_by,
    prepare_folder,
    remove_dataset,
    store,
    write_manifest,
)
from traces.store.scratch import Scratch
from traces.store.source import DatasetSource
from traces.store.writer import FRAGMENT_TOKENS, cut
from traces.trace import UNKNOWN_DOMAIN, Trace

__all__ = ["clear_dataset", "read_dataset", "write_dataset", "write_npz"]

_TOKEN_FIELDS = ("sequence_T", "position_T", "rank_T", "domain_T")


def clear_dataset(path: str | Path) -> None:
    """Remove the files of a recorded data set, all ranks, spools too; the folder stays.

    A folder that does not exist is left so.

    Raises
    ------
    InputError
        If the folder holds other files too, or cannot be changed.
    """
    remove_dataset(open_folder(path))


def read_dataset(path: str | Path) -> Trace:
    """Read a recorded data set whole, ranks in ascending order, each rank's tokens in recorded order.

    Its digest is that of the content, the same whatever the tokens were read from. `DatasetSource` reads
    what may not fit in memory.

    Parameters
    ----------
    path
        Folder or URL of the data set; ranks may still be writing into it.

    Raises
    ------
    InputError
        If it is no data set, its manifests disagree, or a fragment is missing, truncated or altered; the
        message names the file.
    """
    source = DatasetSource(path)
    header = source.header
    with reading(str(path)):
        ids_bytes = header.num_layers * header.top_k * header.dtype.itemsize
        check_size(source.num_tokens * (ids_bytes + 8 * len(_TOKEN_FIELDS)), source.size_bytes)
        experts_TLK = np.empty((source.num_tokens, header.num_layers, header.top_k), dtype=header.dtype)
    pieces: dict[str, list[Any]] = {name: [] for name in _TOKEN_FIELDS}
    start = 0
    for block in source.recorded_columns():
        turn_to_tokens(block.ids_LTK, experts_TLK[start : start + block.num_tokens])
        for name, parts in pieces.items():
            values_T = getattr(block, name)
            parts.append(np.full(block.num_tokens, UNKNOWN_DOMAIN) if values_T is None else values_T)
        start += block.num_tokens
    with reading(str(path)):
        return Trace(
            experts_TLK=experts_TLK,
            num_experts=header.num_experts,
            domain_names=header.domain_names,
            model_name=header.model_name,
            moe_layer_ids=header.moe_layer_ids,
            **{name: _column(name, np.concatenate(parts)) for name, parts in pieces.items()},
        )


def _column(name: str, values_T: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    known = values_T >= 0
    if name != "domain_T" and known.any() and not known.all():
        raise InputError(
            f"token {int((~known).argmax())} has no {name.removesuffix('_T')}, others have one; "
            "every rank records it or none does"
        )
    return values_T if known.any() else None


def write_dataset(
    trace: Trace, path: str | Path, *, overwrite: bool = False, fragment_tokens: int = FRAGMENT_TOKENS
) -> None:
    """Write a trace as a recorded data set; the folder becomes one with its last file.

    Parameters
    ----------
    trace
        The trace; read back, it has the same digest.
    path
        Folder or URL of the data set; created if it is not there.
    overwrite
        Replace a data set that is there.
    fragment_tokens
        Tokens per fragment.

    Raises
    ------
    InputError
        If the folder cannot be written, holds other files, or holds a data set already.
    """
    check_fragment_tokens(fragment_tokens)
    folder, header = open_folder(path), TraceHeader.of(trace)
    prepare_folder(folder, header, rank=0, overwrite=overwrite)
    room = Scratch()
    fragments = tuple(
        store(folder, header, [piece], fragment_name(0, number), room=room)
        for number, piece in enumerate(cut(trace, fragment_tokens, fragment_tokens))
    )
    write_manifest(folder, Manifest(header=header, rank=0, fragments=fragments, provenance=made_by()))


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
