"""Rows sorted by expert are computed as the experts modules themselves would, gradients included.

Shape letters: T tokens, K top-k, P rows (pairs), C experts, I and O widths of input and output, H hidden.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from placement.errors import BackendError, InputError
from placement.runtime.families.protocol import MoELayer
from placement.runtime.families.registry import family_named, moe_layers_of, supported_families
from placement.runtime.parallel import compute
from placement.runtime.parallel.compute import (
    Backend,
    ExpertMath,
    FusedMath,
    OwnMath,
    backend,
    check_grouped_mm,
    expert_math,
    grouped_linear,
)
from placement.runtime.parallel.rows import combine_rows, expand_rows
from placement.runtime.tiny import tiny_model

FAMILIES = [name for name in supported_families() if not family_named(name).record_only]
BACKENDS: tuple[Backend, ...] = ("loop", "grouped_mm")
COUNTS = [3, 0, 2, 4]


def leaves(transposed: bool, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return nine rows, weights and biases of four experts, widths 8 and 16."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((9, 8), (4, 8, 16) if transposed else (4, 16, 8), (4, 16))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def one_by_one(
    x_PI: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, transposed: bool
) -> torch.Tensor:
    """Return each row's product with its own expert's weights."""
    expert_P = [expert for expert, count in enumerate(COUNTS) for _ in range(count)]
    made = []
    for row, expert in zip(x_PI, expert_P, strict=True):
        made.append(row @ weight[expert] if transposed else weight[expert] @ row)
        if bias is not None:
            made[-1] = made[-1] + bias[expert]
    return torch.stack(made)


@pytest.mark.parametrize("using", BACKENDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_rows_meet_their_experts_weights(
    using: Backend, transposed: bool, biased: bool, dtype: torch.dtype, within: float
) -> None:
    """Outputs and all gradients are those of row by row; an expert without rows has gradients of zeros."""
    x_PI, weight, bias = leaves(transposed, dtype)
    inputs = (x_PI, weight, bias) if biased else (x_PI, weight)
    given = bias if biased else None
    expected = one_by_one(x_PI, weight, given, transposed=transposed)
    actual = grouped_linear(
        x_PI, weight, torch.tensor(COUNTS), bias=given, transposed=transposed, using=using
    )
    grad = torch.randn(expected.shape).to(dtype)
    torch.testing.assert_close(actual, expected, rtol=within, atol=within)
    grads = torch.autograd.grad(actual, inputs, grad)
    torch.testing.assert_close(
        grads, torch.autograd.grad(expected, inputs, grad), rtol=within, atol=4 * within
    )
    assert all(not one[1].any() for one in grads[1:])
    assert grads[1].is_contiguous()


@pytest.mark.parametrize("using", BACKENDS)
@pytest.mark.parametrize("num_experts", [0, 3])
def test_no_rows_keep_the_graph_whole(using: Backend, num_experts: int) -> None:
    """Without rows, or without experts, the output is empty but every gradient is there, and zero."""
    x_PI = torch.zeros(0, 8, requires_grad=True)
    weight = torch.ones(num_experts, 16, 8, requires_grad=True)
    bias = torch.ones(num_experts, 16, requires_grad=True)
    counts_C = torch.zeros(num_experts, dtype=torch.int64)
    y_PO = grouped_linear(x_PI, weight, counts_C, bias=bias, using=using)
    assert y_PO.shape == (0, 16)
    y_PO.sum().backward()
    for leaf in (x_PI, weight, bias):
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


@pytest.mark.parametrize("using", BACKENDS)
def test_only_what_needs_a_gradient_gets_one(using: Backend) -> None:
    """Frozen weights stay without gradient, and rows that are data too."""
    for trained in range(3):
        inputs = [one.detach().requires_grad_(place == trained) for place, one in enumerate(leaves(False))]
        x_PI, weight, bias = inputs
        y_PO = grouped_linear(x_PI, weight, torch.tensor(COUNTS), bias=bias, using=using)
        y_PO.sum().backward()
        assert [one.grad is not None for one in inputs] == [place == trained for place in range(3)]


def test_counts_of_the_host_are_taken_instead() -> None:
    """Counts given twice are not fetched: those on the device may be anything there."""
    x_PI, weight, _bias = leaves(False)
    fetched = grouped_linear(x_PI, weight, torch.tensor(COUNTS))
    given = grouped_linear(x_PI, weight, torch.full((4,), -1), counts_host=tuple(COUNTS))
    assert torch.equal(fetched, given)


@pytest.mark.parametrize("using", BACKENDS)
def test_rows_that_are_not_dense_do_as_well(using: Backend) -> None:
    """Rows cut out of wider ones, beginning anywhere, and gradients that are one number seen often."""
    x_PI, weight, _bias = leaves(False)
    wide = torch.cat([torch.zeros(9, 3), x_PI.detach(), torch.zeros(9, 2)], dim=1).requires_grad_()
    y_PO = grouped_linear(wide[:, 3:11], weight, torch.tensor(COUNTS), using=using)
    (grad,) = torch.autograd.grad(y_PO.sum(), wide)
    expected = grouped_linear(x_PI, weight, torch.tensor(COUNTS))
    torch.testing.assert_close(y_PO, expected)
    torch.testing.assert_close(grad[:, 3:11], torch.autograd.grad(expected.sum(), x_PI)[0])


@pytest.mark.parametrize("using", BACKENDS)
@pytest.mark.parametrize("num_rows", [0, 9])
def test_autocast_chooses_the_dtype(using: Backend, num_rows: int) -> None:
    """Products are in autocast's dtype, with rows or without; gradients are in the parameters' own."""
    x_PI, weight, bias = leaves(False)
    counts_C = torch.tensor(COUNTS if num_rows else [0] * 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_PO = grouped_linear(x_PI[:num_rows], weight, counts_C, bias=bias, using=using)
    assert y_PO.dtype == torch.bfloat16
    grads = torch.autograd.grad(y_PO.float().sum(), (x_PI, weight, bias))
    assert {one.dtype for one in grads} == {torch.float32}
    expected = one_by_one(x_PI, weight, bias, transposed=False)[:num_rows]
    torch.testing.assert_close(y_PO.float(), expected, rtol=5e-2, atol=5e-2)


def test_without_autocast_the_weights_choose_the_dtype() -> None:
    """Float32 rows are rounded to bfloat16 weights; float64 stays."""
    x_PI, weight, _bias = leaves(False)
    assert grouped_linear(x_PI, weight.bfloat16(), torch.tensor(COUNTS)).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grouped_linear(x_PI, weight.double(), torch.tensor(COUNTS)).dtype == torch.float64


def test_a_cpu_takes_the_loop() -> None:
    """The grouped kernel is for CUDA; on the CPU it is for tests."""
    assert backend(torch.ones(1, 8).bfloat16(), torch.ones(1, 8, 8).bfloat16()) == "loop"


def test_the_check_agrees_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """All results agree here; a kernel that forgets the last row is found out."""
    assert check_grouped_mm("cpu", dtype=torch.float32) == 24
    right = compute._grouped_mm

    def forgetful(left: torch.Tensor, right_: torch.Tensor, end_C: torch.Tensor) -> torch.Tensor:
        made = right(left, right_, end_C)
        made[-1] = 0
        return made

    monkeypatch.setattr(compute, "_grouped_mm", forgetful)
    with pytest.raises(BackendError, match=r"differ in output for counts \[5, 0, 64, 1\]"):
        check_grouped_mm("cpu", dtype=torch.float32)


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for a kernel that is not there says which torch has it."""
    monkeypatch.setattr(compute, "_GROUPED_MM", None)
    x_PI, weight, _bias = leaves(False)
    with pytest.raises(InputError, match=r"has no grouped_mm; use the loop, or torch 2\.9"):
        grouped_linear(x_PI, weight, torch.tensor(COUNTS), using="grouped_mm")


def test_shapes_that_do_not_fit_are_refused() -> None:
    """The message has the shapes, and what the counts say."""
    x_PI, weight, _bias = leaves(False)
    with pytest.raises(
        InputError, match=r"rows \[9, 8\] and counts \[3\] do not go with weights \[4, 16, 8\]"
    ):
        grouped_linear(x_PI, weight, torch.ones(3, dtype=torch.int64))
    with pytest.raises(InputError, match=r"weights \[4, 16, 8\] \(transposed\)"):
        grouped_linear(x_PI, weight, torch.tensor(COUNTS), transposed=True)
    with pytest.raises(InputError, match="counts of 4 experts say 8 rows; there are 9 rows"):
        grouped_linear(x_PI, weight, torch.tensor([2, 2, 2, 2]))


def layer_of(model_type: str, num_experts: int = 5) -> MoELayer:
    """Return an MoE layer with random experts, biases and norms included, on its own eager forward."""
    model: Any = tiny_model(
        model_type, num_layers=2 if model_type == "nemotron_h" else 1, num_experts=num_experts
    )
    layer = moe_layers_of(model)[0]
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.experts.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    config: Any = getattr(layer.experts, "config", None)
    if config is not None:
        config._experts_implementation = "eager"
    return layer


def width_of(experts: Any) -> int:
    """Return the width of the experts' output."""
    transposed = getattr(experts, "is_transposed", type(experts).__name__ == "Llama4TextExperts")
    return int(experts.down_proj.shape[2 if transposed else 1])


def routed(layer: MoELayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return eleven random tokens, two experts of each, never expert 3, and weights."""
    generator = torch.Generator().manual_seed(2)
    hidden_TH = torch.randn(11, width_of(layer.experts), generator=generator).requires_grad_()
    choice_TK = torch.rand(11, 4, generator=generator).argsort(dim=1)[:, :2]
    weight_TK = torch.rand(11, 2, generator=generator).requires_grad_()
    return hidden_TH, torch.tensor([0, 1, 2, 4])[choice_TK], weight_TK


def of_module(
    layer: MoELayer, hidden_TH: torch.Tensor, id_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    """Return what the module's own forward pass makes of tokens; Llama-4's as its block calls it."""
    made: torch.Tensor
    if type(layer.experts).__name__ == "Llama4TextExperts":
        score_TE = torch.zeros(len(id_TK), layer.num_experts).scatter(1, id_TK, weight_TK)
        every_expert = hidden_TH.repeat(layer.num_experts, 1) * score_TE.T.reshape(-1, 1)
        made = layer.experts(every_expert).view(layer.num_experts, *hidden_TH.shape).sum(0)
    else:
        made = layer.experts(hidden_TH, id_TK, weight_TK)
    return made


def of_math(
    math: ExpertMath,
    layer: MoELayer,
    hidden_TH: torch.Tensor,
    id_TK: torch.Tensor,
    weight_TK: torch.Tensor,
) -> torch.Tensor:
    """Return the same by way of rows sorted by expert."""
    order_P = id_TK.flatten().argsort(stable=True)
    token_P = order_P // id_TK.shape[1]
    pair_TK = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P))).view_as(id_TK)
    rows_PH = expand_rows(hidden_TH, token_P, pair_TK)
    if math.weights_first:
        rows_PH = rows_PH * weight_TK.flatten()[order_P].unsqueeze(1)
    made_PH = math(layer.experts, rows_PH, id_TK.flatten().bincount(minlength=layer.num_experts))
    return combine_rows(made_PH, token_P, pair_TK, None if math.weights_first else weight_TK)


def check_math(math: ExpertMath, layer: MoELayer) -> None:
    """Outputs and gradients of tokens, weights and all the module's tensors agree within 1e-6."""
    hidden_TH, id_TK, weight_TK = routed(layer)
    inputs = (hidden_TH, weight_TK, *layer.experts.parameters())
    expected = of_module(layer, hidden_TH, id_TK, weight_TK)
    actual = of_math(math, layer, hidden_TH, id_TK, weight_TK)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_computes_what_its_module_does(model_type: str) -> None:
    """Sorted rows, computed and summed, are the module's own forward pass; also on the class's own pass."""
    layer = layer_of(model_type)
    math = expert_math(family_named(model_type), layer)
    assert isinstance(math, FusedMath)
    assert math.weights_first == (model_type == "llama4_text")
    check_math(math, layer)


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text", "muse_spark_text", "nemotron_h", "olmoe"])
def test_no_rows_reach_every_tensor(model_type: str) -> None:
    """A rank without tokens still has a gradient, zero, for every tensor of its experts."""
    layer = layer_of(model_type)
    math = expert_math(family_named(model_type), layer)
    none_PH = torch.zeros(0, width_of(layer.experts), requires_grad=True)
    math(layer.experts, none_PH, torch.zeros(5, dtype=torch.int64)).sum().backward()
    grads = [one.grad for one in (none_PH, *layer.experts.parameters())]
    assert all(one is not None and not one.any() for one in grads)


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral", "step3p5"])
def test_a_class_that_nobody_knows_runs_itself(model_type: str) -> None:
    """Its own forward pass sees one expert for each row, and as many experts as there are tensors for."""
    layer = layer_of(model_type)
    check_math(OwnMath(expert_counters=layer.expert_counters, expert_tensors=layer.expert_tensors), layer)


class _Unknown(nn.Module):
    """Experts that scale tokens, one number each, of a class without the decorator."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 7
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, hidden_TH: torch.Tensor, id_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        assert self.num_experts == len(self.scale)
        return torch.einsum("th,tk,tk->th", hidden_TH, self.scale[id_TK], weight_TK)


@pytest.mark.parametrize("counts", [[1, 2], [0, 0]])
def test_the_counters_say_how_many_while_it_runs(counts: list[int]) -> None:
    """The class's pass runs, not the one put in its place; the counter is as before afterwards."""
    experts = _Unknown()
    experts.forward = None  # type: ignore[assignment, method-assign]
    layer = MoELayer(
        decoder_layer=0,
        router=experts,
        experts=experts,
        expert_tensors=("scale",),
        expert_counters=((experts, "num_experts"),),
        num_experts=7,
        top_k=1,
    )
    math = expert_math(family_named("olmoe"), layer)
    assert isinstance(math, OwnMath)
    made_PH = math(experts, torch.ones(sum(counts), 1), torch.tensor(counts))
    assert made_PH.flatten().tolist() == [2.0] * counts[0] + [3.0] * counts[1]
    assert experts.num_experts == 7
    made_PH.sum().backward()
    assert experts.scale.grad is not None
    assert experts.scale.grad.tolist() == counts


def test_what_can_only_be_recorded_is_refused() -> None:
    """The reason stands in the message."""
    layer = layer_of("olmoe")
    with pytest.raises(
        InputError, match="experts of dbrx cannot be computed apart: its experts' weights are"
    ):
        expert_math(family_named("dbrx"), layer)


def test_quantised_experts_are_refused() -> None:
    """Tensors in eight bits come with scales that nobody applies here."""
    layer = layer_of("olmoe")
    experts: Any = layer.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(InputError, match=r"down_proj of decoder layer 0 is torch\.float8_e4m3fn; load"):
        expert_math(family_named("olmoe"), layer)


def test_single_rows_have_the_stride_of_dense_ones() -> None:
    """One row out of a wider tensor counts as contiguous whatever its stride, which the kernel refuses."""
    odd = torch.ones(3, 9)[1:2, :8]
    assert odd.is_contiguous()
    assert compute._aligned(odd).stride() == (8, 1)
