"""Is it right before it is fast: outputs and gradients over the ranks against the model in one piece.

Small models in float32 under random placements with replicas and empty slots; the row copies and the grouped
products against float64 on inputs drawn anew. Run by torchrun, on the very device that is then timed.

Shape letters: R rows, H hidden, P pairs, K pairs of a row, C rows of this rank, S slots.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.instances import Shape
from benchmarks.gpu.shapes import experts_of
from placement.plan import EMPTY, Placement
from placement.runtime.families.registry import moe_layers_of
from placement.runtime.parallel.compute import expert_math
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.model import Execution, expert_parallel
from placement.runtime.parallel.rows import combine_rows, expand_rows, uses_kernels
from placement.runtime.tiny import tiny_model

__all__ = ["smoke"]

Row = dict[str, Any]

FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "glm4_moe", "llama4_text")
EXCHANGES = ("pairs", "dedup", "hierarchical")
LAYERS, EXPERTS, TOP_K, TOKENS = 2, 6, 2, 24
HIDDEN = 64
EXACT, ROUNDED = 1e-5, 1e-2
"""Limits of relative errors: in float32, and with bfloat16 operands."""


def smoke(mesh: Mesh, *, families: tuple[str, ...] = FAMILIES) -> list[Row]:
    """Run all checks; every rank has to call this. Rows say what was checked, the error and the limit."""
    rows: list[Row] = []
    nodes = Mesh.create(devices_per_node=1, timeout_s=mesh.timeout_s)
    for family in families:
        for exchange in EXCHANGES:
            over = nodes if exchange == "hierarchical" else mesh
            rows.extend(_model_checks(family, exchange, over))
    rows.extend(_row_checks(mesh.device))
    rows.extend(_product_checks(mesh.device))
    worst = [max(errors) for errors in zip(*mesh.gather([row["error"] for row in rows]), strict=True)]
    for row, error in zip(rows, worst, strict=True):
        # NaN passes nothing.
        row |= {"error": error, "passed": bool(error <= row["limit"])}
    return rows


def _row(what: str, error: float, limit: float) -> Row:
    return {"check": what, "error": error, "limit": limit}


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    value, reference = value.detach().double(), reference.detach().double()
    difference = torch.linalg.vector_norm((value - reference).flatten())
    return float(difference / torch.linalg.vector_norm(reference.flatten()).clamp(min=1e-30))


def _placement(num_ranks: int, seed: int) -> Placement:
    """Draw a placement with two slots too many on every rank: some hold replicas, some nothing."""
    rng = np.random.default_rng(seed)
    per_rank = -(-EXPERTS // num_ranks) + 2
    map_LS = np.full((LAYERS, num_ranks, per_rank), EMPTY, dtype=np.int64)
    for layer in range(LAYERS):
        for place, expert in enumerate(rng.permutation(EXPERTS)):
            map_LS[layer, place % num_ranks, place // num_ranks] = expert
        for rank in range(num_ranks):
            others = np.setdiff1d(np.arange(EXPERTS), map_LS[layer, rank])
            map_LS[layer, rank, -1] = rng.choice(others)
    return Placement(
        physical_to_logical_map_LS=map_LS.reshape(LAYERS, -1),
        device_of_slot_S=np.repeat(np.arange(num_ranks), per_rank),
        num_experts=EXPERTS,
        num_devices=num_ranks,
    )


def _model_checks(family: str, exchange: str, mesh: Mesh) -> Iterator[Row]:
    whole = _tiny(family).to(mesh.device)
    placement = _placement(mesh.world_size, seed=len(family))
    parallel = expert_parallel(copy.deepcopy(whole), placement, mesh, execution=Execution(exchange=exchange))
    generator = torch.Generator().manual_seed(1)
    ids_DT = torch.randint(0, 32, (mesh.world_size, TOKENS), generator=generator).to(mesh.device)
    reference = [_output(whole, ids_DT[rank : rank + 1]) for rank in range(mesh.world_size)]
    mine = _output(parallel.model, ids_DT[mesh.rank : mesh.rank + 1])
    yield _row(f"{family} {exchange} outputs", _relative(mine, reference[mesh.rank]), EXACT)
    torch.autograd.backward(torch.stack([_loss(output) for output in reference]).mean())
    torch.autograd.backward(_loss(mine))
    yield _row(f"{family} {exchange} gradients", _gradient_error(whole, parallel, placement, mesh), EXACT)


def _tiny(family: str) -> Any:
    """Return a small model whose rows are wide enough for the compiled copies."""
    heads: dict[str, Any] = {} if family == "deepseek_v3" else {"head_dim": HIDDEN // 2}
    sizes = {"num_layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN}
    return tiny_model(family, **sizes, **heads)


def _output(model: Any, ids: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = model(ids, use_cache=False)[0]
    return output


def _loss(output: torch.Tensor) -> torch.Tensor:
    return output.float().square().mean()


def _gradient_error(whole: Any, parallel: Any, placement: Placement, mesh: Mesh) -> float:
    """Return the largest relative error of the experts' gradients over layers and tensors."""
    worst = 0.0
    mine_S = placement.device_of_slot_S == mesh.rank
    for index, (layer, spread) in enumerate(zip(moe_layers_of(whole), parallel.layers, strict=True)):
        expert_C = placement.physical_to_logical_map_LS[index][mine_S]
        filled = torch.from_numpy(np.flatnonzero(expert_C != EMPTY)).to(mesh.device)
        logical = torch.from_numpy(expert_C[expert_C != EMPTY]).to(mesh.device)
        for name in layer.expert_tensors:
            reference = getattr(layer.experts, name).grad[logical]
            got = getattr(spread.layer.experts, name).grad[filled]
            worst = max(worst, _relative(got, reference))
    return worst


def _row_checks(device: torch.device) -> Iterator[Row]:
    """Copies and sums of rows against float64, and whether compiled kernels ran on a GPU."""
    for dtype, limit in ((torch.float32, EXACT), (torch.bfloat16, ROUNDED)):
        x_RH, row_P, pair_RK, weight_RK = _random_rows(device, dtype)
        copied_PH = expand_rows(x_RH, row_P, pair_RK)
        yield _row(f"expand_rows {dtype}", _relative(copied_PH, x_RH[row_P]), 0.0)
        y_PH = torch.randn_like(copied_PH)
        sum_RH = combine_rows(y_PH, row_P, pair_RK, weight_RK)
        picked = y_PH.double()[pair_RK.clamp(min=0)] * (weight_RK.double() * (pair_RK >= 0)).unsqueeze(2)
        yield _row(f"combine_rows {dtype}", _relative(sum_RH, picked.sum(dim=1)), limit)
        if device.type == "cuda":
            yield _row(f"kernels for rows in use, {dtype}", float(not uses_kernels(x_RH)), 0.0)


def _random_rows(
    device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, hidden, width = 1500, 320, 4
    present_RK = torch.rand(rows, width, device=device) < 0.7
    row_P = present_RK.nonzero()[:, 0]
    shuffled = torch.randperm(row_P.numel(), device=device)
    pair_RK = torch.full((rows, width), -1, dtype=torch.int64, device=device)
    pair_RK[present_RK] = torch.argsort(shuffled)
    x_RH = torch.randn(rows, hidden, device=device).to(dtype)
    return x_RH, row_P[shuffled], pair_RK, torch.rand(rows, width, device=device).to(dtype)


def _product_checks(device: torch.device) -> Iterator[Row]:
    """Grouped products in bfloat16 against float64, an expert without tokens among them."""
    for family in ("olmoe", "gpt_oss"):
        shape = Shape(
            name=family, model_type=family, num_experts=4, top_k=2, hidden_size=320, expert_hidden_size=192
        )
        model, layer = experts_of(shape, 4, device=device, dtype=torch.bfloat16)
        counts_C = torch.tensor([70, 0, 129, 57], device=device)
        x_PH = torch.randn(256, 320, device=device).bfloat16()
        with torch.no_grad():
            rounded = expert_math(model, layer)(layer.experts, x_PH, counts_C)
            layer.experts.double()
            exact = expert_math(model, layer)(layer.experts, x_PH.double(), counts_C)
        yield _row(f"expert_math {family} bfloat16", _relative(rounded, exact), ROUNDED)
