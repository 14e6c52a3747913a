"""One expert's part of every tensor that belongs to it: weights, gradients, optimizer state.

Shape letter: C rows of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from placement.errors import InputError
from placement.runtime.migration.stages import aligned

__all__ = ["LayerRows", "RowTensor", "layer_rows"]

_WORD_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowTensor:
    """A tensor with one row for each slot of this rank.

    Parameters
    ----------
    name
        Of the parameter within the experts module, then what it is: ``up_proj.grad``, ``up_proj.exp_avg``.
    values_C
        The tensor, ``[C, ...]``, detached.
    bytes_C, words_C
        Its rows as they lie in memory, ``[C, bytes]`` and ``[C, words]``, uint8 and int64; no words where
        rows are not whole numbers of them.
    row_bytes
        Bytes of one row.
    """

    name: str
    values_C: torch.Tensor
    bytes_C: torch.Tensor = field(init=False)
    words_C: torch.Tensor | None = field(init=False)
    row_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        values_C = self.values_C
        num_values = math.prod(values_C.shape[1:])
        order = sorted(range(1, values_C.ndim), key=values_C.stride, reverse=True)
        bytes_C = values_C.permute(0, *order).view(values_C.shape[0], num_values).view(torch.uint8)
        ways = (bytes_C.shape[1], bytes_C.stride(0), bytes_C.storage_offset())
        set_(self, "bytes_C", bytes_C)
        set_(self, "words_C", None if any(way % _WORD_BYTES for way in ways) else bytes_C.view(torch.int64))
        set_(self, "row_bytes", num_values * values_C.element_size())

    @property
    def layout(self) -> tuple[object, ...]:
        """What sender and receiver must have in common."""
        values_C = self.values_C
        return (self.name, str(values_C.dtype), tuple(values_C.shape[1:]), values_C.stride()[1:])

    def row(self, row: int) -> torch.Tensor:
        """Return a row's bytes as they lie in memory, ``[bytes]``, uint8; no copy."""
        return self.bytes_C[row]

    def piece(self, row: int, start: int, end: int) -> torch.Tensor:
        """Return some bytes of a row; as 64-bit words where they are whole ones."""
        if self.words_C is None or start % _WORD_BYTES or end % _WORD_BYTES:
            return self.bytes_C[row, start:end]
        return self.words_C[row, start // _WORD_BYTES : end // _WORD_BYTES]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerRows:
    """All tensors of one layer's experts on this rank.

    Parameters
    ----------
    tensors
        In the same order on every rank.
    """

    tensors: tuple[RowTensor, ...]

    @property
    def tensor_bytes(self) -> dict[str, int]:
        """Bytes of one expert, by tensor."""
        return {tensor.name: tensor.row_bytes for tensor in self.tensors}

    @property
    def staged_bytes(self) -> int:
        """Bytes of one waiting expert."""
        return sum(aligned(tensor.row_bytes) for tensor in self.tensors)

    @property
    def layout(self) -> tuple[object, ...]:
        """What all ranks must have in common."""
        return tuple(tensor.layout for tensor in self.tensors)

    @property
    def version(self) -> int:
        """Grows whenever a tensor is changed in place."""
        return sum(tensor.values_C._version for tensor in self.tensors if not tensor.values_C.is_inference())

    def row(self, row: int) -> list[torch.Tensor]:
        """Bytes of one expert, tensor by tensor."""
        return [tensor.row(row) for tensor in self.tensors]

    def parts(self, staged: torch.Tensor) -> list[torch.Tensor]:
        """Cut the bytes of a waiting expert, ``[staged_bytes]``, into its tensors' parts."""
        parts, start = [], 0
        for tensor in self.tensors:
            parts.append(staged[start : start + tensor.row_bytes])
            start += aligned(tensor.row_bytes)
        return parts

    def write(self, row: int, parts: Sequence[torch.Tensor]) -> None:
        """Overwrite a row with an expert's bytes."""
        for own, new in zip(self.row(row), parts, strict=True):
            own.copy_(new)

    def read(self, row: int, parts: Sequence[torch.Tensor]) -> None:
        """Put a row's bytes aside."""
        for own, aside in zip(self.row(row), parts, strict=True):
            aside.copy_(own)

    def clear(self, row: int) -> None:
        """Fill a row with zeros, as empty slots are."""
        for own in self.row(row):
            own.zero_()


def layer_rows(
    parameters: Mapping[str, nn.Parameter],
    *,
    optimizers: Iterable[Optimizer] = (),
    gradients: bool = False,
    where: str = "the experts",
) -> LayerRows:
    """Return everything with one row for each slot that belongs to some parameters.

    Parameters
    ----------
    parameters
        By name, ``[C, ...]``.
    optimizers
        Whose state moves along. A parameter's step count and other single numbers belong to all of its rows
        and stay.
    gradients
        Whether gradients move along; where a parameter that needs one has none, it gets zeros.
    where
        What error messages call the layer.

    Raises
    ------
    InputError
        If a tensor is sharded, has gaps within its rows, or its shape does not tell which part belongs to
        which row; the message names it.
    """
    tensors = []
    for name, parameter in parameters.items():
        tensors.append(_row_tensor(name, parameter.detach(), where))
        if gradients and parameter.requires_grad:
            tensors.append(_row_tensor(f"{name}.grad", _gradient(parameter), where))
        for optimizer in optimizers:
            tensors += _state(name, parameter, optimizer, where)
    return LayerRows(tensors=tuple(tensors))


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.detach()


def _state(name: str, parameter: nn.Parameter, optimizer: Optimizer, where: str) -> Iterator[RowTensor]:
    """Row tensors of an optimizer's state of one parameter, in order of their names."""
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    for key in sorted(state):
        value = state[key]
        if not isinstance(value, torch.Tensor) or value.numel() == 1 or value.ndim == 0:
            continue
        if not _row_aligned(value.shape, parameter.shape):
            raise InputError(
                f"{key} of {name} in the state of {type(optimizer).__name__} is {list(value.shape)} for a "
                f"parameter of {list(parameter.shape)} ({where}): it does not tell which part belongs to "
                "which expert; use an optimizer that keeps every expert's state apart"
            )
        yield _row_tensor(f"{name}.{key}", value.detach(), where)


def _row_aligned(shape: torch.Size, parameter: torch.Size) -> bool:
    """Whether a state has the parameter's shape, or that with each expert's values summed up somehow."""
    if len(shape) == len(parameter):
        kept = zip(shape[1:], parameter[1:], strict=True)
        return shape[0] == parameter[0] and all(size in (1, whole) for size, whole in kept)
    return len(parameter) > 2 and shape in (parameter[:-1], parameter[:-2] + parameter[-1:])


def _row_tensor(name: str, values_C: torch.Tensor, where: str) -> RowTensor:
    if type(values_C) is not torch.Tensor:
        raise InputError(
            f"{name} of {where} is a {type(values_C).__name__}; leave the experts out of FSDP and the like"
        )
    if values_C.shape[0] and not _dense(values_C[0]):
        raise InputError(f"{name} of {where} has gaps within its rows; make it contiguous")
    return RowTensor(name=name, values_C=values_C)


def _dense(values: torch.Tensor) -> bool:
    """Whether a tensor's elements fill its memory without gaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(values.stride(), values.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
