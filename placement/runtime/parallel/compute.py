"""What one expert computes, for many rows of many experts at once.

`grouped_linear` is one linear layer for rows sorted by their expert. It has two back ends:

``grouped_mm``
    One kernel for all experts, forwards and for each gradient; the counts stay on the GPU. Taken with torch
    2.9 and above on CUDA devices of compute capability 8.0 and above, for bfloat16 (for other dtypes it would
    wait for the GPU inside), where rows and weights are multiples of 16 bytes wide, as in all real models.
``loop``
    One matrix product for each expert that has rows: everywhere else, so on CPUs and for other dtypes. It
    needs the counts on the host; on CUDA, give `counts_host`, or it waits for the GPU.

`backend` tells which one it will be. `expert_math` builds a family's whole expert from it.

Shape letters: P rows (pairs), C experts of this rank, I width of the input, O width of the output, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from placement.errors import BackendError, InputError
from placement.runtime.families.protocol import ModelFamily, MoELayer

__all__ = [
    "Backend",
    "ExpertMath",
    "FusedMath",
    "OwnMath",
    "backend",
    "check_grouped_mm",
    "expert_math",
    "grouped_linear",
]

Backend = Literal["grouped_mm", "loop"]
"""How a grouped linear layer runs."""

_GROUPED_MM: Callable[..., torch.Tensor] | None = getattr(
    torch.nn.functional, "grouped_mm", getattr(torch, "_grouped_mm", None)
)
_ALIGNMENT_BYTES = 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def backend(x_PI: torch.Tensor, weight: torch.Tensor) -> Backend:
    """Return the back end that `grouped_linear` takes for these rows and weights.

    Parameters
    ----------
    x_PI
        Rows, ``[P, I]``.
    weight
        ``[C, O, I]`` or ``[C, I, O]``.
    """
    fits = (
        _GROUPED_MM is not None
        and weight.device.type == "cuda"
        and _compute_dtype(x_PI, weight) == torch.bfloat16
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
        and all(width * 2 % _ALIGNMENT_BYTES == 0 for width in weight.shape[1:])
        and weight.is_contiguous()
        and weight.data_ptr() % _ALIGNMENT_BYTES == 0
    )
    return "grouped_mm" if fits else "loop"


def grouped_linear(
    x_PI: torch.Tensor,
    weight: torch.Tensor,
    counts_C: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
    counts_host: Sequence[int] | None = None,
    using: Backend | None = None,
) -> torch.Tensor:
    """Multiply each row with the weights of its expert.

    Parameters
    ----------
    x_PI
        Rows sorted by expert, ``[P, I]``.
    weight
        ``[C, O, I]``, or ``[C, I, O]`` if `transposed`.
    counts_C
        Rows of each expert, int64 ``[C]``, on the device of the rows; their sum is P.
    bias
        ``[C, O]``.
    transposed
        Whether the weights' input width comes first.
    counts_host
        The counts once more, where they are known on the host.
    using
        Back end; `backend` chooses if left out.

    Returns
    -------
    torch.Tensor
        ``[P, O]``, of the autocast dtype where autocast is on, else of the weights' dtype. It depends on all
        of the weights, also where there are no rows: experts without rows have gradients of zeros.

    Raises
    ------
    InputError
        If shapes do not fit.
    """
    _check(x_PI, weight, counts_C, transposed=transposed)
    return _linear(x_PI, weight, _Groups(counts_C, counts_host), bias, transposed=transposed, using=using)


def _check(x_PI: torch.Tensor, weight: torch.Tensor, counts_C: torch.Tensor, *, transposed: bool) -> None:
    width = weight.shape[1 if transposed else 2] if weight.ndim == 3 else -1
    if x_PI.ndim != 2 or x_PI.shape[1] != width or counts_C.shape != weight.shape[:1]:
        raise InputError(
            f"rows {list(x_PI.shape)} and counts {list(counts_C.shape)} do not go with weights "
            f"{list(weight.shape)}{' (transposed)' if transposed else ''}; give [P, I], [C] and [C, O, I]"
        )


class _Groups:
    """Rows of each expert, in the forms that the back ends want, each made once."""

    def __init__(self, counts_C: torch.Tensor, counts_host: Sequence[int] | None = None) -> None:
        self.counts_C = counts_C
        self._counts_host = counts_host

    @cached_property
    def host_C(self) -> Sequence[int]:
        """Counts on the host."""
        if self._counts_host is not None:
            return list(self._counts_host)
        counts: list[int] = self.counts_C.tolist()
        return counts

    @cached_property
    def end_C(self) -> torch.Tensor:
        """Place behind each expert's last row, int32."""
        return self.counts_C.cumsum(0, dtype=torch.int32)


def _linear(
    x_PI: torch.Tensor,
    weight: torch.Tensor,
    groups: _Groups,
    bias: torch.Tensor | None,
    *,
    transposed: bool,
    using: Backend | None = None,
) -> torch.Tensor:
    using = using or backend(x_PI, weight)
    dtype = _compute_dtype(x_PI, weight)
    x_PI, weight = x_PI.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if x_PI.shape[0] == 0:
        return _no_rows(x_PI, weight, bias, transposed=transposed)
    if using == "loop":
        return _loop(x_PI, weight, groups, bias, transposed=transposed)
    y_PO: torch.Tensor = _GroupedLinear.apply(  # type: ignore[no-untyped-call]
        x_PI, weight, bias, groups.counts_C, groups.end_C, transposed
    )
    return y_PO


def _compute_dtype(x_PI: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Dtype of the products, as `torch.nn.functional.linear` would choose; grouped_mm knows no autocast."""
    device_type = x_PI.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return weight.dtype


def _no_rows(
    x_PI: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, transposed: bool
) -> torch.Tensor:
    """Nothing, as a product of empty matrices: every gradient is there, and zero."""
    weight_CIO = weight if transposed else weight.mT
    y_C0O = x_PI.reshape(weight.shape[0], 0, x_PI.shape[1]) @ weight_CIO
    if bias is not None:
        y_C0O = y_C0O + bias.unsqueeze(1)
    return y_C0O.reshape(0, weight_CIO.shape[2])


def _loop(
    x_PI: torch.Tensor, weight: torch.Tensor, groups: _Groups, bias: torch.Tensor | None, *, transposed: bool
) -> torch.Tensor:
    count_C = groups.host_C
    if len(count_C) != weight.shape[0] or sum(count_C) != x_PI.shape[0]:
        raise InputError(
            f"counts of {len(count_C)} experts say {sum(count_C)} rows; there are {x_PI.shape[0]} rows and "
            f"{weight.shape[0]} experts"
        )
    bias_C = (None,) * len(count_C) if bias is None else bias.unbind(0)
    of_experts = zip(torch.split(x_PI, list(count_C)), weight.unbind(0), bias_C, strict=True)
    return torch.cat(
        [
            nn.functional.linear(rows, one.mT if transposed else one, its_bias)
            for rows, one, its_bias in of_experts
            if rows.shape[0]
        ]
    )


class _GroupedLinear(torch.autograd.Function):
    """The grouped kernel, with gradients laid out like the weights, and a bias, which the kernel has not."""

    @staticmethod
    def forward(
        ctx: Any,
        x_PI: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        counts_C: torch.Tensor,
        end_C: torch.Tensor,
        transposed: bool,
    ) -> torch.Tensor:
        ctx.transposed = transposed
        x_PI = _aligned(x_PI)
        ctx.save_for_backward(x_PI, weight, counts_C, end_C)
        y_PO = _grouped_mm(x_PI, weight if transposed else weight.mT, end_C)
        if bias is not None:
            expert_P = torch.repeat_interleave(counts_C, output_size=x_PI.shape[0])
            y_PO += bias.index_select(0, expert_P)
        return y_PO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_PI, weight, counts_C, end_C = ctx.saved_tensors
        grad_PO = _aligned(grad_PO)
        grad_PI = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_PI = _grouped_mm(grad_PO, weight.mT if ctx.transposed else weight, end_C)
        if ctx.needs_input_grad[1]:
            left, right = (x_PI, grad_PO) if ctx.transposed else (grad_PO, x_PI)
            grad_weight = _zero_where_empty(_grouped_mm(left.mT, right, end_C), counts_C)
        if ctx.needs_input_grad[2]:
            # Sums over each expert's rows, as products with rows of ones: no atomic additions.
            ones_P = grad_PO.new_ones(grad_PO.shape[0], _ALIGNMENT_BYTES // grad_PO.element_size())
            grad_bias = _zero_where_empty(_grouped_mm(ones_P.mT, grad_PO, end_C), counts_C)[:, 0]
        return grad_PI, grad_weight, grad_bias, None, None, None


def _grouped_mm(left: torch.Tensor, right: torch.Tensor, end_C: torch.Tensor) -> torch.Tensor:
    if _GROUPED_MM is None:
        raise InputError(f"torch {torch.__version__} has no grouped_mm; use the loop, or torch 2.9 and above")
    return _GROUPED_MM(left, right, offs=end_C)


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """Rows as the kernel wants them: dense, beginning at a multiple of 16 bytes."""
    dense = rows.is_contiguous() and rows.stride(0) == rows.shape[1]  # a single row has any stride
    if dense and rows.data_ptr() % _ALIGNMENT_BYTES == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _zero_where_empty(grad: torch.Tensor, counts_C: torch.Tensor) -> torch.Tensor:
    """Gradients of experts without rows made zero, where the kernel may leave them as they come.

    It clears them on Hopper and on CPUs, not on Blackwell (pytorch issue 172439).
    """
    if grad.device.type == "cpu" or torch.cuda.get_device_capability(grad.device)[0] == 9:
        return grad
    return grad.masked_fill_((counts_C == 0)[:, None, None], 0)


class ExpertMath(Protocol):
    """What the experts of a family compute, for rows sorted by expert."""

    @property
    def weights_first(self) -> bool:
        """Whether routing weights multiply the experts' input, not their output."""
        ...

    def __call__(
        self,
        experts: nn.Module,
        x_PH: torch.Tensor,
        counts_C: torch.Tensor,
        counts_host: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return what each row's expert makes of it, unweighed, ``[P, H]``.

        Parameters
        ----------
        experts
            Module whose tensors hold C experts.
        x_PH
            Rows sorted by expert, ``[P, H]``.
        counts_C
            Rows of each expert, int64 ``[C]``, on the rows' device.
        counts_host
            The counts on the host, where they are known there.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedMath:
    """Up, gate or activation, down: what nearly all families compute; the gate is the module's own.

    Parameters
    ----------
    up
        Parameter of the first linear layer; ``<up>_bias`` and ``down_proj_bias`` are the biases.
    gated
        Whether the module's `_apply_gate` (else ``act(gate) * up``) follows, not `act_fn` alone.
    biased
        Whether the linear layers have biases.
    transposed
        Whether the weights' input width comes first.
    normed
        Whether the module's `post_expert_norm` comes last.
    weights_first
        See `ExpertMath`.
    """

    up: str = "gate_up_proj"
    gated: bool = True
    biased: bool = False
    transposed: bool = False
    normed: bool = False
    weights_first: bool = False

    def __call__(
        self,
        experts: nn.Module,
        x_PH: torch.Tensor,
        counts_C: torch.Tensor,
        counts_host: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return what each row's expert makes of it; see `ExpertMath`."""
        groups = _Groups(counts_C, counts_host)
        inner = self._activated(experts, self._project(self.up, experts, x_PH, groups))
        y_PH = self._project("down_proj", experts, inner, groups)
        if self.normed:
            y_PH = _part(experts, "post_expert_norm")(y_PH)
        return y_PH

    def _project(self, name: str, experts: nn.Module, x_PI: torch.Tensor, groups: _Groups) -> torch.Tensor:
        bias = _part(experts, f"{name}_bias") if self.biased else None
        return _linear(x_PI, _part(experts, name), groups, bias, transposed=self.transposed)

    def _activated(self, experts: nn.Module, inner: torch.Tensor) -> torch.Tensor:
        activated: torch.Tensor
        if not self.gated:
            activated = _part(experts, "act_fn")(inner)
        elif hasattr(experts, "_apply_gate"):
            activated = _part(experts, "_apply_gate")(inner)
        else:
            gate, up = inner.chunk(2, dim=-1)
            activated = _part(experts, "act_fn")(gate) * up
        return activated


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnMath:
    """The class's own forward pass, each row a token with one expert, for classes that nobody knows here.

    It is right for any class that takes tokens, expert ids and weights, and as fast as the class is: most
    wait for the GPU to learn which experts have rows.

    Parameters
    ----------
    expert_counters
        As in `MoELayer`: they say C while the pass runs.
    expert_tensors
        As in `MoELayer`.
    """

    expert_counters: tuple[tuple[nn.Module, str], ...]
    expert_tensors: tuple[str, ...]

    @property
    def weights_first(self) -> bool:
        """Weights multiply outputs."""
        return False

    def __call__(
        self,
        experts: nn.Module,
        x_PH: torch.Tensor,
        counts_C: torch.Tensor,
        counts_host: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return what each row's expert makes of it; see `ExpertMath`."""
        expert_P1 = torch.repeat_interleave(counts_C, output_size=x_PH.shape[0]).unsqueeze(1)
        with _counting(self.expert_counters, counts_C.shape[0]):
            # The instance's forward pass may have been replaced by the one that calls this.
            y_PH: torch.Tensor = type(experts).forward(
                experts, x_PH, expert_P1, x_PH.new_ones(expert_P1.shape)
            )
        for name in self.expert_tensors:
            # A sum of nothing: the output depends on the tensor also where there are no rows.
            y_PH = y_PH + _part(experts, name).flatten()[:0].sum()
        return y_PH


@contextmanager
def _counting(counters: tuple[tuple[nn.Module, str], ...], num_experts: int) -> Iterator[None]:
    """Make counters say a number for a while."""
    before = [getattr(module, name) for module, name in counters]
    try:
        for module, name in counters:
            setattr(module, name, num_experts)
        yield
    finally:
        for (module, name), value in zip(counters, before, strict=True):
            setattr(module, name, value)


def _part(module: nn.Module, name: str) -> Any:
    return getattr(module, name)


# Classes without the library's decorator, which tells the form of the others.
_KNOWN: dict[str, FusedMath] = {
    "Llama4TextExperts": FusedMath(transposed=True, weights_first=True),
    "Step3p7Experts": FusedMath(),
}


def expert_math(family: ModelFamily, layer: MoELayer) -> ExpertMath:
    """Return what the experts of a layer compute.

    Experts modules that transformers marks as runnable by grouped products tell their form themselves; of
    others a few are known, and for the rest the class's own forward pass runs.

    Parameters
    ----------
    family
        Family of the model.
    layer
        A layer of it.

    Raises
    ------
    InputError
        If the family can only be recorded, or the experts are quantised.
    """
    if family.record_only:
        raise InputError(f"experts of {family.model_type} cannot be computed apart: {family.record_only}")
    experts: Any = layer.experts
    for name in layer.expert_tensors:
        if getattr(experts, name).dtype not in _DTYPES:
            raise InputError(
                f"{name} of decoder layer {layer.decoder_layer} is {getattr(experts, name).dtype}; load the "
                "model unquantised, in bfloat16, float16 or float32"
            )
    for one in type(experts).__mro__:
        if one.__name__ in _KNOWN:
            return _KNOWN[one.__name__]
    if not all(hasattr(experts, name) for name in ("has_gate", "has_bias", "is_transposed")):
        return OwnMath(expert_counters=layer.expert_counters, expert_tensors=layer.expert_tensors)
    return FusedMath(
        up="gate_up_proj" if experts.has_gate else "up_proj",
        gated=experts.has_gate,
        biased=experts.has_bias,
        transposed=experts.is_transposed,
        normed=getattr(experts, "has_post_expert_norm", False),
    )


def check_grouped_mm(device: torch.device | str, *, dtype: torch.dtype = torch.bfloat16) -> int:
    """Compare the grouped kernel with the loop, gradients and experts without rows included.

    Parameters
    ----------
    device
        Where to run it.
    dtype
        Dtype of rows and weights.

    Returns
    -------
    int
        Number of results that agreed.

    Raises
    ------
    BackendError
        If they differ by more than the rounding of the dtype.
    """
    tables = ([5, 0, 64, 1], [0, 0, 7, 0], [130, 3, 0, 300])
    return sum(
        _check_grouped_mm(counts, transposed, torch.device(device), dtype)
        for counts in tables
        for transposed in (False, True)
    )


def _check_grouped_mm(counts: list[int], transposed: bool, device: torch.device, dtype: torch.dtype) -> int:
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    inputs = [
        torch.randn(sum(counts), 64, **options),
        torch.randn((len(counts), 64, 96) if transposed else (len(counts), 96, 64), **options),
        torch.randn(len(counts), 96, **options),
    ]
    grad_PO = torch.randn(sum(counts), 96, **options)
    counts_C = torch.tensor(counts, device=device)
    both: list[list[torch.Tensor]] = []
    names: tuple[Backend, ...] = ("grouped_mm", "loop")
    for name in names:
        x_PI, weight, bias = (one.clone().requires_grad_() for one in inputs)
        y_PO = grouped_linear(x_PI, weight, counts_C, bias=bias, transposed=transposed, using=name)
        both.append([y_PO, *torch.autograd.grad(y_PO, (x_PI, weight, bias), grad_PO)])
    rounding = 8 * torch.finfo(dtype).eps
    for what, actual, expected in zip(("output", "rows", "weights", "bias"), *both, strict=True):
        scale = max(float(expected.detach().abs().max()), 1.0)
        if not torch.allclose(actual, expected, rtol=rounding, atol=rounding * scale):
            raise BackendError(
                f"grouped_mm and the loop differ in {what} for counts {counts}; use another torch"
            )
    return len(both[0])
