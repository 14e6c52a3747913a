"""What one rank reads of a checkpoint: its own experts, numbered by its rows, and all that is no expert.

Nothing is read before somebody asks for a tensor's values, and of experts only the rows that were asked for.

Shape letters: C rows of the rank (slots of its device), E logical experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from placement.checkpoint.header import TensorEntry, quoted, read_header
from placement.checkpoint.layouts import Kind, Match, Part, match_tensor
from placement.checkpoint.shards import Shards
from placement.checkpoint.survey import LayerSurvey, Survey
from placement.errors import InputError
from placement.plan import EMPTY

__all__ = ["LazyTensor", "TensorFiles", "check_experts", "local_tensors"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyTensor:
    """A tensor that is read when it is indexed, as transformers does with every entry of a state dict.

    Parameters
    ----------
    shape, stored_dtype
        What it will be; the type as safetensors calls it.
    read
        Reads it.
    """

    shape: tuple[int, ...]
    stored_dtype: str
    read: Callable[[], torch.Tensor]

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]

    def get_shape(self) -> list[int]:
        """Return the shape, as a slice of safetensors does."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Return the stored type's name, as a slice of safetensors does."""
        return self.stored_dtype

    @property
    def dtype(self) -> torch.dtype:
        """The type; asked of one tensor where ``config.json`` names none."""
        return self.read().dtype

    def is_floating_point(self) -> bool:
        """Whether it holds floats."""
        return self.stored_dtype.startswith(("F", "BF"))


class TensorFiles:
    """The safetensors files of a checkpoint, open for reading tensors and rows of tensors.

    Parameters
    ----------
    shards
        The checkpoint.

    Raises
    ------
    InputError
        If a file cannot be opened.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        with self._open:
            for name in shards.files:
                self._files[name] = self._open.enter_context(_opened(shards, name))
            self._open = self._open.pop_all()

    def entries(self) -> Iterator[tuple[str, TensorEntry]]:
        """Yield the file of every tensor and its entry."""
        for name in self._shards.files:
            for entry in read_header(self._shards.folder / name).tensors:
                yield name, entry

    def whole(self, file: str, name: str) -> torch.Tensor:
        """Read a tensor."""
        tensor: torch.Tensor = self._files[file].get_tensor(name)
        return tensor

    def rows(self, file: str, name: str, expert_C: IntArray) -> torch.Tensor:
        """Read some rows of a tensor of all experts; an empty slot's row is zeros, ``[C, ...]``."""
        stored = self._files[file].get_slice(name)
        nothing = stored[0:0]
        rows = torch.zeros((expert_C.size, *nothing.shape[1:]), dtype=nothing.dtype)
        for row, expert in enumerate(expert_C.tolist()):
            if expert != EMPTY:
                rows[row] = stored[expert : expert + 1][0]
        return rows

    def zeros_like(self, file: str, entry: TensorEntry) -> torch.Tensor:
        """Return zeros of a tensor's shape and type, without reading it."""
        stored = self._files[file].get_slice(entry.name)
        dtype = stored[0:0].dtype if entry.shape else stored[...].dtype
        return torch.zeros(entry.shape, dtype=dtype)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._files.clear()
        self._open.close()


def _opened(shards: Shards, name: str) -> Any:
    try:
        return safe_open(shards.folder / name, framework="pt")
    except (OSError, SafetensorError) as exc:
        raise InputError(f"{shards.folder / name}: cannot be read ({exc}); get the file again") from exc


def local_tensors(
    files: TensorFiles, survey: Survey, expert_of_layer_C: Mapping[int, IntArray], *, num_layers: int
) -> dict[str, LazyTensor]:
    """Return the state dict that one rank loads: its experts as experts 0 to C-1, and all else whole.

    Layers that follow the model's own (for speculative decoding) are left out.

    Parameters
    ----------
    expert_of_layer_C
        Expert of each row of the rank by decoder layer, `EMPTY` where there is none.
    num_layers
        Decoder layers of the model.
    """
    found: dict[str, LazyTensor] = {}
    for file, entry in files.entries():
        match = match_tensor(entry.name)
        if match is not None and match.stem == survey.stem and match.layer >= num_layers:
            continue
        if match is None or match.rule is None or match.rule.part is not Part.EXPERTS:
            found[entry.name] = _lazy(entry, entry.shape, partial(files.whole, file, entry.name))
        elif match.stem == survey.stem and match.layer in expert_of_layer_C:
            found |= _of_experts(files, file, entry, match, expert_of_layer_C[match.layer])
    return found


def _of_experts(
    files: TensorFiles, file: str, entry: TensorEntry, match: Match, expert_C: IntArray
) -> Iterator[tuple[str, LazyTensor]]:
    """Yield what the rank takes of one expert tensor under its new names."""
    assert match.rule is not None  # the caller has seen its part
    if match.rule.kind is not Kind.NUMBERED:
        shape = (expert_C.size, *entry.shape[1:])
        yield entry.name, _lazy(entry, shape, partial(files.rows, file, entry.name, expert_C))
        return
    for row in np.flatnonzero(expert_C == match.expert).tolist():
        yield (
            match.renumbered(entry.name, row),
            _lazy(entry, entry.shape, partial(files.whole, file, entry.name)),
        )
    if match.expert == 0:  # every expert has tensors of the same names: the first lends its shapes
        for row in np.flatnonzero(expert_C == EMPTY).tolist():
            yield (
                match.renumbered(entry.name, row),
                _lazy(entry, entry.shape, partial(files.zeros_like, file, entry)),
            )


def _lazy(entry: TensorEntry, shape: tuple[int, ...], read: Callable[[], torch.Tensor]) -> LazyTensor:
    return LazyTensor(shape=shape, stored_dtype=entry.dtype, read=read)


def check_experts(survey: Survey, decoder_layers: tuple[int, ...], num_experts: int) -> None:
    """Check that the checkpoint has every expert of every MoE layer of the model, each by itself.

    Raises
    ------
    InputError
        If it lacks a layer or an expert, has more, or keeps experts in a layout that cannot be cut.
    """
    for number in decoder_layers:
        layer = survey.layers.get(number)
        if layer is None:
            raise InputError(
                f"{survey.stem}: the checkpoint has no experts in decoder layer {number}, the model has; "
                "config.json belongs to another checkpoint"
            )
        _check_layer(f"{survey.stem}.{number}", layer, num_experts)


def _check_layer(name: str, layer: LayerSurvey, num_experts: int) -> None:
    for rest, held in layer.numbered.items():
        if held != (1 << num_experts) - 1:
            raise InputError(
                f"{name}.{rest}: the checkpoint has {held.bit_count()} experts up to number "
                f"{held.bit_length() - 1}, config.json says {num_experts}; get the checkpoint again"
            )
    for entry, match in layer.stacked:
        if match.rule is None or match.rule.part is not Part.EXPERTS:
            continue
        if match.rule.kind is not Kind.ROWS:
            raise InputError(
                f"tensor {quoted(entry.name)} keeps experts the way of {match.rule.layout}, which cannot be "
                "read expert by expert; convert the checkpoint to transformers' own layout"
            )
        if not entry.shape or entry.shape[0] != num_experts:
            raise InputError(
                f"tensor {quoted(entry.name)} has the shape {list(entry.shape)}, config.json says "
                f"{num_experts} experts; get the checkpoint again"
            )
