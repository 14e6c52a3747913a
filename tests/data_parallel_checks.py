"""What ranks train in the tests of data parallelism, beside one process that trains on all their tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from loading_checks import EXPERTS, expected_state
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy

from placement.plan import Placement
from placement.runtime.families.registry import family_of
from placement.runtime.parallel.data_parallel import fully_shard_rest, parameter_groups, wrap_ddp
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.model import Execution, ParallelModel, expert_parallel
from placement.runtime.tiny import tiny_model

STEPS = 3
MAX_NORM = 0.5


def build(family: str) -> Any:
    """A tiny model, the same each time, ready to train."""
    return tiny_model(family, num_layers=2, num_experts=EXPERTS, seed=3).train()


def batch(rank: int, step: int) -> torch.Tensor:
    """Tokens of a rank in a step."""
    return torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean loss of the next token."""
    logits: torch.Tensor = model(input_ids=tokens).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    """Plain descent with momentum: what differs by rounding stays small."""
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9, foreach=True)


def trained_alone(family: str, world_size: int) -> tuple[Any, list[float], list[float]]:
    """Train one model on all ranks' tokens; return it, its losses and its gradients' norms."""
    model = build(family)
    optimizer, losses, norms = optimizer_of(model.parameters()), [], []
    for step in range(STEPS):
        tokens = torch.cat([batch(rank, step) for rank in range(world_size)])
        loss = loss_of(model, tokens)
        torch.autograd.backward(loss)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    return model, losses, norms


def wrapped(parallel: ParallelModel, how: str) -> nn.Module:
    """Put the rest of the model under data parallelism."""
    if how == "ddp":
        return wrap_ddp(parallel)
    decoder: Any = family_of(parallel.model).decoder(parallel.model)
    mesh = init_device_mesh("cpu", (parallel.mesh.world_size,))
    return fully_shard_rest(parallel, decoder.layers, mesh=mesh)


def train(rank: int, family: str, placement: Placement, how: str) -> dict[str, float]:
    """Train on this rank's tokens; return how far losses, norms and parameters are from training alone."""
    mesh = Mesh.create(timeout_s=20.0)
    parallel = expert_parallel(build(family), placement, mesh, execution=Execution())
    model = wrapped(parallel, how)
    optimizer, losses, norms = optimizer_of(parameter_groups(parallel)), [], []
    for step in range(STEPS):
        loss = loss_of(model, batch(rank, step))
        torch.autograd.backward(loss)
        norms.append(float(parallel.clip_grad_norm_(MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / mesh.world_size)
    alone, expected_losses, expected_norms = trained_alone(family, mesh.world_size)
    found = {
        "losses": max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True)),
        "norms": max(abs(a - b) for a, b in zip(norms, expected_norms, strict=True)),
        "clipped steps": float(sum(norm > MAX_NORM for norm in norms)),
    }
    expected = expected_state(alone, placement, rank)
    for name, parameter in parallel.model.named_parameters():
        value: Any = parameter.detach()
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        found[name] = float((whole - expected[name]).abs().max()) if whole.numel() else 0.0
    return found | {"replicas": _replicas_differ(parallel)}


def _replicas_differ(parallel: ParallelModel) -> float:
    """Largest difference between an expert's replicas, over all ranks."""
    held: list[Any] = [None] * parallel.mesh.world_size
    dist.all_gather_object(
        held,
        [{k: v.detach() for k, v in layer.parameters().items()} for layer in parallel.layers],
    )
    largest = 0.0
    for index, layer in enumerate(parallel.layers):
        slots = layer.slots
        for expert in range(slots.num_experts):
            places = slots.slot_EX[expert, : slots.replicas_E[expert]]
            for name in layer.parameters():
                rows = [held[slots.rank_of_slot_S[s]][index][name][slots.row_of_slot_S[s]] for s in places]
                largest = max([largest, *(float((row - rows[0]).abs().max()) for row in rows[1:])])
    return largest


def refuse_another_group(rank: int, family: str, placement: Placement) -> None:
    """Ask for a process group that is not the mesh's."""
    parallel = expert_parallel(build(family), placement, Mesh.create(timeout_s=20.0))
    wrap_ddp(parallel, process_group=dist.group.WORLD)
