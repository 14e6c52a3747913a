"""Saves an expert-parallel model as one checkpoint for transformers; every rank writes its share.

All experts of a layer lie in one file, whose header and size are known before anything is written. Ranks put
their experts in their places there, a layer at a time; rank 0 writes all else. The folder appears at the end.

Shape letters: E logical experts, N experts of a layer that a rank writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from placement.checkpoint.copying import copying
from placement.checkpoint.folder import check_room, writing_folder
from placement.checkpoint.header import BITS_OF_DTYPE, TensorEntry, quoted, read_header
from placement.checkpoint.layouts import Kind, Match, Part, match_tensor
from placement.errors import InputError
from placement.runtime.checkpoint import first_line, quiet_transformers
from placement.runtime.parallel.loading_model import set_rows
from placement.runtime.parallel.model import ParallelModel
from placement.runtime.parallel.patience import FILES_S, Patience
from placement.runtime.parallel.slots import LayerSlots

__all__ = ["save_expert_parallel"]

_STORED = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def save_expert_parallel(parallel: ParallelModel, folder: str | Path, *, timeout_s: float = FILES_S) -> None:
    """Write a model whose experts are spread over ranks into one checkpoint folder.

    Every rank of the model's mesh has to call this with the same folder, on a file system that all of them
    share. The rank of its first replica writes an expert. A rank copies its own experts of one layer at once,
    rank 0 all parameters that are no experts. Optimizer state is not saved.

    Parameters
    ----------
    folder
        Folder that is made, or an empty one; it appears whole or not at all.
    timeout_s
        Seconds to wait for the slowest rank.

    Raises
    ------
    InputError
        On every rank, if one cannot write its share, the folder holds something, or it is not known how such
        a model's experts are stored.
    """
    out, mesh = Path(folder), parallel.mesh
    patience = Patience(mesh, timeout_s=timeout_s)
    with patience.together():
        layout = _ExpertFiles(parallel)
    rest = _rest_state(parallel)
    with ExitStack() as ending:
        growing = Path()
        with patience.together():
            if mesh.rank == 0:
                growing = ending.enter_context(writing_folder(out, source=_source(parallel), overwrite=False))
                check_room(out, layout.num_bytes + sum(one.nbytes for one in rest.values()))
        growing = patience.gather(growing)[0]
        with patience.together():
            if mesh.rank == 0:
                _write_rest(parallel.model, growing, rest)
                layout.create(growing)
        with patience.together():
            layout.write_own(growing)
        with patience.together():
            if mesh.rank == 0:
                _write_index(growing)
                ending.close()


def _source(parallel: ParallelModel) -> Path:
    """Return the folder that the weights were read from, which may still be in use."""
    return Path(getattr(parallel.model, "name_or_path", "") or os.devnull)


def _rest_state(parallel: ParallelModel) -> dict[str, torch.Tensor]:
    """Return all that is no expert, on rank 0; what FSDP has sharded is gathered by all ranks."""
    experts, state = parallel.expert_parameters(), {}
    for name, tensor in parallel.model.state_dict().items():
        if name in experts:
            continue
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if parallel.mesh.rank == 0:
            state[name] = whole.detach().cpu()
    return state


def _write_rest(model: nn.Module, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Have transformers write configuration and everything but the experts."""
    saver: Any = model
    with _converting(model), copying(folder, folder / "model.safetensors"), quiet_transformers():
        saver.save_pretrained(folder, state_dict=dict(state))


@contextmanager
def _converting(model: nn.Module) -> Iterator[None]:
    """Say which model it is that transformers cannot turn into what is stored."""
    from safetensors import SafetensorError

    try:
        yield
    except (ValueError, RuntimeError, SafetensorError) as exc:
        raise InputError(f"{type(model).__name__} cannot be saved: {first_line(exc)}") from exc


def _write_index(folder: Path) -> None:
    """Number the files as usual and say which tensor is in which."""
    files = sorted(
        folder.glob("*.safetensors"), key=lambda path: (path.name.startswith("experts-"), path.name)
    )
    weight_map: dict[str, str] = {}
    num_bytes = 0
    with copying(folder, folder / "model.safetensors.index.json"):
        for number, path in enumerate(files, 1):
            header = read_header(path)
            num_bytes += header.data_bytes
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            weight_map |= {entry.name: name for entry in header.tensors}
            _sync(path)
            # A name of its own first: transformers may have used one of the new ones for another file.
            path.rename(folder / f".{name}")
        for path in folder.glob(".model-*.safetensors"):
            path.rename(folder / path.name.removeprefix("."))
        content = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@dataclass(frozen=True, slots=True, kw_only=True)
class _LayerFile:
    """The file of one layer's experts.

    Parameters
    ----------
    name
        Until all files are numbered.
    header
        What it starts with.
    entries
        Its tensors by name.
    """

    name: str
    header: bytes
    entries: Mapping[str, TensorEntry]

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(entry.num_bytes for entry in self.entries.values())


class _ExpertFiles:
    """One file for each MoE layer, laid out before it is written.

    Raises
    ------
    InputError
        If the family stores experts in a layout that is not known.
    """

    def __init__(self, parallel: ParallelModel) -> None:
        self._parallel = parallel
        self._names = {id(one): name for name, one in parallel.expert_parameters().items()}
        self._stored_as = _Stored(parallel.model)
        self._files = [self._laid_out(index) for index in range(len(parallel.layers))]

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.num_bytes for file in self._files)

    def _laid_out(self, index: int) -> _LayerFile:
        """Lay out a layer's file from the shapes of all its experts, without any values."""
        num_experts = self._parallel.placement.num_experts
        stored = self._stored_as(
            {
                self._names[id(one)]: torch.empty(num_experts, *one.shape[1:], dtype=one.dtype, device="meta")
                for one in self._parallel.layers[index].parameters().values()
            },
            num_rows=num_experts,
        )
        for name in stored:
            _expert_match(name)
        return _layer_file(f"experts-{index:05d}.safetensors", stored)

    def create(self, folder: Path) -> None:
        """Make the files in their full size, headers written."""
        for file in self._files:
            with copying(folder, folder / file.name), (folder / file.name).open("xb") as out:
                out.write(file.header)
                out.truncate(file.num_bytes)

    def write_own(self, folder: Path) -> None:
        """Write this rank's experts to their places."""
        if not folder.is_dir():
            raise InputError(
                f"{folder.parent}: what rank 0 writes there is not seen here; choose a folder that all ranks "
                "share"
            )
        for index, file in enumerate(self._files):
            with copying(folder, folder / file.name):
                self._write_layer(index, file, folder / file.name)

    def _write_layer(self, index: int, file: _LayerFile, path: Path) -> None:
        layer = self._parallel.layers[index]
        expert_N, row_N = _own(layer.slots, self._parallel.mesh.rank)
        if not expert_N:
            return
        stored = self._stored_as(
            {self._names[id(one)]: one.detach()[row_N].cpu() for one in layer.parameters().values()},
            num_rows=len(expert_N),
        )
        descriptor = os.open(path, os.O_WRONLY)
        try:
            for begin, tensor in _pieces(file, stored, expert_N):
                _write_at(descriptor, begin, tensor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Stored:
    """Turns fused tensors of a layer's experts into what transformers stores, names included."""

    def __init__(self, model: nn.Module) -> None:
        given: Any = model
        # Conversions look at the shapes of the model they are for: it has the rows of what is converted.
        with torch.device("meta"):
            self._like: Any = type(given)(given.config)
        if hasattr(given, "_weight_conversions"):
            self._like._weight_conversions = given._weight_conversions

    def __call__(self, tensors: Mapping[str, torch.Tensor], *, num_rows: int) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        set_rows(self._like, num_rows)
        with _converting(self._like):
            stored: dict[str, torch.Tensor] = revert_weight_conversion(self._like, dict(tensors))
        return stored


def _own(slots: LayerSlots, rank: int) -> tuple[list[int], list[int]]:
    """Experts that a rank writes, those whose first replica it has, and their rows."""
    first_E = slots.slot_EX[:, 0]
    expert_N = np.flatnonzero(slots.rank_of_slot_S[first_E] == rank)
    return expert_N.tolist(), slots.row_of_slot_S[first_E[expert_N]].tolist()


def _expert_match(name: str) -> Match:
    """Understand the name of a stored expert tensor."""
    match = match_tensor(name)
    if match is None or match.rule is None or match.rule.part is not Part.EXPERTS:
        raise InputError(
            f"tensor {quoted(name)} follows no known layout of experts; the model cannot be saved"
        )
    return match


def _layer_file(name: str, stored: Mapping[str, torch.Tensor]) -> _LayerFile:
    entries, at = {}, 0
    for key, tensor in stored.items():
        dtype = _STORED.get(tensor.dtype)
        if dtype is None:
            raise InputError(
                f"tensor {quoted(key)} is of {tensor.dtype}, which cannot be saved; convert it first"
            )
        end = at + tensor.numel() * BITS_OF_DTYPE[dtype] // 8
        entries[key] = TensorEntry(name=key, dtype=dtype, shape=tuple(tensor.shape), begin=at, end=end)
        at = end
    return _LayerFile(name=name, header=_header(entries), entries=entries)


def _header(entries: Mapping[str, TensorEntry]) -> bytes:
    members = {
        name: {"dtype": one.dtype, "shape": one.shape, "data_offsets": [one.begin, one.end]}
        for name, one in entries.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **members}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(
    file: _LayerFile, stored: Mapping[str, torch.Tensor], expert_N: list[int]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield where in the file each piece of a rank's experts goes."""
    for name, tensor in stored.items():
        match = _expert_match(name)
        if match.rule is not None and match.rule.kind is Kind.NUMBERED:
            entry = file.entries[match.renumbered(name, expert_N[match.expert])]
            yield len(file.header) + entry.begin, tensor
            continue
        entry = file.entries[name]
        row_bytes = entry.num_bytes // entry.shape[0]
        for row, expert in enumerate(expert_N):
            yield len(file.header) + entry.begin + expert * row_bytes, tensor[row]


def _write_at(descriptor: int, begin: int, tensor: torch.Tensor) -> None:
    left: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    while left:
        written = os.pwrite(descriptor, left, begin)
        begin, left = begin + written, left[written:]
