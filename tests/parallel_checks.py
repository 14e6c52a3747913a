"""What ranks do in the tests of expert-parallel execution: each compares itself with the whole model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from placement.plan import EMPTY, Placement
from placement.runtime.families.registry import moe_layers_of
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.model import Execution, ParallelModel, expert_parallel
from placement.runtime.parallel.slots import rows_of_rank
from placement.runtime.tiny import tiny_model

EXPERTS = 6
VOCABULARY = 32


def random_placement(
    seed: int, *, num_layers: int, num_devices: int, num_experts: int = EXPERTS
) -> Placement:
    """Replicas, empty slots and uneven devices, drawn by a seed; a device may hold nothing at all."""
    rng = np.random.default_rng(seed)
    share = rng.choice([0.0, 0.2, 0.6])
    held_LED = rng.random((num_layers, num_experts, num_devices)) < share
    home_LE = rng.integers(0, num_devices, (num_layers, num_experts))
    np.put_along_axis(held_LED, home_LE[:, :, None], True, axis=2)
    slots_D = held_LED.sum(axis=1).max(axis=0) + rng.integers(0, 2, num_devices)
    device_S = rng.permutation(np.repeat(np.arange(num_devices), slots_D))
    map_LS = np.full((num_layers, device_S.size), EMPTY)
    for layer in range(num_layers):
        for device in range(num_devices):
            experts = rng.permutation(np.flatnonzero(held_LED[layer, :, device]))
            slots = rng.permutation(np.flatnonzero(device_S == device))[: experts.size]
            map_LS[layer, slots] = experts
    return Placement(
        physical_to_logical_map_LS=map_LS,
        device_of_slot_S=device_S,
        num_experts=num_experts,
        num_devices=num_devices,
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison: a model, a placement by its seed, and how it is run."""

    model_type: str
    seed: int
    exchange: str = "dedup"
    split: str = "even"
    gradients: str = "mean"
    devices_per_node: int | None = None
    train: bool = True


@cache
def mesh(devices_per_node: int | None = None) -> Mesh:
    """Mesh of all ranks; made once for each shape, in the same order on every rank."""
    return Mesh.create(devices_per_node=devices_per_node, timeout_s=20.0)


def tokens_of(rank: int, seed: int, *, rows: int = 2, places: int = 9) -> torch.Tensor:
    """Tokens that a rank runs: others on every rank, and not equally many."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(0, VOCABULARY, (rows, places + rank), generator=generator)


def outputs_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head."""
    outputs: torch.Tensor = model(input_ids=tokens)[0]
    return outputs


def loss_of(outputs: torch.Tensor, seed: int) -> torch.Tensor:
    """A loss in which every output counts differently."""
    generator = torch.Generator().manual_seed(seed)
    return (outputs * torch.randn(outputs.shape, generator=generator)).mean()


def layers_of(model_type: str) -> int:
    """MoE layers of the tiny model."""
    return len(moe_layers_of(whole_model(model_type)))


def whole_model(model_type: str) -> Any:
    """A tiny model, the same each time."""
    return tiny_model(model_type, num_layers=2, num_experts=EXPERTS, vocab_size=VOCABULARY, seed=3)


def spread(case: Case) -> ParallelModel:
    """The model of a case, its experts spread over the ranks."""
    world = mesh(case.devices_per_node)
    placement = random_placement(
        case.seed, num_layers=layers_of(case.model_type), num_devices=world.world_size
    )
    how = Execution(exchange=case.exchange, split=case.split, gradients=case.gradients)
    return expert_parallel(whole_model(case.model_type), placement, world, execution=how)


def compare(rank: int, case: Case) -> dict[str, float]:
    """Return the largest differences of outputs and gradients from the whole model's, over their scale."""
    parallel = spread(case)
    world = parallel.mesh.world_size
    with torch.set_grad_enabled(case.train):
        outputs = outputs_of(parallel.model, tokens_of(rank, case.seed))
        whole = whole_model(case.model_type)
        expected_D = [outputs_of(whole, tokens_of(one, case.seed)) for one in range(world)]
    found = {"outputs": difference(outputs, expected_D[rank])}
    if not case.train:
        return found
    loss_of(outputs, case.seed).backward()
    losses = torch.stack([loss_of(one, case.seed) for one in expected_D])
    (losses.mean() if case.gradients == "mean" else losses.sum()).backward()
    return found | _gradients(rank, parallel, whole, mean_wanted=case.gradients == "mean")


def _gradients(
    rank: int, parallel: ParallelModel, whole: nn.Module, *, mean_wanted: bool
) -> dict[str, float]:
    placement, found = parallel.placement, {}
    rows_C = rows_of_rank(placement, rank)
    local = set(parallel.expert_parameters())
    for index, (layer, reference) in enumerate(zip(parallel.layers, moe_layers_of(whole), strict=True)):
        expert_C = placement.physical_to_logical_map_LS[index][rows_C]
        for name, parameter in layer.parameters().items():
            expected = getattr(reference.experts, name).grad
            if expected is None or parameter.grad is None:
                found[f"{index}.{name}"] = 0.0 if expected is None else float("inf")
                continue
            expected_C = expected[np.maximum(expert_C, 0)]
            expected_C[expert_C == EMPTY] = 0
            found[f"{index}.{name}"] = difference(parameter.grad, expected_C, scale=expected)
    others = {name: one for name, one in parallel.model.named_parameters() if name not in local}
    # A scalar's gradient is a sum over all tokens whose terms cancel: it is as exact as they are.
    floor = 0.01 * _largest_gradient(whole)
    for name, parameter in whole.named_parameters():
        if name in others and parameter.grad is not None:
            mean = others[name].grad
            assert mean is not None, name
            dist.all_reduce(mean)
            # Each rank has the gradient of its own loss alone.
            mean = mean / dist.get_world_size() if mean_wanted else mean
            found[name] = difference(mean, parameter.grad, scale=parameter.grad.abs() + floor)
    return found


def _largest_gradient(model: nn.Module) -> float:
    return max(float(one.grad.abs().max()) for one in model.parameters() if one.grad is not None)


def difference(actual: torch.Tensor, expected: torch.Tensor, *, scale: torch.Tensor | None = None) -> float:
    """Return the largest difference over the largest expected value."""
    if actual.shape != expected.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    largest = float((expected if scale is None else scale).abs().max())
    return float((actual - expected).abs().max()) / max(largest, 1e-3)


def spread_on(rank: int, devices_D: list[int], options: dict[str, Any]) -> str:
    """Spread a model over ranks that may not agree; `options` says in what."""
    seeds, exchanges = options.get("seeds", [0] * 4), options.get("exchanges", ["dedup"] * 4)
    world = Mesh.create(devices_per_node=options.get("devices_per_node"), timeout_s=20.0)
    model = whole_model("olmoe")
    placement = random_placement(seeds[rank], num_layers=2, num_devices=devices_D[rank])
    for _ in range(1 + options.get("twice", False)):
        expert_parallel(model, placement, world, execution=Execution(exchange=exchanges[rank]))
    return "spread"


def lose_a_rank(rank: int, lost: int) -> None:
    """Run a pass in which a rank dies between two layers."""
    parallel = expert_parallel(
        whole_model("olmoe"),
        random_placement(1, num_layers=2, num_devices=3),
        Mesh.create(timeout_s=5.0),
    )
    if rank == lost:
        parallel.layers[1].layer.router.register_forward_hook(lambda *_: os._exit(1))
    outputs_of(parallel.model, tokens_of(rank, 1))


def share_by_loads(rank: int) -> dict[str, Any]:
    """Tell how split ``lp`` follows loads, and keeps to them when the placement changes."""
    world = mesh()
    first = random_placement(2, num_layers=2, num_devices=world.world_size)
    parallel = expert_parallel(whole_model("olmoe"), first, world, execution=Execution(split="lp"))
    load_LE = np.random.default_rng(5).integers(1, 100, (2, EXPERTS))
    before = [layer.forward._share_EX for layer in parallel.layers]
    parallel.use_loads(load_LE)
    shares = [layer.forward._share_EX for layer in parallel.layers]
    parallel.set_layer(0, first.physical_to_logical_map_LS[1])
    return {
        "before": before,
        "shares": shares,
        "after": parallel.layers[0].forward._share_EX,
        "expert_S": parallel.layers[0].slots.expert_S,
        "loads": load_LE,
        "rank_of_slot_S": first.device_of_slot_S,
        "rows": first.physical_to_logical_map_LS,
    }


def run_without_tokens(rank: int, exchange: str, num_tokens_D: list[int]) -> tuple[float, tuple[int, ...]]:
    """Run one layer's experts with this rank's number of tokens; return the error and the output's shape."""
    case = Case(model_type="olmoe", seed=7, exchange=exchange)
    parallel, whole = spread(case), whole_model("olmoe")
    generator = torch.Generator().manual_seed(rank)
    hidden_TH = torch.randn(num_tokens_D[rank], 16, generator=generator, requires_grad=True)
    index_TK = torch.randint(0, EXPERTS, (num_tokens_D[rank], 2), generator=generator)
    index_TK[:, 1] = (index_TK[:, 0] + 1) % EXPERTS
    weight_TK = torch.rand(num_tokens_D[rank], 2, generator=generator)
    output_TH = parallel.layers[0].layer.experts(hidden_TH, index_TK, weight_TK)
    output_TH.sum().backward()
    expected_TH = moe_layers_of(whole)[0].experts(hidden_TH.detach(), index_TK, weight_TK)
    return difference(output_TH, expected_TH), tuple(output_TH.shape)
