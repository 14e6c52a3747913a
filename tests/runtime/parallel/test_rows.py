"""Rows go to their pairs and come back summed, with gradients, the same bits every time.

Shape letters: R rows, H hidden, P pairs, K pairs of a row.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from placement.runtime.parallel import rows
from placement.runtime.parallel.optional import OptionalKernels
from placement.runtime.parallel.rows import combine_rows, expand_rows, uses_kernels

ROW_P = torch.tensor([2, 0, 2, 0])
PAIR_RK = torch.tensor([[1, 3], [-1, -1], [2, 0], [-1, -1]])
"""Row 0 has pairs 1 and 3, row 2 has pairs 2 and 0, rows 1 and 3 have none."""

SIZES = st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 3), st.integers(0, 2**31 - 1))


def tables(num_rows: int, num_k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random pairs in random order, about a third of the table's entries without one."""
    generator = torch.Generator().manual_seed(seed)
    there_RK = torch.rand(num_rows, num_k, generator=generator) > 1 / 3
    row_P = there_RK.nonzero()[:, 0]
    order_P = torch.randperm(len(row_P), generator=generator)
    pair_RK = torch.full((num_rows, num_k), -1)
    pair_RK[there_RK] = order_P
    return torch.empty_like(row_P).scatter_(0, order_P, row_P), pair_RK


def dense(pair_RK: torch.Tensor, num_pairs: int, weight_RK: torch.Tensor) -> torch.Tensor:
    """Return the sum as a matrix, ``[R, P]``."""
    matrix_RP = weight_RK.new_zeros(len(pair_RK), num_pairs)
    for row, pairs in enumerate(pair_RK.tolist()):
        for k, pair in enumerate(pairs):
            if pair >= 0:
                matrix_RP[row, pair] = weight_RK[row, k]
    return matrix_RP


def test_rows_expand_by_hand() -> None:
    """Every pair has a copy of its row."""
    x_RH = torch.arange(8.0).view(4, 2)
    assert expand_rows(x_RH, ROW_P, PAIR_RK).tolist() == [[4, 5], [0, 1], [4, 5], [0, 1]]


def test_pairs_combine_by_hand() -> None:
    """Rows are the weighed sums of their pairs; a weight without a pair counts for nothing, even if none."""
    y_PH = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    assert combine_rows(y_PH, ROW_P, PAIR_RK).tolist() == [[1010], [0], [101], [0]]
    weight_RK = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [0.5, 3.0], [1.0, float("inf")]])
    assert combine_rows(y_PH, ROW_P, PAIR_RK, weight_RK).tolist() == [[2010], [0], [53], [0]]


@given(sizes=SIZES)
@settings(max_examples=40, deadline=None)
def test_both_are_their_matrices(sizes: tuple[int, int, int, int]) -> None:
    """Values and gradients are those of the dense matrices, for any table, empty ones included."""
    num_rows, num_k, width, seed = sizes
    row_P, pair_RK = tables(num_rows, num_k, seed)
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    x_RH, y_PH, weight_RK = leaf(num_rows, width), leaf(len(row_P), width), leaf(num_rows, num_k)
    grad_RH, grad_PH = leaf(num_rows, width).detach(), leaf(len(row_P), width).detach()
    matrix_RP = dense(pair_RK, len(row_P), weight_RK)
    of_ones_RP = dense(pair_RK, len(row_P), torch.ones_like(weight_RK))
    results = (
        (expand_rows(x_RH, row_P, pair_RK), of_ones_RP.T @ x_RH, (x_RH,), grad_PH),
        (combine_rows(y_PH, row_P, pair_RK), of_ones_RP @ y_PH, (y_PH,), grad_RH),
        (combine_rows(y_PH, row_P, pair_RK, weight_RK), matrix_RP @ y_PH, (y_PH, weight_RK), grad_RH),
    )
    for actual, expected, inputs, grad in results:
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, inputs, grad),
            torch.autograd.grad(expected, inputs, grad, allow_unused=True, materialize_grads=True),
        )


@given(sizes=SIZES)
@settings(max_examples=20, deadline=None)
def test_each_is_the_others_transpose(sizes: tuple[int, int, int, int]) -> None:
    """<expand(x), y> == <x, combine(y)>."""
    num_rows, num_k, width, seed = sizes
    row_P, pair_RK = tables(num_rows, num_k, seed)
    generator = torch.Generator().manual_seed(seed)
    x_RH = torch.randn(num_rows, width, dtype=torch.float64, generator=generator)
    y_PH = torch.randn(len(row_P), width, dtype=torch.float64, generator=generator)
    there = (expand_rows(x_RH, row_P, pair_RK) * y_PH).sum()
    back = (x_RH * combine_rows(y_PH, row_P, pair_RK)).sum()
    torch.testing.assert_close(there, back)


def test_sums_run_in_float32_in_order() -> None:
    """In bfloat16, 256 + 1 is 256: only a sum kept in float32 gets to 260. Order is k, not the pairs'."""
    y_PH = torch.tensor([[1.0], [1.0], [256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    row_P, pair_RK = torch.zeros(5, dtype=torch.int64), torch.tensor([[2, 4, 1, 3, 0]])
    assert combine_rows(y_PH, row_P, pair_RK).item() == 260
    big_PH = torch.tensor([[-1e8], [1.0], [1e8]])
    assert combine_rows(big_PH, row_P[:3], torch.tensor([[2, 0, 1]])).item() == 1
    assert combine_rows(big_PH, row_P[:3], torch.tensor([[1, 2, 0]])).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_their_dtype(dtype: torch.dtype) -> None:
    """Float32 weights weigh rows of any dtype; each gradient has the dtype of its input."""
    y_PH = torch.ones(4, 3, dtype=dtype, requires_grad=True)
    weight_RK = torch.full((4, 2), 0.25, requires_grad=True)
    out_RH = combine_rows(y_PH, ROW_P, PAIR_RK, weight_RK)
    out_RH.sum().backward()
    assert out_RH.dtype == dtype
    assert y_PH.grad is not None
    assert weight_RK.grad is not None
    assert y_PH.grad.tolist() == [[0.25] * 3] * 4
    assert weight_RK.grad.dtype == torch.float32
    assert weight_RK.grad.tolist() == [[3, 3], [0, 0], [3, 3], [0, 0]]


def test_rows_of_pairs_are_kept_for_the_weights_alone() -> None:
    """Without a gradient for the weights, the backward pass needs no outputs, so they are not kept."""
    y_PH = torch.ones(4, 2, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        combine_rows(y_PH, ROW_P, PAIR_RK, torch.ones(4, 2))
    assert all(one is not y_PH for one in kept)
    assert len(kept) == 3


def test_ids_expand_too() -> None:
    """Integer rows have no gradient but can be copied."""
    ids_R1 = torch.tensor([[5], [6], [7], [8]])
    assert expand_rows(ids_R1, ROW_P, PAIR_RK).flatten().tolist() == [7, 5, 7, 5]


def test_shapes_that_do_not_fit_are_refused() -> None:
    """The message has the shapes."""
    with pytest.raises(InputError, match=r"3 rows do not go with row_P \[4\] and pair_RK \[4, 2\]"):
        expand_rows(torch.ones(3, 1), ROW_P, PAIR_RK)
    with pytest.raises(InputError, match="5 rows of pairs do not go with"):
        combine_rows(torch.ones(5, 1), ROW_P, PAIR_RK)
    with pytest.raises(InputError, match=r"weights are \[4\], the table of pairs \[4, 2\]"):
        combine_rows(torch.ones(4, 1), ROW_P, PAIR_RK, torch.ones(4))


def test_a_cpu_uses_no_kernels() -> None:
    """Rows on the CPU go through torch, and nobody looks for Triton."""
    assert not uses_kernels(torch.ones(1, 4096))
    assert "placement.runtime.parallel.rows_triton" not in sys.modules


class _Broken(ModuleType):
    """Kernels that cannot be built."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError("no compiler")


def test_kernels_that_fail_are_given_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first failure is a warning and torch does the work; later calls do not try again."""
    kernels = OptionalKernels("placement.runtime.parallel.rows_triton", "the rows of experts")
    kernels._module, kernels._usable = _Broken("broken"), True
    monkeypatch.setattr(rows, "_KERNELS", kernels)
    monkeypatch.setattr(rows, "uses_kernels", lambda *tensors: kernels.load())
    x_RH = torch.arange(8.0).view(4, 2)
    with pytest.warns(RuntimeWarning, match=r"no Triton kernels .*RuntimeError: no compiler.*slower"):
        expanded = expand_rows(x_RH, ROW_P, PAIR_RK)
    assert torch.equal(expanded, x_RH[ROW_P])
    assert not kernels.load()
    assert torch.equal(expand_rows(x_RH, ROW_P, PAIR_RK), expanded)


@pytest.mark.parametrize("fails", ["sum", "spread_and_dot"])
def test_every_kernel_has_torch_behind_it(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """Whichever kernel fails first, forwards or backwards, the results are torch's."""
    y_PH, weight_RK = torch.randn(4, 3, requires_grad=True), torch.rand(4, 2, requires_grad=True)
    expected = combine_rows(y_PH, ROW_P, PAIR_RK, weight_RK)
    expected_grads = torch.autograd.grad(expected.sum(), (y_PH, weight_RK))
    kernels = OptionalKernels("placement.runtime.parallel.rows_triton", "the rows of experts")
    kernels._module, kernels._usable = _Broken("broken"), fails == "sum"
    monkeypatch.setattr(rows, "_KERNELS", kernels)
    monkeypatch.setattr(rows, "uses_kernels", lambda *tensors: kernels.load())
    if fails == "sum":
        with pytest.warns(RuntimeWarning, match="no compiler"):
            actual = combine_rows(y_PH, ROW_P, PAIR_RK, weight_RK)
        grads = torch.autograd.grad(actual.sum(), (y_PH, weight_RK))
    else:
        actual = combine_rows(y_PH, ROW_P, PAIR_RK, weight_RK)
        kernels._usable = True
        with pytest.warns(RuntimeWarning, match="no compiler"):
            grads = torch.autograd.grad(actual.sum(), (y_PH, weight_RK))
    assert torch.equal(actual, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_a_missing_triton_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton cannot be imported, one warning says so."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "placement.runtime.parallel.rows_triton", raising=False)
    kernels = OptionalKernels("placement.runtime.parallel.rows_triton", "the rows of experts")
    with pytest.warns(RuntimeWarning, match="no Triton kernels"):
        assert not kernels.load()
    assert not kernels.load()


def test_memory_that_is_full_is_no_fault_of_the_kernels() -> None:
    """It is raised as it is, and the kernels stay in use."""
    kernels = OptionalKernels("placement.runtime.parallel.rows_triton", "the rows of experts")
    kernels._usable = True
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        kernels.give_up(torch.OutOfMemoryError("full"))
    assert kernels.load()
