# Triton compiles the kernels from their source; what they are written in has no types.
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
"""Triton kernels of `rows`: one pass over the data, no atomic additions, sums in float32 in a fixed order.

Importing this file needs Triton, which comes with PyTorch for CUDA; `rows` does it when it first meets a GPU.
A program does one block of one row: it reads the row once for all of its pairs (spread) or writes it once
(sum), so that the bytes moved are those that must be.

Shape letters: R rows, H hidden, P pairs, K pairs of a row, B blocks of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton import language as tl

from placement.errors import BackendError
from placement.runtime.parallel import rows

__all__ = ["FAILURES", "check_kernels", "spread", "spread_and_dot", "weighed_sum"]

_BLOCK = 1024
_DOT_BLOCK = 8192
"""Whole rows, as a rule: each block of a row leaves a part of the inner product to be summed afterwards."""

_errors: Any = getattr(triton, "errors", None)
FAILURES: tuple[type[Exception], ...] = (_errors.TritonError,) if hasattr(_errors, "TritonError") else ()
"""What Triton raises, beside RuntimeError and OSError, where a kernel cannot be built."""


@triton.jit
def _spread_kernel(
    pair_RK,
    weight_RK,
    x_RH,
    y_PH,
    out_PH,
    dot_RKB,
    H,
    K: tl.constexpr,
    WEIGHED: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < H
    x = tl.load(x_RH + row * H + at, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        pair = tl.load(pair_RK + row * K + k)
        there = at < tl.where(pair >= 0, H, 0)
        copy = x
        if WEIGHED:
            copy = x * tl.load(weight_RK + row * K + k).to(tl.float32)
        if DOT:
            y = tl.load(y_PH + pair * H + at, mask=there, other=0.0).to(tl.float32)
            dot = tl.where(pair >= 0, tl.sum(x * y, axis=0), 0.0)
            tl.store(dot_RKB + (row * K + k) * tl.num_programs(1) + block, dot)
        tl.store(out_PH + pair * H + at, copy.to(out_PH.dtype.element_ty), mask=there)


@triton.jit
def _sum_kernel(
    pair_RK,
    weight_RK,
    y_PH,
    out_RH,
    H,
    K: tl.constexpr,
    WEIGHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < H
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in tl.static_range(K):
        pair = tl.load(pair_RK + row * K + k)
        there = at < tl.where(pair >= 0, H, 0)
        y = tl.load(y_PH + pair * H + at, mask=there, other=0.0).to(tl.float32)
        if WEIGHED:
            # A weight without a pair may be anything, also not a number.
            y = y * tl.load(weight_RK + row * K + k, mask=pair >= 0, other=0.0).to(tl.float32)
        total += y
    tl.store(out_RH + row * H + at, total.to(out_RH.dtype.element_ty), mask=inside)


def spread(
    x_RH: torch.Tensor, pair_RK: torch.Tensor, weight_RK: torch.Tensor | None, num_pairs: int
) -> torch.Tensor:
    """Copy each row to its pairs, times the pairs' weights if there are any, ``[P, H]``."""
    out_PH = x_RH.new_empty(num_pairs, x_RH.shape[1])
    _launch(
        _spread_kernel,
        pair_RK,
        *(weight_RK, x_RH, None, out_PH, None),
        width=x_RH.shape[1],
        block=_BLOCK,
        WEIGHED=weight_RK is not None,
        DOT=False,
    )
    return out_PH


def spread_and_dot(
    x_RH: torch.Tensor, pair_RK: torch.Tensor, weight_RK: torch.Tensor, y_PH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`spread`, and the inner product of each row with each of its pairs' rows, float32 ``[R, K]``."""
    width = x_RH.shape[1]
    out_PH = torch.empty_like(y_PH, memory_format=torch.contiguous_format)
    dot_RKB = x_RH.new_empty((*pair_RK.shape, triton.cdiv(width, _DOT_BLOCK)), dtype=torch.float32)
    _launch(
        _spread_kernel,
        pair_RK,
        *(weight_RK, x_RH, y_PH, out_PH, dot_RKB),
        width=width,
        block=_DOT_BLOCK,
        WEIGHED=True,
        DOT=True,
    )
    return out_PH, dot_RKB.squeeze(2) if dot_RKB.shape[2] == 1 else dot_RKB.sum(2)


def weighed_sum(y_PH: torch.Tensor, pair_RK: torch.Tensor, weight_RK: torch.Tensor | None) -> torch.Tensor:
    """Sum each row's pairs, times their weights if there are any, ``[R, H]``."""
    out_RH = y_PH.new_empty(pair_RK.shape[0], y_PH.shape[1])
    _launch(
        _sum_kernel,
        pair_RK,
        *(weight_RK, y_PH, out_RH),
        width=y_PH.shape[1],
        block=_BLOCK,
        WEIGHED=weight_RK is not None,
    )
    return out_RH


def _launch(
    kernel: Any,
    pair_RK: torch.Tensor,
    *tensors: torch.Tensor | None,
    width: int,
    block: int,
    **options: bool,
) -> None:
    """Run a kernel over all rows and blocks of a row; a tensor that it does not use is `None`."""
    num_rows, num_k = pair_RK.shape
    if num_rows == 0 or width == 0:
        return
    block = min(block, triton.next_power_of_2(width))
    given = [(pair_RK if one is None else one).contiguous() for one in (pair_RK, *tensors)]
    options |= {"enable_fp_fusion": False}  # a * b + c rounded twice, as torch does
    with torch.cuda.device_of(pair_RK):
        kernel[(num_rows, triton.cdiv(width, block))](
            *given, width, K=num_k, BLOCK=block, num_warps=min(max(block // 256, 1), 16), **options
        )


_SHAPES = ((5, 3, 128), (64, 8, 2880), (33, 1, 9000), (7, 4, 1), (4, 0, 256), (0, 2, 256))
"""Rows, pairs of a row and hidden sizes to check: whole blocks, broken ones, several, and nothing at all."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_kernels(device: torch.device | str) -> int:
    """Compare every kernel with the torch code it stands for; return how many results agreed.

    Parameters
    ----------
    device
        A CUDA device; with the environment's ``TRITON_INTERPRET=1``, the CPU.

    Raises
    ------
    BackendError
        If a kernel gives anything else than torch, beyond the rounding of the dtype.
    """
    return sum(
        _check(torch.device(device), shape, dtype, weight_dtype)
        for shape in _SHAPES
        for dtype in _DTYPES
        for weight_dtype in {dtype, torch.float32}
    )


def _check(
    device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, weight_dtype: torch.dtype
) -> int:
    row_P, pair_RK = _tables(shape[0], shape[1], device)
    num_pairs = row_P.shape[0]
    x_RH = torch.randn(shape[0], shape[2], device=device).to(dtype)
    y_PH = torch.randn(num_pairs, shape[2], device=device).to(dtype)
    weight_RK = torch.rand(pair_RK.shape, device=device).to(weight_dtype)
    weight_RK[pair_RK < 0] = float("nan")
    both = spread_and_dot(x_RH, pair_RK, weight_RK, y_PH)
    pairs = {
        "spread": (spread(x_RH, pair_RK, None, num_pairs), rows._torch_spread(x_RH, row_P, pair_RK, None)),
        "weighed": (
            spread(x_RH, pair_RK, weight_RK, num_pairs),
            rows._torch_spread(x_RH, row_P, pair_RK, weight_RK),
        ),
        "weighed beside dot": (both[0], rows._torch_spread(x_RH, row_P, pair_RK, weight_RK)),
        "dot": (both[1], rows._torch_dot(x_RH, y_PH, pair_RK)),
        "sum": (weighed_sum(y_PH, pair_RK, None), rows._torch_sum(y_PH, pair_RK, None)),
        "weighed sum": (weighed_sum(y_PH, pair_RK, weight_RK), rows._torch_sum(y_PH, pair_RK, weight_RK)),
    }
    for what, (actual, expected) in pairs.items():
        _agree(f"{what} of {list(shape)} in {dtype} by {weight_dtype}", actual, expected)
    return len(pairs)


def _tables(num_rows: int, num_k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pairs in random order, a third of the entries without one."""
    there_RK = torch.rand(num_rows, num_k, device=device) > 1 / 3
    row_P, _k_P = there_RK.nonzero(as_tuple=True)
    order_P = torch.randperm(row_P.shape[0], device=device)
    pair_RK = torch.full((num_rows, num_k), -1, dtype=torch.int64, device=device)
    pair_RK[there_RK] = order_P
    return torch.empty_like(row_P).scatter_(0, order_P, row_P), pair_RK


def _agree(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    rounding = 4 * torch.finfo(actual.dtype).eps
    # Inner products over thousands of columns round in another order.
    if actual.shape != expected.shape or not torch.allclose(actual, expected, rtol=rounding, atol=1e-4):
        raise BackendError(
            f"the Triton kernel gives another {what} than torch; do not use it on this machine"
        )
