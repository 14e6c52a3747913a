"""Copies rows of tokens to their pairs and sums pairs back: two functions, each the other's transpose.

Sums run in float32 over k = 0, 1, ... in that order and no kernel adds atomically, so results are the same
bits every time. Nothing here waits for a GPU.

Rows of bfloat16, float16 and float32 on CUDA go through Triton kernels (`rows_triton`) that read and write
every byte once. All else, and all where Triton is missing or fails, goes through torch; the first failure is
told in a warning and ends the use of the kernels.

Shape letters: R rows, H hidden, P pairs, K pairs of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from placement.errors import InputError
from placement.runtime.parallel.optional import OptionalKernels

__all__ = ["combine_rows", "expand_rows", "uses_kernels"]

_MIN_ROW_BYTES = 256
"""Narrower rows (weights, ids) leave most of a program's threads idle; torch is faster there."""
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def expand_rows(x_RH: torch.Tensor, row_P: torch.Tensor, pair_RK: torch.Tensor) -> torch.Tensor:
    """Copy each row to its pairs: ``x_PH[p] = x_RH[row_P[p]]``.

    Parameters
    ----------
    x_RH
        Rows, ``[R, H]``, of any dtype.
    row_P
        Row of each pair, int64 ``[P]``.
    pair_RK
        Pairs of each row, int64 ``[R, K]``, -1 where there is none. Every pair is in one place of the table,
        in its own row: ``row_P[pair_RK[r, k]] == r``.

    Returns
    -------
    torch.Tensor
        ``[P, H]``, of the dtype of the rows. Its gradient is summed as `combine_rows` does without weights.

    Raises
    ------
    InputError
        If shapes do not fit.
    """
    _check(row_P, pair_RK, num_rows=x_RH.shape[0])
    if not (x_RH.requires_grad and torch.is_grad_enabled()):
        return _spread(x_RH, row_P, pair_RK)
    expanded: torch.Tensor = _Expand.apply(x_RH, row_P, pair_RK)  # type: ignore[no-untyped-call]
    return expanded


def combine_rows(
    y_PH: torch.Tensor,
    row_P: torch.Tensor,
    pair_RK: torch.Tensor,
    weight_RK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum each row's pairs: ``out_RH[r]`` is the sum over k of ``weight_RK[r, k] * y_PH[pair_RK[r, k]]``.

    Parameters
    ----------
    y_PH
        Rows of pairs, ``[P, H]``.
    row_P, pair_RK
        The same tables as for `expand_rows`.
    weight_RK
        Weight of each pair, ``[R, K]``, of any floating dtype; 1 if left out. Entries without a pair count
        for nothing and have gradient zero.

    Returns
    -------
    torch.Tensor
        ``[R, H]``, of the dtype of `y_PH`, summed in float32 (float64 in float64). Rows without pairs
        are zero.

    Raises
    ------
    InputError
        If shapes do not fit.
    """
    _check(row_P, pair_RK, num_pairs=y_PH.shape[0])
    if weight_RK is not None and weight_RK.shape != pair_RK.shape:
        raise InputError(
            f"weights are {list(weight_RK.shape)}, the table of pairs {list(pair_RK.shape)}; give one weight "
            "for each of its entries"
        )
    needs_gradient = y_PH.requires_grad or (weight_RK is not None and weight_RK.requires_grad)
    if not (needs_gradient and torch.is_grad_enabled()):
        return _sum(y_PH, pair_RK, weight_RK)
    combined: torch.Tensor = _Combine.apply(  # type: ignore[no-untyped-call]
        y_PH, row_P, pair_RK, weight_RK
    )
    return combined


def _check(
    row_P: torch.Tensor, pair_RK: torch.Tensor, *, num_rows: int | None = None, num_pairs: int | None = None
) -> None:
    fits = (
        row_P.ndim == 1
        and pair_RK.ndim == 2
        and pair_RK.shape[0] == (pair_RK.shape[0] if num_rows is None else num_rows)
        and row_P.shape[0] == (row_P.shape[0] if num_pairs is None else num_pairs)
    )
    if not fits:
        what = f"{num_rows} rows" if num_pairs is None else f"{num_pairs} rows of pairs"
        raise InputError(
            f"{what} do not go with row_P {list(row_P.shape)} and pair_RK {list(pair_RK.shape)}; "
            "give [P] and [R, K]"
        )


class _Expand(torch.autograd.Function):
    """Gather forwards, sum backwards."""

    @staticmethod
    def forward(ctx: Any, x_RH: torch.Tensor, row_P: torch.Tensor, pair_RK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(row_P, pair_RK)
        return _spread(x_RH, row_P, pair_RK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PH: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        _row_P, pair_RK = ctx.saved_tensors
        return _sum(grad_PH, pair_RK, None), None, None


class _Combine(torch.autograd.Function):
    """Sum forwards, weighed copies backwards."""

    @staticmethod
    def forward(
        ctx: Any,
        y_PH: torch.Tensor,
        row_P: torch.Tensor,
        pair_RK: torch.Tensor,
        weight_RK: torch.Tensor | None,
    ) -> torch.Tensor:
        # The pairs' rows are kept for the gradient of the weights alone.
        kept_PH = y_PH if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(row_P, pair_RK, weight_RK, kept_PH)
        return _sum(y_PH, pair_RK, weight_RK)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_RH: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None]:
        row_P, pair_RK, weight_RK, y_PH = ctx.saved_tensors
        if y_PH is None:
            grad_PH = _spread(grad_RH, row_P, pair_RK, weight_RK) if ctx.needs_input_grad[0] else None
            return grad_PH, None, None, None
        grad_PH, grad_RK = _spread_and_dot(grad_RH, row_P, pair_RK, weight_RK, y_PH)
        return grad_PH, None, None, grad_RK.to(weight_RK.dtype)


def _spread(
    x_RH: torch.Tensor, row_P: torch.Tensor, pair_RK: torch.Tensor, weight_RK: torch.Tensor | None = None
) -> torch.Tensor:
    """Copies of rows at their pairs, times the pairs' weights."""
    if uses_kernels(x_RH, weight_RK):
        try:
            spread: torch.Tensor = _KERNELS.module.spread(x_RH, pair_RK, weight_RK, row_P.shape[0])
            return spread
        except _KERNELS.failures as failure:
            _KERNELS.give_up(failure)
    return _torch_spread(x_RH, row_P, pair_RK, weight_RK)


def _spread_and_dot(
    x_RH: torch.Tensor,
    row_P: torch.Tensor,
    pair_RK: torch.Tensor,
    weight_RK: torch.Tensor,
    y_PH: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_spread`, and the inner product of each pair's row with its row, float32 ``[R, K]``."""
    if uses_kernels(x_RH, weight_RK) and uses_kernels(y_PH):
        try:
            both: tuple[torch.Tensor, torch.Tensor] = _KERNELS.module.spread_and_dot(
                x_RH, pair_RK, weight_RK, y_PH
            )
            return both
        except _KERNELS.failures as failure:
            _KERNELS.give_up(failure)
    return _torch_spread(x_RH, row_P, pair_RK, weight_RK), _torch_dot(x_RH, y_PH, pair_RK)


def _sum(y_PH: torch.Tensor, pair_RK: torch.Tensor, weight_RK: torch.Tensor | None) -> torch.Tensor:
    """Weighed sum over each row's pairs."""
    if uses_kernels(y_PH, weight_RK):
        try:
            total: torch.Tensor = _KERNELS.module.weighed_sum(y_PH, pair_RK, weight_RK)
            return total
        except _KERNELS.failures as failure:
            _KERNELS.give_up(failure)
    return _torch_sum(y_PH, pair_RK, weight_RK)


def _torch_spread(
    x_RH: torch.Tensor, row_P: torch.Tensor, pair_RK: torch.Tensor, weight_RK: torch.Tensor | None
) -> torch.Tensor:
    x_PH = x_RH.index_select(0, row_P)
    if weight_RK is None:
        return x_PH
    # Entries without a pair write to a place of their own behind the last pair.
    num_pairs = row_P.shape[0]
    at_Q = pair_RK.reshape(-1).where(pair_RK.reshape(-1) >= 0, num_pairs)
    weight_P = weight_RK.new_empty(num_pairs + 1).scatter_(0, at_Q, weight_RK.reshape(-1))[:num_pairs]
    wide = _wide(x_RH)
    return (x_PH.to(wide) * weight_P.to(wide).unsqueeze(1)).to(x_RH.dtype)


def _torch_sum(y_PH: torch.Tensor, pair_RK: torch.Tensor, weight_RK: torch.Tensor | None) -> torch.Tensor:
    wide = _wide(y_PH)
    total_RH = y_PH.new_zeros((pair_RK.shape[0], y_PH.shape[1]), dtype=wide)
    if weight_RK is not None:  # one without a pair may be anything, also not a number
        weight_RK = weight_RK.to(wide).masked_fill(pair_RK < 0, 0)
    for k, y_RH in _pairs_in_order(y_PH, pair_RK):
        total_RH += y_RH if weight_RK is None else y_RH * weight_RK[:, k, None]
    return total_RH.to(y_PH.dtype)


def _torch_dot(x_RH: torch.Tensor, y_PH: torch.Tensor, pair_RK: torch.Tensor) -> torch.Tensor:
    wide = _wide(y_PH)
    dot_RK = y_PH.new_zeros(pair_RK.shape, dtype=wide)
    for k, y_RH in _pairs_in_order(y_PH, pair_RK):
        dot_RK[:, k] = (x_RH.to(wide) * y_RH).sum(dim=1)
    return dot_RK.masked_fill_(pair_RK < 0, 0)


def _pairs_in_order(y_PH: torch.Tensor, pair_RK: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """The k-th pair of every row, wide, zero where there is none; no k at all where there are no pairs."""
    for k in range(pair_RK.shape[1] if y_PH.shape[0] else 0):
        pair_R = pair_RK[:, k]
        y_RH = y_PH.index_select(0, pair_R.clamp(min=0)).to(_wide(y_PH))
        yield k, y_RH.masked_fill_((pair_R < 0).unsqueeze(1), 0)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


_KERNELS = OptionalKernels("placement.runtime.parallel.rows_triton", "the rows of experts")


def uses_kernels(x_RH: torch.Tensor, weight_RK: torch.Tensor | None = None) -> bool:
    """Whether rows like these go through the Triton kernels, not through torch.

    Parameters
    ----------
    x_RH
        Rows, ``[R, H]``.
    weight_RK
        Weights that come with them, if any.
    """
    return (
        x_RH.device.type == "cuda"
        and x_RH.dtype in _KERNEL_DTYPES
        and (weight_RK is None or weight_RK.dtype in _KERNEL_DTYPES)
        and x_RH.shape[-1] * x_RH.element_size() >= _MIN_ROW_BYTES
        and _KERNELS.load()
    )
